"""What each term computes again rather than holding it between terms: memory of large networks for a little arithmetic.

A transformer holds 28 MiB between terms instead of 38, and its terms take as long (one core).
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import fx

from hvp_engine.differentiation.trace.patterns import result_bytes

aten = torch.ops.aten

_CHEAP = (
    aten.add.Tensor,
    aten.sub.Tensor,
    aten.mul.Tensor,
    aten.mul.Scalar,
    aten.div.Tensor,
    aten.div.Scalar,
    aten.neg.default,
    aten.relu.default,
    aten.threshold_backward.default,
)
"""One pass over memory, as reading the held result would be."""

_LARGE = 1 << 18
"""Bytes below which a result is held: what a small net holds is no burden, and its terms are bound by launches."""

_SMALL_SHARE = 1 / 16
"""An operand of so little of the result's size may be held in its place."""

_MOST_PASSES = 2
"""Operations on tensors of the result's size, at most, that are made again for it."""


def recomputable(residuals: Iterable[fx.Node]) -> set[fx.Node]:
    """What runs again with each term: those of `residuals` that cheap operations make of the others, of inputs and of
    small operands, and what lies in between.

    Batch normalization is full of them: the centred and the scaled activations, once for each derivative.
    """
    held = set(residuals)
    found: set[fx.Node] = set()
    for node in held:
        chain = _chain(node, held, _SMALL_SHARE * result_bytes(node), _MOST_PASSES)
        if result_bytes(node) >= _LARGE and chain is not None:
            found |= chain
    return found


def _chain(node: fx.Node, held: set[fx.Node], small: float, passes: int) -> set[fx.Node] | None:
    """The operations that make `node` again, itself included; None if they are too many or one is not cheap."""
    if node.target is aten.expand.default:
        return {node} if result_bytes(node.all_input_nodes[0]) <= small else None
    if node.target not in _CHEAP or passes == 0:
        return None
    found = {node}
    for operand in node.all_input_nodes:
        if operand in held or operand.op == "placeholder" or result_bytes(operand) <= small:
            continue
        chain = _chain(operand, held, small, passes - len(found))
        if chain is None:
            return None
        found |= chain
    return found
