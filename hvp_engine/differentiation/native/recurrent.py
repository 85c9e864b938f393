"""The derivatives of recurrent layers, each as one operation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hvp_engine.differentiable.recurrent.operations import ops
from hvp_engine.differentiable.recurrent.signatures import CODES, OPS, by_columns, sizes, transposes
from hvp_engine.differentiation.native.conversion import Conversion, Value, handles
from hvp_engine.differentiation.native.operations import Operation, UnsupportedError, Words
from hvp_engine.differentiation.native.places import Place

_HANDLED = {getattr(torch.ops.hvp_engine, name).default: op for name, op in OPS.items() if name.endswith("backward")}


@dataclass(frozen=True)
class Recurrence(Operation):
    """One of the operations of :mod:`hvp_engine.differentiable.recurrent` on places that are contiguous, or None."""

    name: str
    units: int
    batch_sizes: tuple[int, ...]
    reverse: bool
    taken: tuple[Place | None, ...]
    given: tuple[Place | None, ...]

    @property
    def reads(self) -> tuple[Place, ...]:
        return tuple(place for place in self.taken if place is not None)

    @property
    def writes(self) -> tuple[Place, ...]:
        return tuple(place for place in self.given if place is not None)

    def write(self, words: Words, workspace: int) -> None:
        words.words += [4, CODES[self.name], self.units, self.reverse, len(self.batch_sizes), *self.batch_sizes]
        for place in (*self.taken, *self.given):
            words.words.append(place is not None)
            if place is not None:
                words.place(place, (), workspace)


@handles(*_HANDLED)
def _recurrence(c: Conversion, node: Any) -> Value:
    op = _HANDLED[node.target]
    tensors, (batch_sizes, reverse, *keep) = node.args[: len(op.arguments)], node.args[len(op.arguments) :]
    arguments = dict(zip(op.arguments, tensors, strict=True))
    weight = arguments["weight"]
    units = c.shape(weight)[1]
    taken = {name: None if tensor is None else c.contiguous(tensor) for name, tensor in arguments.items()}
    if transposes(op):
        taken["weight"] = c.derive(c.shape(weight)[::-1], by_columns, [weight])
    given = tuple(
        None if shape.endswith("?") and not all(keep) else c.builder.workspace(sizes(shape, batch_sizes, units))
        for shape in op.results.values()
    )
    c.builder.operations.append(Recurrence(op.name, units, tuple(batch_sizes), reverse, tuple(taken.values()), given))
    return given


_LSTM = 2
"""The mode of oneDNN's layers that is an LSTM."""


def onednn_layer_backward(
    x: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor,
    bias_hh: Tensor,
    hidden: Tensor,
    cell: Tensor,
    output: Tensor,
    last_hidden: Tensor,
    last_cell: Tensor,
    output_grad: Tensor | None,
    last_hidden_grad: Tensor | None,
    last_cell_grad: Tensor | None,
    reverse: bool,
    mode: int,
    units: int,
    layers: int,
    has_biases: bool,
    train: bool,
    bidirectional: bool,
    batch_sizes: list[int],
    *_: Any,
) -> tuple[Tensor, ...]:
    """The derivative of `aten.mkldnn_rnn_layer`, which `nn.LSTM` calls on a CPU for each layer and direction."""
    if mode != _LSTM or batch_sizes:
        raise UnsupportedError("layers of oneDNN other than those of nn.LSTM")
    times, batch, inputs = x.shape
    rows = x.reshape(-1, inputs)
    sizes = [batch] * times
    projected = rows @ weight_ih.t()
    if has_biases:  # otherwise others stand in their place
        projected = projected + bias_ih + bias_hh
    *_results, previous, gates, previous_cell, squashed = ops.lstm_recurrence(
        projected, weight_hh, hidden, cell, sizes, reverse
    )
    last = last_hidden_grad, last_cell_grad
    given = None if output_grad is None else output_grad.reshape(-1, units)
    grad, hidden_grad, cell_grad, _, _ = ops.lstm_recurrence_backward(
        given, *last, None, None, None, None, weight_hh, gates, previous_cell, squashed, sizes, reverse, False
    )
    of_bias = grad.sum(0)
    of_inputs = (grad @ weight_ih).reshape(x.shape)
    return of_inputs, grad.t() @ rows, grad.t() @ previous, of_bias, of_bias, hidden_grad, cell_grad


FORMULAS: dict[Any, Callable[..., Any]] = {torch.ops.aten.mkldnn_rnn_layer_backward.default: onednn_layer_backward}
