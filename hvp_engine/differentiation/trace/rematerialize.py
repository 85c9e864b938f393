"""What each term computes again rather than holding it between terms: memory of large networks for a little arithmetic.

A ResNet-20 holds 215 MiB between terms instead of 395, for terms that take 1.07 times as long (one core); a transformer
28 instead of 38, for none.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import fx

from hvp_engine._support.torch_compat import tags_of
from hvp_engine.differentiation.trace.functionalize import is_random
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
"""Operations of one pass over memory, as is reading a result that was held."""

_VIEWS = (
    aten.expand.default,
    aten.view.default,
    aten.select.int,
    aten.unsqueeze.default,
    aten.t.default,
    aten.full.default,
)

_LARGE = 1 << 18
"""Bytes from which a result is computed again: small networks hold little, and their terms are bound by launches."""

_SMALL_SHARE = 1 / 16
"""An operand of at most this share of the result's size may be held instead."""

_MOST_PASSES = 2
"""Most operations on tensors of the result's size that are computed again for it."""


def recomputable(residuals: Iterable[fx.Node]) -> set[fx.Node]:
    """The nodes to compute again in each term: large residuals that a few cheap operations make of what is held anyway.

    Batch normalization is full of them: the centred activations x - mean and the scaled ones, once for each derivative,
    are one pass over x.
    """
    held = set(residuals)
    found: set[fx.Node] = set()
    for node in held:
        chain = _chain(node, held, _SMALL_SHARE * result_bytes(node), _MOST_PASSES)
        if result_bytes(node) >= _LARGE and chain is not None:
            found |= chain
    return found


def pointwise(known: Iterable[fx.Node]) -> set[fx.Node]:
    """The known nodes that a part which runs once computes itself: elementwise ones, and views and constants for them.

    So nothing is written for it, to be read once: of d2L/dlambda dw for a decay e^lambda w^2 / 2, which is e^lambda w,
    it reads lambda and w.
    """
    return {
        node
        for node in known
        if node.op == "call_function"
        and not is_random(node)
        and (torch.Tag.pointwise in tags_of(node.target) or node.target in _VIEWS)
    }


def _chain(node: fx.Node, held: set[fx.Node], small: float, passes: int) -> set[fx.Node] | None:
    """The nodes to compute again for `node`, itself included; None if there are too many or one is not cheap."""
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
