"""Elementwise regions of a traced graph, each compiled once however often it occurs.

The graph of a Python loop repeats the same cell, and compiling all of it takes minutes. Here whatever lies between two
matrix products, convolutions or lookups becomes one call, and regions with the same operations on the same shapes share
one compiled function. Everything else runs operation by operation.
"""

from __future__ import annotations

import heapq
import operator
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from hvp_engine._support.torch_compat import tags_of
from hvp_engine._support.torch_compat_traces import graph_module
from hvp_engine.differentiation.trace.functionalize import is_random
from hvp_engine.differentiation.trace.patterns import result_bytes

aten = torch.ops.aten

Compile = Callable[[fx.GraphModule, Sequence[Tensor]], Callable[..., Sequence[Tensor]]]
Function = Callable[..., Sequence[Tensor]]

_SMALLEST = 3
"""Fewest operations that are worth a call: on a CPU, calling a compiled function costs about as much as they do."""

_LARGE = 1 << 18
"""Bytes of a result from which even two operations are worth a call, since it saves a pass over memory."""

_VIEWS = (
    aten.slice.Tensor,
    aten.select.int,
    aten.view.default,
    aten._unsafe_view.default,
    aten.t.default,
    aten.transpose.int,
    aten.permute.default,
    aten.expand.default,
    aten.unsqueeze.default,
    aten.squeeze.dim,
)
_OTHERS = (
    aten.cat.default,
    aten.stack.default,
    aten.clone.default,
    aten.sum.dim_IntList,
    aten.mean.dim,
    aten._softmax.default,
    aten._softmax_backward_data.default,
    aten._log_softmax.default,
    aten._log_softmax_backward_data.default,
    aten.native_layer_norm_backward.default,
)


def lazily(compile: Compile, module: fx.GraphModule) -> Function:
    """`module`, compiled at its first call, for arguments like those of that call."""
    compiled: list[Function] = []

    def region(*arguments: Tensor) -> Sequence[Tensor]:  # the name that a graph shows for its call
        if not compiled:
            compiled.append(compile(module, arguments))
        return compiled[0](*arguments)

    return region


class Regions:
    """The compiled functions of a problem, shared between its graphs.

    Arguments:
        compile: makes a function of a graph and example arguments; called at a region's first call.
    """

    def __init__(self, compile: Compile):
        self._compile = compile
        self._functions: dict[Hashable, Function] = {}

    def outline(self, module: fx.GraphModule) -> fx.GraphModule:
        """A copy of `module` in which a call replaces every region that is worth one."""
        worthwhile = list(_worthwhile(module.graph))
        inside = {node for nodes in worthwhile for node in nodes}
        parts = [[node] for node in module.graph.nodes if node not in inside] + worthwhile
        new = fx.Graph()
        copies: dict[fx.Node, fx.Node] = {}
        for part in _sorted(module.graph, parts):
            if part[0] not in inside:
                copies[part[0]] = new.node_copy(part[0], lambda argument: copies[argument])
                continue
            inputs, outputs = _boundary(part)
            function = self._function(module, part, inputs, outputs)
            call = new.call_function(function, tuple(copies[node] for node in inputs))
            for index, output in enumerate(outputs):
                copies[output] = new.call_function(operator.getitem, (call, index))
                copies[output].meta = dict(output.meta)
        return graph_module(module, new)

    def _function(
        self, module: fx.GraphModule, nodes: Sequence[fx.Node], inputs: Sequence[fx.Node], outputs: Sequence[fx.Node]
    ) -> Function:
        key = _signature(nodes, inputs, outputs)
        if key not in self._functions:
            graph = fx.Graph()
            copies = {node: graph.placeholder(f"input_{index}") for index, node in enumerate(inputs)}
            for node in nodes:
                copies[node] = graph.node_copy(node, lambda argument: copies[argument])
            graph.output(tuple(copies[node] for node in outputs))
            self._functions[key] = lazily(self._compile, graph_module(module, graph))
        return self._functions[key]


def distinct(modules: Iterable[fx.GraphModule]) -> int:
    """How many functions :meth:`Regions.outline` would compile for `modules`."""
    return len({_signature(nodes, *_boundary(nodes)) for module in modules for nodes in _worthwhile(module.graph)})


def _worthwhile(graph: fx.Graph) -> Iterator[list[fx.Node]]:
    """The regions that are worth a call."""
    for nodes in _components(graph):
        computing = [node for node in nodes if _computes(node)]
        if len(computing) >= _SMALLEST or (len(computing) > 1 and max(map(result_bytes, computing)) >= _LARGE):
            yield nodes


def _computes(node: fx.Node) -> bool:
    return node.target not in _VIEWS and node.target is not operator.getitem


def _components(graph: fx.Graph) -> Iterator[list[fx.Node]]:
    """Connected elementwise nodes of equal depth, in order.

    A path that leaves a component passes a node that is not elementwise, which makes it deeper, so it cannot come back:
    no call waits for its own result.
    """
    depths = _depths(graph)
    component: dict[fx.Node, list[fx.Node]] = {}
    for node in filter(_is_elementwise, graph.nodes):
        mine = component[node] = [node]
        for other in node.all_input_nodes:
            theirs = component.get(other)
            if theirs is not None and theirs is not mine and depths[other] == depths[node]:
                small, large = sorted((mine, theirs), key=len)
                large += small
                component.update(dict.fromkeys(small, large))
                mine = large
    order = {node: index for index, node in enumerate(graph.nodes)}
    for nodes in {id(nodes): nodes for nodes in component.values()}.values():
        yield sorted(nodes, key=order.__getitem__)


def _depths(graph: fx.Graph) -> dict[fx.Node, int]:
    """How many nodes that are neither elementwise nor inputs are on the longest path to each node.

    What elementwise nodes make of inputs alone gets the depth at which it is first used, and is computed there.
    """
    depths: dict[fx.Node, int] = {}
    elementwise = set(filter(_is_elementwise, graph.nodes))
    given: dict[fx.Node, None] = {}
    early: dict[fx.Node, None] = {}
    for node in graph.nodes:
        if node not in elementwise and all(i in given for i in node.all_input_nodes) and _is_given(node):
            given[node] = None
        elif node in elementwise and all(i in given or i in early for i in node.all_input_nodes):
            early[node] = None
        depths[node] = max(
            (depths[i] + (i not in elementwise and i not in given) for i in node.all_input_nodes), default=0
        )
    for node in reversed(early):
        depths[node] = min((depths[user] for user in node.users), default=0)
    return depths


def _is_given(node: fx.Node) -> bool:
    """Whether the node is an input, or, if its operands are, a view of one."""
    return node.op in ("placeholder", "get_attr") or node.target in _VIEWS


def _is_elementwise(node: fx.Node) -> bool:
    """Whether the compiler can fuse the node with its neighbours.

    Views of inputs stay outside, since the repetitions of a cell differ in which part of an input they take.
    """
    if node.op != "call_function" or is_random(node):
        return False
    if node.target is operator.getitem:
        return _is_elementwise(node.args[0])  # type: ignore[arg-type]  # of several results
    if node.target in _VIEWS:
        return any(argument.op != "placeholder" for argument in node.all_input_nodes)
    return node.target in _OTHERS or torch.Tag.pointwise in tags_of(node.target)


def _boundary(nodes: Sequence[fx.Node]) -> tuple[list[fx.Node], list[fx.Node]]:
    """The nodes that a region reads from outside, and those of it that are read outside, in order."""
    inside = set(nodes)
    inputs = dict.fromkeys(i for node in nodes for i in node.all_input_nodes if i not in inside)
    return list(inputs), [node for node in nodes if not inside.issuperset(node.users)]


def _signature(nodes: Sequence[fx.Node], inputs: Sequence[fx.Node], outputs: Sequence[fx.Node]) -> Hashable:
    """A key that is equal for regions that one compiled function can serve."""
    number = {node: index for index, node in enumerate([*inputs, *nodes])}

    def frozen(value: Any) -> Hashable:
        if isinstance(value, fx.Node):
            return ("node", number[value])
        if isinstance(value, (tuple, list)):
            return tuple(map(frozen, value))
        return (type(value), repr(value))

    values = [node.meta["val"] for node in inputs]
    return (
        tuple((value.shape, value.stride(), value.dtype, value.device) for value in values),
        tuple((node.target, frozen(node.args), frozen(list(node.kwargs.items()))) for node in nodes),
        tuple(number[node] for node in outputs),
    )


def _sorted(graph: fx.Graph, parts: Sequence[list[fx.Node]]) -> Iterator[list[fx.Node]]:
    """`parts` in topological order, as close to the graph's as possible; random draws keep their order."""
    order = {node: index for index, node in enumerate(graph.nodes)}
    owner = {node: index for index, part in enumerate(parts) for node in part}
    draws = [owner[node] for node in graph.nodes if is_random(node) or node.op in ("placeholder", "output")]
    needs = [{owner[i] for node in part for i in node.all_input_nodes} - {index} for index, part in enumerate(parts)]
    for before, after in zip(draws, draws[1:], strict=False):
        needs[after].add(before)
    users: dict[int, list[int]] = defaultdict(list)
    for index, needed in enumerate(needs):
        for other in needed:
            users[other].append(index)
    waiting = [len(needed) for needed in needs]
    ready = [(order[part[-1]], index) for index, part in enumerate(parts) if not waiting[index]]
    heapq.heapify(ready)
    while ready:
        _, index = heapq.heappop(ready)
        yield parts[index]
        for user in users[index]:
            waiting[user] -= 1
            if not waiting[user]:
                heapq.heappush(ready, (order[parts[user][-1]], user))
