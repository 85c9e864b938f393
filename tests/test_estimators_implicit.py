"""Implicit methods of the paper's table beside the plain one: Larsen's matrix, and the minimum found first."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from problems_with_known_answers import BILEVEL, DTYPE, Bilevel, flat, randn, relative_error
from torch import Tensor, nn
from torch.autograd.functional import hessian, jacobian
from torch.nn.functional import cross_entropy, dropout

import hvp_engine as hvp
from baselines.estimators import AtMinimum, larsen

pytestmark = pytest.mark.filterwarnings("ignore:the weights are far from a minimum")


class Network:
    """A tanh network with one log decay for each tensor, away from a minimum, and everything about it densely."""

    def __init__(self) -> None:
        self.weights = {"a": randn(3, 4, seed=1) / 2, "b": randn(4, 2, seed=2) / 2, "c": randn(2, seed=3)}
        self.hyper = {name: randn(1, seed=10 + i)[0] - 2 for i, name in enumerate(self.weights)}
        self.batch = randn(15, 3, seed=4), torch.arange(15) % 2
        self.val_batch = randn(9, 3, seed=5), torch.arange(9) % 2

    def model(self, weights: Any, hyper: Any, batch: Any) -> Tensor:
        return torch.tanh(batch[0] @ weights["a"]) @ weights["b"] + weights["c"]

    def loss(self, outputs: Tensor, weights: Any, hyper: Any, batch: Any) -> Tensor:
        decay = sum(hyper[name].exp() * weights[name].square().sum() for name in weights)
        return cross_entropy(outputs, batch[1]) + decay / 2

    def val_loss(self, weights: Any, hyper: Any, batch: Any) -> Tensor:
        return cross_entropy(self.model(weights, hyper, batch), batch[1]) + hyper["a"].square() / 5

    def at(self, vector: Tensor) -> dict[str, Tensor]:
        return dict(zip(self.weights, unflat_with_graph(vector, list(self.weights.values())), strict=True))


def unflat_with_graph(vector: Tensor, like: list[Tensor]) -> list[Tensor]:
    return [part.view_as(t) for part, t in zip(vector.split([t.numel() for t in like]), like, strict=True)]


def test_larsen_densely() -> None:
    """direct - mixed^T (sum_n J_n^T (diag p - p p^T) J_n / N + diag decay)^-1 dL_V/dw."""
    problem = Network()
    w = flat(list(problem.weights.values()))
    names = list(problem.hyper)
    h = torch.stack([problem.hyper[name] for name in names])

    def named(h: Tensor) -> dict[str, Tensor]:
        return dict(zip(names, h, strict=True))

    slope = jacobian(lambda w: problem.model(problem.at(w), None, problem.batch), w)  # samples, classes, weights
    chances = problem.model(problem.weights, None, problem.batch).softmax(1)
    curvature = torch.diag(torch.cat([h[i].exp().expand(t.numel()) for i, t in enumerate(problem.weights.values())]))
    for j, p in zip(slope, chances, strict=True):
        curvature = curvature + j.T @ (torch.diag(p) - torch.outer(p, p)) @ j / len(chances)

    def train(w: Tensor, h: Tensor) -> Tensor:
        weights = problem.at(w)
        return problem.loss(problem.model(weights, named(h), problem.batch), weights, named(h), problem.batch)

    mixed = hessian(train, (w, h))[0][1]
    v, direct = jacobian(lambda w, h: problem.val_loss(problem.at(w), named(h), problem.val_batch), (w, h))
    expected = direct - mixed.T @ torch.linalg.solve(curvature, v)

    estimator = larsen(problem.model, problem.loss, problem.val_loss)
    found = estimator(problem.weights, problem.hyper, problem.batch, problem.val_batch)
    grads = torch.stack([found.grads[name] for name in names])
    torch.testing.assert_close(grads, expected, rtol=1e-10, atol=1e-13)
    torch.testing.assert_close(found.train_loss, train(w, h))
    exact = hvp.Hypergradient(
        lambda w, h, b: problem.loss(problem.model(w, h, b), w, h, b), problem.val_loss, hvp.Exact(), engine="eager"
    )(problem.weights, problem.hyper, problem.batch, problem.val_batch)
    other = torch.stack([exact.grads[name] for name in names])
    assert relative_error(grads, other) > 1e-2, "the model's curvature matters here"
    solver = hvp.ConjugateGradient(200, tol=1e-12)
    iterative = larsen(problem.model, problem.loss, problem.val_loss, solver)
    again = iterative(problem.weights, problem.hyper, problem.batch, problem.val_batch)
    torch.testing.assert_close(torch.stack([again.grads[name] for name in names]), expected, rtol=1e-8, atol=1e-11)


def test_larsen_is_the_implicit_hypergradient_of_a_linear_model() -> None:
    x, y, decay = randn(20, 3, seed=1), randn(20, seed=2), randn(3, seed=3)
    weights = randn(3, seed=4)

    def loss(outputs: Tensor, w: Tensor, h: Tensor, batch: Any) -> Tensor:
        return (outputs - y).square().mean() / 2 + (h.exp() * w.square()).sum()

    def val_loss(w: Tensor, h: Tensor, batch: Any) -> Tensor:
        return (w - 1).square().sum()

    found = larsen(lambda w, h, b: x @ w, loss, val_loss)(weights, decay, None, None).grads
    plain = hvp.Hypergradient(lambda w, h, b: loss(x @ w, w, h, b), val_loss, hvp.Exact(), engine="eager")
    torch.testing.assert_close(found, plain(weights, decay, None, None).grads, rtol=1e-11, atol=1e-13)


def test_larsen_draws_the_same_masks_for_matrix_and_mixed_product() -> None:
    """In a linear model with dropout the two matrices are equal, if the masks are."""
    x, weights, decay = randn(20, 6, seed=1), randn(6, seed=4), torch.zeros((), dtype=DTYPE)

    def model(w: Tensor, h: Tensor, batch: Any) -> Tensor:
        return dropout(x, 0.5) @ w

    def loss(outputs: Tensor, w: Tensor, h: Tensor, batch: Any) -> Tensor:
        return (outputs - 1).square().mean() * h.exp() + w.square().sum() / 2

    def val_loss(w: Tensor, h: Tensor, batch: Any) -> Tensor:
        return (w - 1).square().sum()

    both = [
        larsen(model, loss, val_loss),
        hvp.Hypergradient(lambda w, h, b: loss(model(w, h, b), w, h, b), val_loss, hvp.Exact(), engine="eager"),
    ]
    found = [estimator(weights, decay, None, None).grads for estimator in both]
    torch.testing.assert_close(found[0], found[1], rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("name", BILEVEL)
def test_exact_theorem_from_anywhere(name: str) -> None:
    problem: Bilevel = BILEVEL[name]()
    implicit = hvp.Hypergradient(problem.train_loss, problem.val_loss, hvp.Exact(), engine="eager")
    weights = problem.weights + 0.3 * randn(*problem.weights.shape, seed=9)
    kept = weights.clone()
    found = AtMinimum(problem.train_loss, implicit)(weights, problem.hyper, None, None)
    torch.testing.assert_close(found.grads, problem.hypergradient, rtol=1e-8, atol=1e-10)
    assert torch.equal(weights, kept) and float(found.gradient_norm) < 1e-10
    approximate = implicit(weights, problem.hyper, None, None).grads
    assert relative_error(approximate, problem.hypergradient) > 1e-2


def test_state_is_the_estimators() -> None:
    module, x = nn.Linear(3, 1), torch.randn(4, 3)
    net, weights, decay = hvp.functional(module), dict(module.named_parameters()), torch.zeros(())

    def train(w: Any, h: Tensor, b: Any) -> Tensor:
        return (net(w, x) - 1).square().mean() + h.exp() * sum(t.square().sum() for t in w.values())

    def val(w: Any, h: Tensor, b: Any) -> Tensor:
        return dropout(net(w, x), 0.5).square().mean()

    one, other = (AtMinimum(train, hvp.Hypergradient(train, val, hvp.Exact(), engine="eager")) for _ in range(2))
    one(weights, decay, None, None)
    other.load_state_dict(one.state_dict())
    assert torch.equal(one(weights, decay, None, None).grads, other(weights, decay, None, None).grads)


def test_bad_input() -> None:
    with pytest.raises(TypeError, match="model: expected a function; got NoneType"):
        larsen(None, lambda *a: a[0], lambda *a: a[0])  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="loss: expected a function; got int"):
        larsen(lambda *a: a[0], 3, lambda *a: a[0])  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="estimator: expected a callable; got str"):
        AtMinimum(lambda w, h, b: w, "exact")  # type: ignore[arg-type]
