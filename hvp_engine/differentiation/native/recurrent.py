"""The derivatives of recurrent layers, each as one operation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from hvp_engine.differentiable.recurrent.signatures import CODES, OPS, by_columns, sizes, transposes
from hvp_engine.differentiation.native.conversion import Conversion, Value, handles
from hvp_engine.differentiation.native.operations import Operation, Words
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
