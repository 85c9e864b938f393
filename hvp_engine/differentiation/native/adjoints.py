"""Operators that move elements to places known beforehand, and their adjoints: along one dimension, or one by one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from hvp_engine.differentiation.native.builder import CPU, Kind
from hvp_engine.differentiation.native.conversion import Conversion, Value, handles
from hvp_engine.differentiation.native.operations import Code, UnsupportedError
from hvp_engine.differentiation.native.places import Place
from hvp_engine.differentiation.native.shaping import as_rows, flat, numel, positions_of, reshaped

aten = torch.ops.aten

_MOST_SUMS = 64
"""Elements along a dimension up to which running sums are a product with a triangular matrix."""


def _onto(c: Conversion, node: Any, onto: Place, values: Place, places: Place) -> Place:
    """`onto`, plus the values at these places of it, flat."""
    base = as_rows(c, flat(c, onto), 0)
    rows = as_rows(c, flat(c, values), 0)
    return reshaped(c, c.builder.scattered(rows, places, base.sizes[1], onto=base), c.shape(node))


def _zeros(c: Conversion, node: Any) -> Place:
    return c.builder.stored(c.builder.filled(c.shape(node), 0.0))


@handles(aten.diagonal_backward.default)
def _diagonal_backward(c: Conversion, node: Any) -> Value:
    grad, sizes, *arguments = node.args
    values = c.place(grad)
    places = positions_of(c, node, aten.diagonal.default, tuple(sizes), arguments, values.sizes)
    return _onto(c, node, _zeros(c, node), values, places)


_COPIES = {
    getattr(aten, f"{name}{dims}d").default: (getattr(aten, f"{name}{dims}d_backward").default, dims)
    for name in ("reflection_pad", "replication_pad", "_upsample_nearest_exact", "upsample_nearest")
    for dims in (1, 2, 3)
    if (name, dims) != ("upsample_nearest", 2)  # which has a formula of its own
}
"""Paddings and enlargements, each of whose pixels is one of the image: their adjoints, and an image's dimensions."""

_ADJOINTS = {adjoint: copy for copy, (adjoint, _) in _COPIES.items()}


def _pixels(c: Conversion, copy: Any, sizes: tuple[int, ...], arguments: Sequence[Any]) -> Place:
    """The positions of the pixels that `copy` takes, in one of the images."""
    image = sizes[len(sizes) - _COPIES[copy][1] :]
    numbers = torch.arange(numel(image), dtype=torch.float64, device=CPU).reshape(1, 1, *image)  # it takes no integers
    found = copy(numbers, *arguments).reshape(-1).to(torch.int64)
    return c.builder.derive(found.shape, lambda: found, [], Kind.INDEX)


def _images(c: Conversion, place: Place, dims: int) -> Place:
    """Images one after another, each with its pixels in a line."""
    pixels = numel(place.sizes[len(place.sizes) - dims :])
    return as_rows(c, reshaped(c, place, (place.numel // max(pixels, 1), pixels)), 1)


@handles(*_COPIES)
def _copied(c: Conversion, node: Any) -> Value:
    source, *arguments = node.args
    pixels = _pixels(c, node.target, c.shape(source), arguments)
    chosen = c.builder.selected(_images(c, c.place(source), _COPIES[node.target][1]), pixels)
    return reshaped(c, chosen, c.shape(node))


@handles(*_ADJOINTS)
def _copied_backward(c: Conversion, node: Any) -> Value:
    copy, sizes = _ADJOINTS[node.target], c.shape(node)
    dims = _COPIES[copy][1]
    padded = isinstance(node.args[1], fx.Node)  # (grad, image, padding), or (grad, new sizes, sizes, scales)
    pixels = _pixels(c, copy, sizes, node.args[2:] if padded else (node.args[1], *node.args[3:]))
    images = _images(c, c.place(node.args[0]), dims)
    return reshaped(c, c.builder.scattered(images, pixels, numel(sizes[len(sizes) - dims :])), sizes)


@handles(aten.unfold_backward.default)
def _unfold_backward(c: Conversion, node: Any) -> Value:
    """Windows are added up, first the first elements of all of them, then the second ones, and so on."""
    grad, _, dim, size, step = node.args
    result, values = _zeros(c, node), c.place(grad)
    dim %= len(result.sizes)
    last = len(values.sizes) - 1
    for k in range(size):
        part = result.narrowed(dim, k, values.sizes[dim], step)
        total = c.builder.combined(Code.ADD, [part, values.narrowed(last, k, 1).without(last)], part.sizes)
        c.builder.stored(total, part)
    return result


@handles(aten.index_add.default)
def _index_add(c: Conversion, node: Any) -> Value:
    onto, dim, index, values = node.args
    sizes = c.shape(node)
    if node.kwargs.get("alpha", 1) != 1 or c.moves(index) or not sizes:
        raise UnsupportedError("index_add with alpha, by what depends on the tangents, or of one number")
    base, rows = (as_rows(c, c.place(x), dim % len(sizes)) for x in (onto, values))
    return reshaped(c, c.builder.scattered(rows, c.indices(index), base.sizes[1], onto=base), sizes)


@handles(aten.scatter.src)
def _scatter(c: Conversion, node: Any) -> Value:
    """What is overwritten becomes zero, then the values are added; of several for one place the last one counts."""
    onto, dim, index, values = node.args
    sizes, of_index = c.shape(node), c.shape(index)
    if c.moves(index):
        raise UnsupportedError("scatter by what depends on the tangents")
    chosen = c.place(values)
    for d, size in enumerate(of_index):
        chosen = chosen.narrowed(d, 0, size)

    def last_ones(index: Tensor) -> Tensor:
        """[7, 3, 7] -> [0, 1, 1]."""
        places = torch.arange(numel(sizes), device=CPU).reshape(sizes).gather(dim, index).reshape(-1)
        order = torch.arange(len(places), device=CPU)
        last = torch.full((numel(sizes),), -1, device=CPU).scatter_reduce(0, places, order, "amax")
        return (last[places] == order).reshape(of_index).to(c.builder.dtype)

    def left(index: Tensor) -> Tensor:
        return torch.ones(sizes, dtype=c.builder.dtype, device=CPU).scatter(dim, index, 0.0)

    base = c.builder.combined(Code.SELECT, [c.operand(onto, node), c.derive(sizes, left, [index])], sizes)
    counted = c.builder.combined(Code.SELECT, [chosen, c.derive(of_index, last_ones, [index])], of_index)
    places = positions_of(c, node, aten.gather.default, sizes, [dim, index], of_index)
    return _onto(c, node, c.builder.stored(base), c.builder.stored(counted), places)


@handles(aten.cumsum.default)
def _cumsum(c: Conversion, node: Any) -> Value:
    """The product of a triangle of ones with what is along the dimension."""
    place = c.place(node.args[0])
    if not place.sizes or (count := place.sizes[dim := node.args[1] % len(place.sizes)]) > _MOST_SUMS:
        raise UnsupportedError(f"cumsum along more than {_MOST_SUMS} elements")
    dtype = c.builder.dtype
    triangle = c.builder.derive((count, count), lambda: torch.ones(count, count, dtype=dtype, device=CPU).tril(), [])
    rows = as_rows(c, place, dim)
    before, _, after = rows.sizes
    if after == 1:
        total = c.builder.product(rows.without(2), triangle.transposed(0, 1))
    else:
        total = c.builder.product(triangle.with_new(0).expanded((before, count, count)), rows)
    return reshaped(c, total, place.sizes)


@handles(aten.glu_backward.default)
def _glu_backward(c: Conversion, node: Any) -> Value:
    """The gradient times the slopes with respect to each half, which the operator gives for a gradient of ones."""
    grad, inputs, dim = node.args
    if c.moves(inputs):
        raise UnsupportedError("glu_backward of an input that depends on the tangents")
    sizes, dtype, result = c.shape(node), c.builder.dtype, c.builder.workspace(c.shape(node))
    value = c.place(grad)

    def slopes(x: Tensor) -> Tensor:
        return aten.glu_backward.default(torch.ones(value.sizes, dtype=dtype, device=CPU), x, dim)

    slope, half = c.derive(sizes, slopes, [inputs]), value.sizes[dim]
    for start in (0, half):
        parts = [value, slope.narrowed(dim % len(sizes), start, half)]
        product = c.builder.combined(Code.MULTIPLY, parts, value.sizes)
        c.builder.stored(product, result.narrowed(dim % len(sizes), start, half))
    return result


@handles(aten.copy.default)
def _copy(c: Conversion, node: Any) -> Value:
    """The source in the shape of the target, whose values are lost."""
    return c.place(node.args[1]).expanded(c.shape(node))


def _laid_out(c: Conversion, node: Any, new: bool) -> Place:
    """An argument with the strides that the graph says, which `as_strided` counts in; a copy if it is written."""
    place, strides = c.place(node), node.meta["val"].stride()
    return c.builder.copied(place, strides) if new or place.strides != strides or place.offset else place


def _strided(node: Any, place: Place, first: int) -> Place:
    sizes, strides, *offset = [*node.args[first:], None][:3]
    if node.args[0].meta["val"].storage_offset():
        raise UnsupportedError(f"{node.target} of a part of a tensor")
    return Place(place.region, tuple(sizes), tuple(strides), place.offset + (offset[0] or 0))


@handles(aten.as_strided.default)
def _as_strided(c: Conversion, node: Any) -> Value:
    return _strided(node, _laid_out(c, node.args[0], new=False), 1)


@handles(aten.as_strided_scatter.default)
def _as_strided_scatter(c: Conversion, node: Any) -> Value:
    result = _laid_out(c, node.args[0], new=True)
    c.builder.stored(c.place(node.args[1]), _strided(node, result, 2))
    return result


@handles(aten.unfold.default, every_term=True)
def _unfold(c: Conversion, node: Any) -> Value:
    """Windows, which overlap, as a view."""
    source, dim, size, step = node.args
    place = c.place(source)
    if not place.sizes:
        raise UnsupportedError("unfold of one number")
    dim %= len(place.sizes)
    strides = [*place.strides, place.strides[dim]]
    strides[dim] *= step
    return Place(place.region, (*c.shape(node)[:-1], size), tuple(strides), place.offset)


_PLANES = {
    aten.max_pool2d_with_indices_backward.default: 2,
    aten.adaptive_max_pool2d_backward.default: 2,
    aten.fractional_max_pool2d_backward.default: 2,
    aten.max_pool3d_with_indices_backward.default: 3,
    aten.adaptive_max_pool3d_backward.default: 3,
    aten.fractional_max_pool3d_backward.default: 3,
}
"""Adjoints of the choice of a largest pixel in each window, and the dimensions in which pixels are counted."""


@handles(*_PLANES)
def _max_pool_backward(c: Conversion, node: Any) -> Value:
    grad, indices, sizes = node.args[0], node.args[-1], c.shape(node)
    first = len(sizes) - _PLANES[node.target]
    plane = numel(sizes[first:])

    def compute(chosen: Tensor) -> Tensor:
        planes = chosen.reshape(-1, numel(chosen.shape[first:]))
        return (planes + plane * torch.arange(len(planes), device=CPU)[:, None]).reshape(-1)

    positions = c.derive((numel(c.shape(grad)),), compute, [indices], Kind.INDEX)
    rows = as_rows(c, flat(c, c.place(grad)), 0)
    return reshaped(c, c.builder.scattered(rows, positions, numel(sizes)), sizes)
