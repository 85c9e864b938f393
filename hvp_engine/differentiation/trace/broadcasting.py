"""Known tensors that are one number, or one for each row, are computed as such and expanded last.

A penalty e^h sum(w^2) with one h has the factor 2 e^h for each weight, which autograd computes as a matrix of equal
numbers: expand(1) * exp(h) * 2 becomes expand(1 * exp(h) * 2). That saves the passes over memory, and its strides say
that all its elements are the same. An input x with a stride of 0 has been expanded before: it counts as expand(x[:1]).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx

from hvp_engine._support.torch_compat import broadcast_shapes
from hvp_engine.differentiation.trace.patterns import Builder

aten = torch.ops.aten

_ELEMENTWISE = (
    aten.mul.Tensor,
    aten.mul.Scalar,
    aten.div.Tensor,
    aten.div.Scalar,
    aten.add.Tensor,
    aten.sub.Tensor,
    aten.neg.default,
    aten.exp.default,
    aten.log.default,
    aten.sqrt.default,
    aten.tanh.default,
    aten.sigmoid.default,
    aten.softplus.default,
    aten.pow.Tensor_Scalar,
)


def expand_last(graph: fx.Graph, linear: set[fx.Node]) -> None:
    """Where all operands of a known elementwise operation are expanded along a dimension, expand its result instead."""
    for node in list(graph.nodes):
        if node.op != "call_function" or node.target not in _ELEMENTWISE or node in linear or node.kwargs:
            continue
        if any(user.target is aten.view.default for user in node.users):
            continue  # memory that repeats along a dimension cannot be seen as one with its neighbour
        arguments = [_source(graph, argument) for argument in node.args]
        values = [argument.meta["val"] for argument in arguments if isinstance(argument, fx.Node)]
        result = node.meta["val"]
        if any(value.dtype != result.dtype for value in values):
            continue  # which type the result has depends on which operands have dimensions
        shape = broadcast_shapes(*(value.shape for value in values))
        if math.prod(shape) >= result.numel():
            continue
        with graph.inserting_before(node):
            build = Builder(graph, linear)
            small = build(node.target, tuple(arguments), result.new_empty(shape))
            expanded = build(aten.expand.default, (small, list(result.shape)), small.meta["val"].expand(result.shape))
        node.replace_all_uses_with(expanded)
        graph.erase_node(node)


def _source(graph: fx.Graph, argument: Any) -> Any:
    """What is expanded, or the argument itself."""
    while isinstance(argument, fx.Node) and argument.target is aten.expand.default:
        argument = argument.args[0]
    if not isinstance(argument, fx.Node) or argument.op != "placeholder":
        return argument
    value = argument.meta["val"]
    first = next(node for node in graph.nodes if node.op != "placeholder")
    for dim, (size, stride) in enumerate(zip(value.shape, value.stride(), strict=True)):
        if stride == 0 and size > 1:
            value = value.narrow(dim, 0, 1)
            with graph.inserting_before(first):
                argument = graph.call_function(aten.slice.Tensor, (argument, dim, 0, 1))
            argument.meta["val"] = value
    return argument
