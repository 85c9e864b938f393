"""The Nystrom approximation: exact where the rank is, as the printed formula elsewhere, and its numerics."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from problems_with_known_answers import BILEVEL, DTYPE, flat, matrix_with, randn, relative_error, unflat
from torch import Tensor

import hvp_engine as hvp
from hvp_engine._support.flat_vector import Layout
from hvp_engine.solvers.low_rank import Sketch

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
SKETCHES = pytest.mark.parametrize("sketch", ["gaussian", "columns"])
LOW_RANK = matrix_with([0.0] * 36 + [0.5, 1.0, 3.0, 7.0], seed=1)
V = randn(40, seed=2)


def solve(matrix: Tensor, v: Tensor, solver: hvp.Nystrom) -> hvp.Solution:
    return hvp.solve(lambda x: matrix.to(x.dtype) @ x, v, solver)


@SKETCHES
@DTYPES
@pytest.mark.parametrize("rho, damping", [(1.0, 0.0), (0.01, 0.0), (0.01, 0.3)])
def test_exact_for_a_matrix_of_its_rank(rho: float, damping: float, dtype: torch.dtype, sketch: str) -> None:
    solution = solve(LOW_RANK, V.to(dtype), hvp.Nystrom(8, rho=rho, damping=damping, sketch=sketch))
    truth = torch.linalg.solve(LOW_RANK + (rho + damping) * torch.eye(40, dtype=DTYPE), V)
    assert relative_error(solution.value.double(), truth) < (1e-4 if dtype == torch.float32 else 1e-11)
    assert solution.iterations == solution.hvps == 9
    residual = V - LOW_RANK @ solution.value.double() - damping * solution.value.double()
    assert solution.residual_of == "returned"
    assert solution.residual_norm == pytest.approx(float(residual.norm() / V.norm()), rel=1e-3)


@SKETCHES
@pytest.mark.parametrize("rho, hvps", [(1e-12, 41), ("auto", 42)])
def test_full_rank_is_the_inverse(rho: Any, hvps: int, sketch: Any) -> None:
    matrix = matrix_with(torch.linspace(0.5, 4.0, 40, dtype=DTYPE), seed=3)
    solution = solve(matrix, V, hvp.Nystrom(100, rho=rho, sketch=sketch))
    assert relative_error(solution.value, torch.linalg.solve(matrix, V)) < 1e-9
    assert solution.converged and solution.hvps == hvps


def test_columns_give_the_printed_formula() -> None:
    """v / rho - C (W + C^T C / rho)^-1 C^T v / rho^2 (Hataya and Yamada, equation 6)."""
    matrix, rho, rank = matrix_with(torch.logspace(-2, 1, 40, dtype=DTYPE), seed=4), 0.1, 6
    sketch = Sketch(Layout.of([V]), rank, "columns", seed=0)
    chosen = sketch._tests[:, :40].argmax(1)
    assert len(set(chosen.tolist())) == rank
    c, w = matrix[:, chosen], matrix[chosen][:, chosen]
    truth = V / rho - c @ torch.linalg.solve(w + c.T @ c / rho, c.T @ V) / rho**2
    assert relative_error(solve(matrix, V, hvp.Nystrom(rank, rho=rho, sketch="columns")).value, truth) < 1e-10


def test_small_rho_in_single_precision_keeps_what_the_printed_formula_loses() -> None:
    rho, v = 1e-4, LOW_RANK @ V
    truth = torch.linalg.solve(LOW_RANK + rho * torch.eye(40, dtype=DTYPE), v)
    ours = relative_error(solve(LOW_RANK, v.float(), hvp.Nystrom(4, rho=rho)).value.double(), truth)
    tests = torch.randn(40, 4, generator=torch.Generator(torch.get_default_device()).manual_seed(0))
    c = LOW_RANK.float() @ tests
    printed = v.float() / rho - c @ torch.linalg.solve(tests.T @ c + c.T @ c / rho, c.T @ v.float()) / rho**2
    assert 100 * ours < relative_error(printed.double(), truth)
    assert ours < 0.02


@SKETCHES
@pytest.mark.parametrize("damping", [0.0, 0.3])
def test_automatic_rho_is_the_rayleigh_quotient_of_the_rest(damping: float, sketch: Any) -> None:
    """By dense algebra from Y (T^T Y)^+ Y^T."""
    matrix, rank = matrix_with(torch.logspace(-2, 1, 40, dtype=DTYPE), seed=4), 6
    tests = Sketch(Layout.of([V]), rank, sketch, seed=0)._tests[:, :40].T
    images = matrix @ tests
    values, vectors = torch.linalg.eigh(images @ torch.linalg.pinv(tests.T @ images, hermitian=True) @ images.T)
    values, vectors = values[-rank:], vectors[:, -rank:]
    rest = V - vectors @ (vectors.T @ V)
    rho = rest @ matrix @ rest / (rest @ rest)
    truth = vectors @ ((vectors.T @ V) / (values + damping)) + rest / (rho + damping)
    solution = solve(matrix, V, hvp.Nystrom(rank, damping=damping, sketch=sketch))
    assert relative_error(solution.value, truth) < 1e-8
    residual = V - matrix @ truth - damping * truth
    assert solution.residual_norm == pytest.approx(float(residual.norm() / V.norm()), rel=1e-6)
    assert solution.hvps == solution.iterations == rank + 2


def test_automatic_rho_serves_where_a_small_one_is_worse_than_zero() -> None:
    """A slowly falling spectrum over a decay of 1e-3, as of a regression: errors fall with the rank, from below 1."""
    values = 1e-3 + 5 / torch.arange(1, 401, dtype=DTYPE) ** 1.5
    matrix, v = matrix_with(values, seed=8), randn(400, seed=9)
    v = matrix @ v + v / 100  # more of it where eigenvalues are large, as of a gradient
    truth = torch.linalg.solve(matrix, v)
    ranks = (2, 5, 10, 20, 50, 100)
    errors, small = (
        [relative_error(solve(matrix, v, hvp.Nystrom(rank, rho=rho)).value, truth) for rank in ranks]
        for rho in ("auto", 1e-3)
    )
    assert sorted(errors, reverse=True) == errors and errors[0] < 1 and errors[-1] < 0.6
    assert min(small[:4]) > 1


def test_error_falls_with_the_rank() -> None:
    falling = matrix_with(torch.logspace(-4, 1, 40, dtype=DTYPE), seed=5)
    damped = falling + 0.01 * torch.eye(40, dtype=DTYPE)
    errors = [
        relative_error(solve(falling, V, hvp.Nystrom(k, rho=0.01)).value, torch.linalg.solve(damped, V))
        for k in (5, 15, 30)
    ]
    assert errors[0] > errors[1] > errors[2] and errors[2] < 0.2


def test_a_flat_spectrum_is_no_place_for_a_fixed_rho() -> None:
    identity = torch.eye(40, dtype=DTYPE)
    fixed = solve(identity, V, hvp.Nystrom(5, rho=0.01))
    assert fixed.residual_norm > 1 and fixed.status is hvp.Status.DIVERGED
    fitted = solve(identity, V, hvp.Nystrom(5))
    assert fitted.converged and relative_error(fitted.value, V) < 1e-12


@SKETCHES
@DTYPES
def test_automatic_rho_of_a_singular_operator(dtype: torch.dtype, sketch: Any) -> None:
    """The least-squares solution of smallest norm; with damping, the inverse."""
    truth = torch.linalg.pinv(LOW_RANK, hermitian=True, rtol=1e-9) @ V
    accuracy = 2e-3 if dtype == torch.float32 else 1e-10
    for v, status in ((V, hvp.Status.SINGULAR), (LOW_RANK @ truth, hvp.Status.CONVERGED)):
        solution = solve(LOW_RANK, v.to(dtype), hvp.Nystrom(8, sketch=sketch))
        assert solution.status is status and relative_error(solution.value.double(), truth) < accuracy
    damped = solve(LOW_RANK, V.to(dtype), hvp.Nystrom(8, damping=0.1, sketch=sketch))
    exact = torch.linalg.solve(LOW_RANK + 0.1 * torch.eye(40, dtype=DTYPE), V)
    assert damped.converged and relative_error(damped.value.double(), exact) < accuracy
    zero = solve(torch.zeros(40, 40, dtype=DTYPE), V.to(dtype), hvp.Nystrom(3, sketch=sketch))
    assert zero.status is hvp.Status.SINGULAR and not zero.value.any()


@SKETCHES
def test_negative_curvature_has_a_status(sketch: str) -> None:
    matrix = matrix_with([-3.0, -1.0] + [0.0] * 34 + [1.0, 2.0, 4.0, 6.0], seed=6)
    solution = solve(matrix, V, hvp.Nystrom(10, rho=0.5, sketch=sketch))
    assert solution.status is hvp.Status.NEGATIVE_CURVATURE and torch.isfinite(solution.value).all()
    assert float(solution.value.norm()) <= float(V.norm()) / 0.5 * (1 + 1e-9), "no eigenvalue below rho is inverted"
    fitted = solve(matrix, V, hvp.Nystrom(10, sketch=sketch))
    assert fitted.status is hvp.Status.NEGATIVE_CURVATURE and torch.isfinite(fitted.value).all()


def test_several_tensors_the_same_twice_and_a_seed() -> None:
    like = [torch.zeros(5, 6, dtype=DTYPE), torch.zeros((), dtype=DTYPE), torch.zeros(9, dtype=DTYPE)]
    calls = [
        hvp.solve(
            lambda v: unflat(LOW_RANK @ flat(v), like), unflat(V, like), hvp.Nystrom(6, rho=0.01, seed=seed)
        ).value
        for seed in (0, 0, 1)
    ]
    assert all(torch.equal(a, b) for a, b in zip(calls[0], calls[1], strict=True))
    assert not torch.equal(calls[0][0], calls[2][0])
    truth = torch.linalg.solve(LOW_RANK + 0.01 * torch.eye(40, dtype=DTYPE), V)
    assert relative_error(flat(calls[0]), truth) < 1e-10


@pytest.mark.parametrize("name", BILEVEL)
def test_hypergradient_is_the_closed_form(name: str) -> None:
    problem = BILEVEL[name]()
    solver = hvp.Nystrom(len(problem.hessian))
    result = hvp.Hypergradient(problem.train_loss, problem.val_loss, solver=solver)(
        problem.weights, problem.hyper, None, None
    )
    torch.testing.assert_close(result.grads, problem.hypergradient, rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize(
    "error, argument, arguments",
    [
        (TypeError, "rank", {"rank": 2.0}),
        (ValueError, "rank", {"rank": 0}),
        (ValueError, "rho", {"rank": 2, "rho": 0.0}),
        (TypeError, "rho", {"rank": 2, "rho": "1"}),
        (ValueError, "damping", {"rank": 2, "damping": -1.0}),
        (ValueError, "sketch", {"rank": 2, "sketch": "rows"}),
    ],
)
def test_bad_arguments(error: type[Exception], argument: str, arguments: dict) -> None:
    with pytest.raises(error, match=f"{argument}: expected.*got"):
        hvp.Nystrom(**arguments)
