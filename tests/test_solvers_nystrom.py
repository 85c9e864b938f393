"""The Nystrom approximation: exact where the rank is, as the printed formula elsewhere, and its numerics."""

from __future__ import annotations

import pytest
import torch
from cases import BILEVEL, DTYPE, flat, matrix_with, randn, relative_error, unflat
from torch import Tensor

import hvp_engine as hvp
from hvp_engine.low_rank import Sketch
from hvp_engine.vectors import Layout

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
def test_full_rank_is_the_inverse(sketch: str) -> None:
    matrix = matrix_with(torch.linspace(0.5, 4.0, 40, dtype=DTYPE), seed=3)
    solution = solve(matrix, V, hvp.Nystrom(100, rho=1e-12, sketch=sketch))
    assert relative_error(solution.value, torch.linalg.solve(matrix, V)) < 1e-9
    assert solution.converged and solution.hvps == 41


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
    tests = torch.randn(40, 4, generator=torch.Generator().manual_seed(0))
    c = LOW_RANK.float() @ tests
    printed = v.float() / rho - c @ torch.linalg.solve(tests.T @ c + c.T @ c / rho, c.T @ v.float()) / rho**2
    assert 100 * ours < relative_error(printed.double(), truth)
    assert ours < 0.02


def test_error_falls_with_the_rank_and_is_rough_for_a_flat_spectrum() -> None:
    falling = matrix_with(torch.logspace(-4, 1, 40, dtype=DTYPE), seed=5)
    damped = falling + 0.01 * torch.eye(40, dtype=DTYPE)
    errors = [
        relative_error(solve(falling, V, hvp.Nystrom(k)).value, torch.linalg.solve(damped, V)) for k in (5, 15, 30)
    ]
    assert errors[0] > errors[1] > errors[2] and errors[2] < 0.2
    solution = solve(torch.eye(40, dtype=DTYPE), V, hvp.Nystrom(5))
    assert solution.residual_norm > 1 and solution.status is hvp.Status.DIVERGED


@SKETCHES
def test_negative_curvature_has_a_status(sketch: str) -> None:
    matrix = matrix_with([-3.0, -1.0] + [0.0] * 34 + [1.0, 2.0, 4.0, 6.0], seed=6)
    solution = solve(matrix, V, hvp.Nystrom(10, rho=0.5, sketch=sketch))
    assert solution.status is hvp.Status.NEGATIVE_CURVATURE and torch.isfinite(solution.value).all()
    assert float(solution.value.norm()) <= float(V.norm()) / 0.5 * (1 + 1e-9), "no eigenvalue below rho is inverted"


def test_several_tensors_the_same_twice_and_a_seed() -> None:
    like = [torch.zeros(5, 6, dtype=DTYPE), torch.zeros((), dtype=DTYPE), torch.zeros(9, dtype=DTYPE)]
    calls = [
        hvp.solve(lambda v: unflat(LOW_RANK @ flat(v), like), unflat(V, like), hvp.Nystrom(6, seed=seed)).value
        for seed in (0, 0, 1)
    ]
    assert all(torch.equal(a, b) for a, b in zip(calls[0], calls[1], strict=True))
    assert not torch.equal(calls[0][0], calls[2][0])
    truth = torch.linalg.solve(LOW_RANK + 0.01 * torch.eye(40, dtype=DTYPE), V)
    assert relative_error(flat(calls[0]), truth) < 1e-10


@pytest.mark.parametrize("name", BILEVEL)
def test_hypergradient_is_the_closed_form(name: str) -> None:
    problem = BILEVEL[name]()
    solver = hvp.Nystrom(len(problem.hessian), rho=1e-10)
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
