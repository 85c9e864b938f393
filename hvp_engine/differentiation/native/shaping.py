"""Operators that move elements: views, which cost nothing, concatenation, lookups, and their adjoints."""

from __future__ import annotations

import math
import operator
from typing import Any

import torch
from torch import Tensor, fx

from hvp_engine.differentiation.native.builder import CPU, Kind
from hvp_engine.differentiation.native.conversion import Conversion, Value, handles
from hvp_engine.differentiation.native.operations import UnsupportedError
from hvp_engine.differentiation.native.places import Place

aten = torch.ops.aten


@handles(operator.getitem)
def _getitem(c: Conversion, node: Any) -> Value:
    source, index = node.args
    return c.part(source, index)


@handles(aten.clone.default, aten.detach.default, aten.alias.default, aten._to_copy.default, every_term=True)
def _same(c: Conversion, node: Any) -> Value:
    """Nothing is written in place, so that a copy need not be one."""
    return c.operand(node.args[0], node)


@handles(aten.view.default, aten._unsafe_view.default, every_term=True)
def _view(c: Conversion, node: Any) -> Value:
    place = c.place(node.args[0])
    return reshaped(c, place, c.shape(node))


@handles(aten.t.default, aten.transpose.int, aten.permute.default, every_term=True)
def _permute(c: Conversion, node: Any) -> Value:
    place = c.place(node.args[0])
    dims = len(place.sizes)
    if node.target is aten.permute.default:
        return place.with_dims([d % dims for d in node.args[1]])
    if node.target is aten.t.default:
        return place if dims < 2 else place.transposed(0, 1)
    return place if dims == 0 else place.transposed(node.args[1] % dims, node.args[2] % dims)


@handles(aten.expand.default, every_term=True)
def _expand(c: Conversion, node: Any) -> Value:
    return c.place(node.args[0]).expanded(c.shape(node))


@handles(aten.slice.Tensor, every_term=True)
def _slice(c: Conversion, node: Any) -> Value:
    place = c.place(node.args[0])
    dim, start, step = _slice_of(node, 1, place.sizes)
    return place.narrowed(dim, start, c.shape(node)[dim], step)


def _slice_of(node: Any, first: int, sizes: tuple[int, ...]) -> tuple[int, int, int]:
    """(dim, start, step), of which the arguments from `first` on may leave out some."""
    dim, start, _, step = [*node.args[first:], *[None] * 4][:4]
    dim = (dim or 0) % len(sizes)
    start = start or 0
    start = max(0, min(start + sizes[dim] if start < 0 else start, sizes[dim]))
    return dim, start, step or 1


@handles(aten.select.int, every_term=True)
def _select(c: Conversion, node: Any) -> Value:
    place = c.place(node.args[0])
    dim = node.args[1] % len(place.sizes)
    return place.narrowed(dim, node.args[2] % place.sizes[dim], 1).without(dim)


@handles(aten.squeeze.dim, aten.squeeze.dims, aten.squeeze.default, aten.unsqueeze.default, every_term=True)
def _squeeze(c: Conversion, node: Any) -> Value:
    place = c.place(node.args[0])
    if node.target is aten.unsqueeze.default:
        return place.with_new(node.args[1] % (len(place.sizes) + 1))
    if not place.sizes:
        return place
    given = range(len(place.sizes)) if len(node.args) < 2 else node.args[1]
    dims = {d % len(place.sizes) for d in ([given] if isinstance(given, int) else given)}
    for dim in sorted(dims, reverse=True):
        place = place.without(dim) if place.sizes[dim] == 1 else place
    return place


@handles(aten.split.Tensor, aten.split_with_sizes.default, aten.unbind.int)
def _split(c: Conversion, node: Any) -> Value:
    place = c.place(node.args[0])
    shapes = [tuple(value.shape) for value in node.meta["val"]]
    if node.target is aten.unbind.int:
        dim = (node.args[1] if len(node.args) > 1 else 0) % len(place.sizes)
        return tuple(place.narrowed(dim, i, 1).without(dim) for i in range(len(shapes)))
    dim = (node.args[2] if len(node.args) > 2 else 0) % len(place.sizes)
    parts, start = [], 0
    for shape in shapes:
        parts.append(place.narrowed(dim, start, shape[dim]))
        start += shape[dim]
    return tuple(parts)


@handles(aten.cat.default, aten.stack.default)
def _cat(c: Conversion, node: Any) -> Value:
    sizes = c.shape(node)
    result = c.builder.workspace(sizes)
    dim = (node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)) % len(sizes)
    start = 0
    for argument in node.args[0]:
        if node.target is aten.cat.default and c.shape(argument) == (0,) and len(sizes) > 1:
            continue  # an empty vector may stand beside tensors of any shape
        value = c.operand(argument, argument)
        if node.target is aten.stack.default:
            value = c.place(argument).with_new(dim)
        c.builder.stored(value, result.narrowed(dim, start, value.sizes[dim]))
        start += value.sizes[dim]
    return result


def _within_zeros(c: Conversion, node: Any) -> Place:
    result = c.builder.workspace(c.shape(node))
    return c.builder.stored(c.builder.filled(result.sizes, 0.0), result)


@handles(aten.slice_backward.default)
def _slice_backward(c: Conversion, node: Any) -> Value:
    result = _within_zeros(c, node)
    dim, start, step = _slice_of(node, 2, result.sizes)
    c.builder.stored(c.place(node.args[0]), result.narrowed(dim, start, c.shape(node.args[0])[dim], step))
    return result


@handles(aten.select_backward.default)
def _select_backward(c: Conversion, node: Any) -> Value:
    result = _within_zeros(c, node)
    dim = node.args[2] % len(result.sizes)
    index = node.args[3] % result.sizes[dim]
    c.builder.stored(c.place(node.args[0]), result.narrowed(dim, index, 1).without(dim))
    return result


@handles(aten.constant_pad_nd.default)
def _pad(c: Conversion, node: Any) -> Value:
    """Zeros around, or, where a width is negative, less of what there is."""
    if len(node.args) > 2 and node.args[2] != 0:
        raise UnsupportedError("constant_pad_nd with a number that is not zero")
    source, result, widths = c.place(node.args[0]), _within_zeros(c, node), node.args[1]
    inside = result
    for k in range(0, len(widths), 2):
        dim = len(source.sizes) - 1 - k // 2
        before, after = widths[k], widths[k + 1]
        source = source.narrowed(dim, max(-before, 0), source.sizes[dim] - max(-before, 0) - max(-after, 0))
        inside = inside.narrowed(dim, max(before, 0), source.sizes[dim])
    c.builder.stored(source, inside)
    return result


@handles(aten.index_select.default)
def _index_select(c: Conversion, node: Any) -> Value:
    """Whole rows: the source as (before, rows, after), where a row is what one index chooses."""
    source, dim, index = node.args
    place = c.place(source)
    if c.moves(index) or not place.sizes:
        raise UnsupportedError("index_select by what depends on the tangents, or of one number")
    dim %= len(place.sizes)
    rows = as_rows(c, place, dim)
    return reshaped(c, c.builder.selected(rows, c.indices(index)), c.shape(node))


def as_rows(c: Conversion, place: Place, dim: int) -> Place:
    before, after = 1, 1
    for d, size in enumerate(place.sizes):
        before, after = (before * size, after) if d < dim else (before, after * size) if d > dim else (before, after)
    return reshaped(c, place, (before, place.sizes[dim], after))


@handles(aten.embedding.default)
def _embedding(c: Conversion, node: Any) -> Value:
    weight, index = node.args[:2]
    rows = c.place(weight).with_new(0)
    return reshaped(c, c.builder.selected(rows, c.indices(index)), c.shape(node))


@handles(aten.embedding_dense_backward.default)
def _embedding_backward(c: Conversion, node: Any) -> Value:
    grad, index, rows, padding, by_frequency = node.args
    if by_frequency or c.moves(index):
        raise UnsupportedError("embedding_dense_backward scaled by frequency")
    place, count = c.place(grad), index.meta["val"].numel()
    shown = reshaped(c, place, (1, count, c.shape(node)[1]))
    skipped = padding if padding >= 0 else None
    return c.builder.scattered(shown, c.indices(index), rows, skipped).without(0)


_INDEXES = (aten.index.Tensor, aten._unsafe_index.Tensor)
"""Choices by indices; PyTorch's decompositions have the second, which trusts them to be in range."""


@handles(
    aten.gather.default,
    *_INDEXES,
    aten.flip.default,
    aten.roll.default,
    aten.repeat.default,
    aten.take.default,
    aten.diagonal.default,
)
def _chosen(c: Conversion, node: Any) -> Value:
    source, *arguments = node.args
    rows = _rows_chosen(c, node)
    if rows is not None:
        return rows
    positions = positions_of(c, node, node.target, c.shape(source), arguments, c.shape(node))
    return reshaped(c, c.builder.selected(as_rows(c, flat(c, c.place(source)), 0), positions), c.shape(node))


def _rows_chosen(c: Conversion, node: Any) -> Place | None:
    """A choice along one dimension, the same for all others; None for any other."""
    source, *arguments = node.args
    sizes = c.shape(source)
    turned = {aten.flip.default: 0, aten.roll.default: 1}.get(node.target)  # the place of the dimensions, if there
    if turned is not None and turned < len(arguments) and len(arguments[turned]) == 1:
        dim = arguments[turned][0] % len(sizes)
        amount = arguments[0][0] if turned else 0
        line = torch.arange(sizes[dim], device=CPU)
        line = line.roll(amount) if turned else line.flip(0)
        index = c.builder.derive((sizes[dim],), lambda: line, [], Kind.INDEX)
    elif node.target in _INDEXES and [x is None for x in arguments[0]].count(False) == 1:
        dim, chosen = next((d, x) for d, x in enumerate(arguments[0]) if x is not None)
        value = chosen.meta["val"]
        if value.dim() != 1 or value.dtype == torch.bool or c.moves(chosen):
            return None
        size = sizes[dim]
        index = c.derive((len(value),), lambda x: torch.where(x < 0, x + size, x).to(torch.int64), [chosen], Kind.INDEX)
    else:
        return None
    return reshaped(c, c.builder.selected(as_rows(c, c.place(source), dim), index), c.shape(node))


@handles(aten.scatter_add.default, aten.index_put.default, aten._unsafe_index_put.default)
def _scattered(c: Conversion, node: Any) -> Value:
    """The adjoint of a choice, onto what there is."""
    if node.target is aten.scatter_add.default:
        onto, dim, index, values = node.args
        chosen = c.place(values)
        for d, size in enumerate(c.shape(index)):
            chosen = chosen.narrowed(d, 0, size)
        positions = positions_of(c, node, aten.gather.default, c.shape(node), [dim, index], chosen.sizes)
    else:
        onto, indices, values, *accumulate = node.args
        if accumulate != [True]:
            raise UnsupportedError("index_put that overwrites")
        sizes = tuple(_chosen_shape(c, node, indices))
        positions = positions_of(c, node, aten.index.Tensor, c.shape(node), [indices], sizes)
        chosen = c.place(values).expanded(sizes)
    rows = as_rows(c, flat(c, chosen), 0)
    base = as_rows(c, flat(c, c.place(onto)), 0)
    return reshaped(c, c.builder.scattered(rows, positions, base.sizes[1], onto=base), c.shape(node))


def _chosen_shape(c: Conversion, node: Any, indices: Any) -> Any:
    """The shape of what `indices` choose of a tensor like the result."""
    if any(index is not None and index.meta["val"].dtype == torch.bool for index in indices):
        raise UnsupportedError("index_put by a mask")
    example = [
        None if index is None else torch.zeros(c.shape(index), dtype=torch.int64, device="meta") for index in indices
    ]
    return aten.index.Tensor(torch.empty(c.shape(node), device="meta"), example).shape


def positions_of(
    c: Conversion, node: Any, choose: Any, shape: tuple[int, ...], arguments: list[Any], wanted: tuple[int, ...]
) -> Place:
    """The positions of the elements that `choose` takes of a tensor of `shape`: what it makes of their numbers."""
    known: list[fx.Node] = []
    fx.node.map_arg(arguments, lambda argument: known.append(argument))
    known = list(dict.fromkeys(known))
    if any(c.moves(argument) for argument in known):
        raise UnsupportedError(f"{node.target} by what depends on the tangents")

    def compute(*tensors: Tensor) -> Tensor:
        values = dict(zip(known, tensors, strict=True))
        args = fx.node.map_arg(arguments, lambda argument: values[argument])
        return choose(torch.arange(numel(shape), device=CPU).reshape(shape), *args).reshape(-1)

    return c.derive((numel(wanted),), compute, known, Kind.INDEX)


def flat(c: Conversion, place: Place) -> Place:
    return reshaped(c, place, (place.numel,))


def reshaped(c: Conversion, place: Place, sizes: tuple[int, ...]) -> Place:
    """As a view where strides allow it, else as one of a copy."""
    shown = place.reshaped(sizes)
    if shown is None:
        shown = c.builder.copied(place).reshaped(sizes)
    assert shown is not None  # a dense copy has every shape
    return shown


def numel(shape: tuple[int, ...]) -> int:
    return math.prod(shape)
