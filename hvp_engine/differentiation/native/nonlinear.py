"""Operators that are not linear, as losses and their gradients have them; only of tensors that are known."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx

from hvp_engine._support.torch_compat import broadcast_shapes
from hvp_engine.differentiation.native.conversion import Conversion, Value, handles
from hvp_engine.differentiation.native.expressions import Operand
from hvp_engine.differentiation.native.operations import Code, UnsupportedError
from hvp_engine.differentiation.native.places import Place

aten = torch.ops.aten

_FUNCTIONS = {
    aten.exp.default: Code.EXPONENTIAL,
    aten.log.default: Code.LOGARITHM,
    aten.sqrt.default: Code.SQUARE_ROOT,
    aten.tanh.default: Code.TANH,
    aten.sigmoid.default: Code.SIGMOID,
}


def _known(c: Conversion, node: Any) -> None:
    if 0 in [size for argument in node.all_input_nodes for size in c.shape(argument)]:
        raise UnsupportedError(f"{node.target} of no elements")
    if any(c.moves(argument) for argument in node.all_input_nodes):
        raise UnsupportedError(f"{node.target} of what depends on the tangents")


@handles(*_FUNCTIONS)
def _function(c: Conversion, node: Any) -> Value:
    _known(c, node)
    return c.builder.combined(_FUNCTIONS[node.target], [c.operand(node.args[0], node)], c.shape(node))


@handles(aten.relu.default)
def _relu(c: Conversion, node: Any) -> Value:
    _known(c, node)
    value = c.place(node.args[0])
    return c.builder.combined(Code.SELECT_ABOVE, [value, value], value.sizes, 0.0)


@handles(aten.pow.Tensor_Scalar, aten.square.default, aten.reciprocal.default, aten.rsqrt.default)
def _power(c: Conversion, node: Any) -> Value:
    _known(c, node)
    fixed = {aten.square.default: 2, aten.reciprocal.default: -1, aten.rsqrt.default: -0.5}
    exponent = fixed.get(node.target) or node.args[1]
    value, sizes, combined = c.place(node.args[0]), c.shape(node), c.builder.combined
    factors = {1: [value], 2: [value] * 2, 3: [value] * 3, 4: [value] * 4}
    powers: dict[Any, Operand] = {exponent: _product(c, same) for exponent, same in factors.items()}
    powers[0.5] = combined(Code.SQUARE_ROOT, [value], sizes)
    for inverse, power in ((-1, value), (-2, powers[2]), (-0.5, powers[0.5])):
        powers[inverse] = combined(Code.DIVIDE, [c.builder.filled(sizes, 1.0), power], sizes)
    if exponent not in powers:
        raise UnsupportedError(f"the power of {exponent}")
    return powers[exponent]


def _product(c: Conversion, factors: list[Place]) -> Operand:
    product: Operand = factors[0]
    for factor in factors[1:]:
        product = c.builder.combined(Code.MULTIPLY, [product, factor], factor.sizes)
    return product


@handles(aten.full.default, aten.zeros.default, aten.ones.default, aten.scalar_tensor.default)
def _constant(c: Conversion, node: Any) -> Value:
    fixed = {aten.zeros.default: 0.0, aten.ones.default: 1.0}
    value = fixed.get(node.target, node.args[0 if node.target is aten.scalar_tensor.default else -1])
    if isinstance(value, fx.Node):
        raise UnsupportedError("full of a number that is computed")
    return c.builder.filled(c.shape(node), float(value))


@handles(aten._log_softmax.default, aten._softmax.default)
def _softmax(c: Conversion, node: Any) -> Value:
    """x - m - log(sum(e^(x - m))) with the largest m, or e^(x - m) / sum(e^(x - m))."""
    _known(c, node)
    value, sizes, dims, build = c.place(node.args[0]), c.shape(node), [node.args[1]], c.builder
    shifted: Operand = build.combined(Code.SUBTRACT, [value, build.summed(value, dims, largest=True)], sizes)
    if node.target is aten._softmax.default:
        shares = build.stored(build.combined(Code.EXPONENTIAL, [shifted], sizes))
        return build.combined(Code.DIVIDE, [shares, build.summed(shares, dims)], sizes)
    shifted = build.stored(shifted)
    total = build.summed(build.combined(Code.EXPONENTIAL, [shifted], sizes), dims)
    logarithm = build.stored(build.combined(Code.LOGARITHM, [total], total.sizes))
    return build.combined(Code.SUBTRACT, [shifted, logarithm], sizes)


_MEAN, _SUM = 1, 2
"""`reduction` of losses; 0 is none."""


@handles(aten.mse_loss.default)
def _mse_loss(c: Conversion, node: Any) -> Value:
    _known(c, node)
    reduction = node.args[2] if len(node.args) > 2 else _MEAN
    sizes = broadcast_shapes(*(c.shape(argument) for argument in node.args[:2]))
    operands = [c.operand(argument, node) for argument in node.args[:2]]
    difference = c.builder.stored(c.builder.combined(Code.SUBTRACT, operands, sizes))
    square = c.builder.combined(Code.MULTIPLY, [difference, difference], sizes)
    if reduction == 0:
        return square
    total = c.builder.summed(square, range(len(sizes)))
    for _ in sizes:
        total = total.without(0)
    return c.builder.combined(Code.SCALE, [total], (), 1 / math.prod(sizes)) if reduction == _MEAN else total


@handles(aten.mse_loss_backward.default)
def _mse_loss_backward(c: Conversion, node: Any) -> Value:
    _known(c, node)
    grad, first, second, reduction = node.args
    sizes = c.shape(node)
    difference = c.builder.combined(Code.SUBTRACT, [c.operand(first, node), c.operand(second, node)], sizes)
    scaled = c.builder.combined(Code.SCALE, [difference], sizes, 2 / (math.prod(sizes) if reduction == _MEAN else 1))
    return c.builder.combined(Code.MULTIPLY, [scaled, c.operand(grad, node)], sizes)


def _chosen_scores(c: Conversion, node: Any, scores: Place, target: Any) -> tuple[Place, Place]:
    """(scores as the table of a lookup, of which each example has its own part; the classes)."""
    if len(scores.sizes) == 1:
        scores = scores.with_new(0)
    if len(scores.sizes) != 2:
        raise UnsupportedError(f"{node.target} of {len(scores.sizes)} dimensions")
    table = Place(scores.region, (1, scores.sizes[1], 1, scores.sizes[0]), (0, scores.strides[1], 0, scores.strides[0]),
                  scores.offset)  # fmt: skip
    return table, c.indices(target)


@handles(aten.nll_loss_forward.default)
def _nll_loss(c: Conversion, node: Any) -> Value:
    """(the mean, the sum or each of -score of the class; how many classes are not ignored)."""
    _known(c, node)
    scores, target, weight, reduction, ignored = node.args
    if weight is not None:
        raise UnsupportedError("classes with weights")
    table, classes = _chosen_scores(c, node, c.place(scores), target)
    build = c.builder
    chosen = build.selected(table, classes, ignored)
    if reduction == 0:
        shape = tuple(node.meta["val"][0].shape)
        losses = build.combined(Code.SCALE, [chosen], chosen.sizes, -1.0)
        return _shaped(c, losses, shape), build.filled((), 0.0)
    total, valid = build.summed(chosen, [1]), _valid(c, classes, table.sizes[1], ignored)
    loss = build.combined(Code.SCALE, [total], total.sizes, -1.0)
    if reduction == _MEAN:
        loss = build.combined(Code.DIVIDE, [loss, valid], total.sizes)
    return _shaped(c, loss, ()), _shaped(c, valid, ())


def _valid(c: Conversion, classes: Place, count: int, ignored: int) -> Place:
    """How many of the classes are not `ignored`; (1, 1, 1)."""
    one = c.builder.stored(c.builder.filled((1,), 1.0))
    ones = Place(one.region, (1, count, 1, classes.numel), (0, 0, 0, 0), one.offset)
    return c.builder.summed(c.builder.selected(ones, classes, ignored), [1])


def _shaped(c: Conversion, value: Operand, shape: tuple[int, ...]) -> Place:
    shown = c.builder.stored(value).reshaped(shape)
    assert shown is not None  # it is dense
    return shown


@handles(aten.nll_loss_backward.default)
def _nll_loss_backward(c: Conversion, node: Any) -> Value:
    _known(c, node)
    grad, scores, target, weight, reduction, ignored, valid = node.args
    if weight is not None:
        raise UnsupportedError("classes with weights")
    sizes, build = c.shape(node), c.builder
    result = build.stored(build.filled(sizes, 0.0), build.workspace(sizes))
    table, classes = _chosen_scores(c, node, result, target)
    share: Operand = build.combined(Code.SCALE, [c.operand(grad, grad)], c.shape(grad), -1.0)
    if reduction == _MEAN:
        share = build.combined(Code.DIVIDE, [share, c.operand(valid, valid)], c.shape(grad))
    spread = build.stored(share)
    spread = spread if spread.sizes else spread.with_new(0).expanded((classes.numel,))
    build.scatter_into(table, spread.with_new(0).with_new(2), classes, ignored)
    return result
