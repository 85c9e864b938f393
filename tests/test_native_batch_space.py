"""Terms in the space of the batch: taken where the structure allows and it is less work, with eager's numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from problems_with_known_answers import DTYPE, flat, randn, relative_error
from test_engines_native import SOLVERS, problem_at
from torch import Tensor

import hvp_engine as hvp
from hvp_engine.differentiation.native.batch_space import Combination
from hvp_engine.differentiation.native.program import NativeProgram
from hvp_engine.differentiation.problem import Problem
from hvp_engine.engines import EagerEngine
from hvp_engine.engines.functions import TracedLinearization
from hvp_engine.engines.traced import LinearizedEngine

pytestmark = pytest.mark.filterwarnings("ignore:the weights are far from a minimum")

Decay = Callable[[dict[str, Tensor], dict[str, Tensor]], Tensor]

UNIFORM: dict[str, tuple[dict[str, Tensor], Decay]] = {
    "none": ({"h": torch.zeros((), dtype=DTYPE)}, lambda w, h: 0 * h["h"]),
    "one": (
        {"h": torch.tensor(-2.0, dtype=DTYPE)},
        lambda w, h: h["h"].exp() * sum(t.square().sum() for t in w.values()),
    ),
    "one for each weight": (
        {"a": torch.tensor(-2.0, dtype=DTYPE), "c": torch.tensor(-1.0, dtype=DTYPE)},
        lambda w, h: sum(h[k].exp() * w[k].square().sum() for k in h),
    ),
    "for each output": (
        {"a": randn(7, 1, seed=1), "c": randn(4, 1, seed=2)},
        lambda w, h: sum((h[k].exp() * w[k].square()).sum() for k in h),
    ),
    "expanded": (
        {"h": torch.tensor(0.3, dtype=DTYPE)},
        lambda w, h: sum((h["h"].expand_as(t) * t.square()).sum() for t in w.values()),
    ),
    "twice": (
        {"h": torch.tensor(0.3, dtype=DTYPE), "a": randn(7, 1, seed=1)},
        lambda w, h: (
            sum(h["h"] * t.square().sum() for t in w.values()) + (w["a"].square() * h["a"].sigmoid()).sum() / 2
        ),
    ),
    "constant": ({"h": torch.zeros((), dtype=DTYPE)}, lambda w, h: 0.05 * w["a"].square().sum() + 0 * h["h"]),
}
ELSEWISE: dict[str, tuple[dict[str, Tensor], Decay]] = {
    "for each weight": ({"a": torch.zeros(7, 12, dtype=DTYPE)}, lambda w, h: (h["a"].exp() * w["a"].square()).sum()),
    "for each input": ({"a": torch.zeros(12, dtype=DTYPE)}, lambda w, h: (h["a"].exp() * w["a"].square()).sum()),
    "not diagonal": ({"h": torch.ones((), dtype=DTYPE)}, lambda w, h: h["h"] * (w["a"] @ w["a"].t()).sum() / 9),
    "not quadratic": ({"h": torch.ones((), dtype=DTYPE)}, lambda w, h: h["h"] * w["a"].pow(4).sum()),
}


def problem(decay: tuple[dict[str, Tensor], Decay], examples: int = 5, dtype: torch.dtype = DTYPE) -> Problem:
    """An MLP of 12 inputs, 7 hidden units and 4 outputs."""
    hyper, penalty = decay
    weights = {
        "a": randn(7, 12, seed=3) / 3,
        "b": randn(7, seed=4),
        "c": randn(4, 7, seed=5) / 2,
        "d": randn(4, seed=6),
    }
    x, y = randn(examples, 12, seed=7).to(dtype), torch.arange(examples) % 4

    def loss(w: dict[str, Tensor], h: dict[str, Tensor], x: Tensor) -> Tensor:
        hidden = torch.tanh(torch.nn.functional.linear(x, w["a"], w["b"]))
        scores = torch.nn.functional.linear(hidden, w["c"], w["d"])
        return torch.nn.functional.cross_entropy(scores, y) + penalty(w, h)

    cast = [{key: tensor.to(dtype) for key, tensor in tensors.items()} for tensors in (weights, hyper)]
    return problem_at(loss, *cast, x)


def factored(problem: Problem) -> tuple[LinearizedEngine, TracedLinearization, NativeProgram | None]:
    """The engine, its linearization, and the program in the space of the batch that it made for a solve."""
    engine = LinearizedEngine()
    linearization = engine.linearize(problem)
    assert isinstance(linearization, TracedLinearization)
    engine.run(linearization, [torch.randn_like(w) for w in problem.weights], hvp.Neumann(6, alpha=1e-3), None)
    programs = linearization.functions.native
    assert programs is not None and programs.program is not None, programs
    return engine, linearization, programs.factored


@pytest.mark.parametrize("decay", UNIFORM)
def test_every_solver_as_eager(decay: str) -> None:
    at = problem(UNIFORM[decay])
    engine, linearization, program = factored(at)
    assert program is not None and [factor.weight for factor in program.factors] == [0]
    assert "1 of 4 weights in the space of the batch" in engine.report()
    eager = EagerEngine().linearize(at)
    v = [randn(*weight.shape, seed=50 + i) for i, weight in enumerate(at.weights)]
    for key, solver in SOLVERS.items():
        for _ in range(2):  # the second solve must not see the first
            ours, theirs = engine.run(linearization, v, solver, None), EagerEngine().run(eager, v, solver, None)
        first, second = ours.outcome(), theirs.outcome()
        assert relative_error(ours.value.data, theirs.value.data) < 1e-11, key
        assert first.residual_norm == pytest.approx(second.residual_norm, rel=1e-8), key
        assert (first.status, first.finite, ours.steps) == (second.status, second.finite, theirs.steps), key


@pytest.mark.parametrize("decay", ELSEWISE)
def test_other_decays_stay_dense(decay: str) -> None:
    """Also one that happens to be equal everywhere: values prove nothing."""
    at = problem(ELSEWISE[decay])
    engine, linearization, program = factored(at)
    assert program is None
    v = [randn(*weight.shape, seed=50 + i) for i, weight in enumerate(at.weights)]
    solver = hvp.Neumann(9, alpha=0.02)
    theirs = EagerEngine().run(EagerEngine().linearize(at), v, solver, None)
    assert relative_error(engine.run(linearization, v, solver, None).value.data, theirs.value.data) < 1e-11


def test_more_examples_than_inputs_stay_dense() -> None:
    assert factored(problem(UNIFORM["one"], examples=12))[2] is not None
    assert factored(problem(UNIFORM["one"], examples=13))[2] is None


def test_short_solves_stay_dense() -> None:
    engine, at = LinearizedEngine(), problem(UNIFORM["one"])
    linearization = engine.linearize(at)
    engine.run(linearization, at.weights, hvp.Neumann(4, alpha=1e-3), None)
    assert linearization.functions.native.factored is None  # type: ignore[attr-defined]


def test_gram_matrices_are_made_where_the_terms_repay_them() -> None:
    """Of 25 rows of 30 inputs and 2 outputs: (25 * 25 * 30 + 2 * 25 * 30 * 2) / ((2 * 30 - 25) * 25 * 2) = 12.4."""
    x, engine = randn(25, 30, seed=1), LinearizedEngine()

    def loss(w: Tensor, h: Tensor) -> Tensor:
        return torch.tanh(x @ w.t()).square().mean() + h * w.square().sum()

    at = problem_at(loss, randn(2, 30, seed=2) / 9, torch.tensor(0.3, dtype=DTYPE))
    linearization, eager, v = engine.linearize(at), EagerEngine().linearize(at), [randn(2, 30, seed=3)]
    for terms, taken in ((12, False), (14, True), (6, True)):  # the last one finds them there
        solver = hvp.Neumann(terms, alpha=0.3)
        ours = engine.run(linearization, v, solver, None).value.data
        assert relative_error(ours, EagerEngine().run(eager, v, solver, None).value.data) < 1e-12
        assert (linearization.functions.native.factored is not None) == taken  # type: ignore[attr-defined]


@pytest.mark.parametrize("read", ["in the penalty", "by another layer", "transposed", "twice"])
def test_a_weight_that_is_read_otherwise_stays_dense(read: str) -> None:
    x = randn(3, 6, seed=1)

    def loss(w: dict[str, Tensor], h: Tensor) -> Tensor:
        out = torch.tanh(x @ w["a"] if read == "transposed" else x @ w["a"].t())
        if read == "in the penalty":
            return out.square().sum() + h * torch.tanh(w["a"]).sum()
        if read == "by another layer":
            out = torch.tanh(out @ w["a"])
        if read == "twice":
            out = out + torch.tanh((2 * x) @ w["a"].t())
        return out.square().sum() + h * w["a"].square().sum()

    at = problem_at(loss, {"a": randn(6, 6, seed=2) / 3}, torch.ones((), dtype=DTYPE))
    engine, linearization, program = factored(at)
    assert program is None
    v, solver = [randn(6, 6, seed=3)], hvp.Neumann(7, alpha=0.02)
    theirs = EagerEngine().run(EagerEngine().linearize(at), v, solver, None)
    assert relative_error(engine.run(linearization, v, solver, None).value.data, theirs.value.data) < 1e-11


def test_rows_that_are_every_second_column_of_a_table() -> None:
    """BLAS takes a copy, of which the products with themselves are made, too."""
    x = randn(5, 60, seed=1)[:, ::2]

    def loss(w: Tensor, h: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(x @ w.t()).square().mean() + h * w.square().sum()

    at = problem_at(loss, randn(3, 30, seed=2) / 9, torch.tensor(0.3, dtype=DTYPE), x)
    engine, linearization, program = factored(at)
    assert program is not None
    v, solver = [randn(3, 30, seed=3)], hvp.Neumann(20, alpha=0.1)
    theirs = EagerEngine().run(EagerEngine().linearize(at), v, solver, None)
    assert relative_error(engine.run(linearization, v, solver, None).value.data, theirs.value.data) < 1e-11


def test_new_values_of_decay_and_batch() -> None:
    first = problem(UNIFORM["for each output"])
    engine, _, program = factored(first)
    for scale in (0.5, -1.0):
        at = Problem(
            first.loss, [w * scale for w in first.weights], first.weight_structure,
            [h + scale for h in first.hyperparameters], first.hyperparameter_structure, (first.inputs[0] * scale,),
        )  # fmt: skip
        v, solver = [torch.randn_like(w) for w in at.weights], hvp.Neumann(9, alpha=0.02)
        linearization = engine.linearize(at)
        theirs = EagerEngine().run(EagerEngine().linearize(at), v, solver, None)
        assert relative_error(engine.run(linearization, v, solver, None).value.data, theirs.value.data) < 1e-11
        assert linearization.functions.native.factored is program  # type: ignore[attr-defined]


def test_float32_is_as_accurate_as_eager() -> None:
    solver, found = hvp.Neumann(100, alpha=0.1, damping=2.0), {}
    v = [randn(*weight.shape, seed=50 + i) for i, weight in enumerate(problem(UNIFORM["one"]).weights)]
    for dtype in (torch.float64, torch.float32):
        at = problem(UNIFORM["one"], dtype=dtype)
        here = [tensor.to(dtype) for tensor in v]
        if dtype == torch.float32:
            engine, linearization, program = factored(at)
            assert program is not None
            found["ours"] = flat(engine.run(linearization, here, solver, None).value.views)
        found[str(dtype)] = flat(EagerEngine().run(EagerEngine().linearize(at), here, solver, None).value.views)
    truth = found["torch.float64"]
    assert relative_error(found["ours"], truth) <= 2 * relative_error(found["torch.float32"], truth) + 2e-7


def test_a_logistic_regression_with_its_hypergradient() -> None:
    x, y = randn(6, 30, seed=1), torch.arange(6) % 3
    weights: dict[str, Any] = {"w": randn(3, 30, seed=2), "b": randn(3, seed=3)}
    results = {}

    def val(w: Any, h: Any, _: Any) -> Tensor:
        return torch.nn.functional.cross_entropy(torch.nn.functional.linear(-x, w["w"], w["b"]), y)

    def train(w: Any, h: Any, _: Any) -> Tensor:
        scores = torch.nn.functional.linear(x, w["w"], w["b"])
        return torch.nn.functional.cross_entropy(scores, y) + h.exp() * w["w"].square().sum()

    for name in ("eager", "linearized"):
        hypergradient = hvp.Hypergradient(train, val, hvp.Chebyshev(12, bounds=(0.1, 9.0)), engine=name)
        results[name] = hypergradient(weights, torch.tensor(-1.0, dtype=DTYPE), None, None)
    assert "1 of 2 weights in the space of the batch" in hypergradient.report()
    assert float(results["linearized"].grads) == pytest.approx(float(results["eager"].grads), rel=1e-10)


def test_terms_that_do_not_agree_with_products_are_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fault of ours, seen at the first and the tenth solve: its numbers are never used, and it is said."""
    at, solver = problem(UNIFORM["one"]), hvp.Neumann(9, alpha=0.02)
    v = [torch.randn_like(w) for w in at.weights]
    exact = EagerEngine().run(EagerEngine().linearize(at), v, solver, None).value.data
    engine, linearization, program = factored(at)
    assert program is not None
    for _ in range(8):
        assert relative_error(engine.run(linearization, v, solver, None).value.data, exact) < 1e-11
    follow = Combination.follow

    def faulty(self: Combination, accumulation: Any, target: int, pairs: Any, damping: float, steps: range) -> None:
        follow(self, accumulation, target, pairs, damping + 0.01, steps)

    monkeypatch.setattr(Combination, "follow", faulty)
    with pytest.warns(UserWarning, match="terms in the space of the batch do not agree"):
        found = engine.run(linearization, v, solver, None)
    assert relative_error(found.value.data, exact) < 1e-11
    assert relative_error(engine.run(linearization, v, solver, None).value.data, exact) < 1e-11
    assert "space of the batch" not in engine.report()
