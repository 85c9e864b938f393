"""Operations of `hvp_engine.differentiable`: of a term, elementwise products with known tensors, and sums."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor

from hvp_engine.differentiable.cross_entropy_reference import label_weights
from hvp_engine.differentiation.native.conversion import Conversion, Value, handles
from hvp_engine.differentiation.native.expressions import Operand
from hvp_engine.differentiation.native.linear_algebra import mean_of, total
from hvp_engine.differentiation.native.operations import Code, UnsupportedError
from hvp_engine.differentiation.native.places import Place

ops = torch.ops.hvp_engine


def _refuse_moving(c: Conversion, node: Any, *others: Any) -> None:
    if any(c.moves(argument) for argument in node.all_input_nodes if argument not in others):
        raise UnsupportedError(f"{node.target} of something known that depends on the tangents")


def _is_read(node: Any, index: int) -> bool:
    """Whether anything reads this result of several."""
    return any(user.target is operator.getitem and user.args[1] == index for user in node.users)


def _product(c: Conversion, sizes: tuple[int, ...], *factors: Operand) -> Operand:
    first, *rest = factors
    for factor in rest:
        first = c.builder.combined(Code.MULTIPLY, [first, factor], sizes)
    return first


def _difference(c: Conversion, sizes: tuple[int, ...], a: Operand, b: Operand) -> Operand:
    return c.builder.combined(Code.SUBTRACT, [a, b], sizes)


def _sum(c: Conversion, value: Operand) -> Place:
    """Of each row."""
    return c.builder.summed(value, [1])


@handles(ops.cross_entropy_double_backward.default)
def _cross_entropy_double_backward(c: Conversion, node: Any) -> Value:
    """grad a p (t - sum p t)."""
    tangent, grad, input, lse, target, weight, ignore_index, label_smoothing = node.args
    _refuse_moving(c, node, tangent)
    if _is_read(node, 0):
        raise UnsupportedError(f"{node.target} for a gradient that depends on the weights")
    sizes = c.shape(input)

    def factors(g: Tensor, z: Tensor, y: Tensor, *w: Tensor) -> Tensor:
        return (g * label_weights(z, y, w[0] if w else None, ignore_index, label_smoothing)[2]).unsqueeze(1)

    known = [grad, input, target, *([] if weight is None else [weight])]
    p = c.derive(sizes, lambda z, total: (z - total.unsqueeze(1)).exp(), [input, lse])
    factor = c.derive((sizes[0], 1), factors, known)
    t = c.place(tangent)
    centred = _difference(c, sizes, t, _sum(c, _product(c, sizes, t, p)))
    return None, c.builder.stored(_product(c, sizes, centred, p, factor))


@handles(ops.cross_entropy_backward.default)
def _cross_entropy_backward(c: Conversion, node: Any) -> Value:
    """Linear in grad."""
    grad, input, lse, target, weight, *settings = node.args
    _refuse_moving(c, node, grad)

    def slope(z: Tensor, total: Tensor, y: Tensor, *w: Tensor) -> Tensor:
        return ops.cross_entropy_backward(torch.ones_like(total), z, total, y, w[0] if w else None, *settings)

    known = [input, lse, target, *([] if weight is None else [weight])]
    sizes = c.shape(input)
    return _product(c, sizes, c.derive(sizes, slope, known), c.place(grad).with_new(1))


@handles(ops.log_softmax_double_backward.default)
def _log_softmax_double_backward(c: Conversion, node: Any) -> Value:
    """(t - sum exp(y) t, -sum(g) exp(y) t)."""
    tangent, grad, output = node.args
    _refuse_moving(c, node, tangent)
    sizes, t = c.shape(output), c.place(tangent)
    p = c.derive(sizes, torch.exp, [output])
    factor = c.derive((sizes[0], 1), lambda g: -g.sum(1, keepdim=True), [grad])
    weighted = c.builder.stored(_product(c, sizes, t, p))
    return _difference(c, sizes, t, _sum(c, weighted)), _product(c, sizes, weighted, factor)


@handles(ops.log_softmax_backward.default)
def _log_softmax_backward(c: Conversion, node: Any) -> Value:
    """g - exp(y) sum(g)."""
    grad, output = node.args
    _refuse_moving(c, node, grad)
    sizes, g = c.shape(output), c.place(grad)
    p = c.derive(sizes, torch.exp, [output])
    return _difference(c, sizes, g, _product(c, sizes, p, _sum(c, g)))


class _Rows:
    """The known parts of a layer or root-mean-square normalization over the last dimension, and its means."""

    def __init__(self, c: Conversion, node: Any, grad: Any):
        input, weight, mean, variance, size, eps = node.args[-6:]
        if size != 1:
            raise UnsupportedError(f"{node.target} over several dimensions")
        self.c, self.sizes = c, c.shape(input)
        self.row = (*self.sizes[:-1], 1)
        self.centred = node.target in (ops.layer_norm_backward.default, ops.layer_norm_double_backward.default)
        self.weight = None if weight is None else c.place(weight)
        self.root = c.derive(self.row, lambda v: self._root(v, eps), [variance])
        self.normal = c.derive(self.sizes, lambda x, m, v: self._normal(x, m, v, eps), [input, mean, variance])
        self._weight, self._statistics, self._eps, self._grad = weight, (input, mean, variance), eps, grad

    def _root(self, variance: Tensor, eps: float) -> Tensor:
        return (variance + eps).rsqrt().reshape(self.row).to(self.c.builder.dtype)

    def _normal(self, x: Tensor, mean: Tensor, variance: Tensor, eps: float) -> Tensor:
        return ((x - mean.reshape(self.row)) * (variance + eps).rsqrt().reshape(self.row)).to(x.dtype)

    def product(self, *factors: Operand) -> Operand:
        return _product(self.c, self.sizes, *factors)

    def difference(self, a: Operand, b: Operand) -> Operand:
        return _difference(self.c, self.sizes, a, b)

    def mean(self, value: Operand) -> Operand:
        return mean_of(self.c, value, self.sizes, [len(self.sizes) - 1])

    def projected(self, value: Operand) -> Operand:
        """r (a - <a> - x' <a x'>)."""
        stored = self.c.builder.stored(value)
        shared = self.mean(self.product(stored, self.normal))
        centred = self.difference(stored, self.mean(stored)) if self.centred else stored
        return self.product(self.difference(centred, self.product(self.normal, shared)), self.root)

    def of_channels(self, value: Operand) -> Place:
        return total(self.c, value, list(range(len(self.sizes) - 1)), self.sizes[-1:])

    def centred_gradient(self) -> Place:
        """h - <h>."""

        def compute(g: Tensor, *w: Tensor) -> Tensor:
            h = g * w[0] if w else g
            return h - h.mean(-1, keepdim=True) if self.centred else h

        return self.c.derive(self.sizes, compute, [self._grad, *([] if self._weight is None else [self._weight])])

    def factor(self, power: int) -> Place:
        """-r <h x'>, or -r^2, for each row."""

        def compute(x: Tensor, m: Tensor, v: Tensor, g: Tensor, *w: Tensor) -> Tensor:
            root = self._root(v, self._eps)
            if power == 2:
                return -root.square()
            h = g * w[0] if w else g
            return -root * (h * self._normal(x, m, v, self._eps)).mean(-1, keepdim=True)

        known = [*self._statistics, self._grad, *([] if self._weight is None else [self._weight])]
        return self.c.derive(self.row, compute, known)


@handles(ops.layer_norm_backward.default, ops.rms_norm_backward.default)
def _rows_backward(c: Conversion, node: Any) -> Value:
    """(r (h - <h> - x' <h x'>), sum g x', sum g), with h = g weight."""
    grad = node.args[0]
    _refuse_moving(c, node, grad)
    rows, g = _Rows(c, node, grad), c.place(grad)
    for_input = (
        rows.projected(g if rows.weight is None else rows.product(g, rows.weight)) if _is_read(node, 0) else None
    )
    for_weight = rows.of_channels(rows.product(g, rows.normal)) if _is_read(node, 1) else None
    return for_input, for_weight, rows.of_channels(g) if _is_read(node, 2) else None


@handles(ops.layer_norm_double_backward.default, ops.rms_norm_double_backward.default)
def _rows_double_backward(c: Conversion, node: Any) -> Value:
    """The formula of csrc/normalization.h, with a = r (t - <t> - x' <t x'>):

    (w a + tw x' + tb, r (k - <k> - x' <k x'>) - r <h x'> a - r^2 (<t x'> (h - <h>) + x' (<t (h - <h>)> - 2 <h x'>
    <t x'>)), sum g a), where k = tw g.
    """
    tangent, tangent_weight, tangent_bias, grad = node.args[:4]
    _refuse_moving(c, node, tangent, tangent_weight, tangent_bias)
    rows, t, combined = _Rows(c, node, grad), c.place(tangent), c.builder.combined
    projected = c.builder.stored(rows.projected(t))
    for_grad: Operand = projected if rows.weight is None else rows.product(projected, rows.weight)
    gradient, slope, square = rows.centred_gradient(), rows.factor(1), rows.factor(2)
    shared = rows.mean(rows.product(t, rows.normal))
    scaled = c.builder.stored(combined(Code.MULTIPLY, [shared, square], rows.row))
    # -r^2 (<t (h - <h>)> - 2 <h x'> <t x'>), where -r <h x'> is the slope
    along = combined(Code.MULTIPLY, [rows.mean(rows.product(t, gradient)), square], rows.row)
    twice = combined(Code.SCALE, [_product(c, rows.row, shared, slope, rows.root)], rows.row, 2.0)
    of_normal = c.builder.stored(combined(Code.SUBTRACT, [along, twice], rows.row))
    for_input = combined(Code.ADD, [rows.product(projected, slope), rows.product(gradient, scaled)], rows.sizes)
    for_input = combined(Code.ADD, [for_input, rows.product(rows.normal, of_normal)], rows.sizes)
    if tangent_weight is not None:
        tw = c.place(tangent_weight)
        for_grad = combined(Code.ADD, [for_grad, rows.product(rows.normal, tw)], rows.sizes)
        turned = rows.projected(rows.product(c.place(grad), tw))
        for_input = combined(Code.ADD, [for_input, turned], rows.sizes)
    if tangent_bias is not None:
        for_grad = combined(Code.ADD, [for_grad, c.place(tangent_bias)], rows.sizes)
    stored = c.builder.stored(for_grad)
    for_weight = rows.of_channels(rows.product(c.place(grad), projected)) if _is_read(node, 2) else None
    return stored, c.builder.stored(for_input), for_weight
