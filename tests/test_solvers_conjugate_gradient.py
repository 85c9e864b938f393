"""Conjugate gradients against dense float64 solves, where they stop and why, and how often they wait."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from problems_with_known_answers import BILEVEL, DTYPE, flat, matrix_with, randn, relative_error, spd_problems, unflat
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import hvp_engine as hvp
from hvp_engine.solvers.iteration import CHECK_EVERY, REFRESH_EVERY

SPD = matrix_with([0.1, 0.4, 1.0, 1.7, 3.0, 9.0], seed=1)
V = randn(6, seed=2)
IDENTITY = torch.eye(6, dtype=DTYPE)
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)


class Matrix:
    """v -> A v, counting its calls."""

    def __init__(self, matrix: Tensor):
        self.matrix, self.calls = matrix, 0

    def __call__(self, v: Tensor) -> Tensor:
        self.calls += 1
        return self.matrix.to(v.dtype) @ v


def residual_of(matrix: Tensor, v: Tensor, x: Tensor) -> float:
    return float((v - matrix @ x.double()).norm() / v.norm())


# --- against dense solves --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("index", range(19))
def test_positive_definite_of_condition_1_to_1e6(index: int, backend: str) -> None:
    matrix, v = spd_problems(19)[index]
    operator = Matrix(matrix)
    with hvp.use_backend(backend):
        solution = hvp.solve(operator, v, hvp.ConjugateGradient(2000))
    assert solution.converged and solution.residual_of == "returned"
    assert solution.residual_norm <= 3.7e-11
    assert residual_of(matrix, v, solution.value) < 1e-9
    values = torch.linalg.eigvalsh(matrix)
    condition = float(values[-1] / values[0])
    assert relative_error(solution.value, torch.linalg.solve(matrix, v)) < 1e-9 * condition
    assert operator.calls == solution.iterations == solution.hvps < 2000


@DTYPES
@pytest.mark.parametrize("size", [1, 2, 5, 8])
def test_exact_after_n_products_and_not_before(size: int, dtype: torch.dtype) -> None:
    matrix = matrix_with(torch.linspace(1.0, 9.0, size, dtype=DTYPE), seed=size)
    v = randn(size, seed=3)
    solution = hvp.solve(Matrix(matrix), v.to(dtype), hvp.ConjugateGradient(size, tol=0.0))
    tolerance = {torch.float32: 1e-5, torch.float64: 1e-13}[dtype]
    assert relative_error(solution.value.double(), torch.linalg.solve(matrix, v)) < tolerance
    if size > 1:
        short = hvp.solve(Matrix(matrix), v.to(dtype), hvp.ConjugateGradient(size - 1, tol=0.0))
        assert relative_error(short.value.double(), torch.linalg.solve(matrix, v)) > 20 * tolerance
        assert short.status is hvp.Status.ITERATION_LIMIT


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_each_iterate_is_the_best_of_its_krylov_space(count: int) -> None:
    basis, _ = torch.linalg.qr(torch.stack([torch.linalg.matrix_power(SPD, k) @ V for k in range(count)], 1))
    truth = basis @ torch.linalg.solve(basis.T @ SPD @ basis, basis.T @ V)
    solution = hvp.solve(Matrix(SPD), V, hvp.ConjugateGradient(count, tol=0.0))
    assert relative_error(solution.value, truth) < 1e-11
    assert solution.residual_norm == pytest.approx(residual_of(SPD, V, truth), rel=1e-9)


@DTYPES
@pytest.mark.parametrize("scale", [1.0, 2.0, 1e-6, 1e6])
def test_multiples_of_the_identity_take_one_step(scale: float, dtype: torch.dtype) -> None:
    operator = Matrix(scale * IDENTITY)
    solution = hvp.solve(operator, V.to(dtype), hvp.ConjugateGradient(100))
    torch.testing.assert_close(
        solution.value, (V / scale).to(dtype), rtol=1e-6 if dtype == torch.float32 else 1e-14, atol=0
    )
    assert solution.converged and operator.calls == 1


@DTYPES
@pytest.mark.parametrize("scale", [1e-6, 1e-3, 1.0, 1e3, 1e6])
def test_scale_of_the_right_hand_side(scale: float, dtype: torch.dtype) -> None:
    solution = hvp.solve(Matrix(SPD), (scale * V).to(dtype), hvp.ConjugateGradient(30))
    assert solution.converged
    truth = torch.linalg.solve(SPD, scale * V)
    assert relative_error(solution.value.double(), truth) < (1e-3 if dtype == torch.float32 else 1e-9)


@DTYPES
@pytest.mark.parametrize("iterations", [0, 1, 20])
def test_zero_right_hand_side(iterations: int, dtype: torch.dtype) -> None:
    operator = Matrix(SPD)
    solution = hvp.solve(operator, torch.zeros(6, dtype=dtype), hvp.ConjugateGradient(iterations))
    assert torch.equal(solution.value, torch.zeros(6, dtype=dtype))
    assert solution.converged and solution.residual_norm == 0.0
    assert operator.calls <= 1


def test_no_product_gives_zero() -> None:
    solution = hvp.solve(Matrix(SPD), V, hvp.ConjugateGradient(0))
    assert torch.equal(solution.value, torch.zeros_like(V))
    assert (solution.residual_of, solution.residual_norm) == ("none", 1.0)
    assert solution.status is hvp.Status.ITERATION_LIMIT


@DTYPES
def test_singular_and_consistent(dtype: torch.dtype) -> None:
    matrix = matrix_with([0.0, 0.0, 1.0, 2.0, 5.0, 9.0], seed=4)
    v = matrix @ V
    for iterations in (6, 300):
        solution = hvp.solve(Matrix(matrix), v.to(dtype), hvp.ConjugateGradient(iterations))
        assert solution.converged
        truth = torch.linalg.pinv(matrix, hermitian=True) @ v
        assert relative_error(solution.value.double(), truth) < (1e-4 if dtype == torch.float32 else 1e-9)


def test_singular_and_inconsistent_is_reported() -> None:
    matrix = matrix_with([0.0, 1.0, 1.0, 2.0, 5.0, 9.0], seed=4)
    solution = hvp.solve(Matrix(matrix), V, hvp.ConjugateGradient(300))
    assert torch.isfinite(solution.value).all()
    assert not solution.converged, "whatever the processor rounds the eigenvalue 0 to"


def test_singular_to_rounding_is_reported() -> None:
    """A smallest eigenvalue of 1e-16 is one that rounding made: the solution of norm 1e15 means nothing."""
    matrix = torch.diag(torch.tensor([1e-16, 1.0, 1.0, 2.0, 5.0, 9.0], dtype=DTYPE))
    solution = hvp.solve(Matrix(matrix), V, hvp.ConjugateGradient(40, tol=1e-6))
    assert solution.status is hvp.Status.SINGULAR
    assert solution.residual_norm > 0.1 and solution.value.norm() > 1e14
    with_damping = hvp.solve(Matrix(matrix), V, hvp.ConjugateGradient(40, damping=1e-3))
    assert with_damping.converged and with_damping.residual_norm < 1e-6


def test_exactly_singular_and_inconsistent_is_reported() -> None:
    matrix = torch.diag(torch.tensor([0.0, 1, 1, 2, 5, 9], dtype=DTYPE))
    with pytest.raises(hvp.DivergenceError):
        hvp.solve(Matrix(matrix), V, hvp.ConjugateGradient(300))


@DTYPES
@pytest.mark.parametrize("kind", ["blocks", "0-dim tensors", "strides"])
def test_blocks_coupled_across_tensors(kind: str, dtype: torch.dtype) -> None:
    shapes = {
        "blocks": [(2, 3), (4,), (1, 5)],
        "0-dim tensors": [(), (3,), (), (2, 1)],
        "strides": [(3, 2, 2, 2), (5,)],
    }
    like = [torch.zeros(shape, dtype=dtype) for shape in shapes[kind]]
    if kind == "strides":
        like[0] = like[0].to(memory_format=torch.channels_last)
    size = sum(tensor.numel() for tensor in like)
    matrix, v = matrix_with(torch.linspace(0.5, 5.0, size, dtype=DTYPE), seed=5), randn(size, seed=6)

    def operator(parts: list[Tensor]) -> list[Tensor]:
        return unflat(matrix @ flat(parts), like)

    vector = [part.clone(memory_format=torch.preserve_format) for part in like]
    for part, value in zip(vector, unflat(v, like), strict=True):
        part.copy_(value)
    solution = hvp.solve(operator, vector, hvp.ConjugateGradient(2 * size))
    assert [part.shape for part in solution.value] == [part.shape for part in like]
    assert relative_error(flat(solution.value), torch.linalg.solve(matrix, v)) < (
        1e-4 if dtype == torch.float32 else 1e-9
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision_weights(dtype: torch.dtype) -> None:
    diagonal = torch.tensor([0.5, 1.0, 1.5, 2.0], dtype=DTYPE)
    v = torch.tensor([1.0, -2.0, 0.5, 3.0], dtype=dtype)
    for iterations in (8, 2 * REFRESH_EVERY):
        solution = hvp.solve(lambda t: diagonal.to(dtype) * t, v, hvp.ConjugateGradient(iterations))
        assert solution.value.dtype == dtype
        assert relative_error(solution.value.double(), v.double() / diagonal) < 2e-2


@pytest.mark.parametrize("damping", [0.3, 4.0])
@pytest.mark.parametrize("iterations", [3, 100])
def test_damping_is_a_multiple_of_the_identity(damping: float, iterations: int) -> None:
    solver = hvp.ConjugateGradient(iterations, tol=0.0)
    damped = hvp.solve(Matrix(SPD), V, replace(solver, damping=damping))
    plain = hvp.solve(Matrix(SPD + damping * IDENTITY), V, solver)
    assert relative_error(damped.value, plain.value) < 1e-12
    if iterations == 100:
        assert relative_error(damped.value, torch.linalg.solve(SPD + damping * IDENTITY, V)) < 1e-12


# --- long runs -------------------------------------------------------------------------------------------------------


def hilbert_like(condition: float) -> tuple[Tensor, Tensor]:
    values = torch.logspace(0, torch.log10(torch.tensor(condition)).item(), 80, dtype=DTYPE)
    return matrix_with(values, seed=7), randn(80, seed=8)


@pytest.mark.parametrize("damping", [0.0, 0.2])
def test_the_residual_is_recomputed(damping: float) -> None:
    """Every 51st product is taken at x itself, and what it shows is what the solve goes on with."""
    matrix, v = hilbert_like(1e5)
    taken: list[Tensor] = []

    def operator(direction: Tensor) -> Tensor:
        taken.append(direction.clone())
        return matrix @ direction

    solution = hvp.solve(operator, v, hvp.ConjugateGradient(REFRESH_EVERY, tol=0.0, damping=damping))
    x = solution.value
    taken.clear()
    after = hvp.solve(operator, v, hvp.ConjugateGradient(REFRESH_EVERY + 1, tol=0.0, damping=damping))
    assert torch.equal(taken[REFRESH_EVERY], x) and torch.equal(after.value, x)
    damped = matrix + damping * torch.eye(80, dtype=DTYPE)
    assert after.residual_norm == pytest.approx(residual_of(damped, v, x), rel=1e-9)


def test_single_precision_reaches_what_its_rounding_allows() -> None:
    matrix, v = hilbert_like(1e3)
    solution = hvp.solve(Matrix(matrix), v.float(), hvp.ConjugateGradient(2000))
    assert solution.converged
    assert residual_of(matrix, v, solution.value) < 2e-4
    assert relative_error(solution.value.double(), torch.linalg.solve(matrix, v)) < 1e-2


def test_more_products_than_needed_change_nothing() -> None:
    results = [hvp.solve(Matrix(SPD), V, hvp.ConjugateGradient(count)) for count in (7, 8, 500)]
    assert all(torch.equal(result.value, results[0].value) for result in results)
    assert results[-1].iterations <= 6 + CHECK_EVERY


def test_tolerance() -> None:
    matrix, v = hilbert_like(1e4)
    counts = []
    for tol in (1e-2, 1e-4, 1e-8):
        solution = hvp.solve(Matrix(matrix), v, hvp.ConjugateGradient(5000, tol=tol))
        assert solution.converged and 0 < residual_of(matrix, v, solution.value) < 1.01 * tol
        counts.append(solution.iterations)
    assert counts[0] < counts[1] < counts[2]


# --- negative curvature ----------------------------------------------------------------------------------------------


@DTYPES
@pytest.mark.parametrize("iterations", [6, 200])
def test_indefinite(iterations: int, dtype: torch.dtype) -> None:
    matrix = matrix_with([-0.5, 0.3, 1.0, 1.7, 3.0, 4.0], seed=9)
    solution = hvp.solve(Matrix(matrix), V.to(dtype), hvp.ConjugateGradient(iterations))
    assert solution.status is hvp.Status.NEGATIVE_CURVATURE
    # the iterate is one of those before: it lowers the quadratic that a positive definite matrix would have
    x = solution.value.double()
    assert float(x @ matrix @ x / 2 - V @ x) < 0
    assert solution.residual_norm == pytest.approx(residual_of(matrix, V, x), rel=1e-4)
    damped = hvp.solve(Matrix(matrix), V.to(dtype), hvp.ConjugateGradient(iterations, damping=0.6))
    assert damped.converged


def test_negative_definite_stays_at_zero() -> None:
    solution = hvp.solve(Matrix(-SPD), V, hvp.ConjugateGradient(50))
    assert torch.equal(solution.value, torch.zeros_like(V))
    assert solution.status is hvp.Status.NEGATIVE_CURVATURE and solution.residual_norm == 1.0
    assert solution.iterations < 50


def test_negative_curvature_found_late_keeps_the_iterate() -> None:
    matrix = torch.diag(torch.tensor([1.0, 2.0, 3.0, -1.0], dtype=DTYPE))
    v = torch.tensor([1.0, 1.0, 1.0, 1e-9], dtype=DTYPE)
    solution = hvp.solve(Matrix(matrix), v, hvp.ConjugateGradient(100, tol=1e-14))
    assert solution.status is hvp.Status.NEGATIVE_CURVATURE
    torch.testing.assert_close(solution.value[:3], torch.tensor([1.0, 0.5, 1 / 3], dtype=DTYPE), rtol=1e-6, atol=0)


# --- waiting for the device ------------------------------------------------------------------------------------------


class Reads(TorchDispatchMode):
    """Counts reads of a number on the host."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


@contextmanager
def reads() -> Iterator[Reads]:
    with Reads() as counter:
        yield counter


@pytest.mark.parametrize("preconditioner", [None, lambda v: [part / 2 for part in v]], ids=["plain", "preconditioned"])
@pytest.mark.parametrize("iterations", [4, 30, 120])
def test_at_most_one_read_for_each_check_interval(iterations: int, preconditioner: Callable | None) -> None:
    matrix, v = hilbert_like(1e6)
    solver = hvp.ConjugateGradient(iterations, tol=0.0, preconditioner=preconditioner)
    with reads() as plain:
        hvp.solve(Matrix(matrix), v, replace(solver, iterations=0))
    with reads() as counter:
        solution = hvp.solve(Matrix(matrix), v, solver)
    assert solution.iterations == iterations
    assert 1 <= counter.count - plain.count <= -(-iterations // CHECK_EVERY)


# --- in use ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ["eager", "recorded", "linearized"])
@pytest.mark.parametrize("name", BILEVEL)
def test_hypergradient_is_the_closed_form(name: str, engine: str) -> None:
    problem = BILEVEL[name]()
    solver = hvp.ConjugateGradient(len(problem.hessian), tol=0.0)
    result = hvp.Hypergradient(problem.train_loss, problem.val_loss, solver=solver, engine=engine)(
        problem.weights, problem.hyper, None, None
    )
    torch.testing.assert_close(result.grads, problem.hypergradient, rtol=1e-9, atol=1e-12)


def test_v_stays_and_twice_is_the_same() -> None:
    v = V.clone().requires_grad_()
    first, second = (hvp.solve(Matrix(SPD), v, hvp.ConjugateGradient(4)) for _ in range(2))
    assert torch.equal(first.value, second.value)
    assert torch.equal(v.detach(), V) and v.grad is None and v.requires_grad
    assert not first.value.requires_grad


@pytest.mark.parametrize(
    "error, argument, arguments",
    [
        (TypeError, "iterations", {"iterations": 2.0}),
        (ValueError, "iterations", {"iterations": -1}),
        (TypeError, "tol", {"iterations": 2, "tol": "1e-3"}),
        (ValueError, "tol", {"iterations": 2, "tol": -1.0}),
        (ValueError, "tol", {"iterations": 2, "tol": float("nan")}),
        (ValueError, "damping", {"iterations": 2, "damping": -1.0}),
        (TypeError, "preconditioner", {"iterations": 2, "preconditioner": torch.ones(2)}),
    ],
)
def test_bad_arguments(error: type[Exception], argument: str, arguments: dict) -> None:
    with pytest.raises(error, match=f"{argument}: expected.*got"):
        hvp.ConjugateGradient(**arguments)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite(bad: float) -> None:
    with pytest.raises(hvp.NonFiniteError, match="v: expected finite values"):
        hvp.solve(Matrix(SPD), torch.tensor([bad, *[1.0] * 5], dtype=DTYPE), hvp.ConjugateGradient(10))
    with pytest.raises(hvp.NonFiniteError, match="operator: expected finite products"):
        hvp.solve(Matrix(bad * torch.ones(6, 6, dtype=DTYPE)), V, hvp.ConjugateGradient(10))


def test_a_tolerance_out_of_reach_does_not_make_a_definite_operator_singular() -> None:
    generator = torch.Generator().manual_seed(0)
    vectors, _ = torch.linalg.qr(torch.randn(30, 30, generator=generator, dtype=torch.float64))
    matrix = (vectors @ torch.diag(torch.logspace(0, 4, 30, dtype=torch.float64)) @ vectors.T).float()
    v = vectors[:, :5].T.float().contiguous()  # eigenvectors: a residual of rounding is far from them
    solution = hvp.solve(lambda x: matrix @ x, v, hvp.ConjugateGradient(400, tol=1e-5), batched=True)
    true = ((v.T.double() - matrix.double() @ solution.value.T.double()).norm(dim=0)).max()
    assert solution.status is not hvp.Status.SINGULAR
    assert solution.residual_norm <= 10 * true


def test_a_residual_that_rounding_has_parted_from_the_truth_is_measured() -> None:
    generator = torch.Generator().manual_seed(1)
    vectors, _ = torch.linalg.qr(torch.randn(40, 40, generator=generator, dtype=torch.float64))
    matrix = (vectors @ torch.diag(torch.logspace(-4, 0, 40, dtype=torch.float64)) @ vectors.T).float()
    for _ in range(5):
        v = torch.randn(40, generator=generator)
        solution = hvp.solve(lambda x: matrix @ x, v, hvp.ConjugateGradient(1000, tol=1e-5))
        true = float((v.double() - matrix.double() @ solution.value.double()).norm() / v.double().norm())
        assert solution.residual_norm == pytest.approx(true, rel=0.5)
        rounding = torch.finfo(torch.float32).eps * float(
            solution.value.norm() / v.norm()
        )  # times 1, the largest value
        assert not solution.converged or true <= max(1e-5, 4 * rounding)
