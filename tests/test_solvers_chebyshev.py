"""Chebyshev iteration against its theory, with given and with estimated bounds."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from problems_with_known_answers import BILEVEL, DTYPE, matrix_with, randn, relative_error, spd_problems
from torch import Tensor

import hvp_engine as hvp
from hvp_engine.solvers.chebyshev import amplification, chebyshev_coefficients, heavy_ball_coefficients
from hvp_engine.solvers.spectrum import COLD_STEPS, REFRESH_STEPS

SPD = matrix_with([0.1, 0.4, 1.0, 1.7, 3.0, 9.0], seed=1)
V = randn(6, seed=2)
FORMS = pytest.mark.parametrize("form", ["chebyshev", "heavy_ball"])


def chebyshev_value(degree: int, x: float) -> float:
    return math.cosh(degree * math.acosh(x))


# --- the polynomials -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("terms", [1, 2, 3, 8, 40])
@pytest.mark.parametrize("condition", [2.0, 30.0, 1e4])
def test_residual_is_the_chebyshev_polynomial(condition: float, terms: int) -> None:
    upper = 3.0
    lower = upper / condition
    coefficients = chebyshev_coefficients(lower, upper, terms)
    peak = 1 / chebyshev_value(terms, (condition + 1) / (condition - 1))
    for share in (0.0, 0.1, 0.37, 0.9, 1.0):
        eigenvalue = lower + share * (upper - lower)
        argument = (upper + lower - 2 * eigenvalue) / (upper - lower)
        expected = abs(math.cos(terms * math.acos(max(-1.0, min(1.0, argument))))) * peak
        assert amplification(coefficients, eigenvalue) == pytest.approx(expected, rel=1e-9, abs=1e-12)
    assert peak <= 2 * ((math.sqrt(condition) - 1) / (math.sqrt(condition) + 1)) ** terms
    assert amplification(coefficients, lower / 2) < 1, "below the interval it converges, too"
    assert amplification(coefficients, upper + 1.1 * lower) > 1 >= amplification(coefficients, upper + 0.9 * lower)


def test_equal_bounds_make_the_neumann_series() -> None:
    assert chebyshev_coefficients(4.0, 4.0, 3) == [(0.25, 0.0)] * 3


@pytest.mark.parametrize("terms", [1, 2, 3, 10, 100, 1000])
def test_heavy_ball_bound(terms: int) -> None:
    coefficients = heavy_ball_coefficients(2.0, terms)
    for eigenvalue in torch.logspace(-8, math.log10(2.0), 200, dtype=DTYPE).tolist():
        assert amplification(coefficients, eigenvalue) <= 1.35 / (1 + terms**2 * eigenvalue / 2)


# --- solves ----------------------------------------------------------------------------------------------------------


@FORMS
@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("iterations", [0, 1, 2, 13])
def test_solve_is_the_polynomial_of_the_matrix(iterations: int, backend: str, form: str) -> None:
    solver = hvp.Chebyshev(iterations, bounds=(0.3, 9.5), form=form, damping=0.2)
    with hvp.use_backend(backend):
        solution = hvp.solve(lambda v: SPD @ v, V, solver)
    values, vectors = torch.linalg.eigh(SPD + 0.2 * torch.eye(6, dtype=DTYPE))
    _, coefficients = solver.coefficients_for(None)
    residual, direction = torch.ones_like(values), torch.zeros_like(values)
    residuals = []
    for alpha, beta in coefficients:
        residuals.append(residual)
        direction = beta * direction + alpha * residual
        residual = residual - values * direction
    truth = vectors @ ((1 - residual) / values * (vectors.T @ V))
    torch.testing.assert_close(solution.value, truth, rtol=1e-12, atol=1e-13)
    assert solution.hvps == solution.iterations == iterations
    if iterations:
        before = float((vectors @ (residuals[-1] * (vectors.T @ V))).norm() / V.norm())
        assert (solution.residual_of, solution.residual_norm) == ("previous", pytest.approx(before, rel=1e-9))


@pytest.mark.parametrize("condition", [1.0, 10.0, 1e3, 1e5])
def test_error_with_known_bounds_keeps_to_its_bound(condition: float) -> None:
    matrix, v = matrix_with(torch.logspace(-math.log10(condition), 0, 30, dtype=DTYPE), seed=3), randn(30, seed=4)
    truth = torch.linalg.solve(matrix, v)
    for iterations in (3, 20, 100):
        solver = hvp.Chebyshev(iterations, bounds=(1 / condition, 1.0))
        value = hvp.solve(lambda x: matrix @ x, v, solver).value
        rate = (math.sqrt(condition) - 1) / (math.sqrt(condition) + 1)
        assert relative_error(value, truth) <= 2 * rate ** (iterations + 1) + 1e-11 * condition


def test_fewer_products_than_the_neumann_series() -> None:
    """Condition 1000: 300 products do what 3000 of the series do not, all with automatic settings."""
    matrix, v = matrix_with(torch.logspace(-3, 0, 40, dtype=DTYPE), seed=5), randn(40, seed=6)
    truth = torch.linalg.solve(matrix, v)
    errors = {
        solver: relative_error(hvp.solve(lambda x: matrix @ x, v, solver).value, truth)
        for solver in (hvp.Chebyshev(300), hvp.Chebyshev(300, form="heavy_ball"), hvp.Neumann(3000))
    }
    chebyshev, heavy_ball, neumann = errors.values()
    assert chebyshev < 2e-3 and heavy_ball < 2e-2 < neumann


@pytest.mark.parametrize("condition", [300.0, 3e3])
def test_more_terms_bring_it_closer_with_estimated_bounds(condition: float) -> None:
    """Many eigenvalues at the lower end, which the estimate does not find."""
    values = torch.cat([torch.logspace(0, -math.log10(condition), 100), torch.full((100,), 1 / condition)])
    matrix, v = matrix_with(values, seed=3), randn(200, seed=4)
    truth = torch.linalg.solve(matrix, v)
    errors = [
        relative_error(hvp.solve(lambda x: matrix @ x, v, hvp.Chebyshev(iterations)).value, truth)
        for iterations in (25, 50, 100, 200, 400, 800, 1600)
    ]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] <= 1e-5


@FORMS
def test_estimates_are_counted(form: str) -> None:
    operator = hvp.HessianOperator(lambda w: (w @ SPD @ w) / 2, torch.zeros(6, dtype=DTYPE))
    big = hvp.HessianOperator(lambda w: w.square().sum(), torch.zeros(20, dtype=DTYPE))
    assert operator.solve(V, hvp.Chebyshev(4, form=form)).hvps == 4 + 6, "no more than there are weights"
    counts = [big.solve(randn(20, seed=7), hvp.Chebyshev(4, form=form)).hvps for _ in range(2)]
    assert counts == [4 + COLD_STEPS, 4 + REFRESH_STEPS]


@FORMS
@pytest.mark.parametrize("index", range(0, 19, 2))
def test_positive_definite_never_diverges(index: int, form: str) -> None:
    matrix, v = spd_problems(19)[index]
    for iterations in (1, 5, 30, 300):
        solution = hvp.solve(lambda x: matrix @ x, v, hvp.Chebyshev(iterations, form=form))
        assert solution.residual_norm <= 1 and solution.status is not hvp.Status.NEGATIVE_CURVATURE
        assert relative_error(solution.value, torch.linalg.solve(matrix, v)) < 1.0


# --- what is not as estimated ----------------------------------------------------------------------------------------


def sharpening(grown: int) -> tuple[hvp.HessianOperator, hvp.HessianOperator, Tensor]:
    """An operator, and one on whose estimate it comes to be solved, with an eigenvalue that rose 13-fold."""
    values, basis = torch.linspace(1.0, 0.05, 30, dtype=DTYPE), torch.linalg.qr(randn(30, 30, seed=7))[0]
    risen = values.clone()
    risen[grown] = 13.0
    matrices = [basis @ torch.diag(diagonal) @ basis.T for diagonal in (values, risen)]
    before, after = (hvp.HessianOperator(lambda w, a=a: w @ a @ w / 2, torch.zeros(30, dtype=DTYPE)) for a in matrices)
    return before, after, matrices[1]


@FORMS
@pytest.mark.parametrize("grown", [0, 17], ids=["same direction", "new direction"])
@pytest.mark.parametrize("iterations", [3, 20, 200])
def test_growth_between_two_calls(iterations: int, grown: int, form: str) -> None:
    before, after, matrix = sharpening(grown)
    v, solver = randn(30, seed=8), hvp.Chebyshev(iterations, form=form)
    before.solve(v, solver)
    after.spectrum = before.spectrum
    solution = after.solve(v, solver)
    assert solution.residual_norm <= 1
    assert float((v - matrix @ solution.value).norm() / v.norm()) <= 1
    if iterations == 200:
        assert relative_error(solution.value, torch.linalg.solve(matrix, v)) < 0.05


def test_growth_that_the_refresh_misses_is_found_by_the_residual() -> None:
    before, after, matrix = sharpening(17)
    v, solver = randn(30, seed=8), hvp.Chebyshev(60)
    before.solve(v, solver)
    after.spectrum = before.spectrum
    stale = before.spectrum.estimate
    after.spectrum.refresh = lambda operator, preconditioner: stale  # type: ignore[method-assign]
    solution = after.solve(v, solver)
    assert solution.hvps == 8 + 60 + COLD_STEPS + 60
    assert relative_error(solution.value, torch.linalg.solve(matrix, v)) < 0.1


@FORMS
@pytest.mark.parametrize("negative", [-1e-3, -0.1, -1.0, -5.0])
@pytest.mark.parametrize("iterations", [5, 50, 500])
def test_indefinite_has_a_status_and_stays_bounded(negative: float, iterations: int, form: str) -> None:
    matrix, v = matrix_with([negative, 0.3, 1.0, 1.7, 3.0, 4.0], seed=9), V
    solution = hvp.solve(lambda x: matrix @ x, v, hvp.Chebyshev(iterations, form=form))
    assert solution.status is hvp.Status.NEGATIVE_CURVATURE
    assert float((v - matrix @ solution.value).norm() / v.norm()) <= 10.5
    damped = hvp.solve(lambda x: matrix @ x, v, hvp.Chebyshev(500, form=form, damping=1.2 * abs(negative)))
    assert damped.residual_norm < 1 and damped.status is not hvp.Status.NEGATIVE_CURVATURE


def test_hidden_negative_curvature_is_found_by_the_residual() -> None:
    """Among many eigenvalues 8 products do not see a small negative one."""
    values = torch.linspace(0.05, 1.0, 400, dtype=DTYPE)
    values[0] = -0.03
    matrix, v = torch.diag(values), randn(400, seed=10)
    solution = hvp.solve(lambda x: matrix @ x, v, hvp.Chebyshev(200))
    assert solution.status is hvp.Status.NEGATIVE_CURVATURE
    assert torch.isfinite(solution.value).all() and solution.residual_norm <= 10


def test_too_low_an_upper_bound_is_explained() -> None:
    with pytest.raises(hvp.DivergenceError, match=r"bounds=\(0\.1, 2\).*an upper bound of 9\.45 or bounds='auto'"):
        hvp.solve(lambda x: SPD @ x, V, hvp.Chebyshev(60, bounds=(0.1, 2.0)))


# --- preconditioned --------------------------------------------------------------------------------------------------


@FORMS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_preconditioned(dtype: torch.dtype, form: str) -> None:
    decay = torch.logspace(-2, 4, 40, dtype=DTYPE)
    matrix, b = matrix_with(torch.linspace(0.5, 2.0, 40, dtype=DTYPE), seed=10) + torch.diag(decay), randn(40, seed=11)
    solver = hvp.Chebyshev(30, form=form, damping=0.3, preconditioner=hvp.DiagonalPreconditioner(decay, shift=1.3))
    solution = hvp.solve(lambda x: matrix.to(x.dtype) @ x, b.to(dtype), solver)
    truth = torch.linalg.solve(matrix + 0.3 * torch.eye(40, dtype=DTYPE), b)
    assert relative_error(solution.value.double(), truth) < (1e-5 if form == "chebyshev" else 1e-2)
    plain = hvp.solve(lambda x: matrix.to(x.dtype) @ x, b.to(dtype), replace(solver, preconditioner=None))
    assert relative_error(plain.value.double(), truth) > 0.3


@FORMS
def test_preconditioned_by_the_identity_is_plain(form: str) -> None:
    solver = hvp.Chebyshev(9, bounds=(0.1, 9.0), form=form)
    plain = hvp.solve(lambda x: SPD @ x, V, solver)
    other = hvp.solve(lambda x: SPD @ x, V, replace(solver, preconditioner=lambda v: [t.clone() for t in v]))
    torch.testing.assert_close(other.value, plain.value, rtol=1e-12, atol=1e-14)
    assert other.residual_norm == pytest.approx(plain.residual_norm, rel=1e-9)


# --- in use ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ["eager", "recorded", "linearized"])
@pytest.mark.parametrize("name", BILEVEL)
def test_hypergradient_is_the_closed_form(name: str, engine: str) -> None:
    problem = BILEVEL[name]()
    result = hvp.Hypergradient(problem.train_loss, problem.val_loss, solver=hvp.Chebyshev(60), engine=engine)(
        problem.weights, problem.hyper, None, None
    )
    torch.testing.assert_close(result.grads, problem.hypergradient, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(
    "error, argument, arguments",
    [
        (TypeError, "iterations", {"iterations": 2.0}),
        (ValueError, "form", {"form": "cheb"}),
        (TypeError, "bounds", {"bounds": 2.0}),
        (TypeError, "bounds", {"bounds": ("0", 1.0)}),
        (ValueError, "bounds", {"bounds": (0.0, 1.0)}),
        (ValueError, "bounds", {"bounds": (2.0, 1.0)}),
        (ValueError, "bounds", {"bounds": (1.0, math.inf)}),
        (ValueError, "bounds", {"bounds": (math.nan, 1.0)}),
        (ValueError, "damping", {"damping": -1.0}),
        (TypeError, "preconditioner", {"preconditioner": torch.ones(2)}),
    ],
)
def test_bad_arguments(error: type[Exception], argument: str, arguments: dict) -> None:
    with pytest.raises(error, match=f"{argument}: expected.*got"):
        hvp.Chebyshev(**{"iterations": 2, **arguments})


def test_no_weights_in_float16_have_no_curvature_to_lose() -> None:
    solution = hvp.solve(lambda v: v, [torch.zeros(2, 0, dtype=torch.float16)], hvp.Chebyshev(5))
    assert solution.value[0].shape == (2, 0)
