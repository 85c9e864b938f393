"""In-place operations of a recorded graph, turned into operations that make new tensors.

Autograd accumulates in place, so a recorded graph contains `add_` and the like, nearly always on a fresh tensor
without views; those are replaced here. Anything else, such as buffers written in part, is left to torch's own
functionalization, at the price of a second trace.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

aten = torch.ops.aten

_RENAMED = {aten.transpose_.default: aten.transpose.int}
_RANDOM = (aten.bernoulli_.float, aten.normal_.default, aten.uniform_.default, aten.exponential_.default)


def draw(operation: Any, index: int, like: torch.Tensor, *arguments: Any, **keywords: Any) -> torch.Tensor:
    """A new tensor like `like`, filled by an in-place random operation.

    The out-of-place operations of torch fill in another order where strides are not row-major, and would draw
    other masks than eager does. `index` keeps two draws from being taken for one.
    """
    return operation(torch.empty_like(like), *arguments, **keywords)


def functionalized(recorded: fx.GraphModule) -> bool:
    """Replace every in-place operation of `recorded`; False, and a graph partly replaced, where that is not simple."""
    graph = recorded.graph
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
        pure = _out_of_place(node.target)
        later = [user for user in target.users if order.get(user, -1) > order[node]]
        if pure is None or not _fresh(target) or any(is_view(user) for user in target.users):
            if later or node.users or not _fresh(target):
                return False
            graph.erase_node(node)  # nobody reads the change
            continue
        with graph.inserting_before(node):
            result = graph.call_function(pure, node.args, node.kwargs)
        result.meta = dict(node.meta)
        order[result] = order[node]
        for user in later:
            user.replace_input_with(target, result)
        node.replace_all_uses_with(result)
        graph.erase_node(node)
    recorded.recompile()
    return True


def retraced(recorded: fx.GraphModule, arguments: Sequence[Tensor]) -> fx.GraphModule:
    """`recorded` without in-place operations, by torch's functionalization.

    It follows what is written to its inputs and to what is made of them, and nothing else: so the tensors that the
    graph takes from elsewhere, as module buffers, become inputs for that long. A change of one of those themselves
    stays in the graph, as a copy to it.
    """
    lifted, inputs = fx.Graph(), len(arguments)
    taken: dict[str, Tensor] = {
        str(node.target): getattr(recorded, str(node.target)) for node in recorded.graph.nodes if node.op == "get_attr"
    }
    copies: dict[fx.Node, fx.Node] = {}
    for node in recorded.graph.nodes:
        if node.op == "placeholder":
            copies[node] = lifted.node_copy(node)
    places = {name: lifted.placeholder(f"taken_{index}") for index, name in enumerate(taken)}
    for node in recorded.graph.nodes:
        if node.op == "get_attr":
            copies[node] = places[str(node.target)]
        elif node.op != "placeholder":
            copies[node] = lifted.node_copy(node, lambda argument: copies[argument])
    pure = torch.func.functionalize(fx.GraphModule(recorded, lifted))
    with torch.no_grad():
        graph = make_fx(pure)(*arguments, *(tensor.clone() for tensor in taken.values()))
    placeholders = [node for node in graph.graph.nodes if node.op == "placeholder"][inputs:]
    for (name, tensor), node in zip(taken.items(), placeholders, strict=True):
        attribute = f"taken_{name}"
        graph.register_buffer(attribute, tensor)
        with graph.graph.inserting_after(placeholders[-1]):
            again = graph.graph.get_attr(attribute)
        again.meta = dict(node.meta)
        node.replace_all_uses_with(again)
    for node in placeholders:
        graph.graph.erase_node(node)
    graph.recompile()
    return graph


def is_random(node: fx.Node) -> bool:
    """Whether two evaluations of the operation differ."""
    return node.target is draw or torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())


def mutates(node: fx.Node) -> bool:
    """Whether the operation changes one of its arguments."""
    schema = getattr(node.target, "_schema", None)
    return schema is not None and schema.is_mutable


def _out_of_place(target: Any) -> Any:
    """The operation that returns what `target` would have stored."""
    if target in _RENAMED:
        return _RENAMED[target]
    name, overload = target._schema.name.split("::")[1], target._schema.overload_name or "default"
    packet = getattr(aten, name[:-1], None) if name.endswith("_") else None
    return getattr(packet, overload, None) if packet is not None else None


def _fresh(node: Any) -> bool:
    """Whether the node makes a tensor of its own."""
    return isinstance(node, fx.Node) and node.op == "call_function" and not is_view(node) and not mutates(node)


def is_view(node: fx.Node) -> bool:
    """Whether the result may share memory with an argument."""
    if node.target is draw:
        return False
    if node.target is operator.getitem:
        return is_view(node.args[0]) if isinstance(node.args[0], fx.Node) else True
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        return node.op == "call_function"  # unknown: be careful
    return any(result.alias_info is not None and not result.alias_info.is_write for result in schema.returns)
