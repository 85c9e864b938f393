"""Normalizations by operations that have derivatives of every order.

The third derivatives of torch's kernels for layer and batch normalization are wrong, and a product with the Hessian of
a loss takes one where the loss itself differentiates through them, as a gradient penalty does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from inspect import signature
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from hvp_engine.differentiable.registration import accumulated


def _accepted(function: Callable[..., Tensor], arguments: Sequence[Any], named: dict[str, Any]) -> tuple[Any, ...]:
    """All arguments in their order, once torch's function has refused what does not fit, and updated statistics."""
    given = signature(function).bind(*arguments, **named)
    given.apply_defaults()
    with torch.no_grad():
        function(*given.args)
    return given.args


def _layer_norm(*arguments: Any, **named: Any) -> Tensor:
    input, shape, weight, bias, eps = _accepted(functional.layer_norm, arguments, named)
    x = input.to(accumulated(input.dtype))
    variance, mean = torch.var_mean(x, tuple(range(-len(shape), 0)), correction=0, keepdim=True)
    return _scaled(x - mean, variance, weight, bias, eps).to(input.dtype)


def _over_channels(function: Callable[..., Tensor], dims: tuple[int, ...], *arguments: Any, **named: Any) -> Tensor:
    """Statistics over `dims` and the points of images, or those that are given."""
    input, running_mean, running_var, weight, bias, by_input, _, eps = _accepted(function, arguments, named)
    x = input.to(accumulated(input.dtype))
    channels = (-1, *(1,) * (input.dim() - 2))
    if by_input:
        variance, mean = torch.var_mean(x, (*dims, *range(2, input.dim())), correction=0, keepdim=True)
    else:
        mean, variance = (given.to(x.dtype).reshape(channels) for given in (running_mean, running_var))
    weight, bias = (None if each is None else each.reshape(channels) for each in (weight, bias))
    return _scaled(x - mean, variance, weight, bias, eps).to(input.dtype)


def _scaled(centred: Tensor, variance: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    normal = centred * (variance + eps).rsqrt()
    normal = normal if weight is None else normal * weight
    return normal if bias is None else normal + bias


NORMALIZATION_FORMULAS: dict[Callable[..., Any], Callable[..., Any]] = {
    functional.batch_norm: partial(_over_channels, functional.batch_norm, (0,)),
    functional.instance_norm: partial(_over_channels, functional.instance_norm, ()),
    functional.layer_norm: _layer_norm,
}
