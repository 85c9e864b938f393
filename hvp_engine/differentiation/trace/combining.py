"""Many small operations of a traced loop made few large ones: what the steps of a recurrent net have in common.

* Sums: of matrix products, one product of the factors side by side; of batch sums, one sum over all batches; of
  gradients of the entries of a stack, the stack of the gradients.
* Products of known matrices with the same matrix: one product of the known ones, stacked once in the primal part.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import fx

from hvp_engine.differentiation.trace.passes import called

aten = torch.ops.aten


def combine_sums(graph: fx.Graph, linear: set[fx.Node]) -> None:
    """Sums of several products, batch sums or entry gradients, added up at once."""
    _drop_kept_dimensions(graph)
    for root in [node for node in graph.nodes if node in linear and _is_sum(node)]:
        if len(root.users) == 1 and _is_sum(next(iter(root.users))):
            continue
        summands, sums = _summands(root)
        groups: dict[Hashable, list[fx.Node]] = defaultdict(list)
        for summand in summands:
            groups[_kind(summand)].append(summand)
        with graph.inserting_before(root):
            combined = [_combined(graph, group) for group in groups.values()]
            if combined == list(groups.values()):
                continue
            total, *others = (node for group in combined for node in group)
            for other in others:
                total = called(graph, aten.add.Tensor, (total, other), root.meta["val"])
        root.replace_all_uses_with(total)
        for node in [*sums, *summands]:
            if not node.users:
                graph.erase_node(node)


def share_factors(graph: fx.Graph, linear: set[fx.Node]) -> None:
    """K_1 R, K_2 R, ... with known K_i of few rows: parts of one product."""
    groups: dict[fx.Node, list[fx.Node]] = defaultdict(list)
    for node in graph.nodes:
        if node in linear and node.target is aten.mm.default and node.args[0] not in linear:
            groups[_factor(node, 1)].append(node)
    groups = {right: group for right, group in groups.items() if len(group) > 1 and all(map(_has_few_rows, group))}
    if not groups:
        return
    first = next(node for node in graph.nodes if node in linear and node.op == "call_function")
    for node in list(graph.nodes):
        if node.op == "call_function" and node not in linear:
            first.prepend(node)
    for right, group in groups.items():
        with graph.inserting_before(first):
            stacked = _concatenated(graph, [_factor(node, 0) for node in group], 0)
        with graph.inserting_after(right) if right.op == "call_function" else graph.inserting_before(first):
            value = group[0].meta["val"].new_empty(stacked.meta["val"].shape[0], group[0].meta["val"].shape[1])
            product = called(graph, aten.mm.default, (stacked, right), value)
        start = 0
        for node in group:
            end = start + node.meta["val"].shape[0]
            with graph.inserting_before(node):
                part = called(graph, aten.slice.Tensor, (product, 0, start, end), value[start:end])
            node.replace_all_uses_with(part)
            graph.erase_node(node)
            start = end


def _drop_kept_dimensions(graph: fx.Graph) -> None:
    """sum(x, 0, keepdim) viewed without the kept dimension into sum(x, 0)."""
    for node in list(graph.nodes):
        source: Any = node.args[0] if node.op == "call_function" and node.target is aten.view.default else None
        if source is None or source.target is not aten.sum.dim_IntList or len(source.users) != 1:
            continue
        summed, dimensions, *rest = source.args
        shape = [n for k, n in enumerate(summed.meta["val"].shape) if k not in dimensions]
        if rest == [True] and not source.kwargs and list(node.meta["val"].shape) == shape:
            with graph.inserting_before(node):
                plain = called(graph, aten.sum.dim_IntList, (summed, dimensions), node.meta["val"])
            node.replace_all_uses_with(plain)
            graph.erase_node(node)
            graph.erase_node(source)


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


def _summands(root: fx.Node) -> tuple[list[fx.Node], list[fx.Node]]:
    """What is added up in `root`, and the sums on the way, `root` first."""
    summands: list[fx.Node] = []
    sums: list[fx.Node] = []
    stack: list[Any] = [root]
    while stack:
        node = stack.pop()
        if node is root or (_is_sum(node) and len(node.users) == 1):
            sums.append(node)
            stack.extend(reversed(node.args))
        else:
            summands.append(node)
    return summands, sums


def _kind(node: fx.Node) -> Hashable:
    """Summands of the same kind can be combined; one that cannot is a kind of its own."""
    arguments: tuple[Any, ...] = node.args
    if node.op == "call_function" and len(node.users) == 1 and not node.kwargs:
        if node.target is aten.mm.default:
            return node.target
        if node.target is aten.sum.dim_IntList:
            return node.target, tuple(arguments[1]), arguments[2:], arguments[0].meta["val"].dim()
        if node.target is aten.select_backward.default:
            return node.target, tuple(arguments[1]), arguments[2]
    return node


def _combined(graph: fx.Graph, group: list[fx.Node]) -> list[fx.Node]:
    """One node that is the sum of `group`, which is of one kind; the group where that is impossible or does not pay."""
    if len(group) < 2 or _kind(group[0]) is group[0]:
        return group
    target, value = group[0].target, group[0].meta["val"]
    first: tuple[Any, ...] = group[0].args
    if target is aten.mm.default:
        rows, columns = value.shape
        inner = sum(_factor(node, 0).meta["val"].shape[1] for node in group)
        if inner * (rows + columns) > (len(group) - 1) * rows * columns:
            return group  # to copy the factors costs more than to read and write the result again and again
        left, right = (_concatenated(graph, [_factor(node, k) for node in group], 1 - k) for k in (0, 1))
        return [called(graph, target, (left, right), value)]
    if target is aten.sum.dim_IntList:
        source = _concatenated(graph, [_factor(node, 0) for node in group], first[1][0])
        return [called(graph, target, (source, *first[1:]), value)]
    size, dimension = first[1:3]
    entries = {_factor(node, 3) % size[dimension]: _factor(node, 0) for node in group}
    if len(group) != size[dimension] or len(entries) != size[dimension]:
        return group
    return [called(graph, aten.stack.default, ([entries[k] for k in range(len(entries))], dimension), value)]


def _factor(node: fx.Node, index: int) -> Any:
    return node.args[index]


def _has_few_rows(product: fx.Node) -> bool:
    """Whether reading the right factor takes longer than reading and writing the rest."""
    rows, columns = product.meta["val"].shape
    inner = _factor(product, 0).meta["val"].shape[1]
    return inner * columns > rows * (inner + columns)


def _concatenated(graph: fx.Graph, nodes: Sequence[fx.Node], dimension: int) -> fx.Node:
    """`nodes` side by side; of transposed ones, the transposed of what is below."""
    if all(node.target is aten.t.default for node in nodes):
        below = _concatenated(graph, [_factor(node, 0) for node in nodes], 1 - dimension)
        return called(graph, aten.t.default, (below,), below.meta["val"].t())
    value = nodes[0].meta["val"]
    shape = list(value.shape)
    shape[dimension] = sum(node.meta["val"].shape[dimension] for node in nodes)
    return called(graph, aten.cat.default, (list(nodes), dimension), value.new_empty(shape))
