"""In-place buffer reuse: an operation overwrites an operand that nothing reads again, instead of making a tensor.

BLAS then adds a matrix product to another one without copying that first, and elementwise operations read and write two
streams of memory instead of three, one of which is still in the cache.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from hvp_engine._support.torch_compat_traces import graph_module
from hvp_engine.differentiation.trace.functionalize import is_view
from hvp_engine.differentiation.trace.patterns import same_layout

aten = torch.ops.aten

_IN_PLACE = {
    aten.addmm.default: aten.addmm_.default,
    aten.baddbmm.default: aten.baddbmm_.default,
    aten.addcmul.default: aten.addcmul_.default,
    aten.add.Tensor: aten.add_.Tensor,
    aten.sub.Tensor: aten.sub_.Tensor,
    aten.mul.Tensor: aten.mul_.Tensor,
    aten.mul.Scalar: aten.mul_.Scalar,
    aten.div.Tensor: aten.div_.Tensor,
    aten.div.Scalar: aten.div_.Scalar,
}
"""Operations that may overwrite their first operand."""

_INTO = {
    aten.threshold_backward.default: aten.threshold_backward.grad_input,
    aten.tanh_backward.default: aten.tanh_backward.grad_input,
    aten.sigmoid_backward.default: aten.sigmoid_backward.grad_input,
    aten.gelu_backward.default: aten.gelu_backward.grad_input,
}
"""Operations that may overwrite their first operand by a keyword argument for the result."""

_COMMUTATIVE = (aten.add.Tensor, aten.mul.Tensor)

_FRESH = (
    *_IN_PLACE,
    *_INTO,
    aten.mm.default,
    aten.bmm.default,
    aten.clone.default,
    aten.cat.default,
    aten.convolution.default,
)
"""Operations whose result is a new tensor, dense and without overlapping elements."""


def written_over(module: fx.GraphModule) -> fx.GraphModule:
    """A copy of `module` that computes in place wherever that makes no difference to what it returns."""
    new = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    order = {node: index for index, node in enumerate(module.graph.nodes)}
    last = _last_reads(module.graph, order)
    bases: dict[fx.Node, set[fx.Node]] = {}
    for node in module.graph.nodes:
        copies[node] = copy = new.node_copy(node, lambda argument: copies[argument])
        bases[node] = {node}
        if node.op != "call_function":
            continue
        if _shows_argument(node):
            bases[node] = set().union(*(bases[argument] for argument in node.all_input_nodes))
        operand = _operand(node, bases, last, order[node])
        if operand is None:
            continue
        position, base = operand
        arguments = list(copy.args)
        arguments[0], arguments[position] = arguments[position], arguments[0]
        copy.args = tuple(arguments)
        if node.target in _INTO:
            copy.target, copy.kwargs = _INTO[node.target], copy.kwargs | {"grad_input": arguments[0]}
        else:
            copy.target = _IN_PLACE[node.target]
        bases[node] = {base}
        last[base] = last[node]
    return graph_module(module, new)


def _last_reads(graph: fx.Graph, order: dict[fx.Node, int]) -> dict[fx.Node, int]:
    """For each node, the position at which it is last read, directly or through a view."""
    last: dict[fx.Node, int] = {}
    for node in reversed(graph.nodes):
        last[node] = order[node]
        for user in node.users:
            last[node] = max(last[node], last[user] if _shows_argument(user) else order[user])
    return last


def _operand(
    node: fx.Node, bases: dict[fx.Node, set[fx.Node]], last: dict[fx.Node, int], now: int
) -> tuple[int, fx.Node] | None:
    """The position of the operand that `node` may overwrite, and the node that allocated its memory."""
    if node.target not in _IN_PLACE and node.target not in _INTO:
        return None
    for position in (0, 1) if node.target in _COMMUTATIVE and not node.kwargs else (0,):
        operand: Any = node.args[position]
        if not isinstance(operand, fx.Node) or len(bases[operand]) != 1 or not same_layout(operand, node):
            continue
        (base,) = bases[operand]
        others = [other for other in node.all_input_nodes if other is not operand]
        read_twice = sum(argument is operand for argument in node.args) > 1
        if (
            base.target in _FRESH
            and last[base] <= now
            and not read_twice
            and not any(base in bases[other] for other in others)
        ):
            return position, base
    return None


def _shows_argument(node: fx.Node) -> bool:
    """Whether the result may share memory with an argument; the schema of `_unsafe_view` does not say so."""
    return node.target is aten._unsafe_view.default or is_view(node)
