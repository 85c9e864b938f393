"""Matrix products, sums, and the adjoints of normalizations, which are sums and products of known tensors."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from hvp_engine.differentiation.native.conversion import Conversion, Value, handles
from hvp_engine.differentiation.native.expressions import Operand
from hvp_engine.differentiation.native.operations import Code, UnsupportedError
from hvp_engine.differentiation.native.places import Place

aten = torch.ops.aten


@handles(aten.mm.default, aten.bmm.default)
def _mm(c: Conversion, node: Any) -> Value:
    first, second = node.args
    return c.builder.product(c.place(first), c.place(second))


@handles(aten.addmm.default, aten.baddbmm.default)
def _addmm(c: Conversion, node: Any) -> Value:
    onto, first, second = node.args
    if node.kwargs.get("beta", 1) != 1:
        raise UnsupportedError("addmm with beta")
    a, b = c.place(first), c.place(second)
    read_twice = onto is first or onto is second
    return c.builder.product(a, b, c.copy_of(onto) if read_twice else c.owned(onto), float(node.kwargs.get("alpha", 1)))


@handles(aten.mv.default, aten.dot.default)
def _mv(c: Conversion, node: Any) -> Value:
    first, second = (c.place(argument) for argument in node.args)
    if node.target is aten.dot.default:
        return c.builder.product(first.with_new(0), second.with_new(1)).without(1).without(0)
    return c.builder.product(first, second.with_new(1)).without(1)


@handles(aten.sum.dim_IntList, aten.sum.default, aten.mean.dim, aten.mean.default)
def _sum(c: Conversion, node: Any) -> Value:
    argument = node.args[0]
    sizes = c.shape(argument)
    given: Any = node.args[1] if len(node.args) > 1 else None
    dims = (
        [d % len(sizes) for d in ([given] if isinstance(given, int) else given or range(len(sizes)))] if sizes else []
    )
    total = c.builder.summed(c.operand(argument, argument), dims) if sizes else c.place(argument)
    keeps = node.args[2] if len(node.args) > 2 else node.kwargs.get("keepdim", False)
    for dim in [] if keeps else sorted(dims, reverse=True):
        total = total.without(dim)
    if node.target in (aten.mean.dim, aten.mean.default):
        count = math.prod(sizes[d] for d in dims)
        return c.builder.combined(Code.SCALE, [total], total.sizes, 1 / count if count else math.nan)
    return total


@handles(aten.native_layer_norm_backward.default)
def _layer_norm_backward(c: Conversion, node: Any) -> Value:
    grad, inputs, normalized, mean, std, weight = node.args[:6]
    sizes = c.shape(inputs)
    inside = list(range(len(sizes) - len(normalized), len(sizes)))
    outside = list(range(len(sizes) - len(normalized)))
    _refuse_moving(c, node, grad)
    statistics = c.derive(sizes, lambda x, m, s: (x - m) * s, [inputs, mean, std])
    factor = None if weight is None else c.place(weight)
    return _normalized(c, node, factor, c.place(std), statistics, inside, outside, tuple(normalized))


@handles(aten.native_batch_norm_backward.default)
def _batch_norm_backward(c: Conversion, node: Any) -> Value:
    grad, inputs, weight, running_mean, running_variance, mean, std, training, eps = node.args[:9]
    sizes = c.shape(inputs)
    channels = (1, sizes[1], *[1] * (len(sizes) - 2))
    others = [d for d in range(len(sizes)) if d != 1]
    _refuse_moving(c, node, grad)

    def scale_of(known: Tensor) -> Tensor:
        """1 / std, from what was saved in training and from the running variance in evaluation."""
        return (known if training else (known + eps).rsqrt()).reshape(channels)

    centre, spread = (mean, std) if training else (running_mean, running_variance)
    statistics = c.derive(sizes, lambda x, m, s: (x - m.reshape(channels)) * scale_of(s), [inputs, centre, spread])
    scale = c.derive(channels, scale_of, [spread])
    factor = None if weight is None else c.derive(channels, lambda tensor: tensor.reshape(channels), [weight])
    if training:
        return _normalized(c, node, factor, scale, statistics, others, others, (sizes[1],))
    return _scaled(c, node, factor, scale, statistics, others)


def _scaled(c: Conversion, node: Any, weight: Place | None, scale: Place, statistics: Place, dims: list[int]) -> Value:
    """In evaluation, where the statistics are constants: g weight / std, the sums of g x' and of g."""
    combined, sizes, gradient = c.builder.combined, statistics.sizes, c.place(node.args[0])
    factor = scale if weight is None else combined(Code.MULTIPLY, [scale, weight], scale.sizes)
    along = combined(Code.MULTIPLY, [gradient, statistics], sizes)
    wanted, count = node.args[-1], (sizes[1],)
    return (
        c.builder.stored(combined(Code.MULTIPLY, [gradient, factor], sizes)) if wanted[0] else None,
        total(c, along, dims, count) if wanted[1] else None,
        total(c, gradient, dims, count) if wanted[2] else None,
    )


def _refuse_moving(c: Conversion, node: Any, grad: Any) -> None:
    if any(c.moves(argument) for argument in node.all_input_nodes if argument is not grad):
        raise UnsupportedError(f"{node.target} of an input that depends on the tangents")


def _normalized(
    c: Conversion,
    node: Any,
    weight: Place | None,
    scale: Place,
    statistics: Place,
    means: list[int],
    sums: list[int],
    shape: tuple[int, ...],
) -> Value:
    """With x' the normalized input, `scale` 1 / std and h = g weight: (h - mean(h) - x' mean(h x')) / std for the
    input, the sums of g x' and of g for weight and bias; those that the mask leaves out are not made."""
    combined, sizes = c.builder.combined, statistics.sizes
    gradient = c.place(node.args[0])
    results: list[Any] = [None, None, None]
    if node.args[-1][0]:
        weighted: Operand = gradient
        if weight is not None:
            weighted = c.builder.stored(combined(Code.MULTIPLY, [gradient, weight], sizes))
        mean = mean_of(c, weighted, sizes, means)
        shared = mean_of(c, combined(Code.MULTIPLY, [weighted, statistics], sizes), sizes, means)
        centred = combined(Code.SUBTRACT, [weighted, mean], sizes)
        without = combined(Code.SUBTRACT, [centred, combined(Code.MULTIPLY, [statistics, shared], sizes)], sizes)
        results[0] = c.builder.stored(combined(Code.MULTIPLY, [without, scale], sizes))
    if node.args[-1][1]:
        results[1] = total(c, combined(Code.MULTIPLY, [gradient, statistics], sizes), sums, shape)
    if node.args[-1][2]:
        results[2] = total(c, gradient, sums, shape)
    return tuple(results)


def total(c: Conversion, value: Operand, dims: list[int], shape: tuple[int, ...]) -> Place:
    """The sum over `dims` as a tensor of `shape`, which the result of a sum, being dense, always has."""
    total = c.builder.copied(c.builder.summed(value, dims))
    shown = total.reshaped(shape)
    assert shown is not None
    return shown


def mean_of(c: Conversion, value: Operand, sizes: tuple[int, ...], dims: list[int]) -> Operand:
    total = c.builder.summed(value, dims)
    count = math.prod(sizes[d] for d in dims)
    return c.builder.stored(c.builder.combined(Code.SCALE, [total], total.sizes, 1 / count if count else 0.0))
