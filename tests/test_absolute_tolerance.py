"""Where conjugate gradients and MINRES stop with an absolute tolerance: at the iterate that theory says."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from problems_with_known_answers import DTYPE, matrix_with, randn, relative_error
from torch import Tensor

import hvp_engine as hvp

EIGENVALUES = [1.0, 1.2, 1.5, 2.0, 3.0, 4.0, 5.0, 6.0]
SPD = matrix_with(EIGENVALUES, seed=1)
INDEFINITE = matrix_with([-2.0, -1.7, *EIGENVALUES[2:]], seed=1)
V = 40 * randn(8, seed=2)
DIAGONAL = torch.linspace(0.3, 1.5, 8, dtype=DTYPE)
KINDS = pytest.mark.parametrize("kind", [hvp.ConjugateGradient, hvp.MINRES])


def iterate(kind: type, A: Tensor, v: Tensor, steps: int, M: Tensor | None = None) -> Tensor:
    """The best x of the Krylov space of `steps` products: smallest error in the A-norm, or residual in the M-norm."""
    M = torch.eye(len(v), dtype=DTYPE) if M is None else M
    basis, u = [], M @ v
    for _ in range(steps):
        for _ in range(2):
            u = u - sum(((b @ u) * b for b in basis), torch.zeros_like(u))
        basis.append(u / u.norm())
        u = M @ A @ basis[-1]
    if not basis:
        return torch.zeros_like(v)
    K = torch.stack(basis, 1)
    metric = torch.eye(len(v), dtype=DTYPE) if kind is hvp.ConjugateGradient else A @ M
    return K @ torch.linalg.solve(K.T @ metric @ A @ K, K.T @ metric @ v)


def first_within(kind: type, A: Tensor, v: Tensor, bound: float, M: Tensor | None = None) -> tuple[int, Tensor]:
    for steps in range(len(v) + 1):
        x = iterate(kind, A, v, steps, M)
        if (v - A @ x).norm() <= bound:
            return steps, x
    raise AssertionError("not reached")


@KINDS
@pytest.mark.parametrize("damping", [0.0, 0.5])
@pytest.mark.parametrize("M", [None, torch.diag(DIAGONAL)], ids=["plain", "preconditioned"])
@pytest.mark.parametrize("atol", [30.0, 5.0, 1.0])
def test_it_stops_at_the_first_iterate_within(kind: type, damping: float, M: Tensor | None, atol: float) -> None:
    preconditioner: Callable[..., Any] | None = None if M is None else lambda vs: [M @ vs[0]]
    solver = kind(50, tol=0.0, damping=damping, preconditioner=preconditioner, atol=atol)
    solution = hvp.solve(lambda v: SPD @ v, V, solver)
    steps, x = first_within(kind, SPD + damping * torch.eye(8, dtype=DTYPE), V, atol, M)
    assert 0 < steps < 8 and steps <= solution.iterations <= steps + 5
    assert relative_error(solution.value, x) < 1e-9
    assert solution.converged and solution.residual_norm * float(V.norm()) <= atol


def test_of_an_indefinite_operator() -> None:
    solution = hvp.solve(lambda v: INDEFINITE @ v, V, hvp.MINRES(50, tol=0.0, atol=8.0))
    steps, x = first_within(hvp.MINRES, INDEFINITE, V, 8.0)
    assert steps < 8 and relative_error(solution.value, x) < 1e-9 and solution.converged


@KINDS
def test_the_larger_tolerance_counts(kind: type) -> None:
    norm = float(V.norm())
    for tol, atol in ((1e-2, 1e-6), (1e-6, 1e-2 * norm)):
        solution = hvp.solve(lambda v: SPD @ v, V, kind(50, tol=tol, atol=atol))
        assert relative_error(solution.value, first_within(kind, SPD, V, 1e-2 * norm)[1]) < 1e-9
    without = hvp.solve(lambda v: SPD @ v, V, kind(3, tol=1e-9))
    assert not without.converged
    torch.testing.assert_close(hvp.solve(lambda v: SPD @ v, V, kind(3, 1e-9, atol=0.0)).value, without.value)


@KINDS
def test_a_right_hand_side_below_it_is_left_alone(kind: type) -> None:
    small = V * (1e-3 / V.norm())
    solution = hvp.solve(lambda v: SPD @ v, small, kind(50, atol=2e-3))
    assert solution.converged and torch.equal(solution.value, torch.zeros_like(V)) and solution.residual_norm == 1.0


@KINDS
def test_from_a_first_guess_it_is_not_relative(kind: type) -> None:
    x0 = torch.linalg.solve(SPD, V) + 0.01 * randn(8, seed=5)
    residual = V - SPD @ x0
    assert 0.01 < residual.norm() < 1.0
    solution = hvp.solve(lambda v: SPD @ v, V, kind(50, tol=0.0, atol=0.01), x0=x0)
    assert relative_error(solution.value - x0, first_within(kind, SPD, residual, 0.01)[1]) < 1e-8
    enough = hvp.solve(lambda v: SPD @ v, V, kind(50, tol=0.0, atol=1.0), x0=x0)
    assert enough.converged and enough.hvps == 1 and torch.equal(enough.value, x0)


@KINDS
def test_of_several_right_hand_sides_each_has_its_own(kind: type) -> None:
    vs = torch.stack([V, V / 100, V / 1e6])
    solution = hvp.solve(lambda v: SPD @ v, vs, kind(50, tol=0.0, atol=1e-3), batched=True)
    for v, x in zip(vs, solution.value, strict=True):
        torch.testing.assert_close(x, first_within(kind, SPD, v, 1e-3)[1])
    assert solution.converged


@pytest.mark.parametrize("atol", [-1.0, math.nan, "x"])
@KINDS
def test_it_is_checked(kind: type, atol: Any) -> None:
    with pytest.raises((TypeError, ValueError), match="^atol: expected a finite number >= 0"):
        kind(3, atol=atol)


def test_a_budget_is_as_it_was() -> None:
    solution = hvp.solve(lambda v: SPD @ v, V, hvp.Budget(error=1e-6))
    assert relative_error(solution.value, torch.linalg.solve(SPD, V)) < 1e-6
