"""Solves with a linear model by every engine, against dense matrices and plain autograd in float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from linear_models_and_losses import DECAYS, ENGINES, FORMS, LOSSES, Model, joined, likewise, model_of
from problems_with_known_answers import flat, randn, relative_error, truncated_sum, unflat
from torch import Tensor

import hvp_engine as hvp

BY_ENGINE = pytest.mark.parametrize("engine", ENGINES)

# Every pair of loss, decay and iterations occurs.
SETTINGS = [
    (loss, decay, (0, 1, 50)[(i + j) % 3], (0.0, 0.4)[(i * j) % 2])
    for i, loss in enumerate(LOSSES)
    for j, decay in enumerate(DECAYS)
]


@BY_ENGINE
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("loss", "decay", "iterations", "damping"), SETTINGS)
def test_truncated_sum(loss: str, decay: str, iterations: int, form: str, damping: float, engine: str) -> None:
    check_series(model_of(loss, decay=decay, bias=form == "horner"), iterations, form, damping, engine)


@BY_ENGINE
@pytest.mark.parametrize(("outputs", "form"), list(zip(["vector", 2, 11], [*FORMS, FORMS[0]], strict=True)))
@pytest.mark.parametrize("samples, features", [(1, 1), (97, 25), (5, 400)])
def test_sizes(samples: int, features: int, outputs: int | str, form: str, engine: str) -> None:
    loss = "logistic" if outputs == "vector" else "softmax"
    check_series(model_of(loss, outputs, samples=samples, features=features), 7, form, 0.1, engine)


def check_series(model: Model, iterations: int, form: str, damping: float, engine: str) -> None:
    """The operator's solve against the one with the loss as a function, and for small problems dense powers."""
    size = sum(w.numel() for w in model.weights)
    v = randn(size, seed=15)
    autograd = hvp.HessianOperator(model.value, model.weights, engine="eager")
    alpha = autograd.solve(unflat(v, model.weights), hvp.Neumann(1, damping=damping)).alpha
    assert alpha is not None
    solver = hvp.Neumann(iterations, alpha=alpha, form=form, damping=damping)  # type: ignore[arg-type]
    solution = model.operator_by(engine).solve(likewise(model, v), solver)
    ordinary = autograd.solve(unflat(v, model.weights), solver)
    torch.testing.assert_close(joined(solution.value), flat(ordinary.value), rtol=1e-11, atol=1e-13)
    if size < 100:
        truth = truncated_sum(model.hessian(), v, iterations, alpha, damping)
        torch.testing.assert_close(joined(solution.value), truth, rtol=1e-11, atol=1e-12)
    assert solution.residual_norm == pytest.approx(ordinary.residual_norm, rel=1e-9, abs=1e-13)
    others = [(s.status, s.iterations, s.hvps, s.residual_of, s.alpha) for s in (solution, ordinary)]
    assert others[0] == others[1]


@BY_ENGINE
@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("loss", LOSSES)
def test_float32(loss: str, decay: str, engine: str) -> None:
    """No further from float64 than twice the loss as a function by autograd in float32, or as 50 sums that are rounded
    once in each of the terms: sqrt(50) eps = 8e-7."""
    model = model_of(loss, 10, decay, samples=50, features=300)
    v = randn(sum(w.numel() for w in model.weights), seed=16)
    narrow = model.to(torch.float32)
    solver = hvp.Neumann(50, alpha=model.operator.solve(likewise(model, v), hvp.Neumann(0)).alpha, damping=0.1)  # type: ignore[arg-type]
    truth = joined(model.operator.solve(likewise(model, v), solver).value)
    ours = narrow.operator_by(engine).solve(likewise(narrow, v), solver)
    autograd = hvp.HessianOperator(narrow.value, narrow.weights, engine="eager")
    ordinary = autograd.solve(unflat(v, narrow.weights), solver)
    floor = 4e-7
    assert relative_error(joined(ours.value), truth) < 2 * max(floor, relative_error(flat(ordinary.value), truth))
    assert ours.residual_norm == pytest.approx(ordinary.residual_norm, rel=1e-4, abs=2e-7)
    assert ours.status is ordinary.status and ours.value[0].dtype == torch.float32


@pytest.mark.parametrize("engine", ["recorded", "linearized"])
@pytest.mark.parametrize(("decay", "taken"), [("none", True), ("leaves", True), ("per weight", False)])
def test_one_decay_is_solved_in_the_space_of_the_batch(decay: str, taken: bool, engine: str) -> None:
    """Where the graph shows that there is one, and that takes fewer multiplications."""
    check_series(model := model_of("softmax", 10, decay, samples=9, features=900), 20, "horner", 0.1, engine)
    operator = model.operator_by(engine)
    operator.solve(likewise(model, randn(9010, seed=18)), hvp.Neumann(20, alpha=0.01))
    made: Any = operator.linear_map if engine == "linearized" else operator.linear_map.program  # type: ignore[attr-defined]
    assert (made.functions.native.factored is not None) == taken


@BY_ENGINE
@pytest.mark.parametrize("decay", ["scalar", "per weight"])
@pytest.mark.parametrize("loss", LOSSES)
def test_converges_to_the_dense_solve(loss: str, decay: str, engine: str) -> None:
    model = model_of(loss, decay=decay, samples=5)
    v = randn(24, seed=19)
    truth = torch.linalg.solve(model.hessian(), v)
    solution = model.operator_by(engine).solve(likewise(model, v), hvp.Neumann(2000))
    assert relative_error(joined(solution.value), truth) < 1e-6
    assert solution.converged and solution.lambda_max is not None
    assert solution.hvps == 2008
    few = model.operator_by(engine).solve(likewise(model, v), hvp.Neumann(2))
    assert relative_error(joined(few.value), truth) > 1e-2, "two terms are not enough"


@BY_ENGINE
@pytest.mark.parametrize(
    "solver",
    [
        hvp.Chebyshev(150),
        hvp.ConjugateGradient(40),
        hvp.Exact(),
        hvp.Neumann(2000, preconditioner=lambda v: [2 * t for t in v]),
    ],
    ids=lambda solver: type(solver).__name__,
)
def test_every_solver_works_on_it(solver: Any, engine: str) -> None:
    model = model_of("softmax", decay="per weight")
    v = randn(24, seed=20)
    value = joined(model.operator_by(engine).solve(likewise(model, v), solver).value)
    assert relative_error(value, torch.linalg.solve(model.hessian(), v)) < 1e-7


@BY_ENGINE
def test_a_solve_leaves_v_and_the_operator_as_they_were(engine: str) -> None:
    model = model_of("softmax")
    operator, v = model.operator_by(engine), likewise(model, randn(24, seed=21))
    before = joined(v).clone()
    first = operator.solve(v, hvp.Neumann(7, alpha=0.1))
    second = operator.solve(v, hvp.Neumann(7, alpha=0.1))
    assert torch.equal(joined(v), before)
    assert torch.equal(joined(first.value), joined(second.value))
    third = operator.solve(v, hvp.Neumann(3, alpha=0.1, form="horner"))
    assert not torch.equal(joined(third.value), joined(first.value))
    assert torch.equal(joined(v), before)


# Several right-hand sides


@BY_ENGINE
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("outputs", ["vector", 3])
def test_batched_equals_one_by_one(outputs: int | str, form: str, engine: str) -> None:
    model = model_of("logistic", outputs)
    vs = [likewise(model, randn(sum(w.numel() for w in model.weights), seed=23 + i)) for i in range(9)]
    solver = hvp.Neumann(9, alpha=0.1, form=form, damping=0.1)  # type: ignore[arg-type]
    operator = model.operator_by(engine)
    batch = operator.solve(tuple(torch.stack(parts) for parts in zip(*vs, strict=True)), solver, batched=True)
    alone = [operator.solve(v, solver) for v in vs]
    for index, solution in enumerate(alone):
        part = joined([leaf[index] for leaf in batch.value])
        torch.testing.assert_close(part, joined(solution.value), rtol=1e-13, atol=1e-14)
    assert batch.hvps == 81 and batch.iterations == 9
    assert batch.residual_norm == pytest.approx(max(solution.residual_norm for solution in alone), rel=1e-12)


def test_batch_shares_one_estimate() -> None:
    model = model_of("softmax")
    v = (randn(4, 3, 7, seed=28), randn(4, 3, seed=29))
    solution = model.operator.solve(v, hvp.Neumann(5), batched=True)
    assert solution.hvps == 8 + 4 * 5


@pytest.mark.parametrize("make", ["autograd", "callable", "conjugate gradients"])
def test_any_operator_takes_a_batch(make: str) -> None:
    model = model_of("softmax")
    hessian = model.hessian()
    v = randn(3, 24, seed=30)
    solver: Any = hvp.ConjugateGradient(24) if make == "conjugate gradients" else hvp.Neumann(500, alpha=0.1)
    operator: Any = (lambda x: hessian @ x) if make == "callable" else model.operator
    tree: Any = v if make == "callable" else (v[:, :21].reshape(3, 3, 7), v[:, 21:])
    if make == "autograd":
        operator, tree = hvp.HessianOperator(model.value, model.weights), list(tree)
    value = hvp.solve(operator, tree, solver, batched=True).value
    leaves = [value] if isinstance(value, Tensor) else list(value)
    result = torch.cat([leaf.reshape(3, -1) for leaf in leaves], 1)
    assert relative_error(result, torch.linalg.solve(hessian, v.T).T) < 1e-6


def test_batch_errors() -> None:
    model = model_of("softmax")
    operator = model.operator
    good = randn(2, 3, 7, seed=31), randn(2, 3, seed=32)
    solver = hvp.Neumann(2, alpha=0.1)
    with pytest.raises(ValueError, match=r"^v: expected leaves with a first dimension of one length"):
        operator.solve((good[0], good[1][:1]), solver, batched=True)
    with pytest.raises(ValueError, match=r"^v: expected leaves .* got shapes \(\)"):
        hvp.solve(lambda x: x, torch.tensor(1.0), solver, batched=True)
    with pytest.raises(ValueError, match="first dimension"):
        operator.solve((good[0][:0], good[1][:0]), solver, batched=True)
    with pytest.raises(ValueError, match=r"^v\[0\]\[0\]: expected shape \(3, 7\) as weights"):
        operator.solve((good[0][:, :2], good[1]), solver, batched=True)
    good[1][1, 2] = math.nan
    with pytest.raises(hvp.NonFiniteError, match=r"^v\[1\]: expected finite values"):
        operator.solve(good, solver, batched=True)
    with pytest.raises(hvp.NonFiniteError, match=r"^v: expected finite values"):
        operator.solve((good[0][1], good[1][1]), hvp.Neumann(2), batched=False)
