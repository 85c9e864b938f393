"""Preconditioned solves: the same solution in fewer products, and preconditioners that are none."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from problems_with_known_answers import BILEVEL, DTYPE, flat, matrix_with, randn, relative_error, unflat

import hvp_engine as hvp
from hvp_engine.solvers.conjugate_gradient import REFRESH_EVERY

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
SPD = matrix_with([0.1, 0.4, 1.0, 1.7, 3.0, 9.0], seed=1)
V = randn(6, seed=2)
DECAY = torch.logspace(-2, 4, 40, dtype=DTYPE)
SCALED = matrix_with(torch.linspace(0.5, 2.0, 40, dtype=DTYPE), seed=10) + torch.diag(DECAY)
B = randn(40, seed=11)
PRECONDITIONERS: dict[str, Callable] = {
    "decay": hvp.DiagonalPreconditioner(DECAY, shift=1.0),
    "function": hvp.DiagonalPreconditioner(lambda: [DECAY], shift=1.0),
    "callable": lambda v: [v[0] / (DECAY.to(v[0].dtype) + 1)],
    "dense": lambda v: [(torch.linalg.inv(SCALED) @ v[0].double()).to(v[0].dtype)],
}


@DTYPES
@pytest.mark.parametrize("name", PRECONDITIONERS)
def test_preconditioner_changes_the_count_and_not_the_solution(name: str, dtype: torch.dtype) -> None:
    plain = hvp.solve(lambda x: SCALED.to(x.dtype) @ x, B.to(dtype), hvp.ConjugateGradient(3000))
    better = hvp.solve(
        lambda x: SCALED.to(x.dtype) @ x, B.to(dtype), hvp.ConjugateGradient(3000, preconditioner=PRECONDITIONERS[name])
    )
    truth = torch.linalg.solve(SCALED, B)
    assert better.converged
    assert relative_error(better.value.double(), truth) < (1e-3 if dtype == torch.float32 else 1e-8)
    assert better.iterations <= (1 if name == "dense" and dtype == DTYPE else 21) < plain.iterations / 2


def test_preconditioner_and_damping() -> None:
    solver = hvp.ConjugateGradient(200, damping=0.7, preconditioner=PRECONDITIONERS["decay"])
    truth = torch.linalg.solve(SCALED + 0.7 * torch.eye(40, dtype=DTYPE), B)
    assert relative_error(hvp.solve(lambda x: SCALED.to(x.dtype) @ x, B, solver).value, truth) < 1e-9


def test_preconditioner_over_several_tensors_and_a_refresh() -> None:
    parts = [torch.zeros(3, 4, dtype=DTYPE), torch.zeros((), dtype=DTYPE), torch.zeros(27, dtype=DTYPE)]
    preconditioner = hvp.DiagonalPreconditioner(unflat(DECAY, parts), shift=1.0)
    solver = hvp.ConjugateGradient(3 * REFRESH_EVERY, tol=1e-15, preconditioner=preconditioner)
    solution = hvp.solve(lambda v: unflat(SCALED @ flat(v), parts), unflat(B, parts), solver)
    assert relative_error(flat(solution.value), torch.linalg.solve(SCALED, B)) < 1e-12


ROOT = torch.logspace(-3, 3, 40, dtype=DTYPE)
ILL_SCALED = ROOT[:, None] * matrix_with(torch.linspace(0.5, 2.0, 40, dtype=DTYPE), seed=12) * ROOT
SERIES: dict[str, Callable] = {
    "neumann": lambda count, m: hvp.Neumann(count, preconditioner=m),
    "neumann, accumulated": lambda count, m: hvp.Neumann(count, form="accumulate", preconditioner=m),
    "chebyshev": lambda count, m: hvp.Chebyshev(count, preconditioner=m),
    "heavy ball": lambda count, m: hvp.Chebyshev(count, form="heavy_ball", preconditioner=m),
}


@pytest.mark.parametrize("name", SERIES)
def test_a_series_is_judged_in_the_norm_in_which_it_contracts(name: str) -> None:
    """A right-hand side of small scale: its residual in the 2-norm grows by orders while the solution comes close."""
    v = torch.zeros(40, dtype=DTYPE)
    v[:5] = 1.0
    truth = torch.linalg.solve(ILL_SCALED, v)
    m = hvp.DiagonalPreconditioner(ROOT**2, shift=1e-12)

    def energy(x: torch.Tensor) -> float:
        return float(x @ ILL_SCALED @ x)

    errors = []
    for count in (2, 5):
        solution = hvp.solve(lambda x: ILL_SCALED @ x, v, SERIES[name](count, m))
        errors.append(energy(solution.value - truth) / energy(truth))
        assert solution.residual_norm > 1
        assert solution.status is hvp.Status.ITERATION_LIMIT
        assert solution.hvps == count + 8  # no restart
    assert errors[1] < errors[0] < 0.5


@pytest.mark.parametrize("name", ["neumann", "neumann, accumulated"])
def test_a_preconditioned_series_that_grows_still_says_so(name: str) -> None:
    m = hvp.DiagonalPreconditioner(ROOT**2, shift=1e-12)
    solver = replace(SERIES[name](6, m), alpha=1.5)
    assert hvp.solve(lambda x: ILL_SCALED @ x, B * ROOT, solver).status is hvp.Status.DIVERGED
    with pytest.raises(hvp.DivergenceError, match="the residual grew"):
        hvp.solve(lambda x: ILL_SCALED @ x, B * ROOT, replace(solver, iterations=200))


@pytest.mark.parametrize("sign", [-1.0, 0.0, float("nan")])
def test_a_preconditioner_that_is_not_positive_definite_is_refused(sign: float) -> None:
    solver = hvp.ConjugateGradient(20, preconditioner=lambda v: [sign * part for part in v])
    with pytest.raises(ValueError, match="preconditioner: expected a symmetric positive definite M.*got"):
        hvp.solve(lambda x: SPD @ x, V, solver)


@pytest.mark.parametrize(
    "error, result",
    [
        (TypeError, lambda v: v[0]),
        (ValueError, lambda v: [v[0], v[0]]),
        (TypeError, lambda v: None),
        (ValueError, lambda v: [v[0][:-1]]),
        (TypeError, lambda v: [0.0]),
    ],
)
@pytest.mark.parametrize("solver", [hvp.ConjugateGradient, hvp.Neumann])
def test_a_preconditioner_that_does_not_fit(solver: type, error: type[Exception], result: Callable) -> None:
    with pytest.raises(error, match="preconditioner.*expected.*got"):
        hvp.solve(lambda x: SPD @ x, V, solver(5, preconditioner=result))


@pytest.mark.parametrize(
    "error, argument, arguments",
    [
        (TypeError, "shift", (DECAY, "1")),
        (ValueError, "shift", (DECAY, -1.0)),
        (ValueError, "shift", (DECAY, float("nan"))),
        (ValueError, "diagonal", (-DECAY, 1.0)),
        (ValueError, "diagonal", (torch.zeros(3),)),
        (ValueError, "diagonal", (lambda: torch.full((3,), float("nan")),)),
        (TypeError, "diagonal", ([1.0],)),
    ],
)
def test_diagonals_that_do_not_fit(error: type[Exception], argument: str, arguments: tuple) -> None:
    with pytest.raises(error, match=f"{argument}.*expected.*got"):
        hvp.DiagonalPreconditioner(*arguments)


def test_a_diagonal_with_another_number_of_leaves() -> None:
    preconditioner = hvp.DiagonalPreconditioner([torch.ones(3), torch.ones(3)])
    with pytest.raises(ValueError, match="diagonal: expected 1 leaves.*got 2"):
        hvp.solve(lambda x: SPD @ x, V, hvp.ConjugateGradient(5, preconditioner=preconditioner))


def test_hypergradient_with_the_decays_as_preconditioner() -> None:
    problem = BILEVEL["ridge"]()
    preconditioner = hvp.DiagonalPreconditioner(lambda: problem.hyper.exp(), shift=1.0)
    solver = hvp.ConjugateGradient(20, preconditioner=preconditioner)
    result = hvp.Hypergradient(problem.train_loss, problem.val_loss, solver=solver)(
        problem.weights, problem.hyper, None, None
    )
    torch.testing.assert_close(result.grads, problem.hypergradient, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("kind", [hvp.Neumann, hvp.Chebyshev, hvp.ConjugateGradient, hvp.MINRES])
def test_a_function_that_changes_its_argument_is_refused(kind: type) -> None:
    solver = kind(5, preconditioner=lambda leaves: [leaf.mul_(0.5) for leaf in leaves])
    with pytest.raises(ValueError, match=r"^preconditioner\(v\): .* in place"):
        hvp.solve(lambda v: 2 * v, torch.ones(4), solver)
    with pytest.raises(ValueError, match=r"^operator\(v\): .* in place"):
        hvp.solve(lambda v: v.mul_(2), torch.ones(4), kind(5))
