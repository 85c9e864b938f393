"""In-place operations of a recorded graph, turned into operations that make new tensors.

Autograd accumulates in place, so a recorded graph contains `add_` and the like, nearly always on a fresh tensor
without views; those are replaced here. Anything else, such as buffers written in part, is left to torch's own
functionalization, at the price of a second trace.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, fx

from hvp_engine._support.torch_compat import schema_of, tags_of
from hvp_engine._support.torch_compat_traces import graph_module
from hvp_engine.differentiation.operations import may_be_view
from hvp_engine.differentiation.trace.graph_recorder import record_graph
from hvp_engine.errors import TraceError

aten = torch.ops.aten

_RANDOM = {
    getattr(packet, overload)
    for packet in (
        *(aten.bernoulli_, aten.normal_, aten.uniform_, aten.exponential_),
        *(aten.random_, aten.cauchy_, aten.log_normal_, aten.geometric_),
    )
    for overload in packet.overloads()
}
"""Operations that fill a tensor with random numbers, whatever it held before."""


def draw(operation: Any, index: int, like: torch.Tensor, *arguments: Any, **keywords: Any) -> torch.Tensor:
    """A new tensor like `like`, filled by an in-place random operation.

    torch's out-of-place operations fill in another order where strides are not row-major, and would draw other masks
    than eager does. `index` distinguishes two draws with the same arguments.
    """
    return operation(torch.empty_like(like), *arguments, **keywords)


def functionalized(graph: fx.Graph) -> bool:
    """Replace every in-place operation of `graph`; False, with the graph partly changed, where that is not simple."""
    order = {node: index for index, node in enumerate(graph.nodes)}
    for node in list(graph.nodes):
        if not mutates(node):
            continue
        target: Any = node.args[0]
        if node.target in _RANDOM and _fresh(target) and len(target.users) == 1:
            with graph.inserting_before(node):
                mask = graph.call_function(draw, (node.target, order[node], target, *node.args[1:]), node.kwargs)
            mask.meta = dict(node.meta)
            node.replace_all_uses_with(mask)
            graph.erase_node(node)
            continue
        pure = out_of_place(node.target)
        later = [user for user in target.users if order.get(user, -1) > order[node]]
        if pure is None or not _fresh(target) or any(is_view(user) for user in target.users):
            if later or node.users or not _fresh(target):
                return False
            graph.erase_node(node)  # nobody reads the change
            continue
        with graph.inserting_before(node):
            result = _stored(graph, node, graph.call_function(pure, _reordered(node, pure), node.kwargs))
        order[result] = order[node]
        for user in later:
            user.replace_input_with(target, result)
        node.replace_all_uses_with(result)
        graph.erase_node(node)
    return True


def _stored(graph: fx.Graph, node: fx.Node, result: fx.Node) -> fx.Node:
    """`result` in the dtype of the tensor that `node` writes to, and in a layout in which later views are possible.

    x.gt_(0) stores 0.0 and 1.0 in x, whereas gt(x, 0) is a tensor of truth values: copy(x, gt(x, 0)) is what x holds.
    """
    computed = result.target(*fx.node.map_arg(result.args, _value), **fx.node.map_arg(result.kwargs, _value))  # type: ignore[operator]
    expected = node.meta["val"]
    result.meta = node.meta | {"val": computed}
    if computed.dtype == expected.dtype and (computed.is_contiguous() or computed.stride() == expected.stride()):
        return result
    copy = graph.call_function(aten.copy.default, (node.args[0], result))
    copy.meta = dict(node.meta)
    return copy


def _value(node: fx.Node) -> Any:
    return node.meta["val"]


def retraced(root: fx.GraphModule, graph: fx.Graph, arguments: Sequence[Tensor]) -> fx.GraphModule:
    """`graph` without in-place operations, by torch's functionalization.

    It follows what is written to its inputs and to what is made of them, and nothing else. So the tensors that the
    graph takes from `root`, such as module buffers, become inputs for the time being. A change of one of those
    themselves stays in the graph, as a copy to it.
    """
    lifted, inputs = fx.Graph(), len(arguments)
    taken: dict[str, Tensor] = {
        str(node.target): getattr(root, str(node.target)) for node in graph.nodes if node.op == "get_attr"
    }
    copies: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        if node.op == "placeholder":
            copies[node] = lifted.node_copy(node)
    places = {name: lifted.placeholder(f"taken_{index}") for index, name in enumerate(taken)}
    for node in graph.nodes:
        if node.op == "get_attr":
            copies[node] = places[str(node.target)]
        elif node.op != "placeholder":
            copies[node] = lifted.node_copy(node, lambda argument: copies[argument])
    pure = torch.func.functionalize(graph_module(root, lifted))
    with torch.no_grad():
        again = record_graph(pure, [*arguments, *(tensor.clone() for tensor in taken.values())])
    placeholders = [node for node in again.graph.nodes if node.op == "placeholder"][inputs:]
    for (name, tensor), node in zip(taken.items(), placeholders, strict=True):
        attribute = f"taken_{name}"
        again.register_buffer(attribute, tensor)
        with again.graph.inserting_after(placeholders[-1]):
            read = again.graph.get_attr(attribute)
        read.meta = dict(node.meta)
        node.replace_all_uses_with(read)
    for node in placeholders:
        again.graph.erase_node(node)
    return again


def refuse_side_effects(graph: fx.Graph) -> None:
    """Drop what nobody reads, with writes to tensors made inside the graph; :class:`TraceError` for other writes."""
    for node in reversed(list(graph.nodes)):
        if node.op in ("placeholder", "output") or node.users:
            continue
        if mutates(node):
            target = node.args[0]
            fresh = isinstance(target, fx.Node) and target.op == "call_function" and len(target.users) == 1
            if not fresh:
                raise TraceError(
                    f"loss: expected a function without side effects; tracing saw {node.target} change a tensor "
                    "from outside: compute a new tensor instead, or use engine='eager'"
                )
        graph.erase_node(node)


def is_random(node: fx.Node) -> bool:
    """Whether two evaluations of the operation differ."""
    return node.target is draw or torch.Tag.nondeterministic_seeded in tags_of(node.target)


def mutates(node: fx.Node) -> bool:
    """Whether the operation changes one of its arguments."""
    schema = schema_of(node.target)
    return schema is not None and schema.is_mutable


@cache
def out_of_place(operation: Any) -> Any:
    """The operation that returns what `operation` stores in its first argument, which alone it may change; else None.

    It has the same name without the underscore, and arguments of the same names and types; the overload's name and
    the order of arguments may differ:
    pow_.Scalar(Tensor(a!) self, Scalar exponent) becomes pow.Tensor_Scalar(Tensor self, Scalar exponent), and
    polygamma_(Tensor(a!) self, int n) becomes polygamma(int n, Tensor self).
    """
    schema = schema_of(operation)
    namespace, name = schema.name.split("::")
    written = [argument.alias_info is not None and argument.alias_info.is_write for argument in schema.arguments]
    packet = getattr(getattr(torch.ops, namespace), name.removesuffix("_"), None)
    if packet is None or not name.endswith("_") or written != [True] + [False] * (len(written) - 1):
        return None
    same_name = schema.overload_name or "default"
    for overload in sorted(packet.overloads(), key=lambda overload: overload != same_name):
        pure = getattr(packet, overload)
        if not schema_of(pure).is_mutable and _signature(schema_of(pure)) == _signature(schema):
            return pure
    return None


def _signature(schema: Any) -> dict[str, Any]:
    return {a.name: (str(a.type), a.kwarg_only, a.default_value) for a in schema.arguments}


def _reordered(node: fx.Node, pure: Any) -> tuple[Any, ...]:
    """The positional arguments of `node` in the order in which `pure` takes them."""
    target: Any = node.target
    names = [argument.name for argument in schema_of(target).arguments]
    given = dict(zip(names, node.args, strict=False))
    return tuple(given[argument.name] for argument in schema_of(pure).arguments if argument.name in given)


def _fresh(node: Any) -> bool:
    """Whether the node makes a tensor of its own."""
    return isinstance(node, fx.Node) and node.op == "call_function" and not is_view(node) and not mutates(node)


def is_view(node: fx.Node) -> bool:
    """Whether the result may share memory with an argument."""
    if node.target is draw or node.op != "call_function":
        return False
    if node.target is operator.getitem and isinstance(node.args[0], fx.Node):
        return is_view(node.args[0])
    return may_be_view(node.target)
