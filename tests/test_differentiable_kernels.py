"""Functions of torch whose second derivative is wrong or missing, and what is used in their place."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from problems_with_known_answers import randn, relative_error
from torch import Tensor
from torch.nn.functional import embedding

import hvp_engine as hvp
from hvp_engine.differentiation.differentiable_kernels import plain_kernels

X = randn(5, 3, seed=1)


def weight_norm_by_hand(v: Tensor, g: Tensor, dim: int) -> Tensor:
    return v * (g / v.square().sum(1 - dim, keepdim=True).sqrt())


def loss(weights: list[Tensor], dim: int, normalize: Callable[[Tensor, Tensor, int], Tensor]) -> Tensor:
    return torch.tanh(X @ normalize(*weights, dim).T).square().sum()


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("engine", ["eager", "recorded", "linearized"])
@pytest.mark.filterwarnings("ignore:.*a kernel in it has no second derivative")
def test_weight_normalization(engine: str, dim: int) -> None:
    v = randn(4, 3, seed=2)
    weights = [v, randn(*((4, 1) if dim == 0 else (1, 3)), seed=3)]
    hessians = [
        hvp.HessianOperator(loss, weights, dim, function, engine=engine).dense()
        for function in (torch._weight_norm, weight_norm_by_hand)
    ]
    assert relative_error(*hessians) < 1e-12
    torch.testing.assert_close(hessians[0], hessians[0].T)


@pytest.mark.parametrize("engine", ["eager", "recorded"])
@pytest.mark.parametrize("differentiated", [False, True])
def test_weight_normalization_recorded_already_is_refused(engine: str, differentiated: bool) -> None:
    """It cannot be replaced any more, and autograd's answer is no derivative: of the loss, and of its gradient."""
    weights = v, g = [randn(4, 3, seed=2).requires_grad_(), randn(4, 1, seed=3).requires_grad_()]
    value: Tensor | tuple[Tensor, ...] = loss(weights, 0, torch._weight_norm)
    if differentiated:
        value = torch.autograd.grad(value, weights, create_graph=True)
    for _ in range(3):
        with pytest.raises(hvp.SecondDerivativeError, match="_weight_norm.*remedy: compute the weight as v"):
            hvp.approx_inverse_hvp([v.detach(), g.detach()], value, weights, iterations=2, alpha=0.1, engine=engine)


def test_weight_normalization_that_is_differentiated_once_is_right() -> None:
    """As in a gradient of the weights above it, in a Gauss-Newton matrix, and in a map with a fixed point."""
    v, g = (randn(*shape, seed=2).requires_grad_() for shape in ((4, 3), (4, 1)))
    found = []
    for normalize in (torch._weight_norm, weight_norm_by_hand):
        last = randn(4, seed=4).requires_grad_()
        value = torch.tanh(X @ normalize(v, g, 0).T @ last).square().sum()
        gradient = torch.autograd.grad(value, last, create_graph=True)
        (above,) = hvp.approx_inverse_hvp(last.detach(), gradient, last, iterations=2, alpha=0.1)

        def model(weights: list[Tensor], x: Tensor, normalize: Callable[..., Tensor] = normalize) -> Tensor:
            return torch.tanh(x @ normalize(*weights, 0).T)

        matrix = hvp.GaussNewtonOperator(model, lambda o, _: o.square().sum(), [v.detach(), g.detach()], X, None)

        def phi(w: Tensor, h: Tensor, _: None, normalize: Callable[..., Tensor] = normalize) -> Tensor:
            return 0.3 * torch.tanh(normalize(w, h, 0))

        fixed = hvp.FixedPointHypergradient(phi, lambda w, h, _: w.square().sum(), hvp.Neumann(3))
        found.append((above, matrix.dense(), fixed(v.detach(), g.detach(), None, None).grads))
    for fused, by_hand in zip(*found, strict=True):
        assert relative_error(fused, by_hand) < 1e-12


def test_values_stay() -> None:
    v, g = randn(4, 3, seed=2), randn(4, 1, seed=3)
    indices = torch.tensor([0, 2, 2])
    for arguments in ((indices, v), (indices, v, 2), (indices, v, None, None, 2.0, True, True)):
        expected = embedding(*arguments)
        with plain_kernels():
            torch.testing.assert_close(embedding(*arguments), expected, rtol=0, atol=0)
    expected = torch._weight_norm(v, g)
    with plain_kernels():
        torch.testing.assert_close(torch._weight_norm(v, g), expected)


@pytest.mark.parametrize("engine", ["recorded", "eager"])
def test_what_only_hyperparameters_are_behind_needs_no_second_derivative(engine: str) -> None:
    """AuxiLearn weighs losses by a layer with weight normalization, which is one of the hyperparameters' own."""
    parts = v, g = [randn(1, 2, seed=2).requires_grad_(), randn(1, 1, seed=3).requires_grad_()]
    for seed in range(4, 8):
        w = randn(3, seed=seed).requires_grad_()
        losses = torch.stack([w.sin() ** 2, w**4], dim=1)

        def train_loss(normalized: Callable[..., Tensor], losses: Tensor = losses) -> Tensor:
            return torch.nn.functional.linear(losses, normalized(v, g, 0)).exp().mean()

        value = (w - 1).square().sum()
        fused, by_hand = (
            hvp.hypergradient(train_loss(normalized), value, w, parts, hvp.Neumann(3, 0.1), engine=engine)
            for normalized in (torch._weight_norm, weight_norm_by_hand)
        )
        for ours, theirs in zip(fused, by_hand, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=0)
        with pytest.raises(hvp.SecondDerivativeError, match="_weight_norm"):  # of the same graph, where it counts
            hvp.hypergradient(train_loss(torch._weight_norm), v.square().sum(), [v, g], w, hvp.Neumann(3, 0.1))
