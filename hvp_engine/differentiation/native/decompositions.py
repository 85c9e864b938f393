"""Operators that the extension lacks, written as several that it has."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from hvp_engine._support.torch_compat import schema_of, tags_of
from hvp_engine._support.torch_compat_traces import decomposition, graph_module
from hvp_engine.differentiation.native import pooling, recurrent
from hvp_engine.differentiation.native.operations import UnsupportedError
from hvp_engine.differentiation.trace.graph_recorder import (
    ControlFlowError,
    GraphRecorder,
    ValueDependenceError,
    record_graph,
)
from hvp_engine.differentiation.trace.partial_evaluation import Partition

_FORMULAS: dict[Any, Callable[..., Any]] = pooling.FORMULAS | recurrent.FORMULAS

_MOST = 16
"""Operators that one may become: PyTorch's own, as of a grid of samples, is faster than very many."""


def decomposed(parts: Partition, target: Any) -> Partition | None:
    """The partition with several operators in place of each `target` among those that run in every term.

    None where nothing is known that does the same, or too many operators would.
    """
    module = parts.accumulating.module
    if not any(node.op == "call_function" and node.target is target for node in module.graph.nodes):
        return None
    graph, copies = fx.Graph(), dict[fx.Node, Any]()
    for node in module.graph.nodes:
        if node.op == "call_function" and node.target is target:
            inlined = _inlined(graph, node, copies)
            if inlined is None:
                return None
            copies[node] = inlined
        elif node.target is operator.getitem and isinstance(copies[node.args[0]], (tuple, list)):
            copies[node] = copies[node.args[0]][node.args[1]]
        else:
            copies[node] = graph.node_copy(node, lambda argument: copies[argument])
    graph.eliminate_dead_code(is_impure_node=lambda node: node.op in ("placeholder", "output"))
    accumulating = dataclasses.replace(parts.accumulating, module=graph_module(module, graph))
    return dataclasses.replace(parts, accumulating=accumulating)


def _inlined(graph: fx.Graph, node: fx.Node, copies: dict[fx.Node, Any]) -> Any:
    """What the node gives, by several operators that are added to the graph."""
    ours, sources = _FORMULAS.get(node.target), node.all_input_nodes
    function = ours or decomposition(node.target)
    if function is None or not all(isinstance(source.meta["val"], Tensor) for source in sources):
        return None

    def call(*tensors: Tensor) -> Any:
        known = dict(zip(sources, tensors, strict=True))
        found = function(*_given(node.args, known), **_given(dict(node.kwargs), known))
        return tuple(found) if isinstance(found, tuple) else found  # of a class of their own, some

    try:
        with torch.no_grad():
            recorded = record_graph(call, [_zeros(source.meta["val"]) for source in sources], _Recorder)
    except (UnsupportedError, ControlFlowError, ValueDependenceError):  # it would depend on values
        return None
    except Exception:
        if ours is not None:
            raise
        return None  # torch's own function was not made for such arguments
    inner = [one for one in recorded.graph.nodes if one.op not in ("placeholder", "output")]
    if (len(inner) > _MOST and not ours) or any(one.target is node.target or not _computes(one) for one in inner):
        return None
    values = dict(zip((n for n in recorded.graph.nodes if n.op == "placeholder"), sources, strict=True))
    replaced = {source: copies[kept] for source, kept in values.items()}
    return graph.graph_copy(recorded.graph, replaced)


class _Recorder(GraphRecorder):
    """Refuses functions that ask for values, since those of zeros mean nothing."""

    def done(
        self, func: Any, node: fx.Node | None, args: tuple[Any, ...], keywords: dict[str, Any], result: Any
    ) -> None:
        if node is None and torch.Tag.data_dependent_output in tags_of(func):
            raise ValueDependenceError(str(func))


def _given(argument: Any, known: dict[fx.Node, Tensor]) -> Any:
    """An argument with tensors in place of nodes, in lists that may be changed: some functions write to theirs."""
    if isinstance(argument, dict):
        return {name: _given(value, known) for name, value in argument.items()}
    if isinstance(argument, (list, tuple)):
        return [_given(part, known) for part in argument]
    return known[argument] if isinstance(argument, fx.Node) else argument


def _zeros(like: Tensor) -> Tensor:
    return torch.empty_strided(like.shape, like.stride(), dtype=like.dtype).zero_()


def _computes(node: fx.Node) -> bool:
    """Whether the node is an operator that writes to nothing."""
    schema = schema_of(node.target) if node.op == "call_function" else None
    sized_by_values = torch.Tag.dynamic_output_shape in tags_of(node.target)
    return node.target is operator.getitem or (schema is not None and not schema.is_mutable and not sized_by_values)
