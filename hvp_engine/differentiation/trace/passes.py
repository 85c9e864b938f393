"""Rewrites of a traced graph that keep its value: fewer operations for each term.

The tangent part of the graph is linear in the tangents, so chains of products with known factors collapse into one
product, whose factor moves to the primal part.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from hvp_engine.differentiation.trace.functionalize import is_random, mutates
from hvp_engine.differentiation.trace.rewriting import dependents

aten = torch.ops.aten

_CONSTANTS = {
    aten.zeros_like.default: lambda node: 0,
    aten.new_zeros.default: lambda node: 0,
    aten.zeros.default: lambda node: 0,
    aten.ones_like.default: lambda node: 1,
    aten.new_ones.default: lambda node: 1,
    aten.full_like.default: lambda node: node.args[1],
    aten.new_full.default: lambda node: node.args[2],
}
"""Operations that fill with a value, and read no more of their argument than its shape."""

_NEUTRAL = {aten.add.Tensor: 0, aten.mul.Tensor: 1, aten.mul.Scalar: 1, aten.pow.Tensor_Scalar: 1}
"""Operations that return their operand where the other one is this number."""

_NO_OPS = (aten.detach.default, aten.alias.default, aten.lift_fresh.default, aten.lift_fresh_copy.default)


def simplify(graph: fx.Graph, linear: set[fx.Node]) -> None:
    """Drop what does nothing, merge what is computed twice, remove dead code."""
    for node in list(graph.nodes):
        if node.op != "call_function":
            continue
        if node.target in _NO_OPS:
            _replace(graph, node, node.args[0])
        elif node.target in _CONSTANTS:
            _replace(graph, node, _constant(graph, node, _CONSTANTS[node.target](node)))
        elif node.target is aten.t.default and _calls(node.args[0], aten.t.default):
            _replace(graph, node, node.args[0].args[0])
        elif node.target is aten.pow.Tensor_Scalar and node.args[1] == 0:
            _replace(graph, node, _constant(graph, node, 1))
        elif (operand := _operand(node)) is not None:
            _replace(graph, node, operand)
    _merge_equal(graph)
    graph.eliminate_dead_code(is_impure_node=lambda node: node.op in ("placeholder", "output"))


def _operand(node: fx.Node) -> fx.Node | None:
    """The operand that `node` returns unchanged: of x + 0, x * 1 and x ** 1, as derivatives of powers are full of."""
    target: Any = node.target
    neutral = _NEUTRAL.get(target)
    if neutral is None or node.kwargs or len(node.args) != 2:
        return None
    arguments: tuple[Any, ...] = node.args
    first, second = arguments
    pairs = ((first, second),) if node.target is aten.pow.Tensor_Scalar else ((first, second), (second, first))
    for operand, other in pairs:
        value = other.args[1] if _calls(other, aten.full.default) else other
        if isinstance(value, (int, float)) and value == neutral and alike(operand, node):
            return operand
    return None


def fold_linear(graph: fx.Graph, linear: set[fx.Node]) -> None:
    """Collapse (t * a) * b into t * (a * b), where t depends on the tangents and a and b do not."""
    for node in [node for node in graph.nodes if node in linear]:  # in the graph's order, which sets do not keep
        if node.target is aten.t.default:  # not in the primal part: strides there decide how dropout draws its mask
            _push_transpose(graph, node)
    linear = dependents(graph, {node for node in linear if node.op == "placeholder"})
    for node in list(graph.nodes):
        if node.op != "call_function" or node not in linear:
            continue
        factor = _factor(node, linear)
        if factor is None:
            continue
        inner, outer_factor = factor
        if len(inner.users) != 1 or (below := _factor(inner, linear)) is None:
            continue
        source, inner_factor = below
        if not same_layout(source, node):
            continue  # the product would have other strides than `node`, and views of it would fail
        with graph.inserting_before(node):
            combined = _multiply(graph, inner_factor, outer_factor, node)
            if combined is None:
                continue
            product = graph.call_function(aten.mul.Tensor, (source, combined))
        product.meta = dict(node.meta)
        linear.add(product)
        _replace(graph, node, product)
        graph.erase_node(inner)


def accumulate(graph: fx.Graph, linear: set[fx.Node]) -> None:
    """Turn sums into accumulating operations: mm + x into addmm, bmm + x into baddbmm, t * a + x into addcmul."""
    for node in list(graph.nodes):
        if node.op != "call_function" or node.target is not aten.add.Tensor or node.kwargs or node not in linear:
            continue
        first, second = node.args
        for term, other in ((first, second), (second, first)):
            if not (isinstance(term, fx.Node) and isinstance(other, fx.Node)) or len(term.users) != 1:
                continue
            if term is other:
                continue  # x + x has one user, and is no sum of two
            if not _same_dtype(term, other):
                continue
            if term.target is aten.bmm.default and alike(term, node) and alike(other, node):
                sum_ = _accumulate_batched(graph, node, term, other)
                if sum_ is None:
                    continue
                linear.add(sum_)
                break
            fused: Callable[..., Any] | None = None
            if term.target is aten.mm.default and alike(term, node):
                fused = aten.addmm.default
            elif (
                term.target is aten.mul.Tensor
                and same_layout(other, node)
                and alike(term, node)
                and all(isinstance(a, fx.Node) and _same_dtype(a, node) for a in term.args)
            ):
                fused = aten.addcmul.default
            if fused is not None:
                with graph.inserting_before(node):
                    sum_ = graph.call_function(fused, (other, *term.args))
                sum_.meta = dict(node.meta)
                linear.add(sum_)
                _replace(graph, node, sum_)
                graph.erase_node(term)
                break


def _accumulate_batched(graph: fx.Graph, node: fx.Node, term: fx.Node, other: fx.Node) -> fx.Node | None:
    """x + A B instead of `node`, or (x^T + B^T A^T)^T where that has its strides; None where neither has, since the
    views that follow would fail."""
    value, factors = node.meta["val"], term.args
    if value.is_contiguous():
        with graph.inserting_before(node):
            sum_ = called(graph, aten.baddbmm.default, (other, *factors), value)
    elif value.transpose(1, 2).is_contiguous() and _calls(other, aten.transpose.int):
        x, *dimensions = other.args
        if {dimension % 3 for dimension in dimensions} != {1, 2}:  # type: ignore[operator]
            return None
        with graph.inserting_before(node):
            factors = tuple(transposed(graph, factor) for factor in reversed(factors))
            sum_ = transposed(graph, called(graph, aten.baddbmm.default, (x, *factors), value.transpose(1, 2)))
    else:
        return None
    _replace(graph, node, sum_)
    graph.erase_node(term)
    return sum_


def result_bytes(node: fx.Node) -> int:
    """Of the tensor that a node makes."""
    value = node.meta.get("val")
    return value.numel() * value.element_size() if isinstance(value, Tensor) else 0


def transposed(graph: fx.Graph, node: Any) -> fx.Node:
    """The matrices of a batch transposed."""
    return called(graph, aten.transpose.int, (node, 1, 2), node.meta["val"].transpose(1, 2))


def called(graph: fx.Graph, target: Any, arguments: tuple[Any, ...], value: Any) -> fx.Node:
    """A call whose result is like `value`."""
    node = graph.call_function(target, arguments)
    node.meta["val"] = value
    return node


def _factor(node: fx.Node, linear: set[fx.Node]) -> tuple[fx.Node, Any] | None:
    """(t, a) if `node` is t * a with t in `linear`, of t's shape and dtype, and a known."""
    arguments: tuple[Any, ...] = node.args
    if node.target is aten.neg.default:
        return (arguments[0], -1.0) if arguments[0] in linear else None
    if node.target in (aten.mul.Scalar, aten.mul.Tensor) and len(node.args) == 2:
        for t, a in (arguments, reversed(arguments)):
            known = not isinstance(a, fx.Node) or a not in linear
            if isinstance(t, fx.Node) and t in linear and known and alike(t, node):
                return t, a
    return None


def _multiply(graph: fx.Graph, a: Any, b: Any, like: fx.Node) -> Any:
    """a * b as a node or number; None where that would cost more than it saves."""
    if not isinstance(a, fx.Node) and not isinstance(b, fx.Node):
        return a * b
    if not isinstance(a, fx.Node):
        a, b = b, a
    value = graph.call_function(aten.mul.Tensor, (a, b))
    shapes = [x.meta["val"] for x in (a, b) if isinstance(x, fx.Node)]
    value.meta["val"] = torch.empty(
        torch.broadcast_shapes(*(s.shape for s in shapes)),
        dtype=like.meta["val"].dtype,
        device="meta",
    )
    return value


def _push_transpose(graph: fx.Graph, node: fx.Node) -> None:
    """(A B)^T into B^T A^T, (A + B)^T into A^T + B^T, (A^T)^T into A, where nobody else uses the inside."""
    inner: Any = node.args[0]
    if _calls(inner, aten.t.default):
        _replace(graph, node, inner.args[0])
        return
    if len(inner.users) != 1 or not (
        _calls(inner, aten.mm.default) or (_calls(inner, aten.add.Tensor) and _is_plain_sum(inner))
    ):
        return
    factors = inner.args if inner.target is aten.add.Tensor else tuple(reversed(inner.args))
    with graph.inserting_before(node):
        transposed = [graph.call_function(aten.t.default, (factor,)) for factor in factors]
        for new, factor in zip(transposed, factors, strict=True):
            new.meta["val"] = factor.meta["val"].t()
        result = graph.call_function(inner.target, tuple(transposed))
    result.meta = dict(node.meta)
    _replace(graph, node, result)
    graph.erase_node(inner)
    for new in transposed:
        _push_transpose(graph, new)


def _is_plain_sum(node: fx.Node) -> bool:
    return not node.kwargs and all(isinstance(a, fx.Node) and alike(a, node) for a in node.args)


def _constant(graph: fx.Graph, node: fx.Node, value: Any) -> fx.Node:
    """A filled tensor of `node`'s shape that depends on no other node."""
    with graph.inserting_before(node):
        return filled(graph, node.meta["val"], value)


def filled(graph: fx.Graph, like: Tensor, value: Any) -> fx.Node:
    """A tensor of the shape, dtype and device of `like`, filled with a number."""
    constant = called(graph, aten.full.default, (tuple(like.shape), value), like)
    constant.kwargs = {"dtype": like.dtype, "device": like.device}
    return constant


def _calls(node: Any, target: Any) -> bool:
    return isinstance(node, fx.Node) and node.op == "call_function" and node.target is target


def alike(a: Any, b: fx.Node) -> bool:
    """Whether `a` is a node of the same shape and dtype as `b`."""
    if not isinstance(a, fx.Node):
        return False
    x, y = a.meta.get("val"), b.meta.get("val")
    return x is not None and y is not None and x.shape == y.shape and x.dtype == y.dtype


def same_layout(a: fx.Node, b: fx.Node) -> bool:
    """Whether two nodes have the same shape, dtype and strides."""
    return alike(a, b) and a.meta["val"].stride() == b.meta["val"].stride()


def _same_dtype(a: fx.Node, b: fx.Node) -> bool:
    x, y = a.meta.get("val"), b.meta.get("val")
    return x is not None and y is not None and x.dtype == y.dtype


def _replace(graph: fx.Graph, node: fx.Node, value: Any) -> None:
    node.replace_all_uses_with(value)
    graph.erase_node(node)


def _merge_equal(graph: fx.Graph) -> None:
    """Compute once what is computed twice from the same arguments."""
    seen: dict[Any, fx.Node] = {}
    for node in list(graph.nodes):
        if node.op not in ("call_function", "get_attr") or is_random(node) or mutates(node):
            continue
        key = (node.op, node.target, _frozen(node.args), _frozen(node.kwargs))
        first = seen.setdefault(key, node)
        if first is not node:
            _replace(graph, node, first)


def _frozen(value: Any) -> Any:
    """`value` as something that can be compared and hashed; numbers of different types differ."""
    if isinstance(value, (tuple, list)):
        return tuple(_frozen(item) for item in value)
    if isinstance(value, dict):
        return tuple((key, _frozen(item)) for key, item in value.items())
    return value if isinstance(value, fx.Node) else (type(value), repr(value))
