"""Merges the many small operations of a traced loop, such as the steps of a recurrent network, into a few large ones.

* A sum of matrix products becomes one product of the concatenated factors, a sum of batch sums one sum over all
  batches, and a sum of gradients of the entries of a stack the stack of the gradients.
* Products of known matrices with the same matrix become one product; the known ones are stacked in the primal part.

Without these rewrites a term of an LSTM takes 1.12 times as long, and 1.10 times if it is a Python loop (one core).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import fx

from hvp_engine.differentiation.trace.patterns import Builder, Call, Rule, alike, replace

aten = torch.ops.aten


_KEPT_DIMENSIONS = Rule(
    "sum(x, 0, keepdim) viewed without the kept dimension -> sum(x, 0)",
    Call(aten.view.default, (Call(aten.sum.dim_IntList, ("x", "dimensions", True), alone=True), "shape")),
    lambda build, node, x, dimensions, shape: build(aten.sum.dim_IntList, (x, dimensions), node.meta["val"]),
    lambda build, node, x, dimensions, shape: (
        list(node.meta["val"].shape) == [n for k, n in enumerate(x.meta["val"].shape) if k not in dimensions]
    ),
)


_FEW = 4
"""Summed tensors of one shape that are added up, and not copied behind one another."""


def combine_sums(graph: fx.Graph, linear: set[fx.Node]) -> None:
    """Add up several products, batch sums or entry gradients at once.

    A B + C D + E F -> [A C E] [B; D; F], where copying the factors is cheaper than adding up the products.
    """
    replace(graph, linear, (_KEPT_DIMENSIONS,), only_linear=False)
    build = Builder(graph, linear)
    for root in [node for node in graph.nodes if node in linear and _is_sum(node)]:
        if len(root.users) == 1 and _is_sum(next(iter(root.users))):
            continue
        groups: dict[Hashable, list[fx.Node]] = defaultdict(list)
        for summand in _summands(root):
            groups[_kind(summand)].append(summand)
        with graph.inserting_before(root):
            combined = [_combined(build, group) for group in groups.values()]
            if combined == list(groups.values()):
                continue
            total, *others = (node for group in combined for node in group)
            for other in others:
                total = build(aten.add.Tensor, (total, other), root.meta["val"])
        root.replace_all_uses_with(total)


def share_factors(graph: fx.Graph, linear: set[fx.Node]) -> None:
    """Compute K_1 R, K_2 R, ..., with known K_i of few rows, as parts of one product [K_1; K_2; ...] R."""
    groups: dict[fx.Node, list[fx.Node]] = defaultdict(list)
    for node in graph.nodes:
        if node in linear and node.target is aten.mm.default and node.args[0] not in linear:
            groups[_factor(node, 1)].append(node)
    groups = {right: group for right, group in groups.items() if len(group) > 1 and all(map(_has_few_rows, group))}
    if not groups:
        return
    build = Builder(graph, linear)
    first = next(node for node in graph.nodes if node in linear and node.op == "call_function")
    for node in list(graph.nodes):
        if node.op == "call_function" and node not in linear:
            first.prepend(node)
    for right, group in groups.items():
        with graph.inserting_before(first):
            stacked = _concatenated(build, [_factor(node, 0) for node in group], 0)
        with graph.inserting_after(right) if right.op == "call_function" else graph.inserting_before(first):
            value = group[0].meta["val"].new_empty(stacked.meta["val"].shape[0], group[0].meta["val"].shape[1])
            product = build(aten.mm.default, (stacked, right), value)
        start = 0
        for node in group:
            end = start + node.meta["val"].shape[0]
            with graph.inserting_before(node):
                part = build(aten.slice.Tensor, (product, 0, start, end), value[start:end])
            node.replace_all_uses_with(part)
            start = end


def _is_sum(node: fx.Node) -> bool:
    """Whether the node adds two tensors of its own shape and dtype."""
    return (
        node.op == "call_function"
        and node.target is aten.add.Tensor
        and not node.kwargs
        and _like(node) is not None
        and all(isinstance(argument, fx.Node) and _like(argument) == _like(node) for argument in node.args)
    )


def _like(node: fx.Node) -> Hashable:
    value = node.meta["val"]
    return None if value is None else (value.shape, value.dtype)  # None for a sparse one


def _summands(root: fx.Node) -> list[fx.Node]:
    """What is added up in `root`."""
    summands: list[fx.Node] = []
    stack: list[Any] = [root]
    while stack:
        node = stack.pop()
        if node is root or (_is_sum(node) and len(node.users) == 1):
            stack.extend(reversed(node.args))
        else:
            summands.append(node)
    return summands


def _kind(node: fx.Node) -> Hashable:
    """A key that summands share if they can be combined; the node itself if it can be combined with none."""
    arguments: tuple[Any, ...] = node.args
    if node.op == "call_function" and len(node.users) == 1 and not node.kwargs:
        if node.target is aten.mm.default:
            return node.target
        if node.target is aten.sum.dim_IntList:
            return node.target, tuple(arguments[1]), arguments[2:], arguments[0].meta["val"].dim()
        if node.target is aten.select_backward.default:
            return node.target, tuple(arguments[1]), arguments[2]
    return node


def _combined(build: Builder, group: list[fx.Node]) -> list[fx.Node]:
    """One node that is the sum of `group`, of one kind; the group itself where that is impossible or slower."""
    if len(group) < 2 or _kind(group[0]) is group[0]:
        return group
    target, value = group[0].target, group[0].meta["val"]
    first: tuple[Any, ...] = group[0].args
    if target is aten.mm.default:
        rows, columns = value.shape
        inner = sum(_factor(node, 0).meta["val"].shape[1] for node in group)
        if inner * (rows + columns) > (len(group) - 1) * rows * columns:
            return group  # to copy the factors costs more than to read and write the result again and again
        left, right = (_concatenated(build, [_factor(node, k) for node in group], 1 - k) for k in (0, 1))
        return [build(target, (left, right), value)]
    if target is aten.sum.dim_IntList:
        sources = [_factor(node, 0) for node in group]
        if len(group) <= _FEW and all(alike(x, sources[0]) for x in sources):
            source = sources[0]
            for other in sources[1:]:
                source = build(aten.add.Tensor, (source, other), source.meta["val"])
        else:
            source = _concatenated(build, sources, first[1][0])
        return [build(target, (source, *first[1:]), value)]
    size, dimension = first[1:3]
    entries = {_factor(node, 3) % size[dimension]: _factor(node, 0) for node in group}
    if len(group) != size[dimension] or len(entries) != size[dimension]:
        return group
    return [build(aten.stack.default, ([entries[k] for k in range(len(entries))], dimension), value)]


def _factor(node: fx.Node, index: int) -> Any:
    return node.args[index]


def _has_few_rows(product: fx.Node) -> bool:
    """Whether reading the right factor takes longer than reading and writing the rest."""
    rows, columns = product.meta["val"].shape
    inner = _factor(product, 0).meta["val"].shape[1]
    return inner * columns > rows * (inner + columns)


def _concatenated(build: Builder, nodes: Sequence[fx.Node], dimension: int) -> fx.Node:
    """The concatenation of `nodes`: [A^T B^T] is computed as [A; B]^T."""
    if all(node.target is aten.t.default for node in nodes):
        return build.t(_concatenated(build, [_factor(node, 0) for node in nodes], 1 - dimension))
    value = nodes[0].meta["val"]
    shape = list(value.shape)
    shape[dimension] = sum(node.meta["val"].shape[dimension] for node in nodes)
    return build(aten.cat.default, (list(nodes), dimension), value.new_empty(shape))
