"""The operations of cross-entropy and log-softmax, registered: each derivative is one, and is differentiable.

`cross_entropy`, `log_softmax` and `linear_cross_entropy` have first derivatives of the same names with `_backward`, and
the derivatives of those with `_double_backward`. The last are linear in `tangent`, and what they take beside it has
been computed before. Their own derivatives are those of the reference.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hvp_engine.differentiable import cross_entropy_reference as reference
from hvp_engine.differentiable import linear_cross_entropy_chunks as chunks
from hvp_engine.differentiable.cross_entropy_backends import rows_on
from hvp_engine.differentiable.registration import accumulated, by_reference, register

ops = torch.ops.hvp_engine

_LABELS = "Tensor target, Tensor? weight, int ignore_index, float label_smoothing"


def _save(ctx: Any, tensors: tuple[Tensor | None, ...], labels: tuple[Any, ...]) -> None:
    """Keep tensors and the arguments that say what the labels are."""
    ctx.set_materialize_grads(False)
    target, weight, *settings = labels
    ctx.settings = tuple(settings)
    ctx.save_for_backward(*tensors, target, weight)


def _saved(ctx: Any) -> tuple[list[Tensor | None], tuple[Any, ...]]:
    *tensors, target, weight = ctx.saved_tensors
    return tensors, (target, weight, *ctx.settings)


def _like(tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor, memory_format=torch.contiguous_format)


# cross_entropy


def _value_fake(input: Tensor, *labels: Any) -> tuple[Tensor, Tensor]:
    return tuple(input.new_empty(input.shape[0], dtype=accumulated(input.dtype)) for _ in range(2))  # type: ignore[return-value]


def _value_setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    input, *labels = inputs
    ctx.mark_non_differentiable(output[1])
    _save(ctx, (input, output[1]), tuple(labels))


def _value_backward(ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    (input, lse), labels = _saved(ctx)
    return None if grad is None else ops.cross_entropy_backward(grad, input, lse, *labels), None, None, None, None


def _backward_setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    _save(ctx, inputs[:3], inputs[3:])


def _backward_backward(ctx: Any, tangent: Tensor | None) -> tuple[Tensor | None, ...]:
    (grad, input, lse), labels = _saved(ctx)
    if tangent is None:
        return (None,) * 7
    for_grad, product = ops.cross_entropy_double_backward(tangent, grad, input, lse, *labels)
    return for_grad, product, None, None, None, None, None


register(
    f"cross_entropy(Tensor input, {_LABELS}) -> (Tensor, Tensor)",
    lambda input, *labels: rows_on(input.device).cross_entropy(input, *labels),
    _value_fake,
    _value_setup,
    _value_backward,
)
register(
    f"cross_entropy_backward(Tensor grad, Tensor input, Tensor log_sum_exp, {_LABELS}) -> Tensor",
    lambda grad, *rest: rows_on(grad.device).cross_entropy_backward(grad, *rest),
    lambda grad, input, *rest: _like(input),
    _backward_setup,
    _backward_backward,
)
register(
    "cross_entropy_double_backward(Tensor tangent, Tensor grad, Tensor input, Tensor log_sum_exp, "
    f"{_LABELS}) -> (Tensor, Tensor)",
    lambda tangent, *rest: rows_on(tangent.device).cross_entropy_double_backward(tangent, *rest),
    lambda tangent, grad, input, *rest: (_like(grad), _like(input)),
    *by_reference(reference.cross_entropy_double_backward),
)


# log_softmax: the derivatives take its output, of which they are functions


def _log_softmax_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.settings = ()
    ctx.save_for_backward(output)


def _log_softmax_backward(ctx: Any, grad: Tensor) -> Tensor:
    return ops.log_softmax_backward(grad, *ctx.saved_tensors)


def _log_softmax_backward_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.settings = ()
    ctx.save_for_backward(*inputs)


def _log_softmax_backward_backward(ctx: Any, tangent: Tensor) -> tuple[Tensor, Tensor]:
    return ops.log_softmax_double_backward(tangent, *ctx.saved_tensors)


register(
    "log_softmax(Tensor input) -> Tensor",
    lambda input: rows_on(input.device).log_softmax(input),
    _like,
    _log_softmax_setup,
    _log_softmax_backward,
)
register(
    "log_softmax_backward(Tensor grad, Tensor output) -> Tensor",
    lambda grad, output: rows_on(grad.device).log_softmax_backward(grad, output),
    lambda grad, output: _like(output),
    _log_softmax_backward_setup,
    _log_softmax_backward_backward,
)
register(
    "log_softmax_double_backward(Tensor tangent, Tensor grad, Tensor output) -> (Tensor, Tensor)",
    lambda tangent, grad, output: rows_on(tangent.device).log_softmax_double_backward(tangent, grad, output),
    lambda tangent, grad, output: (_like(output), _like(output)),
    *by_reference(reference.log_softmax_double_backward),
)


# linear_cross_entropy: the logits exist block by block

_LINEAR = f"Tensor input, Tensor linear_weight, Tensor? bias, Tensor? log_sum_exp, {_LABELS}"


def _linear_setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    input, linear_weight, bias, *labels = inputs
    ctx.mark_non_differentiable(output[1])
    _save(ctx, (input, linear_weight, bias, output[1]), tuple(labels))


def _linear_backward(ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    tensors, labels = _saved(ctx)
    if grad is None:
        return (None,) * 7
    found = ops.linear_cross_entropy_backward(grad, *tensors, *labels)
    return *found[:2], None if tensors[2] is None else found[2], None, None, None, None


def _linear_backward_setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    _save(ctx, inputs[:5], inputs[5:])


def _linear_backward_backward(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor | None, ...]:
    tensors, labels = _saved(ctx)
    if all(tangent is None for tangent in tangents):
        return (None,) * 9
    for_grad, *products = ops.linear_cross_entropy_double_backward(*tangents, *tensors, *labels)
    return for_grad, *products[:2], None if tensors[3] is None else products[2], None, None, None, None, None


def _linear_fake(input: Tensor, linear_weight: Tensor, bias: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:
    return _like(input), _like(linear_weight), _like(linear_weight[:, 0])


register(
    f"linear_cross_entropy(Tensor input, Tensor linear_weight, Tensor? bias, {_LABELS}) -> (Tensor, Tensor)",
    chunks.linear_cross_entropy,
    lambda input, linear_weight, bias, *labels: _value_fake(input),
    _linear_setup,
    _linear_backward,
)
register(
    f"linear_cross_entropy_backward(Tensor grad, {_LINEAR}) -> (Tensor, Tensor, Tensor)",
    chunks.linear_cross_entropy_backward,
    lambda grad, *rest: _linear_fake(*rest),
    _linear_backward_setup,
    _linear_backward_backward,
)
register(
    "linear_cross_entropy_double_backward(Tensor? input_tangent, Tensor? weight_tangent, Tensor? bias_tangent, "
    f"Tensor grad, {_LINEAR}) -> (Tensor, Tensor, Tensor, Tensor)",
    chunks.linear_cross_entropy_double_backward,
    lambda a, b, c, grad, *rest: (_like(grad), *_linear_fake(*rest)),
    *by_reference(reference.linear_cross_entropy_double_backward),
)
