"""Recorded solves that may stop early, those of many right-hand sides, and compiled parts: on a CPU, by its calls."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from recorder_on_cpu import CallRecorder, FailingRecorder, OutOfMemory, launching
from test_engines_cudagraph import Make, assert_same, both, make, point, train
from torch import Tensor

import hvp_engine as hvp
from hvp_engine._support.flat_vector import FlatVector
from hvp_engine.engines import LinearizedEngine, compiled
from hvp_engine.engines.cudagraph import CudaGraphEngine
from hvp_engine.solvers.lanczos import tridiagonalize
from hvp_engine.solvers.settling import Settling

pytestmark = pytest.mark.filterwarnings("ignore:the weights are far from a minimum")
__all__ = ["make"]  # a fixture

STOPPING = {
    "conjugate gradient": (hvp.ConjugateGradient(40, tol=1e-2), 4),  # the first product, 5, 5, ..., the last 4, the end
    "refreshed": (hvp.ConjugateGradient(1000, tol=1e-10), 13),
    "minres": (hvp.MINRES(1000, tol=1e-9), 5),
    "settling": (Settling(hvp.ConjugateGradient(40, tol=0.0), 1e-3), 8),
}
"""Solvers, and how many recordings they may take."""


@pytest.mark.parametrize("name", STOPPING)
def test_it_stops_where_it_would_without_a_graph(make: Make, device: torch.device, name: str) -> None:
    solver, most = STOPPING[name]
    engine = make()
    weights, ours, eager = operators(device, engine)
    for call in range(2):
        v = {name: part.cos() + call for name, part in weights.items()}
        found, expected = ours.solve(v, solver), eager.solve(v, solver)
        torch.testing.assert_close(found.value, expected.value, rtol=1e-9, atol=1e-12)
        assert found.iterations == expected.iterations < solver_limit(solver)
        assert (found.hvps, found.status, found.explanation) == (expected.hvps, expected.status, expected.explanation)
        assert found.residual_norm == pytest.approx(expected.residual_norm, rel=1e-6, abs=1e-9)
    assert engine.tally.recordings <= 3 + most  # the primal part, a product and the mixed product are recorded too
    assert "term by term" not in engine.report()


def solver_limit(solver: Any) -> int:
    return getattr(solver, "method", solver).iterations


@pytest.mark.parametrize(("count", "solver"), [(1, hvp.ConjugateGradient(7, tol=1e-12)), (9, hvp.Neumann(2, 0.1))])
def test_a_recording_that_fails_costs_no_result(count: int, solver: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever it is, the rest goes on without it, and the report says so."""
    traces = LinearizedEngine()
    weights, hyper, batch, _ = point(torch.device("cpu"), 0)
    vs = {name: torch.stack([part.cos() * (k + 1) for k in range(count)]) for name, part in weights.items()}
    hvp.HessianOperator(train, weights, hyper, batch, engine=traces)
    expected = hvp.HessianOperator(train, weights, hyper, batch, engine="eager").solve(vs, solver, batched=True)
    with hvp.use_backend("reference"):
        for fails in range(1, 100):
            monkeypatch.setattr(FailingRecorder, "fails", fails)
            monkeypatch.setattr(FailingRecorder, "made", 0)
            engine = CudaGraphEngine(linearized=traces, recorder=FailingRecorder)
            operator = hvp.HessianOperator(train, weights, hyper, batch, engine=engine)
            torch.testing.assert_close(operator.solve(vs, solver, batched=True).value, expected.value)
            if FailingRecorder.made < fails:
                break
            assert f"recording {fails} failed" in engine.report()
    # Three for the linearization; four for the solve, or one, and the batched product that it is compared by.
    assert fails == (8 if count == 1 else 6)


def operators(device: torch.device, engine: CudaGraphEngine) -> tuple[Any, Any, Any]:
    weights, hyper, batch, _ = point(device, 0)
    ours = hvp.HessianOperator(train, weights, hyper, batch, engine=engine)
    return weights, ours, hvp.HessianOperator(train, weights, hyper, batch, engine="eager")


def right_hand_sides(weights: dict[str, Tensor], count: int, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator(torch.get_default_device()).manual_seed(seed)
    return {
        name: torch.randn(count, *part.shape, generator=generator, dtype=part.dtype).to(part.device)
        for name, part in weights.items()
    }


@pytest.mark.parametrize(
    "solver", [hvp.Neumann(6), hvp.MINRES(12, tol=1e-2), hvp.ConjugateGradient(40)], ids=["neumann", "minres", "block"]
)
def test_many_right_hand_sides_are_as_eager(make: Make, device: torch.device, solver: Any) -> None:
    engine = make()
    weights, ours, eager = operators(device, engine)
    for call in range(3):
        vs = right_hand_sides(weights, 10, call)
        found, expected = ours.solve(vs, solver, batched=True), eager.solve(vs, solver, batched=True)
        torch.testing.assert_close(found.value, expected.value, rtol=1e-6, atol=1e-9)
        assert found.hvps == expected.hvps or isinstance(solver, hvp.MINRES)  # which go on until all have finished
        if call == 1:  # which is compared with products one by one
            recordings = engine.tally.recordings
    assert engine.tally.recordings == recordings
    assert "term by term" not in engine.report()


def test_many_products_are_launched_as_one(device: torch.device) -> None:
    if device.type != "cpu":
        pytest.skip("calls are counted on a CPU")
    calls = {}
    for count in (8, 32):
        engine = CudaGraphEngine(recorder=CallRecorder)
        with hvp.use_backend("reference"):
            weights, ours, eager = operators(device, engine)
            vs = list(right_hand_sides(weights, count, 0).values())
            for taken in (count, count - 3):
                some = [part[:taken] for part in vs]
                torch.testing.assert_close(ours.products(some), eager.products(some))
        recorded = recordings_of(engine)
        assert (
            engine.tally.recordings == len(recorded) == 4
        )  # the primal part, both products for the check, one for both counts
        calls[count] = len(recorded[-1].calls)
    assert calls[8] == calls[32] <= len(recorded[1].calls) + 20


def test_products_with_several_vectors_are_not_overwritten(make: Make, device: torch.device) -> None:
    weights, ours, _ = operators(device, make())
    first = ours.products(list(right_hand_sides(weights, 8, 0).values()))
    before = [part.clone() for part in first]
    ours.products(list(right_hand_sides(weights, 8, 1).values()))
    torch.testing.assert_close(list(first), before, rtol=0, atol=0)


def test_full_memory_for_several_vectors_leaves_them_unrecorded() -> None:
    engine = CudaGraphEngine(recorder=CallRecorder)
    with hvp.use_backend("reference"):
        weights, ours, eager = operators(torch.device("cpu"), engine)
        some = list(right_hand_sides(weights, 8, 0).values())
        start = FlatVector.of(ours.layout, [part.cos() for part in weights.values()])
        with OutOfMemory(0) as full:
            found = ours.products(some)
        assert full.failed
        torch.testing.assert_close(found, eager.products(some))
        assert "several products term by term: OutOfMemoryError: CUDA out of memory" in engine.report()
        alone = tridiagonalize(eager, start, 3)
        for place in range(2):  # the buffer; what the recording makes
            with OutOfMemory(place) as full:
                torch.testing.assert_close(tridiagonalize(ours, start, 3).diagonal, alone.diagonal)
            assert full.failed
        assert "('lanczos', 3) term by term: OutOfMemoryError" in engine.report()


def recordings_of(engine: CudaGraphEngine) -> list[Any]:
    """What each of the recordings of the last problem calls."""
    counted: Any = engine._kept[-1]._recorder
    return counted.recorder._all


def assert_as_eager(engine: CudaGraphEngine) -> None:
    with hvp.use_backend("reference"):
        ours, theirs = both(engine, hvp.Neumann(3, 0.1))
        for call in range(2):
            arguments = point(torch.device("cpu"), call)
            assert_same(ours(*arguments), theirs(*arguments))


@pytest.mark.parametrize("whole", [True, False], ids=["whole", "regions"])
def test_compiled_parts_are_recorded(whole: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is a single call: here the compiler leaves its graph as it is."""
    monkeypatch.setattr(compiled, "compile_graph", lambda graph, *_, **__: launching(graph.forward))
    if not whole:
        monkeypatch.setattr(compiled, "_LARGEST_WHOLE", 0)
    calls = {}
    for budget in (0.0, 1e6):
        engine = CudaGraphEngine(recorder=CallRecorder, compile_budget_s=budget)
        assert_as_eager(engine)
        _, product, *_ = recordings_of(engine)
        calls[budget] = len(product.calls)
        assert "term by term" not in engine.report() and "as traced" not in engine.report()
    assert calls[1e6] == 1 if whole else calls[1e6] < calls[0.0]


def test_what_cannot_be_compiled_is_recorded_as_traced(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise OSError("no compiler")

    monkeypatch.setattr(compiled, "compile_graph", broken)
    for budget, reason in ((1e6, "engine 'compiled': inductor failed"), (0.1, "compiling would take about")):
        engine = CudaGraphEngine(recorder=CallRecorder, compile_budget_s=budget)
        assert_as_eager(engine)
        assert f"recorded as traced: {reason}" in engine.report()
