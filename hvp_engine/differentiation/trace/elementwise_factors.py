"""Chains and sums of elementwise operations on one tangent as one product with a known factor.

What depends on the tangents is linear in them. An activation written out is a chain of such operations, whose factors
the primal part multiplies and adds up once:

    u = t * 2;  u * a + tanh_backward(u * b, y)      is   t * (2 * a + tanh_backward(2 * b, y))

Without it a term of a tanh written as (e^2x - 1) / (e^2x + 1) reads 14 known tensors, with it one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from hvp_engine.differentiation.trace.patterns import Builder, alike, is_number, same_dtype, same_layout

aten = torch.ops.aten

_PRODUCTS = (aten.mul.Tensor, aten.mul.Scalar)
_QUOTIENTS = (aten.div.Tensor, aten.div.Scalar)

_SUMS = (aten.add.Tensor, aten.sub.Tensor)

_SLOPES = (
    aten.tanh_backward.default,
    aten.sigmoid_backward.default,
    aten.threshold_backward.default,
    aten.gelu_backward.default,
    aten.silu_backward.default,
    aten.mish_backward.default,
    aten.elu_backward.default,
    aten.leaky_relu_backward.default,
    aten.softplus_backward.default,
    aten.hardtanh_backward.default,
    aten.hardsigmoid_backward.default,
    aten.hardswish_backward.default,
    aten.log_sigmoid_backward.default,
    aten.softshrink_backward.default,
    aten.hardshrink_backward.default,
    aten.native_dropout_backward.default,
)
"""Operations that multiply their first argument by what the others say."""


@dataclass(frozen=True)
class _Multiple:
    """source * factor, in so many operations; without a factor it is made when it is asked for."""

    source: fx.Node
    factor: Any
    operations: int


def fold_factors(graph: fx.Graph, linear: set[fx.Node]) -> None:
    """Replace what is made of one tangent by several elementwise operations by one product."""
    build = Builder(graph, linear)
    multiples: dict[fx.Node, _Multiple] = {}
    for node in list(graph.nodes):
        if node not in linear or node.op != "call_function":
            continue
        with graph.inserting_before(node):
            found = _multiple(build, node, multiples)
            if found is None:
                continue
            if found.operations > 1 or isinstance(found.factor, (int, float)):
                new = _product(build, found, node)
                node.replace_all_uses_with(new)
                graph.erase_node(node)
                node = new
        multiples[node] = found


def _product(build: Builder, found: _Multiple, node: fx.Node) -> fx.Node:
    """The tangent times its factor; a number is a tensor where the tangent is a weight's: weight decay is a diagonal of
    the Hessian, which is known by that."""
    factor, value = found.factor, node.meta["val"]
    if isinstance(factor, fx.Node):
        return build(aten.mul.Tensor, (found.source, factor), value)
    if found.source.op != "placeholder":
        return build(aten.mul.Scalar, (found.source, factor), value)
    return build(aten.mul.Tensor, (found.source, build.filled(value.new_empty(()), factor)), value)


def _multiple(build: Builder, node: fx.Node, multiples: dict[fx.Node, _Multiple]) -> _Multiple | None:
    """What the node is a multiple of; None if it is not elementwise, or of several tangents."""
    target: Any = node.target
    args: tuple[Any, ...] = node.args
    moving = [position for position, x in enumerate(args) if isinstance(x, fx.Node) and x in build.linear]
    if target in _SUMS and len(moving) == 2 and not node.kwargs:
        return _total(build, node, multiples)
    if len(moving) != 1 or not same_layout(args[moving[0]], node):
        return None
    (place,) = moving
    inner = multiples.get(args[place])
    if not _is_elementwise(node, place):
        return None
    if inner is None:
        number = -1.0 if target is aten.neg.default else _number(target, args, place)
        return _Multiple(args[place], number, 1)
    factor = _applied(build, node, place, _factor(build, args[place], inner))
    return _Multiple(inner.source, factor, inner.operations + 1)


def _total(build: Builder, node: fx.Node, multiples: dict[fx.Node, _Multiple]) -> _Multiple | None:
    """t * a + t * b, or t * a - t * b, where the sum of the factors is no larger than they are."""
    parts = []
    for x in node.args:
        assert isinstance(x, fx.Node)
        parts.append((x, multiples.get(x, _Multiple(x, 1.0, 0))))
    (x, first), (y, second) = parts
    if not all(alike(z, node) for z in (x, y)):
        return None
    source = first.source if first.source in (second.source, y) else second.source
    first, second = (m if m.source is source else _Multiple(z, 1.0, 0) for z, m in parts)
    if first.source is not source or second.source is not source or not same_layout(source, node):
        return None
    a, b = (_factor(build, z, m) for (z, _), m in zip(parts, (first, second), strict=True))
    if node.target is aten.sub.Tensor:
        b = _known(build, aten.mul.Tensor, b, -1.0, node)
    shapes = [f.meta["val"].shape if isinstance(f, fx.Node) else torch.Size() for f in (a, b)]
    if torch.broadcast_shapes(*shapes).numel() > max(shape.numel() for shape in shapes):
        return None
    return _Multiple(source, _known(build, aten.add.Tensor, a, b, node), first.operations + second.operations + 1)


def _is_elementwise(node: fx.Node, place: int) -> bool:
    """Whether the operation multiplies its argument at `place` by what does not depend on the tangents."""
    target: Any = node.target
    args: tuple[Any, ...] = node.args
    if target in _PRODUCTS:
        return not node.kwargs
    if target in _QUOTIENTS or target is aten.neg.default or target in _SLOPES:
        return place == 0 and len(args) == (2 if target in _QUOTIENTS else len(args))
    if target is aten.masked_fill.Scalar:
        return place == 0 and args[2] == 0
    return target is aten.where.self and place > 0 and is_number(args[3 - place], 0)


def _number(target: Any, args: tuple[Any, ...], place: int) -> float | None:
    """The factor of a single operation with a number."""
    other = args[1 - place] if target in (*_PRODUCTS, *_QUOTIENTS) else None
    if isinstance(other, bool) or not isinstance(other, (int, float)):
        return None
    if target in _PRODUCTS:
        return float(other)
    return 1.0 / other if other != 0 and 0 < abs(1.0 / other) < 1e30 else None


def _factor(build: Builder, node: fx.Node, multiple: _Multiple) -> Any:
    """The factor, made if it has not been needed yet."""
    if multiple.factor is not None:
        return multiple.factor
    (place,) = [position for position, x in enumerate(node.args) if x is multiple.source]
    return _applied(build, node, place, 1.0)


def _applied(build: Builder, node: fx.Node, place: int, factor: Any) -> Any:
    """What the operation makes of the factor."""
    target: Any = node.target
    args: list[Any] = list(node.args)
    if target is aten.neg.default:
        return _known(build, aten.mul.Tensor, factor, -1.0, node)
    if target in _PRODUCTS:
        return _known(build, aten.mul.Tensor, factor, args[1 - place], node)
    if target in _QUOTIENTS:
        return _known(build, aten.div.Tensor, factor, args[1], node)
    value = node.meta["val"]
    if not alike(factor, node):
        ones = build.filled(value, 1)
        factor = ones if factor == 1.0 else build(aten.mul.Tensor, (ones, factor), value)
    args[place] = factor
    return build(target, tuple(args), value, **node.kwargs)


def _converted(build: Builder, factor: Any, like: fx.Node) -> Any:
    """A mask or whole numbers in the dtype of what they multiply."""
    if not isinstance(factor, fx.Node) or same_dtype(factor, like):
        return factor
    dtype = like.meta["val"].dtype
    value = torch.empty_like(factor.meta["val"], dtype=dtype, device="meta")
    return build(aten._to_copy.default, (factor,), value, dtype=dtype)


def _known(build: Builder, operation: Any, a: Any, b: Any, like: fx.Node) -> Any:
    """The factor a * b, a / b or a + b, either of which may be a number."""
    if not isinstance(a, fx.Node) and not isinstance(b, fx.Node):
        return a * b if operation in _PRODUCTS else a / b if operation in _QUOTIENTS else a + b
    if operation not in _QUOTIENTS and not isinstance(a, fx.Node):
        a, b = b, a
    a, b = (_converted(build, x, like) for x in (a, b))
    if operation in _PRODUCTS and not isinstance(b, fx.Node) and b == 1:
        return a
    shapes = [x.meta["val"].shape for x in (a, b) if isinstance(x, fx.Node)]
    value = torch.empty(torch.broadcast_shapes(*shapes), dtype=like.meta["val"].dtype, device="meta")
    if isinstance(a, fx.Node):
        return build(operation, (a, b), value)
    inverse = build(aten.reciprocal.default, (b,), value)
    return inverse if a == 1 else build(aten.mul.Tensor, (inverse, a), value)
