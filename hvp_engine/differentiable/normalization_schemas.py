"""The registered operations of normalization: for each kind the value, its derivative and the derivative of that.

`batch_norm` (on batch statistics), `group_norm`, `layer_norm` and `rms_norm` have first derivatives of the same names
with `_backward`, and the derivatives of those with `_double_backward`. The last are linear in the tangents, and the
statistics that they take have been computed before. Their own derivatives are those of the reference.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, get_args

import torch
from torch import Tensor

from hvp_engine.differentiable import normalization_reference as reference
from hvp_engine.differentiable.normalization_shapes import (
    Kind,
    Known,
    Tangents,
    keeps_channels_last,
    laid_out,
    normalized_shape,
)
from hvp_engine.differentiable.registration import accumulated, implementation, register_levels, split_off

_MODULES = {
    "reference": "hvp_engine.differentiable.normalization_reference",
    "cpp": "hvp_engine.differentiable.normalization_cpp",
    "triton": "hvp_engine.kernels.normalization",
}


def _dense(kind: Kind, input: Tensor) -> Tensor:
    """Something of the strides that results have."""
    return torch.empty_like(laid_out(input, keeps_channels_last(kind, input)))


def _value_fake(kind: Kind, input: Tensor, weight: Any, bias: Any, size: int, eps: float) -> tuple[Tensor, ...]:
    shape = normalized_shape(kind, input, size)
    mean, variance = (input.new_empty(shape.samples, shape.groups, dtype=torch.float64) for _ in range(2))
    return _dense(kind, input), mean, variance


def _backward_fake(kind: Kind, grad: Tensor, input: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    size = rest[-2]
    channels = normalized_shape(kind, input, size).channels
    per_channel = (input.new_empty(channels, dtype=accumulated(input.dtype)) for _ in range(2))
    return _dense(kind, input), *per_channel


def _double_backward_fake(
    kind: Kind, tangent: Tensor, tangent_weight: Any, tangent_bias: Any, grad: Tensor, input: Tensor, *rest: Any
) -> tuple[Tensor, ...]:
    for_input, for_weight, _ = _backward_fake(kind, grad, input, *rest)
    return torch.empty_like(for_input), for_input, for_weight


def _packed(kind: Kind, function: Callable[..., Any]) -> Callable[..., Any]:
    """A function of a derivative, for all that its operation takes."""

    def packed(*arguments: Any) -> Any:
        (*tangents, grad), known = split_off(Known, arguments)
        return function(kind, *([Tangents(*tangents)] if tangents else []), grad, known)

    return packed


def _run(function: str) -> Callable[..., Any]:
    """A function of the module whose backend runs."""

    def run(kind: Kind, *arguments: Any) -> Any:
        given = arguments[-1].input if isinstance(arguments[-1], Known) else arguments[0]
        return getattr(implementation(given.device, _MODULES), function)(kind, *arguments)

    return run


_GIVEN = "Tensor grad, Tensor input, Tensor? weight, Tensor mean, Tensor variance, int size, float eps"

for _kind in get_args(Kind):
    register_levels(
        _packed(_kind, reference.normalize_double_backward),
        (
            f"{_kind}(Tensor input, Tensor? weight, Tensor? bias, int size, float eps) "
            "-> (Tensor output, Tensor mean, Tensor variance)",
            partial(_run("normalize"), _kind),
            partial(_value_fake, _kind),
        ),
        (
            f"{_kind}_backward({_GIVEN}) -> (Tensor for_input, Tensor for_weight, Tensor for_bias)",
            _packed(_kind, _run("normalize_backward")),
            partial(_backward_fake, _kind),
        ),
        (
            f"{_kind}_double_backward(Tensor tangent, Tensor? tangent_weight, Tensor? tangent_bias, {_GIVEN}) "
            "-> (Tensor for_grad, Tensor for_input, Tensor for_weight)",
            _packed(_kind, _run("normalize_double_backward")),
            partial(_double_backward_fake, _kind),
        ),
    )
