"""Products by central differences: accuracy, losses without second derivatives, an exception half-way."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

import hvp_engine as hvp

DTYPE = torch.float64
pytestmark = pytest.mark.filterwarnings("ignore:the weights are far from a minimum")


def train(w: Tensor, h: Tensor, batch: Any) -> Tensor:
    return (w**4).sum() / 4 + (h.exp() * w**2).sum() + (w[0] * w[1]) ** 2


def val(w: Tensor, h: Tensor, batch: Any) -> Tensor:
    return (w - 1).square().sum() + h.square().sum()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-8), (torch.float32, 1e-3)])
def test_hypergradient_is_close_to_the_exact_one(dtype: torch.dtype, tolerance: float) -> None:
    w, h = torch.linspace(0.5, 1.5, 6, dtype=dtype), torch.linspace(-1, 0, 6, dtype=dtype)
    grads = [
        hvp.Hypergradient(train, val, hvp.Neumann(40, 0.05), engine=engine)(w, h, None, None).grads
        for engine in ("eager", "finite_difference")
    ]
    assert float((grads[1] - grads[0]).norm() / grads[0].norm()) < tolerance


class FirstOrderSquare(torch.autograd.Function):
    """A square whose backward cannot be differentiated."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 2 * ctx.saved_tensors[0] * grad


def test_a_loss_without_second_derivative() -> None:
    w = torch.linspace(0.5, 1.5, 5, dtype=DTYPE)

    def loss(w: Tensor) -> Tensor:
        return FirstOrderSquare.apply(w).sum() + (w**3).sum()

    with pytest.raises(hvp.SecondDerivativeError):
        hvp.HessianOperator(loss, w, engine="eager") @ torch.ones_like(w)
    operator = hvp.HessianOperator(loss, w, engine="finite_difference")
    torch.testing.assert_close(operator @ torch.ones_like(w), 2 + 6 * w, rtol=1e-8, atol=0)


def test_weights_stay_exact_when_the_loss_raises() -> None:
    w = torch.linspace(0.1, 1.3, 7, dtype=DTYPE)
    before, calls = w.clone(), []

    def loss(w: Tensor) -> Tensor:
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("half-way")
        return (w**3).sum()

    operator = hvp.HessianOperator(loss, w, engine="finite_difference")
    with pytest.raises(RuntimeError, match="half-way"):
        operator @ torch.ones_like(w)
    assert torch.equal(w, before) and w.grad is None and not w.requires_grad


def test_both_sides_of_a_difference_see_the_same_mask() -> None:
    w = torch.linspace(0.1, 1.3, 50, dtype=DTYPE)

    def loss(w: Tensor) -> Tensor:
        return torch.nn.functional.dropout(w**2, 0.5).sum()

    product = hvp.HessianOperator(loss, w, engine="finite_difference") @ torch.ones_like(w)
    torch.testing.assert_close(product, product.round(), rtol=0, atol=1e-6)  # 0 or 4, nothing between
    assert set(product.round().tolist()) == {0.0, 4.0}


def test_a_zero_tangent_gives_zero() -> None:
    operator = hvp.HessianOperator(lambda w: (w**3).sum(), torch.ones(3, dtype=DTYPE), engine="finite_difference")
    assert torch.equal(operator @ torch.zeros(3, dtype=DTYPE), torch.zeros(3, dtype=DTYPE))


def test_weights_that_require_grad_are_read_without_a_word() -> None:
    w, h = torch.ones(3, requires_grad=True), torch.zeros(3)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "Converting a tensor with requires_grad")
        hvp.Hypergradient(train, val, hvp.Neumann(2, 0.05), engine="finite_difference")(w, h, None, None)
