"""The automatic engine with several problems at once, and with graphs among the contenders."""

from __future__ import annotations

import itertools
import weakref
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from recorder_on_cpu import CallRecorder
from torch import Tensor

import hvp_engine as hvp
from hvp_engine._support.flat_vector import Layout
from hvp_engine._support.pytree import flatten
from hvp_engine.differentiation.double_backward import Tape
from hvp_engine.differentiation.problem import Problem
from hvp_engine.differentiation.trace.evaluated import PartitionedLinearization
from hvp_engine.engines import AutoEngine, EagerEngine, auto, trial
from hvp_engine.engines.cudagraph import CudaGraphEngine
from hvp_engine.engines.gradients import Gradients
from hvp_engine.engines.traced import LinearizedEngine

pytestmark = pytest.mark.filterwarnings("ignore:the weights are far from a minimum")


def train(weights: list[Tensor], hyper: Tensor, batch: Tensor) -> Tensor:
    return torch.tanh(batch @ weights[0]).square().mean() + (hyper.exp() * weights[0].square()).sum()


def val(weights: list[Tensor], hyper: Tensor, batch: Tensor) -> Tensor:
    return (torch.tanh(batch @ weights[0]) - 0.1).square().mean()


def second_loss(weights: list[Tensor], hyper: Tensor, batch: Tensor) -> Tensor:
    return train(weights, hyper, batch) + val(weights, hyper, batch)


def point(rows: int, device: str | torch.device = "cpu") -> tuple[list[Tensor], Tensor, Tensor]:
    generator = torch.Generator(torch.get_default_device()).manual_seed(rows)
    weights, hyper, batch = (
        torch.randn(*shape, generator=generator, dtype=torch.float64).to(device)
        for shape in ((3, 2), (3, 2), (rows, 3))
    )
    return [weights], hyper, batch


def test_two_operators_of_one_engine_take_turns() -> None:
    engine = AutoEngine(compile_budget_s=0.0)
    points = [point(4), point(7)]
    operators = [hvp.HessianOperator(train, *p, engine=engine) for p in points]
    for rounds, iterations in ((1, 3), (2, 5)):
        for (weights, hyper, batch), operator in zip(points, operators, strict=True):
            eager = hvp.HessianOperator(train, weights, hyper, batch, engine="eager")
            solver = hvp.Neumann(iterations, 0.05)
            torch.testing.assert_close(operator.solve(weights, solver).value, eager.solve(weights, solver).value)
        assert [choice.terms for choice in engine.choices.values()] == [3 if rounds == 1 else 8] * 2


def test_choices_are_remembered_by_shape_not_by_order() -> None:
    first, second = AutoEngine(compile_budget_s=0.0), AutoEngine(compile_budget_s=0.0)
    for loss, rows in ((train, 4), (val, 7)):
        hvp.HessianOperator(loss, *point(rows), engine=first)
    names = iter(("eager", "linearized"))
    chosen = first.state_dict()
    state = chosen | {"engines": {description: next(names) for description in chosen["engines"]}}
    second.load_state_dict(state)
    for loss, rows in ((val, 7), (train, 4), (second_loss, 5)):
        hvp.HessianOperator(loss, *point(rows), engine=second)
    lines = second.report().splitlines()
    assert lines[0] == "linearized: as before the checkpoint" and lines[1] == "eager: as before the checkpoint"
    assert "measured fastest" in lines[2]
    assert state["engines"].items() <= second.state_dict()["engines"].items()
    again = AutoEngine()
    again.load_state_dict(state)
    assert again.state_dict() == state  # also of problems not met since


def test_graphs_are_considered_where_they_can_be_recorded(device: torch.device) -> None:
    engine: Any = AutoEngine(compile_budget_s=0.0)
    if device.type == "cpu":
        engine._cudagraph = CudaGraphEngine(linearized=engine._linearized, recorder=CallRecorder)
    weights, hyper, batch = point(4, device)
    with hvp.use_backend("auto" if device.type == "cuda" else "reference"):
        ours = hvp.Hypergradient(train, val, hvp.Neumann(4, 0.05), engine)
        theirs = hvp.Hypergradient(train, val, hvp.Neumann(4, 0.05), "eager")
        expected = theirs(weights, hyper, batch, batch)
        result = ours(weights, hyper, batch, batch)
        torch.testing.assert_close(result.grads, expected.grads, rtol=1e-9, atol=1e-12)
        (choice,) = engine.choices.values()
        assert set(choice.seconds) == {"eager", "recorded", "linearized", "cudagraph"}
        assert engine._linearized.traces == 1 and engine._cudagraph.traces == 0  # one trace serves both
        assert "cudagraph: 0 traces" in ours.report()

        engine.load_state_dict({"engines": dict.fromkeys(engine.state_dict()["engines"], "cudagraph")})
        for _ in range(5):
            result = ours(weights, hyper, batch, batch)
            torch.testing.assert_close(result.grads, expected.grads, rtol=1e-9, atol=1e-12)
        (choice,) = engine.choices.values()
        assert choice.engine is engine._cudagraph and choice.terms == 20
        assert "1 gradients by CUDA graphs" in ours.report()


@pytest.mark.parametrize("fastest", ["cudagraph", "eager"])
def test_recordings_are_kept_only_where_they_were_chosen(monkeypatch: pytest.MonkeyPatch, fastest: str) -> None:
    monkeypatch.setattr(auto, "seconds_per_term", lambda all_: [1.0 if e.name == fastest else 2.0 for e, _ in all_])
    engine: Any = AutoEngine(compile_budget_s=0.0)
    engine._cudagraph = CudaGraphEngine(linearized=engine._linearized, recorder=CallRecorder)
    with hvp.use_backend("reference"):
        operator = hvp.HessianOperator(train, *point(4), engine=engine)
        kept = [weakref.ref(graphs) for graphs in engine._cudagraph._kept]
        assert [choice.engine.name for choice in engine.choices.values()] == [fastest]
        assert len(kept) == (1 if fastest == "cudagraph" else 0)
        assert engine._cudagraph.tally.buffers == 1  # the trial made no second buffers
        if fastest == "eager":
            return
        recordings = engine._cudagraph.tally.recordings
        operator.solve(point(4)[0], hvp.Neumann(4, 0.05))
        assert engine._cudagraph.tally.recordings == recordings + 1  # the solve; the rest was recorded in the trial
        (key,) = engine.choices
        engine.choices[key].compile_seconds, engine.choices[key].terms = 0.0, 1
        monkeypatch.setattr(auto, "seconds_per_term", lambda all_: [2.0, 1.0])  # compiled is faster
        monkeypatch.setattr(engine, "_compiled", LinearizedEngine())
        del operator
        hvp.HessianOperator(train, *point(4), engine=engine)
        assert kept[0]() is None and engine._cudagraph._kept == []


def test_what_a_solve_sets_up_is_not_a_term(monkeypatch: pytest.MonkeyPatch) -> None:
    """3 ms, as on a GPU, beside terms of 0.1 ms: counted with three terms, they would be 1.1 ms each."""
    for setup, term, lengths, expected in (
        (3e-3, 1e-4, {trial.SHORT, trial.LONG}, 1e-4),
        (3e-3, 1e-1, {trial.SHORT}, 1e-1 + 3e-3 / trial.SHORT),
    ):
        asked: list[int] = []

        def seconds_of_solve(engine: Any, linearization: Any, tangents: Any, terms: int) -> float:
            asked.append(terms)  # noqa: B023
            return setup + terms * term  # noqa: B023

        monkeypatch.setattr(trial, "seconds_of_solve", seconds_of_solve)
        contender: Any = (None, SimpleNamespace(layout=Layout.of([torch.zeros(1)])))
        assert trial.seconds_per_term([contender]) == [pytest.approx(expected)]
        assert set(asked) == lengths


def test_graphs_are_not_considered_on_a_cpu() -> None:
    engine = AutoEngine(compile_budget_s=0.0)
    hvp.HessianOperator(train, *point(4), engine=engine)
    (choice,) = engine.choices.values()
    assert "cudagraph" not in choice.seconds and "cudagraph" not in engine.report()


def test_another_number_of_threads_is_another_choice_on_the_same_trace() -> None:
    engine: Any = AutoEngine(compile_budget_s=0.0)
    before = torch.get_num_threads()
    try:
        for count in (1, 2, 1):
            torch.set_num_threads(count)
            hvp.HessianOperator(train, *point(4), engine=engine)
    finally:
        torch.set_num_threads(before)
    assert len(engine.choices) == len(engine.state_dict()["engines"]) == 2
    assert engine._linearized.traces == 1


def test_a_busy_moment_does_not_put_off_the_trace_of_the_validation_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LinearizedEngine, "seconds_of_a_trace", 1000.0)
    monkeypatch.setattr(Gradients, "_slower", lambda *arguments: "")
    solve = hvp.Hypergradient(train, val, hvp.Neumann(3, 0.05), engine=AutoEngine(compile_budget_s=0.0))
    weights, hyper, batch = point(4)
    for _ in range(3):
        solve(weights, hyper, batch, batch)
    assert "1 gradients by the extension" in solve.report()


@pytest.mark.parametrize("solver", [hvp.Identity(), hvp.Neumann(3, 0.05)], ids=["identity", "neumann"])
def test_what_was_put_off_is_measured_once(monkeypatch: pytest.MonkeyPatch, solver: Any) -> None:
    """Also where eager is faster than a program, and than a trace after it."""
    monkeypatch.setattr(auto, "_SHORT_SECONDS", 0.0)
    monkeypatch.setattr(auto, "_TRACE_SECONDS_PER_NODE", 1e-6)
    monkeypatch.setattr(auto, "seconds_around", lambda engine, *arguments: float(engine.name != "eager"))
    measured: list[bool] = []
    whole = AutoEngine._measured_choice
    monkeypatch.setattr(
        AutoEngine,
        "_measured_choice",
        lambda self, p, trace_too: measured.append(trace_too) or whole(self, p, trace_too),
    )
    solve = hvp.Hypergradient(train, val, solver, engine=AutoEngine(compile_budget_s=0.0, terms=0))
    weights, hyper, batch = point(4)
    for _ in range(12):
        solve(weights, hyper, batch, batch)
    assert measured == [False, True] and "1 traces" in solve.engine.report()
    assert solve.engine.report().startswith("eager: measured fastest")


def test_without_terms_no_products_are_made_to_choose(monkeypatch: pytest.MonkeyPatch) -> None:
    """T1-T2 makes none, and of a large model each takes seconds; but a trace is checked with one by each engine."""
    products: list[object] = []
    for kind in (Tape, PartitionedLinearization):
        product = kind.product
        counted = lambda *arguments, product=product: products.append(0) or product(*arguments)  # noqa: E731
        monkeypatch.setattr(kind, "product", counted)
    solve = hvp.Hypergradient(train, val, hvp.Identity())
    weights, hyper, batch = point(4)
    for _ in range(6):
        found = solve(weights, hyper, batch, batch)
    assert "(one call: eager" in solve.report() and len(products) <= 4  # two checks
    expected = hvp.Hypergradient(train, val, hvp.Identity(), engine="eager")(weights, hyper, batch, batch)
    torch.testing.assert_close(found.grads, expected.grads)


def test_a_trial_that_takes_long_is_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = itertools.count()
    monkeypatch.setattr(trial.time, "perf_counter", lambda: float(next(clock)))
    monkeypatch.setattr(trial, "_LONG", 0.5)
    solves: list[int] = []
    monkeypatch.setattr(trial, "seconds_of_solve", lambda *arguments: solves.append(arguments[-1]) or 1.0)
    weights, hyper, batch = point(4)
    problem = Problem(train, *flatten(weights, "weights"), *flatten(hyper, "hyper"), (batch,))
    contenders = [(EagerEngine(), EagerEngine().linearize(problem)) for _ in range(2)]
    assert trial.seconds_per_term(contenders) == [1 / trial.SHORT] * 2
    assert solves == [trial.SHORT] * 4  # each once to warm up


def test_programs_that_are_seldom_used_twice_are_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """A mask with another number of ones in each batch makes each gradient's graph another one."""
    monkeypatch.setattr("hvp_engine.engines.choice._BUILDING_SECONDS", 0.0)
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(40, 5, generator=generator, dtype=torch.float64)

    def loss(w: Tensor, h: Tensor, mask: Tensor) -> Tensor:
        return (rows @ w).tanh()[mask].square().mean() + h * w.square().sum()

    w, h = torch.ones(5, dtype=torch.float64), torch.tensor(0.1, dtype=torch.float64)
    engine = AutoEngine()
    ours, plain = (hvp.Hypergradient(loss, loss, hvp.Neumann(3, 0.1), e) for e in (engine, "eager"))
    for ones in range(3, 23):
        mask = torch.arange(40) < ones
        torch.testing.assert_close(ours(w, h, mask, mask).grads, plain(w, h, mask, mask).grads)
        (choice,) = engine.choices.values()
        if ones == 3:  # whatever was faster
            choice.engine = engine._recorded
    assert choice.engine is engine._eager and "each gradient's graph was another one" in engine.report()
