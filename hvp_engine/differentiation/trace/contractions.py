"""Contractions as matrix products, however they are written.

A linear layer can be written as (x.unsqueeze(1) * w).sum(2), by einsum, by a batched product with w expanded, as a
convolution of one point. All are sum_i x[b, i] w[o, i], which is x w^T; with b, o, i for the dimensions of the product

    sum over i of  x[b, 1, i] * w[1, o, i]      is   x [b, i]  times  w^T [i, o]
    sum over s of  g[s, o, t] @ x[s, t, i]      is   g [o, (s t)]  times  x [(s t), i]

An operand has no label for a dimension along which its elements are the same. A label of both operands that stays is a
batch, one that is summed is inner; those of one operand are rows and columns.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import fx

from hvp_engine.differentiation.trace.patterns import Builder, alike, same_dtype
from hvp_engine.differentiation.trace.view_chains import permuted, reshaped, shown

aten = torch.ops.aten

Labels = tuple[int, ...]


@dataclass(frozen=True)
class Labelled:
    """A tensor, with the dimension of the contraction that each of its own is; None for one to leave out."""

    node: fx.Node
    marks: tuple[int | None, ...]

    @property
    def labels(self) -> Labels:
        return tuple(d for d in self.marks if d is not None)

    def whole(self, build: Builder) -> fx.Node:
        """Without the dimensions that have no label."""
        node = self.node
        for place in reversed(range(len(self.marks))):
            if self.marks[place] is None:
                node = build(aten.select.int, (node, place, 0), node.meta["val"].select(place, 0))
        return node


@dataclass(frozen=True)
class Contraction:
    """The sum over the dimensions `summed` of the product of two tensors."""

    a: Labelled
    b: Labelled
    summed: Collection[int]
    sizes: Mapping[int, int]

    def shared(self, summed: bool) -> Labels:
        """Dimensions of both operands that are summed, or that stay."""
        return tuple(d for d in self.a.labels if d in self.b.labels and (d in self.summed) == summed)

    def own(self, mine: Labelled, other: Labelled) -> Labels:
        """Dimensions of one operand that stay."""
        return tuple(d for d in mine.labels if d not in other.labels and d not in self.summed)

    @property
    def pays(self) -> bool:
        """Whether a matrix product moves less than the product of all elements; batches of vectors do not."""
        rows, columns = self.own(self.a, self.b), self.own(self.b, self.a)
        if self.shared(summed=False):
            return bool(rows and columns)
        return bool(rows and columns) or bool(self.shared(summed=True) and (rows or columns))

    def made(self, build: Builder) -> Labelled:
        """The result, with its labels in order.

        Rows are those of the operand with the first label, so that the result need not be transposed.
        """
        sizes = self.sizes
        a, b = (self._summed_alone(build, x, y) for x, y in ((self.a, self.b), (self.b, self.a)))
        if min(self.own(b, a), default=len(sizes)) < min(self.own(a, b), default=len(sizes)):
            a, b = b, a
        batch, inner = sorted(self.shared(summed=False)), [d for d in a.labels if d in self.shared(summed=True)]
        rows, columns = self.own(a, b), self.own(b, a)
        labels = (*batch, *rows, *columns)
        shape = tuple(sizes[d] for d in labels)
        if not inner and not (rows and columns):
            left, right = (self._broadcast(build, x, labels) for x in (a, b))
            product = build(aten.mul.Tensor, (left, right), left.meta["val"].new_empty(shape))
        else:
            left = self._as_matrices(build, a, batch, rows, inner)
            right = self._as_matrices(build, b, batch, inner, columns)
            value = left.meta["val"].new_empty((*left.meta["val"].shape[:-1], right.meta["val"].shape[-1]))
            product = build(aten.bmm.default if batch else aten.mm.default, (left, right), value)
            product = reshaped(build, product, shape)
        free = math.prod(sizes[d] for d in self.summed if d not in (*self.a.labels, *self.b.labels))
        if free != 1:
            product = build(aten.mul.Scalar, (product, free), product.meta["val"])
        # A dimension that stays and that neither operand has: ones(4, 4) @ x has the same row four times.
        if same := tuple(d for d in sizes if d not in (*self.summed, *labels) and sizes[d] != 1):
            labels, shape = (*same, *labels), (*(sizes[d] for d in same), *shape)
            product = build(aten.expand.default, (product, list(shape)), product.meta["val"].expand(shape))
        return _in_order(build, Labelled(product, labels))

    def _summed_alone(self, build: Builder, mine: Labelled, other: Labelled) -> Labelled:
        """An operand summed over dimensions that the other one does not have."""
        return _summed(build, mine, [d for d in self.summed if d not in other.labels])

    def _broadcast(self, build: Builder, x: Labelled, labels: Labels) -> fx.Node:
        """With a dimension for each label, of one element where the operand does not have it."""
        order = tuple(x.labels.index(d) for d in labels if d in x.labels)
        shape = tuple(self.sizes[d] if d in x.labels else 1 for d in labels)
        return reshaped(build, permuted(build, x.node, order), shape)

    def _as_matrices(self, build: Builder, x: Labelled, *groups: Sequence[int]) -> fx.Node:
        """With (batch, rows, columns), each group of labels one dimension; without a batch if that has no label."""
        order = tuple(x.labels.index(d) for group in groups for d in group)
        shape = [math.prod(self.sizes[d] for d in group) for group in groups]
        return reshaped(build, permuted(build, x.node, order), tuple(shape if groups[0] else shape[1:]))


def _summed(build: Builder, x: Labelled, summed: Collection[int]) -> Labelled:
    """Over some of its dimensions, where it has them; with labels for all that remain."""
    node = x.whole(build)
    places = [place for place, d in enumerate(x.labels) if d in summed]
    if not places:
        return Labelled(node, x.labels)
    shape = [size for place, size in enumerate(node.meta["val"].shape) if place not in places]
    total = build(aten.sum.dim_IntList, (node, places), node.meta["val"].new_empty(shape))
    return Labelled(total, tuple(d for d in x.labels if d not in summed))


def _in_order(build: Builder, x: Labelled) -> Labelled:
    order = sorted(range(len(x.labels)), key=x.labels.__getitem__)
    return Labelled(permuted(build, x.node, tuple(order)), tuple(sorted(x.labels)))


def labelled(node: fx.Node, labels: Sequence[int]) -> Labelled:
    """What the node shows, with no label for dimensions along which its elements are the same."""
    base, dimensions = shown(node, expanded=True)
    value = base.meta["val"]
    label = {d: mine for d, mine in zip(dimensions, labels, strict=True) if d is not None}
    same = [value.shape[d] == 1 or value.stride(d) == 0 for d in range(value.dim())]
    return Labelled(base, tuple(None if same[d] else label[d] for d in range(value.dim())))


def _contraction(node: fx.Node, labels: Sequence[int], summed: Collection[int]) -> Contraction | None:
    """What a product of elements or a batched matrix product is, if the dimensions `summed` of it are."""
    a, b = (*node.args, None, None)[:2]
    if node.kwargs or not isinstance(a, fx.Node) or not isinstance(b, fx.Node):
        return None
    sizes = dict(zip(labels, node.meta["val"].shape, strict=True))
    if node.target is aten.mul.Tensor and same_dtype(a, node) and same_dtype(b, node):
        first, second = (labels[len(labels) - x.meta["val"].dim() :] for x in (a, b))
        return Contraction(labelled(a, first), labelled(b, second), summed, sizes)
    if node.target is aten.bmm.default:
        (batch, row, column), inner = labels, -1
        left, right = labelled(a, (batch, row, inner)), labelled(b, (batch, inner, column))
        return Contraction(left, right, {*summed, inner}, sizes | {inner: a.meta["val"].shape[2]})
    return None


def _summands(node: fx.Node, labels: Sequence[int]) -> Iterator[tuple[fx.Node, Labels]]:
    """What is added up in `node`, with the label of each dimension, as far as nothing else reads it."""
    base, dimensions = shown(node)
    alone = len(node.users) == 1
    if alone and base is not node and None not in dimensions and len(dimensions) == base.meta["val"].dim():
        order = dict(zip(dimensions, labels, strict=True))
        yield from _summands(base, [order[d] for d in range(len(dimensions))])
    elif alone and node.target is aten.add.Tensor and not node.kwargs and all(alike(x, node) for x in node.args):
        for x in node.args:
            yield from _summands(x, labels)  # type: ignore[arg-type]  # nodes, since they are alike
    else:
        yield node, tuple(labels)


def _sum(build: Builder, node: fx.Node) -> Labelled | None:
    """A sum, of whose summands at least one is a contraction; None for any other."""
    source, dimensions, *_ = (*node.args, None, None)
    if node.target is not aten.sum.dim_IntList or node.kwargs or not dimensions or not same_dtype(source, node):
        return None
    count = source.meta["val"].dim()
    summed = {d % count for d in dimensions}
    summands = list(_summands(source, range(count)))
    found = [_contraction(x, labels, summed) if len(x.users) == 1 else None for x, labels in summands]
    pays = [one is not None and one.pays for one in found]
    if not any(pays):
        return None
    parts = []
    for (x, labels), one, good in zip(summands, found, pays, strict=True):
        if one is not None and good:
            parts.append(one.made(build))
        else:
            several = tuple(None if size == 1 else d for d, size in zip(labels, x.meta["val"].shape, strict=True))
            parts.append(_in_order(build, _summed(build, Labelled(x, several), summed)))
    total = parts[0].node
    for part in parts[1:]:
        total = build(aten.add.Tensor, (total, part.node), total.meta["val"])
    return Labelled(total, parts[0].labels)


def _product(build: Builder, node: fx.Node) -> Labelled | None:
    """A batched product of which one factor is the same for the whole batch, or that is a single one."""
    found = _contraction(node, range(3), ()) if node.target is aten.bmm.default else None
    return None if found is None or found.shared(summed=False) else found.made(build)


def contract(graph: fx.Graph, linear: set[fx.Node]) -> None:
    """Bring sums of products, and batched products of what is the same for the whole batch, to matrix products."""
    put_instead(graph, linear, lambda build, node: _product(build, node) or _sum(build, node))


def put_instead(
    graph: fx.Graph, linear: set[fx.Node], contracted: Callable[[Builder, fx.Node], Labelled | None]
) -> None:
    """Replace the nodes for which `contracted` makes a result, whose labels are in order, by that."""
    build = Builder(graph, linear)
    for node in list(graph.nodes):
        if node not in linear or node.op != "call_function":
            continue
        with graph.inserting_before(node):
            new = contracted(build, node)
            if new is None:
                continue
            value = node.meta["val"]
            result = reshaped(build, new.node, tuple(value.shape))
            if value.is_contiguous() and not result.meta["val"].is_contiguous():
                result = build(aten.clone.default, (result,), value, memory_format=torch.contiguous_format)
        node.replace_all_uses_with(result)
        graph.erase_node(node)
