"""From a recorded product to an optimized program: the rewrites and the partition of a traced loss, without a trace."""

from __future__ import annotations

import operator
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from hvp_engine._support.torch_compat import below_autograd
from hvp_engine._support.torch_compat_traces import graph_module
from hvp_engine.differentiation.abstract_tensor import abstract
from hvp_engine.differentiation.recorded.product_recorder import Constant, RecordedProduct, Value
from hvp_engine.differentiation.self_check import Schedule
from hvp_engine.differentiation.trace.evaluated import PartitionFunctions
from hvp_engine.differentiation.trace.functionalize import functionalized, refuse_side_effects, retraced
from hvp_engine.differentiation.trace.partial_evaluation import partition
from hvp_engine.differentiation.trace.rewriting import Attempts, copied
from hvp_engine.differentiation.trace.tracing import TRACING, Trace

aten = torch.ops.aten


class Program:
    """What a product computes, as functions of (constants, tangents).

    Attributes:
        functions: of the partition; `primal` takes all constants.
        seconds: what building took.
        schedule: when to compare it with autograd.
        nodes: size of the graph that was written down.
    """

    def __init__(self, product: RecordedProduct, tangents: Sequence[Tensor]):
        start = time.perf_counter()
        with torch.no_grad():
            trace = traced(product, tangents)
            self.functions = PartitionFunctions(partition(trace))
            self.functions.run_natively()
        self.nodes = len(product.entries)
        self.schedule = Schedule()
        self.seconds = time.perf_counter() - start

    def residuals(self, constants: Sequence[Tensor]) -> Sequence[Tensor]:
        """What does not depend on the tangents, computed once for each point."""
        with below_autograd():
            return self.functions.primal(*constants)


def traced(product: RecordedProduct, tangents: Sequence[Tensor]) -> Trace:
    """The product as a graph. It is run once on the way, for the shapes and strides of its values."""
    constants = product.constants
    arguments = (*constants, *tangents)
    graph = _graph(product, tangents)
    attempts = Attempts()
    candidate = copied(graph)
    root = graph_module(torch.nn.Module(), graph)
    if not attempts.call(functionalized, candidate, otherwise=False):
        with TRACING:
            root = retraced(root, graph, arguments)
        candidate = root.graph
    refuse_side_effects(candidate)
    return Trace(candidate, root, len(tangents), 0, arguments, tuple(attempts.undone))


def _graph(product: RecordedProduct, tangents: Sequence[Tensor]) -> fx.Graph:
    graph = fx.Graph()
    known: list[fx.Node] = []
    for number, tensor in enumerate(product.constants):
        known.append(graph.placeholder(f"constant_{number}"))
        known[number].meta["val"] = abstract(tensor)
    values: list[_Computed | None] = []
    for number, tensor in enumerate(tangents):
        node = graph.placeholder(f"tangent_{number}")
        node.meta["val"] = abstract(tensor)
        values.append(_Computed(node, tensor.clone(memory_format=torch.preserve_format)))
    for number, (tensor, fill) in enumerate(zip(product.constants, product.fills, strict=True)):
        if fill is not None:  # nothing that has to be handed over
            keywords: dict[str, Any] = {"dtype": tensor.dtype, "device": tensor.device}
            known[number] = graph.call_function(aten.full.default, (tuple(tensor.shape), fill), keywords)
            known[number].meta["val"] = abstract(tensor)
    constants = [_Computed(node, tensor) for node, tensor in zip(known, product.constants, strict=True)]
    last = _last_reads(product)
    for index, entry in enumerate(product.entries):
        arguments = tuple(_filled(entry.arguments, constants, values, "node"))
        named: dict[str, Any] = {name: _filled(value, constants, values, "node") for name, value in entry.keywords}
        node = graph.call_function(entry.operation, arguments, named)
        result = entry.operation(
            *_filled(entry.arguments, constants, values, "tensor"),
            **{name: _filled(value, constants, values, "tensor") for name, value in entry.keywords},
        )
        if isinstance(result, Tensor):
            node.meta["val"] = abstract(result)
            values.append(_Computed(node, result))
        else:
            node.meta["val"] = tuple(abstract(t) if isinstance(t, Tensor) else t for t in result)
            for place, tensor in enumerate(result):
                if isinstance(tensor, Tensor):
                    item = graph.call_function(operator.getitem, (node, place))
                    item.meta["val"] = node.meta["val"][place]
                    values.append(_Computed(item, tensor))
                else:
                    values.append(None)
        for value in _values((entry.arguments, entry.keywords)):
            if last[value.number] == index:
                computed = values[value.number]
                assert computed is not None
                computed.tensor = None
    graph.output([None if value is None else _filled(value, constants, values, "node") for value in product.outputs])
    return graph


@dataclass
class _Computed:
    """A value: its node, and its tensor as long as it is needed."""

    node: fx.Node
    tensor: Tensor | None


def _last_reads(product: RecordedProduct) -> dict[int, int]:
    """For each value the last entry that reads it."""
    return {
        value.number: index
        for index, entry in enumerate(product.entries)
        for value in _values((entry.arguments, entry.keywords))
    }


def _values(argument: Any) -> Iterator[Value]:
    if type(argument) is Value:
        yield argument
    elif type(argument) is tuple:
        for part in argument:
            yield from _values(part)


def _filled(argument: Any, constants: Sequence[_Computed], values: Sequence[_Computed | None], what: str) -> Any:
    """`argument` with the nodes or tensors, as `what` says, in place of values and constants."""
    if type(argument) is Constant:
        return getattr(constants[argument.number], what)
    if type(argument) is Value:
        return getattr(values[argument.number], what)
    if type(argument) is tuple:
        return [_filled(part, constants, values, what) for part in argument]
    return argument


def literals(argument: Any) -> set[Any]:
    """The numbers among arguments of entries."""
    if type(argument) is tuple:
        return set().union(*map(literals, argument))
    return {argument} if isinstance(argument, (int, float, complex)) else set()
