"""First guesses: a series continues, a tolerance is reached sooner, and nothing depends on a good guess."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from problems_with_known_answers import DTYPE, matrix_with, randn, relative_error
from torch import Tensor

import hvp_engine as hvp

MATRIX = matrix_with(torch.logspace(-2, 0, 30, dtype=DTYPE), seed=1)
V = randn(30, seed=2)
TRUTH = torch.linalg.solve(MATRIX, V)


def product(v: Tensor) -> Tensor:
    return MATRIX @ v


@pytest.mark.parametrize("form", ["horner", "accumulate"])
@pytest.mark.parametrize("damping", [0.0, 0.3])
def test_a_series_continues_where_it_stopped(form: Any, damping: float) -> None:
    """i terms from the value of j terms are i + j + 1 terms."""

    def series(iterations: int) -> hvp.Neumann:
        return hvp.Neumann(iterations, alpha=0.9, damping=damping, form=form)

    first = hvp.solve(product, V, series(4))
    continued = hvp.solve(product, V, series(6), x0=first.value)
    whole = hvp.solve(product, V, series(11))
    torch.testing.assert_close(continued.value, whole.value, rtol=1e-12, atol=1e-12)
    assert continued.residual_norm == pytest.approx(whole.residual_norm, rel=1e-9)
    assert (continued.iterations, continued.hvps) == (6, 7)


@pytest.mark.parametrize(
    "solver",
    [hvp.ConjugateGradient(60), hvp.MINRES(60), hvp.Chebyshev(200), hvp.Exact(), hvp.Neumann(3000)],
    ids=lambda solver: type(solver).__name__,
)
@pytest.mark.parametrize("quality", [1e-3, 100.0], ids=["good guess", "bad guess"])
def test_every_solver_from_any_guess(solver: Any, quality: float) -> None:
    guess = TRUTH + quality * randn(30, seed=3)
    solution = hvp.solve(product, V, solver, x0=guess)
    assert relative_error(solution.value, TRUTH) < 1e-6
    actual = float((V - MATRIX @ solution.value).norm() / V.norm())
    assert actual < 1e-7 and solution.residual_norm < 1e-7


@pytest.mark.parametrize("kind", [hvp.ConjugateGradient, hvp.MINRES])
def test_a_tolerance_stays_relative_to_v(kind: Any) -> None:
    """Near the solution fewer products are enough for the same residual; at it, none but the one that finds out."""
    cold = hvp.solve(product, V, kind(60, tol=1e-6))
    warm = hvp.solve(product, V, kind(60, tol=1e-6), x0=TRUTH + 1e-4 * randn(30, seed=3))
    assert cold.converged and warm.converged and warm.hvps <= cold.hvps - 5
    assert float((V - MATRIX @ warm.value).norm() / V.norm()) <= 1.01e-6
    done = hvp.solve(product, V, kind(60, tol=1e-6), x0=TRUTH)
    assert done.converged and (done.iterations, done.hvps) == (0, 1)
    assert torch.equal(done.value, TRUTH) and done.residual_norm < 1e-12


def test_several_right_hand_sides_each_with_its_guess() -> None:
    vs, truths = torch.stack([V, 2 * V, randn(30, seed=4)]), None
    truths = torch.linalg.solve(MATRIX, vs.T).T
    guesses = truths + torch.tensor([0.0, 1e-3, 10.0], dtype=DTYPE)[:, None] * randn(3, 30, seed=5)
    solution = hvp.solve(product, vs, hvp.ConjugateGradient(80, tol=1e-10), batched=True, x0=guesses)
    torch.testing.assert_close(solution.value, truths, rtol=1e-6, atol=1e-7)
    assert solution.converged


def test_low_precision_and_trees() -> None:
    weights = {"a": torch.ones(4, dtype=torch.bfloat16), "b": torch.ones(3)}
    operator = hvp.HessianOperator(lambda w: w["a"].square().sum() + 2 * w["b"].square().sum(), weights)
    x0 = {"a": torch.full((4,), 0.25, dtype=torch.bfloat16), "b": torch.zeros(3)}
    value = operator.solve(weights, hvp.ConjugateGradient(5), x0=x0).value
    torch.testing.assert_close(value["a"], torch.full((4,), 0.5, dtype=torch.bfloat16))
    torch.testing.assert_close(value["b"], torch.full((3,), 0.25))
    assert float(x0["b"].abs().max()) == 0.0


def test_a_zero_right_hand_side() -> None:
    value = hvp.solve(product, torch.zeros_like(V), hvp.ConjugateGradient(60), x0=V).value
    assert float(value.norm()) < 1e-8


def test_bad_guesses_are_named() -> None:
    solver = hvp.Neumann(2, alpha=0.1)
    with pytest.raises(ValueError, match=r"^x0: expected the container of v"):
        hvp.solve(product, V, solver, x0=[V])
    with pytest.raises(ValueError, match=r"^x0\[0\]: expected shape \(30,\)"):
        hvp.solve(product, V, solver, x0=V[1:])
    with pytest.raises(ValueError, match=r"^x0: expected one for each of the 2 right-hand sides; got 1"):
        hvp.solve(product, torch.stack([V, V]), solver, batched=True, x0=V[None])
    with pytest.raises(hvp.NonFiniteError, match=r"^x0: expected finite values"):
        hvp.solve(product, V, solver, x0=V * math.nan)
    with pytest.raises(hvp.NonFiniteError, match=r"^v: expected finite values"):
        hvp.solve(product, V * math.inf, hvp.ConjugateGradient(3), x0=V)


# The hypergradient's own previous solution


def train_loss(w: Tensor, decay: Tensor, batch: Tensor) -> Tensor:
    return w @ MATRIX @ w / 2 - batch @ w + (decay.exp() * w.square()).sum() / 2


def val_loss(w: Tensor, decay: Tensor, batch: Tensor) -> Tensor:
    return (w - batch).square().sum() / 2


def point(decay: Tensor) -> tuple[Tensor, Tensor]:
    """The weights at the minimum, and the hypergradient there in closed form."""
    hessian = MATRIX + torch.diag(decay.exp())
    w = torch.linalg.solve(hessian, V)
    return w, -torch.linalg.solve(hessian, w - V) * decay.exp() * w


@pytest.mark.filterwarnings("ignore:the weights are far")
def test_hypergradients_improve_over_calls_and_follow_a_moving_problem() -> None:
    decay = torch.full((30,), -4.0, dtype=DTYPE)
    hypergradients = [
        hvp.Hypergradient(train_loss, val_loss, hvp.Neumann(10, alpha=0.9), warm_start=warm) for warm in (True, False)
    ]
    errors: list[list[float]] = []
    for step in range(40):
        moved = decay + 0.01 * step
        w, truth = point(moved)
        errors.append([relative_error(hg(w, moved, V, V).grads, truth) for hg in hypergradients])
    warm, cold = zip(*errors, strict=True)
    assert warm[0] == pytest.approx(cold[0], rel=1e-12)
    assert warm[-1] < cold[-1] / 10


def test_a_saved_state_continues_with_the_same_numbers_and_another_shape_starts_cold() -> None:
    decay = torch.full((30,), -4.0, dtype=DTYPE)
    w, _ = point(decay)

    def new() -> hvp.Hypergradient:
        return hvp.Hypergradient(train_loss, val_loss, hvp.Neumann(5), engine="eager", warm_start=True)

    first, second = new(), new()
    for _ in range(2):
        first(w, decay, V, V)
    second.load_state_dict(first.state_dict())
    expected = first(w, decay, V, V).grads
    assert torch.equal(second(w, decay, V, V).grads, expected)
    assert not torch.equal(new()(w, decay, V, V).grads, expected)

    def small(w: Tensor, decay: Tensor, batch: Tensor) -> Tensor:
        return (w.square() * decay.exp()).sum() - (batch[:2] * w).sum()

    first.train_loss = first.val_loss = small
    torch.testing.assert_close(
        first(w[:2], decay[:2], V, V).grads,
        hvp.Hypergradient(small, small, hvp.Neumann(5), engine="eager")(w[:2], decay[:2], V, V).grads,
    )


def test_changing_the_returned_solution_does_not_change_the_next_warm_start() -> None:
    decay = torch.full((30,), -4.0, dtype=DTYPE)
    w, _ = point(decay)
    found = []
    for scale in (1.0, 100.0):
        hypergradient = hvp.Hypergradient(train_loss, val_loss, hvp.Neumann(5), engine="eager", warm_start=True)
        hypergradient(w, decay, V, V).solution.value.mul_(scale)
        found.append(hypergradient(w, decay, V, V).grads)
    assert torch.equal(*found)


def test_a_warm_start_at_zero_for_zero_leaves_no_residual() -> None:
    solution = hvp.solve(lambda v: 2 * v, torch.zeros(4), hvp.ConjugateGradient(5), x0=torch.zeros(4))
    assert solution.converged and solution.residual_norm == 0
