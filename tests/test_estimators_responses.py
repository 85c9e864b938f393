"""Models of the best response against the exact one, on quadratics where they can represent it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from problems_with_known_answers import DTYPE, matrix_with, quadratic_bilevel, randn, relative_error
from torch import Tensor

import hvp_engine as hvp
from baselines.estimators import FittedResponse, LinearResponse, StructuredResponse
from baselines.search import LinearHypernetwork, SelfTuningNetwork, TuningProblem


def sgd(rate: float) -> Any:
    return lambda tensors: torch.optim.SGD(tensors, lr=rate)


def adam(rate: float) -> Any:
    return lambda tensors: torch.optim.Adam(tensors, lr=rate)


def test_linear_response_finds_the_exact_hypergradient() -> None:
    """w* = A^-1 B h is linear in h; from weights away from it."""
    problem = quadratic_bilevel()
    fitted = FittedResponse(problem.train_loss, problem.val_loss, 600, sgd(0.2), scale=1.0)
    estimate = fitted(torch.zeros(5, dtype=DTYPE), problem.hyper, None, None)
    torch.testing.assert_close(estimate.grads, problem.hypergradient, rtol=1e-6, atol=1e-7)
    few = FittedResponse(problem.train_loss, problem.val_loss, 5, sgd(0.2), scale=1.0)
    assert relative_error(few(problem.weights, problem.hyper, None, None).grads, problem.hypergradient) > 1e-2


@pytest.fixture(autouse=True)
def the_same_draws_in_every_order() -> None:
    torch.manual_seed(0)


class Rows:
    """Targets W0 + diag(M h) D and b0 + C h: row by row scaled, as a structured response is; H random in between."""

    def __init__(self) -> None:
        self.w0, self.d, self.m = randn(3, 4, seed=1), randn(3, 4, seed=2), randn(3, 2, seed=3)
        self.b0, self.c, self.s = randn(3, seed=4), randn(3, 2, seed=5), randn(2, seed=6)
        self.curvature = matrix_with([0.5, 1.0, 1.5], seed=7)
        self.hyper = {"x": randn(1, seed=8)[0], "y": randn(1, seed=9)[0]}
        self.weights = {"w": torch.zeros(3, 4, dtype=DTYPE), "b": torch.zeros(3, dtype=DTYPE), "s": self.s[0]}

    def best(self, hyper: Any) -> dict[str, Tensor]:
        h = torch.stack([hyper["x"], hyper["y"]])
        return {"w": self.w0 + (self.m @ h)[:, None] * self.d, "b": self.b0 + self.c @ h, "s": self.s @ h}

    def train_loss(self, weights: Any, hyper: Any, batch: Any) -> Tensor:
        best = self.best(hyper)
        w, b = weights["w"] - best["w"], weights["b"] - best["b"]
        return ((w * (self.curvature @ w)).sum() + b.square().sum() + (weights["s"] - best["s"]).square()) / 2

    def val_loss(self, weights: Any, hyper: Any, batch: Any) -> Tensor:
        return weights["w"].square().sum() + weights["b"].sin().sum() * weights["s"] + hyper["x"].square()


@pytest.mark.parametrize("response", [LinearResponse, StructuredResponse])
def test_responses_are_exact_where_they_can_be(response: Any) -> None:
    problem = Rows()
    hyper = {name: h.clone().requires_grad_() for name, h in problem.hyper.items()}
    exact = torch.autograd.grad(problem.val_loss(problem.best(hyper), hyper, None), list(hyper.values()))
    fitted = FittedResponse(
        problem.train_loss, problem.val_loss, 1500, adam(0.02), scale=1.0, response=response
    )  # fmt: skip
    estimate = fitted(problem.weights, problem.hyper, None, None)
    grads = [estimate.grads["x"], estimate.grads["y"]]
    torch.testing.assert_close(grads, list(exact), rtol=5e-3, atol=5e-3)
    best = problem.best(problem.hyper)
    torch.testing.assert_close(estimate.val_loss, problem.val_loss(best, problem.hyper, None), rtol=5e-3, atol=5e-3)


def test_numbers_of_the_responses() -> None:
    """P (H + 1), and 2 P + (units) H; both begin as the given weights whatever the change."""
    weights = [randn(3, 4, 2, seed=1), randn(3, seed=2), randn(1, seed=3)[0]]
    sizes = {LinearResponse: 28 * 6, StructuredResponse: 2 * 28 + (3 + 3 + 1) * 5}
    for kind, size in sizes.items():
        response = kind(weights, 5)
        assert sum(p.numel() for p in response.parameters) == size
        for made, weight in zip(response(randn(5, seed=4)), weights, strict=True):
            assert torch.equal(made, weight)


def test_structured_response_by_hand() -> None:
    torch.manual_seed(0)
    response = StructuredResponse([randn(3, 4, seed=1), randn(2, seed=2)], 2)
    change = randn(2, seed=3)
    with torch.no_grad():
        for scaled in response.scaled:
            scaled.copy_(randn(*scaled.shape, seed=4))
    matrix, vector = response(change)
    for row in range(3):
        factor = response.mixing[0][row] @ change / 2**0.5
        torch.testing.assert_close(matrix[row], response.base[0][row] + factor * response.scaled[0][row])
    torch.testing.assert_close(vector, response.base[1] + (response.mixing[1] @ change) / 2**0.5 * response.scaled[1])


@pytest.mark.parametrize("size", [1, 20_000])
def test_a_step_of_adam_moves_a_linear_response_alike_for_any_number_of_hyperparameters(size: int) -> None:
    response = LinearResponse([randn(20, seed=1)], size)
    seen, other = randn(size, seed=2), randn(size, seed=3)
    optimizer = torch.optim.Adam(response.slopes, lr=0.02)
    response(seen)[0].sum().backward()
    optimizer.step()
    moved = response(other)[0].detach() - response.base[0].detach()
    assert float(moved.abs().max()) < 0.02 * 3


@pytest.mark.parametrize("size", [1, 20_000])
def test_a_step_of_adam_moves_a_structured_response_alike_for_any_number_of_hyperparameters(size: int) -> None:
    """At a new perturbation, factors of size 1 become others by about the step, not by many times their size."""
    torch.manual_seed(0)
    response = StructuredResponse([randn(200, 2, seed=1)], size)
    for scaled in response.scaled:
        scaled.detach().fill_(1.0)
    seen, other = randn(size, seed=2), randn(size, seed=3)
    before = response(other)[0].detach() - response.base[0].detach()
    optimizer = torch.optim.Adam(response.mixing, lr=0.02)
    response(seen)[0].square().sum().backward()
    optimizer.step()
    after = response(other)[0].detach() - response.base[0].detach()
    assert float(before.std()) == pytest.approx(abs(float(other[0])) if size == 1 else 1.0, rel=0.15)
    assert float((after - before).abs().max()) < 0.1


@pytest.mark.parametrize("curvature, tau", [(1.0, 0.04), (4.0, 0.04), (1.0, 0.25)])
def test_entropy_sets_the_scales(curvature: float, tau: float) -> None:
    """With w* = h, E L_V = curvature ((h - 1)^2 + scale^2) / 2 - tau log scale: least at scale^2 = tau / curvature."""
    problem = TuningProblem(
        lambda w, h, batch: (w - h).square().sum() / 2,
        lambda w, h, batch: curvature * (w - 1).square().sum() / 2,
        torch.zeros(1, dtype=DTYPE), torch.zeros(1, dtype=DTYPE), [None], [None],
    )  # fmt: skip
    search = SelfTuningNetwork(sgd(0.3), adam(0.01), scale=0.3, entropy_weight=tau, warmup_steps=100, perturbations=1)
    result = search(problem, 4000)
    assert float(result.scales) == pytest.approx((tau / curvature) ** 0.5, rel=0.2)
    assert float(result.hyper) == pytest.approx(1.0, abs=0.15)
    assert LinearHypernetwork(sgd(0.3), adam(0.01))(problem, 100).scales is None


def test_nothing_of_the_callers_moves_and_calls_differ() -> None:
    problem = quadratic_bilevel()
    weights, kept, random = problem.weights, problem.weights.clone(), torch.get_rng_state()
    weights.grad = torch.ones_like(weights)
    one, other = (FittedResponse(problem.train_loss, problem.val_loss, 5, sgd(0.2), scale=1.0) for _ in range(2))
    first, second = (one(weights, problem.hyper, None, None).grads for _ in range(2))
    assert torch.equal(weights, kept) and torch.equal(weights.grad, torch.ones_like(weights))
    assert torch.equal(torch.get_rng_state(), random) and relative_error(first, second) > 1e-4
    other.load_state_dict(one.state_dict())
    expected = one(weights, problem.hyper, None, None).grads
    assert torch.equal(other(weights, problem.hyper, None, None).grads, expected)


def test_tuner_takes_it() -> None:
    data, target = torch.tensor([1.0, 3.0]), torch.tensor([0.8, 1.5])
    weights, decay = torch.zeros(2), torch.zeros(2)

    def train(w: Tensor, d: Tensor, batch: Tensor) -> Tensor:
        return ((w - batch) ** 2).sum() / 2 + (d.exp() * w**2).sum() / 2

    def val(w: Tensor, d: Tensor, batch: Tensor) -> Tensor:
        return ((w - batch) ** 2).sum() / 2

    tuner = hvp.Tuner(
        weights, decay, train, val, weight_optimizer=sgd(0.3), hyper_optimizer=adam(0.1), warmup_steps=20,
        estimator=FittedResponse(train, val, 20, sgd(0.3), scale=0.3),
    )  # fmt: skip
    tuner.fit([data], [target], hyper_steps=100, progress=False)
    torch.testing.assert_close(weights, target, rtol=0.02, atol=0.02)


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"steps": 0}, ValueError, "steps: expected an int >= 1"),
        ({"scale": 0.0}, ValueError, "scale: expected a finite number > 0"),
        ({"optimizer": 0.1}, TypeError, "optimizer: expected a function; got float"),
        ({"val_loss": None}, TypeError, "val_loss: expected a function; got NoneType"),
    ],
)
def test_bad_options(options: dict[str, Any], error: type[Exception], message: str) -> None:
    problem = quadratic_bilevel()
    given = {
        "train_loss": problem.train_loss, "val_loss": problem.val_loss, "steps": 3, "optimizer": sgd(0.1), "scale": 1.0,
    } | options  # fmt: skip
    with pytest.raises(error, match=message):
        FittedResponse(**given)
