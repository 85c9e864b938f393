"""The registered operations of cross-entropy and log-softmax: derivatives are operations, too.

`cross_entropy`, `log_softmax` and `linear_cross_entropy` have first derivatives of the same names with `_backward`, and
the derivatives of those with `_double_backward`. The last are linear in `tangent`, and what they take beside it has
been computed before. Their own derivatives are those of the reference.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hvp_engine.differentiable import cross_entropy_reference as reference
from hvp_engine.differentiable import linear_cross_entropy_chunks as chunks
from hvp_engine.differentiable.cross_entropy_reference import Labels
from hvp_engine.differentiable.registration import accumulated, register_levels, split_off


def _like(tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor, memory_format=torch.contiguous_format)


def _per_row(input: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    losses, log_sum_exp = (input.new_empty(input.shape[0], dtype=accumulated(input.dtype)) for _ in range(2))
    return losses, log_sum_exp


def _with_labels(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, whose last argument says what the labels are, for all that an operation takes."""

    def packed(*arguments: Any) -> Any:
        tensors, labels = split_off(Labels, arguments)
        return function(*tensors, labels)

    return packed


def _rows(function: str) -> Callable[..., Any]:
    """A function of the module whose backend runs."""
    return lambda *arguments: getattr(chunks.rows_on(arguments[0].device), function)(*arguments)


_LABELS = "Tensor target, Tensor? weight, int ignore_index, float label_smoothing"
_GIVEN = f"Tensor grad, Tensor input, Tensor log_sum_exp, {_LABELS}"

register_levels(
    _with_labels(reference.cross_entropy_double_backward),
    (
        f"cross_entropy(Tensor input, {_LABELS}) -> (Tensor losses, Tensor log_sum_exp)",
        _with_labels(_rows("cross_entropy")),
        _per_row,
    ),
    (
        f"cross_entropy_backward({_GIVEN}) -> (Tensor for_input)",
        _with_labels(_rows("cross_entropy_backward")),
        lambda grad, input, *rest: _like(input),
    ),
    (
        f"cross_entropy_double_backward(Tensor tangent, {_GIVEN}) -> (Tensor for_grad, Tensor for_input)",
        _with_labels(_rows("cross_entropy_double_backward")),
        lambda tangent, grad, input, *rest: (_like(grad), _like(input)),
    ),
)

register_levels(  # the derivatives take its output, of which they are functions
    reference.log_softmax_double_backward,
    ("log_softmax(Tensor input) -> (Tensor output)", _rows("log_softmax"), _like),
    (
        "log_softmax_backward(Tensor grad, Tensor output) -> (Tensor for_input)",
        _rows("log_softmax_backward"),
        lambda grad, output: _like(output),
    ),
    (
        "log_softmax_double_backward(Tensor tangent, Tensor grad, Tensor output) "
        "-> (Tensor for_grad, Tensor for_output)",
        _rows("log_softmax_double_backward"),
        lambda tangent, grad, output: (_like(output), _like(output)),
    ),
)


def _layer_like(input: Tensor, linear_weight: Tensor, *_: Any) -> tuple[Tensor, ...]:
    return _like(input), _like(linear_weight), _like(linear_weight[:, 0])


_LAYER = "Tensor input, Tensor linear_weight, Tensor? bias"
_GIVEN = f"Tensor grad, {_LAYER}, Tensor? log_sum_exp, {_LABELS}"
_FOR_LAYER = "Tensor for_input, Tensor for_linear_weight, Tensor for_bias"

register_levels(  # the logits exist block by block
    _with_labels(reference.linear_cross_entropy_double_backward),
    (
        f"linear_cross_entropy({_LAYER}, {_LABELS}) -> (Tensor losses, Tensor log_sum_exp)",
        _with_labels(chunks.linear_cross_entropy),
        _per_row,
    ),
    (
        f"linear_cross_entropy_backward({_GIVEN}) -> ({_FOR_LAYER})",
        _with_labels(chunks.linear_cross_entropy_backward),
        lambda grad, *rest: _layer_like(*rest),
    ),
    (
        "linear_cross_entropy_double_backward(Tensor? input_tangent, Tensor? weight_tangent, Tensor? bias_tangent, "
        f"{_GIVEN}) -> (Tensor for_grad, {_FOR_LAYER})",
        _with_labels(chunks.linear_cross_entropy_double_backward),
        lambda a, b, c, grad, *rest: (_like(grad), *_layer_like(*rest)),
    ),
)
