"""Elementwise operators, all linear in what depends on the tangents."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from hvp_engine.differentiation.native.builder import CPU
from hvp_engine.differentiation.native.conversion import Conversion, Value, handles
from hvp_engine.differentiation.native.expressions import Operand
from hvp_engine.differentiation.native.operations import Code, UnsupportedError
from hvp_engine.differentiation.trace.elementwise_factors import SLOPES

aten = torch.ops.aten


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise UnsupportedError(f"a number expected, got {value!r}")
    return float(value)


def _scaled(c: Conversion, value: Operand, factor: Any) -> Operand:
    number = _number(factor)
    return value if number == 1.0 else c.builder.combined(Code.SCALE, [value], value.sizes, number)


@handles(aten.add.Tensor, aten.add.Scalar, aten.sub.Tensor, aten.sub.Scalar, every_term=True)
def add(c: Conversion, node: Any) -> Value:
    first, second = node.args[:2]
    alpha = node.kwargs.get("alpha", node.args[2] if len(node.args) > 2 else 1)
    minus = node.target in (aten.sub.Tensor, aten.sub.Scalar)
    if not isinstance(second, fx.Node):
        shift = _number(second) * _number(alpha) * (-1 if minus else 1)
        return c.builder.combined(Code.SHIFT, [c.operand(first, node)], c.shape(node), shift)
    if not isinstance(first, fx.Node):
        raise UnsupportedError("a sum with a number in the first place")
    scaled = _scaled(c, c.operand(second, node), alpha)
    code = Code.SUBTRACT if minus else Code.ADD
    return c.builder.combined(code, [c.operand(first, node), scaled], c.shape(node))


@handles(aten.mul.Tensor, aten.mul.Scalar, every_term=True)
def _mul(c: Conversion, node: Any) -> Value:
    first, second = node.args[:2]
    if not isinstance(first, fx.Node):
        first, second = second, first
    if not isinstance(second, fx.Node):
        return c.builder.combined(Code.SCALE, [c.operand(first, node)], c.shape(node), _number(second))
    return c.builder.combined(Code.MULTIPLY, [c.operand(first, node), c.operand(second, node)], c.shape(node))


@handles(aten.div.Tensor, aten.div.Scalar, every_term=True)
def _div(c: Conversion, node: Any) -> Value:
    first, second = node.args[:2]
    if not isinstance(first, fx.Node):
        raise UnsupportedError("a number divided by a tensor")
    if not isinstance(second, fx.Node):
        second_value: Operand = c.builder.filled((), _number(second))
    else:
        second_value = c.operand(second, node)
    return c.builder.combined(Code.DIVIDE, [c.operand(first, node), second_value], c.shape(node))


@handles(aten.neg.default, every_term=True)
def _neg(c: Conversion, node: Any) -> Value:
    return c.builder.combined(Code.SCALE, [c.operand(node.args[0], node)], c.shape(node), -1.0)


@handles(aten.addcmul.default, aten.addcdiv.default, every_term=True)
def _added(c: Conversion, node: Any) -> Value:
    onto, first, second = (c.operand(argument, node) for argument in node.args[:3])
    first = _scaled(c, first, node.kwargs.get("value", 1))
    if node.target is aten.addcmul.default:
        return c.builder.combined(Code.MULTIPLY_ADD, [first, second, onto], c.shape(node))
    quotient = c.builder.combined(Code.DIVIDE, [first, second], c.shape(node))
    return c.builder.combined(Code.ADD, [onto, quotient], c.shape(node))


@handles(aten.tanh_backward.default, aten.sigmoid_backward.default, every_term=True)
def _gradient(c: Conversion, node: Any) -> Value:
    grad, output = node.args[:2]
    if c.moves(output):
        raise UnsupportedError(f"{node.target} of an output that depends on the tangents")
    code = Code.TANH_GRADIENT if node.target is aten.tanh_backward.default else Code.SIGMOID_GRADIENT
    return c.builder.combined(code, [c.operand(grad, node), c.operand(output, node)], c.shape(node))


@handles(aten.threshold_backward.default, every_term=True)
def _threshold(c: Conversion, node: Any) -> Value:
    grad, inputs, threshold = node.args[:3]
    if c.moves(inputs):
        raise UnsupportedError("threshold_backward of an input that depends on the tangents")
    operands = [c.operand(grad, node), c.operand(inputs, node)]
    return c.builder.combined(Code.SELECT_ABOVE, operands, c.shape(node), _number(threshold))


@handles(*SLOPES)
def _slope(c: Conversion, node: Any) -> Value:
    """A gradient times a known slope, which the operator itself gives for a gradient of ones."""
    grad, *rest = node.args
    known = [argument for argument in node.all_input_nodes if argument is not grad]
    if any(c.moves(argument) for argument in known) or grad in rest:
        raise UnsupportedError(f"{node.target} of an input that depends on the tangents")
    sizes, dtype, target = c.shape(node), c.builder.dtype, node.target
    assert callable(target)

    def compute(*tensors: Tensor) -> Tensor:
        values = dict(zip(known, tensors, strict=True))
        args: Any = fx.node.map_arg(tuple(rest), lambda n: values[n])
        kwargs: Any = fx.node.map_arg(dict(node.kwargs), lambda n: values[n])
        return target(torch.ones(sizes, dtype=dtype, device=CPU), *args, **kwargs)

    return c.builder.combined(Code.MULTIPLY, [c.operand(grad, node), c.derive(sizes, compute, known)], sizes)


@handles(aten.where.self)
def _where(c: Conversion, node: Any) -> Value:
    mask, first, second = node.args
    if c.moves(mask):
        raise UnsupportedError("where on a condition that depends on the tangents")
    sizes, dtype = c.shape(node), c.builder.dtype
    chosen = [
        c.builder.combined(Code.SELECT, [c.operand(value, node), numbers], sizes)
        for value, numbers in (
            (first, c.derive(c.shape(mask), lambda m: m.to(dtype), [mask])),
            (second, c.derive(c.shape(mask), lambda m: (~m).to(dtype), [mask])),
        )
    ]
    return c.builder.combined(Code.ADD, chosen, sizes)


@handles(aten.masked_fill.Scalar)
def _masked_fill(c: Conversion, node: Any) -> Value:
    value, mask, number = node.args
    if _number(number) != 0.0 or c.moves(mask):
        raise UnsupportedError("masked_fill with a number that is not zero")
    dtype = c.builder.dtype
    left = c.derive(c.shape(mask), lambda m: (~m).to(dtype), [mask])
    return c.builder.combined(Code.SELECT, [c.operand(value, node), left], c.shape(node))


@handles(aten.zeros_like.default, aten.new_zeros.default, aten.new_empty_strided.default)  # the last is overwritten
def _zeros(c: Conversion, node: Any) -> Value:
    return c.builder.filled(c.shape(node), 0.0)


@handles(aten.ones_like.default, aten.new_ones.default)
def _ones(c: Conversion, node: Any) -> Value:
    return c.builder.filled(c.shape(node), 1.0)


@handles(aten.full_like.default, aten.new_full.default)
def _full(c: Conversion, node: Any) -> Value:
    return c.builder.filled(c.shape(node), _number(node.args[1 if node.target is aten.full_like.default else 2]))


@handles(aten._log_softmax_backward_data.default, aten._softmax_backward_data.default)
def _softmax(c: Conversion, node: Any) -> Value:
    """g - exp(y) sum(g) for the logarithm y; y (g - sum(g y)) for the softmax y itself."""
    grad, output, dim = node.args[:3]
    if c.moves(output):
        raise UnsupportedError(f"{node.target} of an output that depends on the tangents")
    sizes, combined = c.shape(node), c.builder.combined
    gradient = c.place(grad)
    if node.target is aten._log_softmax_backward_data.default:
        share = c.exponential(output)
        total = c.builder.summed(gradient, [dim])
        return combined(Code.SUBTRACT, [gradient, combined(Code.MULTIPLY, [share, total], sizes)], sizes)
    share = c.place(output)
    total = c.builder.summed(combined(Code.MULTIPLY, [gradient, share], sizes), [dim])
    return combined(Code.MULTIPLY, [share, combined(Code.SUBTRACT, [gradient, total], sizes)], sizes)
