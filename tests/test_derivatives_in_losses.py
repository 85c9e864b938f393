"""Losses that differentiate, such as gradient penalties and forces: a product with their Hessian is a third derivative,
which no fast kernel may get wrong. Against differences of torch's gradients, in float64."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from problems_with_known_answers import DTYPE, randn, relative_error
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import hvp_engine as hvp
from hvp_engine._support.torch_compat import without_onednn

H = torch.tensor(-1.0, dtype=DTYPE)


class First(nn.Sequential):
    """The outputs of a layer that returns more."""

    def forward(self, x: Tensor) -> Tensor:
        return self[0](x)[0]


class Attention(nn.MultiheadAttention):
    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x, x, x, need_weights=False)[0]


class Scores(nn.Linear):
    """Enough classes for our cross-entropy."""

    def forward(self, x: Tensor) -> Tensor:
        return F.cross_entropy(super().forward(x), torch.arange(len(x)), label_smoothing=0.1)


class Chances(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.log_softmax(super().forward(x), -1)[:, ::50]


def images(norm: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Conv2d(2, 4, 3), norm, nn.Softplus(), nn.Conv2d(4, 2, 2))


def rows(norm: nn.Module, width: int) -> nn.Module:
    return nn.Sequential(nn.Linear(3, width), norm, nn.Tanh(), nn.Linear(width, 2))


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "LSTM": (lambda: First(nn.LSTM(2, 2)), (2, 2, 2)),
    "LSTM, both directions": (lambda: First(nn.LSTM(2, 1, 1, bidirectional=True, batch_first=True)), (2, 2, 2)),
    "GRU": (lambda: First(nn.GRU(2, 2)), (2, 2, 2)),
    "attention": (lambda: Attention(4, 2, batch_first=True), (1, 64, 4)),
    "transformer": (lambda: nn.TransformerEncoderLayer(4, 1, 4, 0.0, "gelu", batch_first=True), (1, 64, 4)),
    "BatchNorm2d": (lambda: images(nn.BatchNorm2d(4)), (3, 2, 5, 5)),
    "BatchNorm2d, of the past": (lambda: images(nn.BatchNorm2d(4)).eval(), (3, 2, 5, 5)),
    "BatchNorm1d": (lambda: rows(nn.BatchNorm1d(4), 4), (5, 3)),
    "InstanceNorm2d": (lambda: images(nn.InstanceNorm2d(4, affine=True)), (3, 2, 5, 5)),
    "GroupNorm": (lambda: images(nn.GroupNorm(2, 4)), (3, 2, 5, 5)),
    "LayerNorm": (lambda: rows(nn.LayerNorm(4), 4), (5, 3)),
    "LayerNorm, large": (lambda: rows(nn.LayerNorm(512), 512), (128, 3)),
    "RMSNorm": (lambda: rows(nn.RMSNorm(512), 512), (128, 3)),
    "cross-entropy": (lambda: Scores(3, 512), (128, 3)),
    "log-softmax": (lambda: Chances(3, 512), (128, 3)),
}

PRODUCTS = [
    *((name, "eager") for name in MODELS),
    *((name, "recorded") for name in ("GRU", "attention", "BatchNorm2d", "log-softmax")),
    *((name, "linearized") for name in ("LSTM", "LayerNorm", "InstanceNorm2d", "cross-entropy")),
]


def penalized(name: str) -> tuple[Callable[..., Tensor], dict[str, Tensor], Tensor]:
    """WGAN-GP's loss: of a critic's scores, and of how far its slopes are from one."""
    torch.manual_seed(0)
    make, shape = MODELS[name]
    module = make().double()
    net = hvp.functional(module)

    def loss(w: dict[str, Tensor], h: Tensor, x: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        scores = net(w, x)
        (slope,) = torch.autograd.grad(scores.sin().sum(), x, create_graph=True)
        lengths = (slope.flatten(1).square().sum(1) + 1e-2).sqrt()
        return scores.square().mean() + h.exp() * (lengths - 1).square().mean()

    return loss, {key: p.detach() for key, p in module.named_parameters()}, randn(*shape, seed=1)


@contextlib.contextmanager
def torchs_own() -> Iterator[None]:
    """Torch's kernels that have second derivatives."""
    with sdpa_kernel(SDPBackend.MATH), without_onednn():
        yield


def gradient(loss: Callable[..., Tensor], *arguments: Any) -> Tensor:
    """By the weights and by h, joined."""
    weights, h, x = arguments
    w = {key: weight.clone().requires_grad_() for key, weight in weights.items()}
    leaves = [*w.values(), h.clone().requires_grad_()]
    found = torch.autograd.grad(loss(w, leaves[-1], x), leaves, materialize_grads=True)
    return torch.cat([g.flatten() for g in found])


def change(loss: Callable[..., Tensor], weights: dict[str, Tensor], x: Tensor, v: dict[str, Tensor]) -> Tensor:
    """Of the gradient along v."""
    step = 1e-5 / max(1.0, *(float(part.abs().max()) for part in v.values()))
    with torchs_own():
        there, back = (gradient(loss, {key: w + s * v[key] for key, w in weights.items()}, H, x) for s in (step, -step))
    return (there - back) / (2 * step)


def product(name: str) -> tuple[dict[str, Tensor], Tensor]:
    """A direction, and the change of the gradient along it."""
    loss, weights, x = penalized(name)
    torch.manual_seed(2)
    v = {key: torch.randn_like(w) for key, w in weights.items()}
    return v, change(loss, weights, x, v)


@pytest.mark.parametrize(("name", "engine"), PRODUCTS)
def test_products_of_a_gradient_penalty(name: str, engine: str) -> None:
    loss, weights, x = penalized(name)
    v, expected = product(name)
    made = hvp.engines.create(engine)
    for _ in range(2):
        operator = hvp.HessianOperator(loss, weights, H, x, engine=made)
        assert operator._linearization.fallback is None, operator._linearization.fallback
        found = torch.cat([p.flatten() for p in (operator @ v).values()])
        assert relative_error(found, expected[:-1]) < 1e-6


@pytest.mark.parametrize("name", ["LSTM", "GRU", "attention", "LayerNorm", "BatchNorm2d", "cross-entropy"])
def test_hypergradients_with_a_penalty_in_both_losses(name: str) -> None:
    loss, weights, x = penalized(name)
    hg = hvp.Hypergradient(loss, loss, hvp.Identity(), engine="auto")
    for _ in range(3):
        result = hg(weights, H, x, x)
    with torchs_own():
        first = gradient(loss, weights, H, x)
    ours = torch.cat([one.flatten() for one in result.solution.value.values()])
    assert relative_error(ours, first[:-1]) < 1e-10
    indirect = change(loss, weights, x, result.solution.value)[-1]
    assert relative_error(result.grads, first[-1] - indirect) < 1e-6


@pytest.mark.parametrize("name", ["LSTM", "GRU", "attention", "GroupNorm", "cross-entropy"])
def test_a_loss_that_autograd_has_recorded(name: str) -> None:
    loss, weights, x = penalized(name)
    v, expected = product(name)
    leaves = {key: w.clone().requires_grad_() for key, w in weights.items()}
    with torchs_own():
        found = hvp.approx_inverse_hvp(list(v.values()), loss(leaves, H, x), list(leaves.values()), 1, 1.0)
    products = [2 * one - part for part, one in zip(found, v.values(), strict=True)]  # found is v + (v - H v)
    assert relative_error(torch.cat([p.flatten() for p in products]), expected[:-1]) < 1e-6


@pytest.mark.parametrize("name", ["LayerNorm", "BatchNorm2d", "InstanceNorm2d"])
def test_a_recorded_loss_whose_third_derivative_torch_has_wrong(name: str) -> None:
    loss, weights, x = penalized(name)
    leaves = {key: w.clone().requires_grad_() for key, w in weights.items()}
    v = list(weights.values())
    with pytest.raises(hvp.SecondDerivativeError, match="normalization, whose third derivative.*wrong; remedy: hand"):
        hvp.approx_inverse_hvp(v, loss(leaves, H, x), list(leaves.values()), 1, 0.5)


def test_the_gauss_newton_matrix_of_a_models_slopes() -> None:
    net = hvp.functional(rows(nn.LayerNorm(4), 4).double())
    weights = {key: p.detach() for key, p in net.module.named_parameters()}

    def slopes(w: dict[str, Tensor], x: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        return torch.autograd.grad(net(w, x).sin().sum(), x, create_graph=True)[0]

    def loss(outputs: Tensor, target: Tensor) -> Tensor:
        return (outputs - target).square().sum() / 2

    x = randn(5, 3, seed=3)
    v = {key: torch.randn_like(w) for key, w in weights.items()}
    step = 1e-5
    there, back = (slopes({key: w + s * v[key] for key, w in weights.items()}, x) for s in (step, -step))
    changes = (there - back) / (2 * step)
    products = hvp.GaussNewtonOperator(slopes, loss, weights, x, torch.zeros(5, 3, dtype=DTYPE)) @ v
    energy = sum((products[key] * v[key]).sum() for key in v).detach()
    assert relative_error(energy, changes.square().sum()) < 1e-6


def test_normalizations_with_running_statistics_leave_them_as_they_are() -> None:
    module = images(nn.BatchNorm2d(4)).double()
    before = {key: b.clone() for key, b in module.named_buffers()}
    net = hvp.functional(module)

    def loss(w: dict[str, Tensor], x: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        return torch.autograd.grad(net(w, x).sin().sum(), x, create_graph=True)[0].square().sum()

    hvp.HessianOperator(loss, module, randn(3, 2, 5, 5, seed=4), engine="eager")
    for key, b in module.named_buffers():
        assert torch.equal(b, before[key])
