"""The dense solve against torch's own in float64, and what it says of singular and too large problems."""

from __future__ import annotations

import pytest
import torch
from problems_with_known_answers import (
    BILEVEL,
    DTYPE,
    NETWORKS,
    dense_hessian,
    flat,
    matrix_with,
    randn,
    relative_error,
    spd_problems,
    unflat,
)
from torch import Tensor

import hvp_engine as hvp
from hvp_engine.solvers.batched import fill

V = randn(6, seed=1)
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)


@pytest.mark.parametrize("index", range(19))
def test_positive_definite_of_condition_1_to_1e6(index: int) -> None:
    matrix, v = spd_problems(19)[index]
    solution = hvp.solve(lambda x: matrix @ x, v, hvp.Exact())
    assert solution.converged and solution.iterations == solution.hvps == len(v)
    assert relative_error(solution.value, torch.linalg.solve(matrix, v)) < 1e-9


@DTYPES
@pytest.mark.parametrize("eigenvalues", [[-0.5, 0.3, 1.0, 1.7, 3.0, 4.0], [-4.0, -2.0, -1.0, -0.5, -3.0, -0.1]])
def test_indefinite(eigenvalues: list[float], dtype: torch.dtype) -> None:
    matrix = matrix_with(eigenvalues, seed=2)
    solution = hvp.solve(lambda x: matrix.to(dtype) @ x, V.to(dtype), hvp.Exact())
    assert solution.converged and solution.residual_norm < 1e-4
    tolerance = 1e-5 if dtype == torch.float32 else 1e-13
    assert relative_error(solution.value.double(), torch.linalg.solve(matrix, V)) < tolerance


@DTYPES
@pytest.mark.parametrize("eigenvalues", [[0.0, 0.0, 1.0, 1.7, 3.0, 4.0], [-0.5, 0.0, 1.0, 1.7, 3.0, 4.0], [0.0] * 6])
@pytest.mark.parametrize("consistent", [True, False])
def test_singular_gives_the_least_squares_solution_of_smallest_norm(
    eigenvalues: list[float], consistent: bool, dtype: torch.dtype
) -> None:
    matrix = matrix_with(eigenvalues, seed=3)
    v = matrix @ V if consistent else V
    solution = hvp.solve(lambda x: matrix.to(dtype) @ x, v.to(dtype), hvp.Exact())
    assert solution.status is hvp.Status.SINGULAR and "damping" in solution.status.value
    truth = torch.linalg.pinv(matrix, hermitian=True, rtol=1e-6) @ v
    torch.testing.assert_close(solution.value.double(), truth, rtol=0, atol=1e-5 if dtype == torch.float32 else 1e-12)
    if not consistent:
        assert solution.residual_norm == pytest.approx(float((v - matrix @ truth).norm() / v.norm()), rel=1e-5)


@pytest.mark.parametrize("seed", [24, 33, 79])
def test_singular_where_no_pivot_is_small(seed: int) -> None:
    matrix = matrix_with(torch.tensor([0.0, 0.3, 1.0], dtype=DTYPE), seed)
    b = matrix @ randn(3, seed=seed + 1)
    solution = hvp.solve(lambda v: matrix @ v, b, hvp.Exact())
    assert solution.status is hvp.Status.SINGULAR
    torch.testing.assert_close(solution.value, torch.linalg.pinv(matrix, hermitian=True, rtol=1e-9) @ b)


def test_nearly_singular_in_single_precision_wants_a_wider_dtype() -> None:
    diagonal = torch.tensor([1.0, 1e-8], dtype=torch.float32)
    v = torch.ones(2)
    assert hvp.solve(lambda x: diagonal * x, v, hvp.Exact()).status is hvp.Status.SINGULAR
    wide = hvp.solve(lambda x: diagonal * x, v, hvp.Exact(dtype=torch.float64))
    assert wide.converged and wide.value.dtype == torch.float32
    torch.testing.assert_close(wide.value, v / diagonal)


def test_double_precision_on_request() -> None:
    """Products that are exact in float32, a matrix whose factorization is not."""
    matrix = torch.tensor([[4.0 / (1 + i + j) if i != j else 4.0 for i in range(8)] for j in range(8)])
    matrix = (matrix * 1024).round() / 1024
    v = torch.arange(1.0, 9.0)
    truth = torch.linalg.solve(matrix.double(), v.double())
    single, double = (hvp.solve(lambda x: matrix @ x, v, hvp.Exact(dtype)) for dtype in (None, torch.float64))
    assert torch.equal(double.value, truth.float())
    assert double.residual_norm < 1e-14 < 1e-9 < single.residual_norm < 1e-5


@DTYPES
@pytest.mark.parametrize("scale", [1e-6, 1.0, 2.0, 1e6])
def test_multiples_of_the_identity_and_one_weight(scale: float, dtype: torch.dtype) -> None:
    for size in (1, 5):
        v = randn(size, seed=4).to(dtype)
        solution = hvp.solve(lambda x: scale * x, v, hvp.Exact())
        assert solution.converged
        torch.testing.assert_close(solution.value, v / scale)


@pytest.mark.parametrize("scale", [0.0, 1e-6, 1e6])
def test_scale_of_the_right_hand_side(scale: float) -> None:
    matrix = matrix_with([0.1, 0.4, 1.0, 1.7, 3.0, 9.0], seed=5)
    solution = hvp.solve(lambda x: matrix @ x, scale * V, hvp.Exact())
    torch.testing.assert_close(solution.value, torch.linalg.solve(matrix, scale * V), rtol=1e-12, atol=0)
    assert solution.converged


@pytest.mark.parametrize("damping", [0.3, 4.0])
def test_damping_is_a_multiple_of_the_identity(damping: float) -> None:
    matrix = matrix_with([-0.2, 0.0, 1.0, 1.7, 3.0, 9.0], seed=6)
    solution = hvp.solve(lambda x: matrix @ x, V, hvp.Exact(damping=damping))
    truth = torch.linalg.solve(matrix + damping * torch.eye(6, dtype=DTYPE), V)
    torch.testing.assert_close(solution.value, truth, rtol=1e-12, atol=0)


def test_a_matrix_that_is_not_quite_symmetric_is_averaged() -> None:
    matrix = matrix_with([1.0, 2.0, 3.0, 4.0, 5.0, 6.0], seed=7)
    skew = randn(6, 6, seed=8)
    skew = 0.01 * (skew - skew.T)
    solution = hvp.solve(lambda x: (matrix + skew) @ x, V, hvp.Exact())
    torch.testing.assert_close(solution.value, torch.linalg.solve(matrix, V), rtol=1e-12, atol=0)


@DTYPES
def test_blocks_coupled_across_tensors(dtype: torch.dtype) -> None:
    like = [torch.zeros(shape, dtype=dtype) for shape in [(3, 2, 2, 2), (), (4, 3), (0,), ()]]
    like[0] = like[0].to(memory_format=torch.channels_last)
    like[2] = like[2].T.contiguous().T
    size = sum(tensor.numel() for tensor in like)
    matrix, v = matrix_with(torch.linspace(-0.5, 5.0, size, dtype=DTYPE), seed=9), randn(size, seed=10)
    vector = [torch.empty_like(tensor).copy_(part) for tensor, part in zip(like, unflat(v, like), strict=True)]

    def operator(parts: list[Tensor]) -> list[Tensor]:
        return unflat(matrix @ flat(parts), like)

    solution = hvp.solve(operator, vector, hvp.Exact())
    tolerance = 1e-4 if dtype == torch.float32 else 1e-11
    assert relative_error(flat(solution.value), torch.linalg.solve(matrix, v)) < tolerance


def test_low_precision_weights() -> None:
    diagonal = torch.tensor([0.5, 1.0, 1.5, 2.0], dtype=torch.bfloat16)
    v = torch.tensor([1.0, -2.0, 0.5, 3.0], dtype=torch.bfloat16)
    solution = hvp.solve(lambda x: diagonal * x, v, hvp.Exact())
    assert solution.value.dtype == torch.bfloat16
    torch.testing.assert_close(solution.value, (v.float() / diagonal.float()).bfloat16())


@pytest.mark.parametrize("engine", ["eager", "recorded", "linearized"])
@pytest.mark.parametrize("name", BILEVEL)
def test_hypergradient_is_the_closed_form(name: str, engine: str) -> None:
    problem = BILEVEL[name]()
    result = hvp.Hypergradient(problem.train_loss, problem.val_loss, solver=hvp.Exact(), engine=engine)(
        problem.weights, problem.hyper, None, None
    )
    torch.testing.assert_close(result.grads, problem.hypergradient, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("name", ["mlp", "channels_last conv"])
def test_network(name: str) -> None:
    network = NETWORKS[name]()
    net = hvp.functional(network.module)
    operator = hvp.HessianOperator(lambda w: network.loss_of(net(w, network.x)), network.module)
    matrix = dense_hessian(network)
    parameters = dict(network.module.named_parameters())
    v = randn(len(matrix), seed=11)
    tree = dict(zip(parameters, unflat(v, list(parameters.values())), strict=True))
    solution = operator.solve(tree, hvp.Exact(damping=0.01))
    truth = torch.linalg.solve(matrix + 0.01 * torch.eye(len(v), dtype=DTYPE), v)
    assert relative_error(flat(list(solution.value.values())), truth) < 1e-9


@pytest.mark.parametrize("engine", ["recorded", "linearized"])
@pytest.mark.parametrize(
    ("loss", "samples", "low_rank"), [("softmax", 4, True), ("squared", 5, True), ("softmax", 60, False)]
)
def test_linear_model_with_a_decay_for_each_weight(engine: str, loss: str, samples: int, low_rank: bool) -> None:
    """Softmax has rank 4 * 9 of 410, the squared loss 5 * 10; with 60 samples the rank is that of the matrix."""
    inputs, weights = randn(samples, 40, seed=3), [randn(10, 40, seed=4), randn(10, seed=5)]
    decays = [1e-4 * randn(*w.shape, seed=6).exp() for w in weights]
    operator = hvp.LinearModelOperator(inputs, weights, loss=loss, decay=decays, engine=engine)  # type: ignore[arg-type]
    vs = [[randn(*w.shape, seed=seed) for w in weights] for seed in (7, 8)]
    matrix = hvp.Exact(damping=0.0).columns(operator.linear_map.layout)
    fill(matrix, operator.linear_map)
    for number, v in enumerate(vs):
        solution = operator.solve(v, hvp.Exact(max_size=400 if low_rank else 410, damping=1e-3))
        x = flat(list(solution.value))
        residual = matrix.matrix @ x + 1e-3 * x - flat(v)
        assert solution.status is hvp.Status.CONVERGED and solution.hvps < (150 if low_rank else 600)
        assert torch.linalg.vector_norm(residual) < 1e-12 * torch.linalg.vector_norm(flat(v)), number
        dense = torch.linalg.solve(matrix.matrix + 1e-3 * torch.eye(410, dtype=DTYPE), flat(v))
        assert relative_error(x, dense) < 1e-11


def test_too_many_weights_name_the_remedy() -> None:
    with pytest.raises(ValueError, match="at most max_size=5 weights; got 6.*GB.*ConjugateGradient.*max_size"):
        hvp.solve(lambda x: x, V, hvp.Exact(max_size=5))
    with pytest.raises(ValueError, match="at most max_size=10000 weights; got 10001, whose matrix takes 0.8 GB"):
        hvp.solve(lambda x: x, torch.zeros(10_001, dtype=DTYPE), hvp.Exact())


@pytest.mark.parametrize(
    "error, argument, arguments",
    [
        (ValueError, "dtype", {"dtype": torch.float16}),
        (ValueError, "dtype", {"dtype": "float64"}),
        (TypeError, "max_size", {"max_size": 10.0}),
        (ValueError, "max_size", {"max_size": 0}),
        (ValueError, "damping", {"damping": -1.0}),
    ],
)
def test_bad_arguments(error: type[Exception], argument: str, arguments: dict) -> None:
    with pytest.raises(error, match=f"{argument}: expected.*got"):
        hvp.Exact(**arguments)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite(bad: float) -> None:
    matrix = matrix_with([0.1, 0.4, 1.0, 1.7, 3.0, 9.0], seed=5)
    with pytest.raises(hvp.NonFiniteError, match="v: expected finite values"):
        hvp.solve(lambda x: matrix @ x, torch.tensor([bad, *[1.0] * 5], dtype=DTYPE), hvp.Exact())
    with pytest.raises(hvp.NonFiniteError, match="operator: expected finite products"):
        hvp.solve(lambda x: bad * (matrix @ x), V, hvp.Exact())


def test_a_solution_beyond_the_weights_dtype_is_refused() -> None:
    with pytest.raises(hvp.DivergenceError):
        hvp.solve(lambda v: 1e-20 * v, torch.full((3,), 1e19), hvp.Exact(dtype=torch.float64))
