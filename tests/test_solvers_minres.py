"""MINRES against dense float64 solves and scipy's, on definite, indefinite and singular operators."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from problems_with_known_answers import BILEVEL, DTYPE, flat, matrix_with, randn, relative_error, spd_problems, unflat
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import hvp_engine as hvp
from hvp_engine.solvers.iteration import CHECK_EVERY

VALUES = torch.tensor([-4.0, -1.0, -0.3, 0.2, 0.5, 1.0, 2.0, 6.0], dtype=DTYPE)
INDEFINITE = matrix_with(VALUES, seed=1)
V = randn(8, seed=2)
IDENTITY = torch.eye(8, dtype=DTYPE)
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)


def solve(matrix: Tensor, v: Tensor, solver: hvp.MINRES) -> hvp.Solution:
    return hvp.solve(lambda x: matrix.to(x.dtype) @ x, v, solver)


def residual_of(matrix: Tensor, v: Tensor, x: Tensor) -> float:
    return float((v - matrix @ x.double()).norm() / v.norm())


def mirrored(condition: float, size: int = 60) -> tuple[Tensor, Tensor]:
    """As many eigenvalues below zero as above, of sizes from 1 / condition to 1."""
    half = torch.logspace(-torch.log10(torch.tensor(condition)).item(), 0, size // 2, dtype=DTYPE)
    return matrix_with(torch.cat([-half, half]), seed=3), randn(size, seed=4)


def with_zeros(values: Tensor, zeros: int) -> Tensor:
    values = values.clone()
    values[:zeros] = 0.0
    return matrix_with(values, seed=5)


# --- against dense solves and scipy ----------------------------------------------------------------------------------


@pytest.mark.parametrize("index", range(0, 19, 3))
def test_positive_definite_of_condition_1_to_1e6(index: int) -> None:
    matrix, v = spd_problems(19)[index]
    solution = solve(matrix, v, hvp.MINRES(2000))
    values = torch.linalg.eigvalsh(matrix)
    assert solution.converged and solution.residual_of == "returned"
    assert residual_of(matrix, v, solution.value) < 1e-12 * float(values[-1] / values[0]) + 1e-10
    assert relative_error(solution.value, torch.linalg.solve(matrix, v)) < 1e-8
    assert solution.hvps - solution.iterations in (0, 1) and solution.iterations < 2000  # 1: the residual was measured


@DTYPES
@pytest.mark.parametrize("condition", [1.0, 10.0, 100.0, 1e3])
def test_indefinite(condition: float, dtype: torch.dtype) -> None:
    matrix, v = mirrored(condition)
    solution = solve(matrix, v.to(dtype), hvp.MINRES(3000))
    slack = 2e-4 if dtype == torch.float32 else 1e-10  # by which rounding parts the updated residual from the true one
    assert residual_of(matrix, v, solution.value) == pytest.approx(solution.residual_norm, rel=0.2, abs=slack)
    error = relative_error(solution.value.double(), torch.linalg.solve(matrix, v))
    assert error < (1e-3 if dtype == torch.float32 else 1e-9)
    assert solution.converged


def test_not_worse_than_scipy() -> None:
    minres = pytest.importorskip("scipy.sparse.linalg").minres
    for condition in (10.0, 1e3, 1e5):
        matrix, v = mirrored(condition)
        truth = torch.linalg.solve(matrix, v)
        for iterations in (5, 30, 2000):
            theirs = torch.from_numpy(minres(matrix.numpy(), v.numpy(), rtol=1e-14, maxiter=iterations)[0])
            ours = solve(matrix, v, hvp.MINRES(iterations, tol=0.0)).value
            if iterations == 5 or (iterations == 30 and condition == 10.0):
                assert relative_error(ours, theirs) < 1e-6, "the same iterates, before rounding sets in"
            elif iterations == 2000:
                assert relative_error(ours, truth) < 2 * relative_error(theirs, truth) + 1e-10


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_each_iterate_has_the_smallest_residual_of_its_krylov_space(count: int) -> None:
    basis, _ = torch.linalg.qr(torch.stack([torch.linalg.matrix_power(INDEFINITE, k) @ V for k in range(count)], 1))
    truth = basis @ torch.linalg.lstsq(INDEFINITE @ basis, V[:, None]).solution[:, 0]
    solution = solve(INDEFINITE, V, hvp.MINRES(count, tol=0.0))
    assert relative_error(solution.value, truth) < 1e-9
    assert solution.residual_norm == pytest.approx(residual_of(INDEFINITE, V, truth), rel=1e-9)


def test_residual_never_grows() -> None:
    norms = [solve(INDEFINITE, V, hvp.MINRES(count, tol=0.0)).residual_norm for count in range(9)]
    assert norms == sorted(norms, reverse=True) and norms[0] == 1.0 and norms[-1] < 1e-10


@pytest.mark.parametrize("backend", ["auto", "reference"])
@DTYPES
def test_exact_after_n_products_and_not_before(dtype: torch.dtype, backend: str) -> None:
    with hvp.use_backend(backend):
        full, short = (solve(INDEFINITE, V.to(dtype), hvp.MINRES(count, tol=0.0)) for count in (8, 7))
    # In float32 the error is 0.6% or 1.7%, by the processor: how its BLAS rounds decides what eight products are worth.
    truth, tolerance = torch.linalg.solve(INDEFINITE, V), {torch.float32: 2.5e-2, torch.float64: 1e-10}[dtype]
    assert relative_error(full.value.double(), truth) < tolerance
    assert relative_error(short.value.double(), truth) > 0.03


# --- singular operators ----------------------------------------------------------------------------------------------

SPECTRA = {
    "indefinite": torch.linspace(-2, 3, 60, dtype=DTYPE),
    "semi-definite": torch.linspace(0.1, 3, 60, dtype=DTYPE),
    "semi-definite, condition 1000": torch.logspace(-3, 0, 60, dtype=DTYPE),
}


@DTYPES
@pytest.mark.parametrize("zeros", [1, 5])
@pytest.mark.parametrize("name", SPECTRA)
def test_singular_and_consistent(name: str, zeros: int, dtype: torch.dtype) -> None:
    matrix = with_zeros(SPECTRA[name], zeros)
    v = matrix @ randn(60, seed=6)
    solution = solve(matrix, v.to(dtype), hvp.MINRES(2000))
    truth = torch.linalg.pinv(matrix, hermitian=True, rtol=1e-10) @ v
    assert solution.converged
    assert relative_error(solution.value.double(), truth) < (2e-2 if dtype == torch.float32 else 1e-8)


@pytest.mark.parametrize("zeros", [1, 5])
@pytest.mark.parametrize("name", SPECTRA)
def test_singular_and_inconsistent_gives_the_smallest_least_squares_solution(name: str, zeros: int) -> None:
    matrix, v = with_zeros(SPECTRA[name], zeros), randn(60, seed=6)
    truth = torch.linalg.pinv(matrix, hermitian=True, rtol=1e-10) @ v
    for iterations in (200, 2000):
        solution = solve(matrix, v, hvp.MINRES(iterations))
        assert solution.status is hvp.Status.SINGULAR and solution.iterations < 200
        assert relative_error(solution.value, truth) < 1e-4
        assert solution.residual_norm == pytest.approx(residual_of(matrix, v, truth), rel=1e-6)


@pytest.mark.parametrize("name", SPECTRA)
def test_singular_and_inconsistent_in_single_precision_is_finite_and_honest(name: str) -> None:
    """As far as the rounding of the solution itself allows: along the null space it may grow to a norm of 1e7, by the
    processor."""
    matrix, v = with_zeros(SPECTRA[name], 5), randn(60, seed=6)
    solution = solve(matrix, v.float(), hvp.MINRES(2000))
    assert solution.status is hvp.Status.SINGULAR
    rounding = (
        4 * torch.finfo(torch.float32).eps * 3 * float(solution.value.norm() / v.norm())
    )  # 3: the largest eigenvalue
    assert residual_of(matrix, v, solution.value) == pytest.approx(solution.residual_norm, rel=0.02, abs=rounding)


def test_preconditioned_least_squares_is_smallest_in_its_norm() -> None:
    """With D = diag(d), M = D^-1 the system is that of D^-1/2 A D^-1/2 and D^-1/2 v, for D^1/2 x."""
    matrix, v = with_zeros(SPECTRA["indefinite"], 3), randn(60, seed=6)
    d = torch.linspace(0.5, 2.0, 60, dtype=DTYPE)
    solution = solve(matrix, v, hvp.MINRES(500, preconditioner=lambda t: [t[0] / d.to(t[0].dtype)]))
    scaled = matrix / d.sqrt() / d.sqrt()[:, None]
    truth = torch.linalg.pinv(scaled, hermitian=True, rtol=1e-10) @ (v / d.sqrt()) / d.sqrt()
    assert solution.status is hvp.Status.SINGULAR
    assert relative_error(solution.value, truth) < 1e-5


@DTYPES
def test_zero_operator_and_a_right_hand_side_in_the_null_space(dtype: torch.dtype) -> None:
    for matrix in (torch.zeros(8, 8, dtype=DTYPE), torch.diag(torch.tensor([0.0, 0, 0, 0, 1, 1, 1, 2], dtype=DTYPE))):
        v = torch.tensor([1.0, 2, 3, 4, 0, 0, 0, 0], dtype=dtype)
        solution = solve(matrix, v, hvp.MINRES(20))
        assert solution.status is hvp.Status.SINGULAR and solution.iterations == 1
        assert torch.equal(solution.value, torch.zeros(8, dtype=dtype)) and solution.residual_norm == pytest.approx(1.0)


# --- tolerance, damping, preconditioner ------------------------------------------------------------------------------


def test_tolerance() -> None:
    matrix, v = mirrored(100.0)
    counts = []
    for tol in (1e-1, 1e-3, 1e-8):
        solution = solve(matrix, v, hvp.MINRES(5000, tol=tol))
        assert solution.converged and 0 < residual_of(matrix, v, solution.value) < 1.01 * tol
        counts.append(solution.iterations)
    assert counts[0] < counts[1] < counts[2]


def test_more_products_than_needed_change_nothing() -> None:
    results = [solve(INDEFINITE, V, hvp.MINRES(count)) for count in (9, 10, 500)]
    assert all(torch.equal(result.value, results[0].value) for result in results)
    assert results[-1].iterations <= 8 + CHECK_EVERY


@DTYPES
@pytest.mark.parametrize("damping", [0.3, 7.0])
def test_damping_is_a_multiple_of_the_identity(damping: float, dtype: torch.dtype) -> None:
    damped = solve(INDEFINITE, V.to(dtype), hvp.MINRES(5, tol=0.0, damping=damping))
    plain = solve(INDEFINITE + damping * IDENTITY, V.to(dtype), hvp.MINRES(5, tol=0.0))
    assert relative_error(damped.value.double(), plain.value.double()) < (1e-4 if dtype == torch.float32 else 1e-11)


@DTYPES
def test_preconditioner_changes_the_count_and_not_the_solution(dtype: torch.dtype) -> None:
    decay = torch.logspace(-2, 4, 40, dtype=DTYPE)
    matrix = matrix_with(torch.linspace(0.5, 2.0, 40, dtype=DTYPE), seed=10) + torch.diag(decay) - 20 * torch.eye(40)
    v = randn(40, seed=11)
    solver = hvp.MINRES(3000, preconditioner=lambda t: [t[0] / (decay - 19).abs().clamp_min(1.0).to(t[0].dtype)])
    better, plain = (solve(matrix, v.to(dtype), s) for s in (solver, replace(solver, preconditioner=None)))
    assert relative_error(better.value.double(), torch.linalg.solve(matrix, v)) < (
        1e-3 if dtype == torch.float32 else 1e-9
    )
    assert better.converged and better.iterations < plain.iterations / 2
    assert residual_of(matrix, v, better.value) == pytest.approx(better.residual_norm, rel=0.2, abs=1e-6)


@pytest.mark.parametrize("sign", [-1.0, 0.0, float("nan")])
def test_a_preconditioner_that_is_not_positive_definite_is_refused(sign: float) -> None:
    with pytest.raises(ValueError, match="preconditioner: expected a symmetric positive definite M.*got"):
        solve(INDEFINITE, V, hvp.MINRES(20, preconditioner=lambda v: [sign * part for part in v]))


# --- the rest --------------------------------------------------------------------------------------------------------


class Reads(TorchDispatchMode):
    """Counts reads of a number on the host."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("preconditioner", [None, lambda v: [part / 2 for part in v]], ids=["plain", "preconditioned"])
def test_at_most_one_read_for_each_check_interval(preconditioner) -> None:
    matrix, v = mirrored(1e5)
    solver = hvp.MINRES(40, tol=0.0, preconditioner=preconditioner)
    with Reads() as plain:
        solve(matrix, v, replace(solver, iterations=0))
    with Reads() as counter:
        assert solve(matrix, v, solver).iterations == 40
    assert 1 <= counter.count - plain.count <= -(-40 // CHECK_EVERY)


def test_several_tensors_and_low_precision() -> None:
    like = [torch.zeros(2, 3, dtype=DTYPE), torch.zeros((), dtype=DTYPE), torch.zeros(1, dtype=DTYPE)]
    solution = hvp.solve(lambda parts: unflat(INDEFINITE @ flat(parts), like), unflat(V, like), hvp.MINRES(30))
    assert relative_error(flat(solution.value), torch.linalg.solve(INDEFINITE, V)) < 1e-9
    diagonal = torch.tensor([0.5, -1.0, 1.5, -2.0], dtype=torch.bfloat16)
    v = torch.tensor([1.0, -2.0, 0.5, 3.0], dtype=torch.bfloat16)
    solution = hvp.solve(lambda t: diagonal * t, v, hvp.MINRES(8))
    assert solution.value.dtype == torch.bfloat16
    assert relative_error(solution.value.double(), v.double() / diagonal.double()) < 3e-2


@pytest.mark.parametrize("engine", ["eager", "recorded", "linearized"])
@pytest.mark.parametrize("name", BILEVEL)
def test_hypergradient_is_the_closed_form(name: str, engine: str) -> None:
    problem = BILEVEL[name]()
    result = hvp.Hypergradient(problem.train_loss, problem.val_loss, solver=hvp.MINRES(50, tol=0.0), engine=engine)(
        problem.weights, problem.hyper, None, None
    )
    torch.testing.assert_close(result.grads, problem.hypergradient, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_bad_values_are_named(bad: float) -> None:
    v = V.clone()
    v[3] = bad
    with pytest.raises(ValueError, match=r"^v: expected finite values"):
        solve(INDEFINITE, v, hvp.MINRES(5))
    with pytest.raises(hvp.DivergenceError, match=r"^operator: .*product A v of a finite v is NaN or Inf"):
        solve(INDEFINITE * bad, V, hvp.MINRES(5))


@pytest.mark.parametrize(
    "error, argument, arguments",
    [
        (TypeError, "iterations", {"iterations": 2.0}),
        (TypeError, "tol", {"iterations": 2, "tol": "1e-3"}),
        (ValueError, "tol", {"iterations": 2, "tol": -1.0}),
        (ValueError, "damping", {"iterations": 2, "damping": -1.0}),
        (TypeError, "preconditioner", {"iterations": 2, "preconditioner": torch.ones(2)}),
    ],
)
def test_bad_arguments(error: type[Exception], argument: str, arguments: dict) -> None:
    with pytest.raises(error, match=f"{argument}: expected.*got"):
        hvp.MINRES(**arguments)


@pytest.mark.parametrize("condition", [1e8, 1e10, 1e12])
def test_the_residual_is_true_where_rounding_has_spoiled_the_recurrence(condition: float) -> None:
    generator = torch.Generator().manual_seed(0)
    vectors, _ = torch.linalg.qr(torch.randn(12, 12, generator=generator, dtype=torch.float64))
    matrix = vectors @ torch.diag(torch.logspace(-math.log10(condition), 0, 12, dtype=torch.float64)) @ vectors.T
    for _ in range(3):
        v = torch.randn(12, generator=generator, dtype=torch.float64)
        for iterations in (20, 40, 100):
            solution = solve(matrix, v, hvp.MINRES(iterations))
            true = residual_of(matrix, v, solution.value)
            assert solution.residual_norm == pytest.approx(true, rel=0.05, abs=1e-7)
            assert not solution.converged or true < max(1e-7, 4e-11 * float(solution.value.norm() / v.norm()))


def test_a_norm_that_overflows_is_not_laid_to_a_preconditioner_that_is_not_there() -> None:
    with pytest.raises(hvp.DivergenceError, match="wider dtype"):
        hvp.solve(lambda x: x, torch.full((40,), 1e19), hvp.MINRES(5))
