"""The operations of normalization, registered: for each kind the value, its derivative and the derivative of that.

`batch_norm` (on batch statistics), `group_norm`, `layer_norm` and `rms_norm` have first derivatives of the same names
with `_backward`, and the derivatives of those with `_double_backward`. The last are linear in the tangents, and the
statistics that they take have been computed before. Their own derivatives are those of the reference.
"""

from __future__ import annotations

from functools import partial
from typing import Any, get_args

import torch
from torch import Tensor

from hvp_engine.differentiable import normalization_reference as reference
from hvp_engine.differentiable.normalization_shapes import Kind, keeps_channels_last, laid_out, normalized_shape
from hvp_engine.differentiable.registration import accumulated, by_reference, implementation, register

ops = torch.ops.hvp_engine

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


def _value_setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    input, weight, bias, size, eps = inputs
    _, mean, variance = output
    ctx.mark_non_differentiable(mean, variance)
    ctx.set_materialize_grads(False)
    like = (None, None) if bias is None else (tuple(bias.shape), bias.dtype)
    ctx.settings = size, eps, like
    ctx.save_for_backward(input, weight, mean, variance)


def _value_backward(kind: Kind, ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 5
    input, weight, mean, variance = ctx.saved_tensors
    backward = getattr(ops, f"{kind}_backward")
    size, eps, (shape, dtype) = ctx.settings
    for_input, for_weight, for_bias = backward(grad, input, weight, mean, variance, size, eps)
    return (
        for_input,
        None if weight is None else for_weight.view(weight.shape).to(weight.dtype),
        None if shape is None else for_bias.view(shape).to(dtype),
        None,
        None,
    )


def _backward_setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    *tensors, size, eps = inputs
    ctx.settings = size, eps
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors)


def _backward_backward(kind: Kind, ctx: Any, *tangents: Tensor | None) -> tuple[Tensor | None, ...]:
    if all(tangent is None for tangent in tangents):
        return (None,) * 7
    grad, input, weight, mean, variance = ctx.saved_tensors
    tangent = torch.zeros_like(input) if tangents[0] is None else tangents[0]
    double_backward = getattr(ops, f"{kind}_double_backward")
    found = double_backward(tangent, *tangents[1:], grad, input, weight, mean, variance, *ctx.settings)
    for_grad, for_input, for_weight = found
    for_weight = None if weight is None else for_weight.view(weight.shape).to(weight.dtype)
    return for_grad, for_input, for_weight, None, None, None, None


def _run(kind: Kind, function: str, *arguments: Any) -> Any:
    device = next(argument.device for argument in arguments if isinstance(argument, Tensor))
    return getattr(implementation(device, _MODULES), function)(kind, *arguments)


_KNOWN = "Tensor grad, Tensor input, Tensor? weight, Tensor mean, Tensor variance, int size, float eps"

for _kind in get_args(Kind):
    register(
        f"{_kind}(Tensor input, Tensor? weight, Tensor? bias, int size, float eps) -> (Tensor, Tensor, Tensor)",
        partial(_run, _kind, "normalize"),
        partial(_value_fake, _kind),
        _value_setup,
        partial(_value_backward, _kind),
    )
    register(
        f"{_kind}_backward({_KNOWN}) -> (Tensor, Tensor, Tensor)",
        partial(_run, _kind, "normalize_backward"),
        partial(_backward_fake, _kind),
        _backward_setup,
        partial(_backward_backward, _kind),
    )
    register(
        f"{_kind}_double_backward(Tensor tangent, Tensor? tangent_weight, Tensor? tangent_bias, {_KNOWN}) "
        "-> (Tensor, Tensor, Tensor)",
        partial(_run, _kind, "normalize_double_backward"),
        partial(_double_backward_fake, _kind),
        *by_reference(partial(reference.normalize_double_backward, _kind)),
    )
