"""Fresh mini-batches for each product, and products averaged over batches: statistics against dense float64."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from problems_with_known_answers import DTYPE, generator, randn, truncated_sum
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

import hvp_engine as hvp

SIZE, EXAMPLES, SOLVES = 3, 30, 400
X = randn(EXAMPLES, SIZE, seed=1)


def loss(w: Tensor, x: Tensor) -> Tensor:
    return (x @ w).square().mean() / 2 + w.square().sum() / 4


def hessian_of(x: Tensor) -> Tensor:
    return x.T @ x / len(x) + torch.eye(SIZE, dtype=DTYPE) / 2


class Independent:
    """Batches drawn with replacement, again and again."""

    def __init__(self, size: int):
        self.size, self.generator = size, generator(2)

    def __iter__(self) -> Iterator[Tensor]:
        while True:
            yield X[torch.randint(EXAMPLES, (self.size,), generator=self.generator)]


def solutions(solver: Any, size: int, count: int = SOLVES, **options: Any) -> Tensor:
    operator = hvp.StochasticHessianOperator(
        loss, torch.zeros(SIZE, dtype=DTYPE), Independent(size), engine="eager", **options
    )
    v = torch.ones(SIZE, dtype=DTYPE)
    return torch.stack([operator.solve(v, solver).value for _ in range(count)])


# Fresh batches


@pytest.mark.parametrize("form", ["horner", "accumulate"])
def test_the_mean_over_solves_is_the_series_of_the_mean_hessian(form: Any) -> None:
    """Within four standard errors in each component, and not that of another number of terms."""
    found = solutions(hvp.Neumann(3, alpha=0.1, form=form), size=4)
    error = found.std(0) / SOLVES**0.5
    v = torch.ones(SIZE, dtype=DTYPE)
    distances = {
        terms: ((found.mean(0) - truncated_sum(hessian_of(X), v, terms, 0.1)) / error).abs().max()
        for terms in (2, 3, 4)
    }
    assert float(distances[3]) < 4
    assert float(distances[2]) > 8 and float(distances[4]) > 8
    assert float(found.std(0).min()) > 0.005, "every solve sees other batches"


def test_averaging_over_batches_divides_the_variance() -> None:
    solver = hvp.Neumann(3, alpha=0.15)
    single, averaged = solutions(solver, size=2), solutions(solver, size=2, count=200, batches_per_product=4)
    ratio = float(single.var(0).sum() / averaged.var(0).sum())
    assert 3.0 < ratio < 5.5  # 4 to first order in the variance


def test_a_small_alpha_approaches_the_inverse() -> None:
    truth = torch.linalg.solve(hessian_of(X), torch.ones(SIZE, dtype=DTYPE))
    few, many = (solutions(hvp.Neumann(terms, alpha=0.02), size=10, count=5).mean(0) for terms in (20, 300))
    assert float((many - truth).norm() / truth.norm()) < 0.08 < 0.3 < float((few - truth).norm() / truth.norm())


def test_automatic_alpha_holds_one_draw_for_its_estimate() -> None:
    operator = hvp.StochasticHessianOperator(loss, torch.zeros(SIZE, dtype=DTYPE), Independent(8), engine="eager")
    drawn: list[Tensor] = []
    original = operator.linear_map._stream.next

    def recording() -> Any:
        drawn.append(original())
        return drawn[-1]

    operator.linear_map._stream.next = recording  # type: ignore[method-assign]
    solution = operator.solve(torch.ones(SIZE, dtype=DTYPE), hvp.Neumann(10))
    assert len(drawn) == 1 + 10 and solution.hvps == 10 + SIZE
    largest = float(torch.linalg.eigvalsh(hessian_of(drawn[0]))[-1])
    assert solution.lambda_max == pytest.approx(largest, rel=1e-9)
    assert solution.status is hvp.Status.ITERATION_LIMIT


def test_all_batches_in_every_product_are_the_mean_hessian() -> None:
    batches = list(X.split(10))
    weights = {"w": torch.zeros(SIZE, dtype=DTYPE)}

    def in_tree(w: Any, x: Tensor) -> Tensor:
        return loss(w["w"], x)

    operator = hvp.StochasticHessianOperator(in_tree, weights, batches, batches_per_product=3)
    v = {"w": randn(SIZE, seed=3)}
    torch.testing.assert_close((operator @ v)["w"], hessian_of(X) @ v["w"], rtol=1e-12, atol=1e-13)
    found = operator.solve(v, hvp.Neumann(7, alpha=0.2, damping=0.1)).value["w"]
    torch.testing.assert_close(found, truncated_sum(hessian_of(X), v["w"], 7, 0.2, 0.1), rtol=1e-12, atol=1e-13)
    both = {"w": torch.stack([v["w"], 2 * v["w"]])}
    value = operator.solve(both, hvp.Neumann(7, alpha=0.2), batched=True).value["w"]
    torch.testing.assert_close(value[1], 2 * value[0], rtol=1e-12, atol=1e-13)


def test_the_callers_random_state_and_tensors_stay() -> None:
    data = torch.utils.data.DataLoader(X, batch_size=3, shuffle=True)
    weights = torch.zeros(SIZE, dtype=DTYPE)
    operator = hvp.StochasticHessianOperator(loss, weights, data)
    state = torch.get_rng_state()
    values = [operator.solve(torch.ones(SIZE, dtype=DTYPE), hvp.Neumann(4, alpha=0.1)).value for _ in range(2)]
    assert not torch.equal(*values)
    assert torch.equal(state, torch.get_rng_state()) and not weights.requires_grad


# Averaged losses on a fixed operator


def test_averaged_hessians_for_solvers_that_need_a_fixed_operator() -> None:
    y = (X[:, 0] > 0).to(DTYPE)

    def classify(w: Tensor, batch: Any) -> Tensor:
        x, y = batch
        return binary_cross_entropy_with_logits(x @ w, y) + 0.1 * w.square().sum()

    w = randn(SIZE, seed=4)
    batches = [(X[part], y[part]) for part in (slice(0, 10), slice(10, 20), slice(20, 30))]
    truth = torch.func.hessian(lambda w: classify(w, (X, y)))(w)
    for engine in ("eager", "linearized"):
        operator = hvp.HessianOperator(hvp.Averaged(classify), w, batches, engine=engine)
        torch.testing.assert_close(operator.dense(), truth, rtol=1e-10, atol=1e-12)
        v = randn(SIZE, seed=5)
        solution = operator.solve(v, hvp.ConjugateGradient(10))
        torch.testing.assert_close(solution.value, torch.linalg.solve(truth, v), rtol=1e-8, atol=1e-10)


# Bad input


@pytest.mark.parametrize("solver", [hvp.ConjugateGradient(3), hvp.MINRES(3), hvp.Chebyshev(3), hvp.Exact()], ids=repr)
def test_solvers_that_need_a_fixed_operator_are_refused(solver: Any) -> None:
    operator = hvp.StochasticHessianOperator(loss, torch.zeros(SIZE, dtype=DTYPE), [X])
    with pytest.raises(
        ValueError, match=rf"^solver: .*changes at every product.*got {type(solver).__name__}.*Averaged"
    ):
        operator.solve(torch.ones(SIZE, dtype=DTYPE), solver)


@pytest.mark.parametrize(
    "use",
    [
        hvp.extreme_eigenvalues,
        hvp.spectral_density,
        lambda operator: operator.to_scipy(),
        lambda operator: hvp.NystromPreconditioner(operator + hvp.I, rank=2, rho=0.1),
    ],
    ids=["extreme_eigenvalues", "spectral_density", "to_scipy", "NystromPreconditioner"],
)
def test_nothing_that_needs_a_fixed_operator_takes_another_at_every_product(use: Callable[[Any], Any]) -> None:
    operator = hvp.StochasticHessianOperator(loss, torch.zeros(SIZE, dtype=DTYPE), [X[:5], X[5:]])
    with pytest.raises(ValueError, match=r"same at every product; .*: use hvp.HessianOperator\(hvp.Averaged\(loss\)"):
        use(operator)


def test_bad_arguments_are_named() -> None:
    weights = torch.zeros(SIZE, dtype=DTYPE)
    with pytest.raises(ValueError, match=r"^batches_per_product: expected an int >= 1; got 0"):
        hvp.StochasticHessianOperator(loss, weights, [X], batches_per_product=0)
    with pytest.raises(TypeError, match=r"^batches: expected a loader"):
        hvp.StochasticHessianOperator(loss, weights, X)
    with pytest.raises(ValueError, match=r"^batches: expected at least one batch"):
        hvp.StochasticHessianOperator(loss, weights, []) @ weights
    with pytest.raises(TypeError, match=r"^loss: expected a function of \(weights, batch\)"):
        hvp.StochasticHessianOperator(1.0, weights, [X])  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"^loss: expected a function of \(..., batch\); got float"):
        hvp.Averaged(1.0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^batches: expected at least one batch; got none"):
        hvp.HessianOperator(hvp.Averaged(loss), weights, [], engine="eager")
