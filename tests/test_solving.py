"""`solve`: operators and containers, the automatic alpha, the help on failure, and its memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from problems_with_known_answers import DTYPE, flat, matrix_with, randn, relative_error, spd_problems, truncated_sum
from torch import Tensor

import hvp_engine as hvp
from hvp_engine._support.flat_vector import Layout
from hvp_engine._support.pytree import flatten
from hvp_engine.diagnostics.memory import peak_memory
from hvp_engine.differentiation.linear_map import LinearMap
from hvp_engine.engines import EagerEngine

# Containers


@pytest.mark.parametrize(
    "v",
    [
        randn(3, seed=1),
        [randn(3, seed=1), randn(2, 2, seed=2)],
        (randn(3, seed=1),),
        {"b": randn(3, seed=1), "a": (randn(1, seed=2)[0], [randn(2, seed=3)])},
    ],
    ids=["tensor", "list", "tuple", "nested"],
)
def test_value_is_in_the_container_of_v(v: Any) -> None:
    leaves, structure = torch.utils._pytree.tree_flatten(v)

    def quadruple(tree: Any) -> Any:
        assert torch.utils._pytree.tree_structure(tree) == structure, "the callable gets the container of v"
        return torch.utils._pytree.tree_map(lambda leaf: 4 * leaf, tree)

    value, found = torch.utils._pytree.tree_flatten(hvp.solve(quadruple, v, hvp.Neumann(80, alpha=0.2)).value)
    assert found == structure
    torch.testing.assert_close(value, [leaf / 4 for leaf in leaves], rtol=1e-14, atol=0)


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (lambda v: v["a"], r"operator\(v\).*container"),
        (lambda v: {"a": v["a"][:1]}, r"operator\(v\)\[0\].*shape \(3,\)"),
        (lambda v: {"a": 1.0}, r"operator\(v\).*expected a tensor; got float"),
        (lambda v: None, r"operator\(v\).*expected a tensor; got NoneType"),
    ],
    ids=["container", "shape", "number", "none"],
)
def test_callable_that_returns_something_else(result: Callable[[Any], Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        hvp.solve(result, {"a": randn(3, seed=1)}, hvp.Neumann(2, alpha=0.1))


def test_graph_of_a_callable_is_not_kept() -> None:
    matrix = matrix_with([1.0, 2.0], seed=1).requires_grad_()
    value = hvp.solve(lambda v: matrix @ v, randn(2, seed=2), hvp.Neumann(3)).value
    assert not value.requires_grad


# The automatic alpha


@pytest.mark.parametrize(("matrix", "v"), spd_problems(50))
def test_auto_alpha_never_grows_the_residual(matrix: Tensor, v: Tensor) -> None:
    """Condition 1 to 1e6, with and without outliers, over six orders of scale."""
    largest = float(torch.linalg.eigvalsh(matrix)[-1])
    solution = hvp.solve(lambda x: matrix @ x, v, hvp.Neumann(300))
    assert solution.alpha is not None and 0 < solution.alpha * largest < 1.9
    assert solution.alpha * largest > 0.2, "safe, but not timid either"
    assert solution.residual_norm <= 1
    assert solution.status in (hvp.Status.CONVERGED, hvp.Status.ITERATION_LIMIT)
    torch.testing.assert_close(solution.value, truncated_sum(matrix, v, 300, solution.alpha), rtol=1e-7, atol=0)
    assert solution.hvps == 300 + min(8, len(v))


@pytest.mark.parametrize("condition", [1.0, 10.0, 1e2, 1e3])
def test_auto_alpha_converges(condition: float) -> None:
    matrix = matrix_with(torch.logspace(0, -math.log10(condition), 20, dtype=DTYPE), seed=3)
    v = randn(20, seed=4)
    solution = hvp.solve(lambda x: matrix @ x, v, hvp.Neumann(int(40 * condition)))
    assert solution.converged
    assert relative_error(solution.value, torch.linalg.solve(matrix, v)) < 1e-8 * condition


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_auto_alpha_of_a_singular_matrix_is_not_called_indefinite(dtype: torch.dtype) -> None:
    """A Gauss-Newton matrix of rank 5 in 60 dimensions, whose zero eigenvalues rounding makes slightly negative."""
    factor = randn(5, 60, seed=5).to(dtype)
    solution = hvp.solve(lambda x: factor.T @ (factor @ x), randn(60, seed=6).to(dtype), hvp.Neumann(20))
    assert solution.status is hvp.Status.ITERATION_LIMIT


@pytest.mark.parametrize("grown", [0, 17], ids=["same direction", "new direction"])
@pytest.mark.parametrize("iterations", [3, 20, 500])
@pytest.mark.parametrize("form", ["accumulate", "horner"])
def test_growth_between_two_calls(grown: int, iterations: int, form: str) -> None:
    """lambda_max rises 13-fold between two calls on one estimate, as it does in training."""
    eigenvalues = torch.linspace(1.0, 0.05, 30, dtype=DTYPE)
    basis, _ = torch.linalg.qr(randn(30, 30, seed=7))
    v = randn(30, seed=8)

    class Sharpening(LinearMap):
        """A map whose matrix changes while the operator's estimate stays."""

        layout = Layout.of([v])
        matrix = basis @ torch.diag(eigenvalues) @ basis.T

        def product(self, tangents: Sequence[Tensor]) -> list[Tensor]:
            return [self.matrix @ tangents[0]]

    sharpening, solver = Sharpening(), hvp.Neumann(iterations, form=form)
    operator = hvp.LinearOperator(sharpening, flatten(v, "v")[1], EagerEngine())
    hvp.solve(operator, v, solver)
    risen = eigenvalues.clone()
    risen[grown] = 13.0
    sharpening.matrix = basis @ torch.diag(risen) @ basis.T
    solution = hvp.solve(operator, v, solver)
    assert solution.residual_norm <= 1
    assert solution.status in (hvp.Status.ITERATION_LIMIT, hvp.Status.CONVERGED)
    truth = truncated_sum(sharpening.matrix, v, iterations, solution.alpha)
    torch.testing.assert_close(solution.value, truth, rtol=1e-7, atol=1e-9)
    if iterations >= 20:
        assert solution.alpha * 13.0 < 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_growth_that_overflows_is_recovered(dtype: torch.dtype) -> None:
    """A million-fold rise: the first attempt is infinite, the estimate has to start again from a random vector."""
    operator = hvp.HessianOperator(lambda w: w.square().sum() / 2, torch.zeros(8, dtype=dtype))
    operator.solve(torch.ones(8, dtype=dtype), hvp.Neumann(100))
    sharp = hvp.HessianOperator(lambda w: 1e6 * w.square().sum() / 2 + w[0] ** 2, torch.zeros(8, dtype=dtype))
    sharp.spectrum = operator.spectrum
    # The refresh sees a uniform rise at once; hide it, so that the solve itself has to notice.
    stale = operator.spectrum.estimate
    sharp.spectrum.refresh = lambda operator, preconditioner: stale  # type: ignore[method-assign]
    solution = sharp.solve(torch.ones(8, dtype=dtype), hvp.Neumann(100))
    truth = torch.full((8,), 1e-6, dtype=dtype)
    torch.testing.assert_close(solution.value, truth, rtol=1e-4, atol=0)
    assert solution.lambda_max == pytest.approx(1e6, rel=1e-3)


def test_estimate_belongs_to_the_operator() -> None:
    first = hvp.HessianOperator(lambda w: w.square().sum(), randn(20, seed=9))
    second = hvp.HessianOperator(lambda w: 9 * w.square().sum(), randn(20, seed=9))
    v, solver = randn(20, seed=10), hvp.Neumann(4)
    assert [first.solve(v, solver).hvps for _ in range(2)] == [4 + 8, 4 + 3]
    assert second.solve(v, solver).lambda_max == pytest.approx(18.0)
    assert first.solve(v, solver).lambda_max == pytest.approx(2.0)


def test_fixed_alpha_makes_no_estimate() -> None:
    operator = hvp.HessianOperator(lambda w: w.square().sum(), randn(5, seed=11))
    solution = operator.solve(randn(5, seed=12), hvp.Neumann(4, alpha=0.1))
    assert (solution.hvps, solution.lambda_max, operator.spectrum.estimate) == (4, None, None)


def test_damping_only_shifts() -> None:
    matrix, v = matrix_with([0.0, 0.5, 2.0], seed=13), randn(3, seed=14)
    damped = hvp.solve(lambda x: matrix @ x, v, hvp.Neumann(400, damping=0.5))
    truth = torch.linalg.solve(matrix + 0.5 * torch.eye(3, dtype=DTYPE), v)
    torch.testing.assert_close(damped.value, truth, rtol=1e-10, atol=1e-12)
    assert damped.lambda_max == pytest.approx(2.0)
    assert damped.alpha == pytest.approx(1 / 2.5)


# NaN and Inf


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("solver", [hvp.Neumann(3), hvp.Neumann(3, alpha=0.1), hvp.Neumann(0, alpha=0.1)], ids=repr)
def test_bad_v_is_named(bad: float, solver: hvp.Neumann) -> None:
    v = torch.ones(3, dtype=DTYPE)
    v[1] = bad
    with pytest.raises(ValueError, match=r"^v: expected finite values"):
        hvp.solve(lambda x: 2 * x, v, solver)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("solver", [hvp.Neumann(3), hvp.Neumann(3, alpha=0.1)], ids=repr)
def test_bad_product_is_not_blamed_on_v(bad: float, solver: hvp.Neumann) -> None:
    with pytest.raises(hvp.DivergenceError, match=r"^operator: .*product A v of a finite v is NaN or Inf"):
        hvp.solve(lambda x: bad * x, torch.ones(3, dtype=DTYPE), solver)


# Memory


def peak_of(operator: hvp.HessianOperator, v: list[Tensor], solver: hvp.Neumann) -> int:
    with peak_memory("cpu") as meter:
        operator.solve(v, solver)
    return meter.peak_bytes


@pytest.mark.parametrize("form", ["accumulate", "horner"])
@pytest.mark.parametrize("alpha", [0.01, "auto"])
def test_memory_does_not_grow_with_iterations(form: str, alpha: float | str) -> None:
    x, y = randn(16, 30, seed=15), randn(16, 20, seed=16)
    weights = [randn(30, 40, seed=17) / 5, randn(40, 20, seed=18) / 5]
    operator = hvp.HessianOperator(lambda w: (torch.tanh(x @ w[0]) @ w[1] - y).square().mean(), weights)
    v = [randn(*w.shape, seed=19) for w in weights]
    few = peak_of(operator, v, hvp.Neumann(2, alpha=alpha, form=form, damping=1.0))
    many = peak_of(operator, v, hvp.Neumann(100, alpha=alpha, form=form, damping=1.0))
    assert few > 2 * flat(v).nbytes, "the meter has to see at least the state"
    assert many <= 1.01 * few
