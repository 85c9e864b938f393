"""Chains of views as at most one permutation and one view.

`einsum`, `w.T` and batched products are recorded with chains of them: permute(unsqueeze(t, 2), [2, 0, 1]) is
view(t, [1, n, m]), and permute(w, [1, 0]) is t(w), which the rules for matrix products look for.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from hvp_engine.differentiation.trace.patterns import Builder

aten = torch.ops.aten

_VIEWS = (aten.view.default, aten._unsafe_view.default)
_PERMUTATIONS = (aten.t.default, aten.transpose.int, aten.permute.default)
_UNITS = (
    *(aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims, aten.unsqueeze.default),
    *(aten.select.int, aten.select_backward.default),
)
"""Operations that take or give dimensions of one element; a selection does if that was all."""

_KEEPING_ALL = (*_VIEWS, *_PERMUTATIONS, *_UNITS)
"""Views that show each element once."""

Dimensions = tuple[int | None, ...]
"""For each dimension of a view which one of what it shows it is; None for one along which all elements are the same."""


def shown(node: fx.Node, expanded: bool = False) -> tuple[fx.Node, Dimensions]:
    """What a chain of views shows, through expansions too if `expanded`, and the dimensions of its last view."""
    dimensions: Dimensions = tuple(range(node.meta["val"].dim()))
    while True:
        step = _step(node, expanded)
        if step is None:
            return node, dimensions
        dimensions = tuple(None if d is None else step[d] for d in dimensions)
        node = node.args[0]  # type: ignore[assignment]  # views are of nodes


def _step(node: fx.Node, expanded: bool) -> Dimensions | None:
    """The dimensions of one view; None for what is no view, or reshapes."""
    target: Any = node.target
    if node.op != "call_function" or target not in (*_KEEPING_ALL, aten.expand.default):
        return None
    source: Any = node.args[0]
    before, after = tuple(source.meta["val"].shape), tuple(node.meta["val"].shape)
    if target is aten.expand.default:
        new = len(after) - len(before)
        kept = [d - new if d >= new and before[d - new] == size else None for d, size in enumerate(after)]
        return tuple(kept) if expanded else None
    if target in _PERMUTATIONS:
        order = torch.empty([*range(len(before))], device="meta")  # whose sizes are the numbers of its dimensions
        return tuple(target(order, *node.args[1:]).shape)
    whole = [d for d, size in enumerate(before) if size != 1]
    if [before[d] for d in whole] != [size for size in after if size != 1]:
        return None
    numbers = iter(whole)
    return tuple(None if size == 1 else next(numbers) for size in after)


def compose_views(graph: fx.Graph, linear: set[fx.Node]) -> None:
    """Replace chains of views of what depends on the tangents."""
    build = Builder(graph, linear)
    for node in list(graph.nodes):
        if node not in linear or node.op != "call_function" or node.target not in _KEEPING_ALL:
            continue
        base, dimensions = shown(node)
        if base is node and node.target not in _VIEWS:
            continue  # a real selection
        with graph.inserting_before(node):
            if base is node:  # another shape
                source: Any = node.args[0]
                new = reshaped(build, source, tuple(node.meta["val"].shape))
            else:
                new = reshaped(build, permuted(build, base, dimensions), tuple(node.meta["val"].shape))
        node.replace_all_uses_with(new)
        graph.erase_node(node)


def permuted(build: Builder, base: fx.Node, dimensions: Dimensions) -> fx.Node:
    """`base` with its dimensions in this order, as far as they have several elements; others last."""
    shape = base.meta["val"].shape
    order = [d for d in dimensions if d is not None]
    if (several := [d for d in order if shape[d] != 1]) == sorted(several):
        return base
    order += [d for d in range(len(shape)) if d not in order]
    if len(order) == 2:
        return build.t(base)
    return build(aten.permute.default, (base, order), base.meta["val"].permute(order))


def reshaped(build: Builder, node: fx.Node, shape: tuple[int, ...]) -> fx.Node:
    """`node` in another shape: as a view of what it is a view of, of a copy where strides do not allow that."""
    if tuple(node.meta["val"].shape) == shape:
        return node
    value = _viewed(node, shape)
    while value is not None and node.target in _VIEWS and _viewed(node.args[0], shape) is not None:
        node = node.args[0]  # type: ignore[assignment]  # a view of a view
        value = _viewed(node, shape)
        if tuple(node.meta["val"].shape) == shape:
            return node
    if value is None:
        dense = torch.empty_like(node.meta["val"], memory_format=torch.contiguous_format)
        node = build(aten.clone.default, (node,), dense, memory_format=torch.contiguous_format)
        value = dense.view(shape)
    return build(aten.view.default, (node, list(shape)), value)


def _viewed(node: Any, shape: tuple[int, ...]) -> Any:
    """The value of a view; None where strides do not allow one."""
    try:
        return node.meta["val"].view(shape)
    except (RuntimeError, ValueError):  # by what kind of fake tensor says so
        return None
