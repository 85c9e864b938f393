"""Normalizations by operations that have derivatives of every order.

The third derivatives of torch's kernels for layer and batch normalization are wrong, and a product with the Hessian of
a loss takes one where the loss itself differentiates through them, as a gradient penalty does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from hvp_engine.differentiable.registration import accumulated


def layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    _checked(functional.layer_norm, input, list(normalized_shape), weight, bias, eps)
    x = input.to(accumulated(input.dtype))
    variance, mean = torch.var_mean(x, tuple(range(-len(normalized_shape), 0)), correction=0, keepdim=True)
    return _scaled(x - mean, variance, weight, bias, eps).to(input.dtype)


def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    _checked(functional.batch_norm, input, running_mean, running_var, weight, bias, training, momentum, eps)
    return _over_channels(input, running_mean, running_var, weight, bias, training, eps, (0,))


def instance_norm(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    _checked(functional.instance_norm, input, running_mean, running_var, weight, bias, use_input_stats, momentum, eps)
    return _over_channels(input, running_mean, running_var, weight, bias, use_input_stats, eps, ())


def _checked(function: Callable[..., Tensor], input: Tensor, *arguments: Any) -> None:
    """Let torch's function refuse what does not fit, and update running statistics."""
    with torch.no_grad():
        function(input.detach(), *arguments)


def _over_channels(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    by_input: bool,
    eps: float,
    dims: tuple[int, ...],
) -> Tensor:
    """Statistics over `dims` and the points of images, or those that are given."""
    x = input.to(accumulated(input.dtype))
    channels = (-1, *(1,) * (input.dim() - 2))
    if by_input:
        variance, mean = torch.var_mean(x, (*dims, *range(2, input.dim())), correction=0, keepdim=True)
    else:
        assert running_mean is not None and running_var is not None
        mean, variance = (given.to(x.dtype).reshape(channels) for given in (running_mean, running_var))
    weight, bias = (None if each is None else each.reshape(channels) for each in (weight, bias))
    return _scaled(x - mean, variance, weight, bias, eps).to(input.dtype)


def _scaled(centred: Tensor, variance: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    normal = centred * (variance + eps).rsqrt()
    normal = normal if weight is None else normal * weight
    return normal if bias is None else normal + bias


NORMALIZATION_FORMULAS: dict[Callable[..., Any], Callable[..., Any]] = {
    functional.batch_norm: batch_norm,
    functional.instance_norm: instance_norm,
    functional.layer_norm: layer_norm,
}
