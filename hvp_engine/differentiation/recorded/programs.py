"""From a recorded product to an optimized program: the rewrites and the partition of a traced loss, without a trace."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from hvp_engine._support.torch_compat import below_autograd
from hvp_engine.differentiation.recorded.product_recorder import Constant, RecordedProduct, Value
from hvp_engine.differentiation.self_check import Schedule
from hvp_engine.differentiation.trace.evaluated import PartitionFunctions
from hvp_engine.differentiation.trace.functionalize import functionalized, refuse_side_effects, retraced
from hvp_engine.differentiation.trace.graph_recorder import record_graph
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
    arguments = (*product.constants, *tangents)
    copies = [tangent.clone(memory_format=torch.preserve_format) for tangent in tangents]  # it may write to them
    root = record_graph(partial(_run, product), (*product.constants, *copies))
    attempts = Attempts()
    graph = copied(root.graph)
    if not attempts.call(functionalized, graph, otherwise=False):
        with TRACING:
            root = retraced(root, root.graph, arguments)
        graph = root.graph
    refuse_side_effects(graph)
    return Trace(graph, root, len(tangents), 0, arguments, tuple(attempts.undone))


def _run(product: RecordedProduct, *arguments: Tensor) -> list[Tensor | None]:
    """The product's outputs from its constants and tangents, with no value kept longer than it is needed."""
    count = len(product.constants)
    constants = [
        # Nothing that has to be handed over.
        known if fill is None else aten.full.default(known.shape, fill, dtype=known.dtype, device=known.device)
        for known, fill in zip(arguments[:count], product.fills, strict=True)
    ]
    values: list[Tensor | None] = list(arguments[count:])
    last = _last_reads(product)
    for index, entry in enumerate(product.entries):
        named = {name: _filled(value, constants, values) for name, value in entry.keywords}
        result = entry.operation(*_filled(entry.arguments, constants, values), **named)
        if isinstance(result, Tensor):
            values.append(result)
        else:
            values += [part if isinstance(part, Tensor) else None for part in result]
        for value in _values((entry.arguments, entry.keywords)):
            if last[value.number] == index:
                values[value.number] = None
    return [None if value is None else _filled(value, constants, values) for value in product.outputs]


def _last_reads(product: RecordedProduct) -> dict[int, int]:
    """For each value the last entry that reads it; the number of entries for outputs."""
    reads = [*((entry.arguments, entry.keywords) for entry in product.entries), tuple(product.outputs)]
    return {value.number: index for index, read in enumerate(reads) for value in _values(read)}


def _values(argument: Any) -> Iterator[Value]:
    if type(argument) is Value:
        yield argument
    elif type(argument) is tuple:
        for part in argument:
            yield from _values(part)


def _filled(argument: Any, constants: Sequence[Tensor], values: Sequence[Tensor | None]) -> Any:
    """`argument` with tensors in place of values and constants."""
    if type(argument) is Constant:
        return constants[argument.number]
    if type(argument) is Value:
        return values[argument.number]
    if type(argument) is tuple:
        return [_filled(part, constants, values) for part in argument]
    return argument


def literals(argument: Any) -> set[Any]:
    """The numbers among arguments of entries."""
    if type(argument) is tuple:
        return set().union(*map(literals, argument))
    return {argument} if isinstance(argument, (int, float, complex)) else set()
