"""Records what a function of tensors computes as a graph of aten operations.

A dispatch mode sees every operation below autograd, those of backward passes included. A tensor that an operation gave
remembers the node that stands for it; one without a node comes from outside, and the graph takes it by reference. For
f(x) = sin(x) * c the graph is mul(sin(x), c), where x is an input and c an attribute.

torch's `make_fx` records the same graph. It imports all of torch.compile first, which takes a second in a new process,
and takes some fifteen times as long for each operation; it stops at every `.item()`, and lets values of its inputs
through by other ways (see :mod:`value_watch`).
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from hvp_engine._support.torch_compat import DispatchMode, tags_of, without_torch_functions
from hvp_engine._support.torch_compat_traces import (
    compiled_code_discarded,
    graph_module,
    has_own_dispatch,
    is_composite,
    is_higher_order,
)
from hvp_engine.differentiation.abstract_tensor import abstract
from hvp_engine.differentiation.operations import METADATA, WITH_MEMORY, kind_of_operation, may_be_view
from hvp_engine.differentiation.trace.value_watch import ControlFlowError, ValueDependenceError, ValueReads, asked

aten = torch.ops.aten

_NODE = "_hvp_engine_node"
"""Attribute of a tensor: the node that stands for it, in the graph that was recorded last."""

_INSTEAD = WITH_MEMORY | {aten.lift_fresh.default: aten.lift_fresh_copy.default}
"""What is done instead: a tensor that Python code makes of numbers (torch.tensor) is new at each run."""

KEPT = "tensors whose values the graph keeps"
"""Where the `meta` of a recorded module has them; other values in them make the graph wrong."""


class LayoutError(RuntimeError):
    """A tensor is laid out as no graph can hold it."""


class GraphRecorder(DispatchMode):
    """Writes every operation into `module.graph`.

    Attributes:
        kept: tensors from outside whose values the graph keeps.
    """

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()
        self.graph = fx.Graph()
        self.root = torch.nn.Module()
        self.kept: list[Tensor] = []
        self._outside: list[Tensor] = []
        self._writes: dict[fx.Node, list[fx.Node]] = {}

    def placeholder(self, tensor: Tensor) -> Tensor:
        """A new input, like `tensor`."""
        value = tensor.detach()
        self._stands_for(self.graph.placeholder(f"input_{len(self.graph.nodes)}"), value)
        return value

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if any(map(has_own_dispatch, types)):
            return NotImplemented  # which makes it operations on what it holds
        with without_torch_functions():
            return self._recorded(_INSTEAD.get(func, func), args, kwargs or {})

    def _recorded(self, func: Any, args: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
        if is_higher_order(func):
            raise ControlFlowError(str(func))
        if func in METADATA:
            return func(*args, **keywords)
        if is_composite(func):
            with self:
                return func.decompose(*args, **keywords)
        if torch.Tag.data_dependent_output not in tags_of(func):
            node = self.graph.call_function(func, self._encode(args), self._encode(keywords))
            if kind_of_operation(func).mutates:
                self._note_write(node)
            result = func(*args, **keywords)
            self._stands_for(node, result)
        else:
            result = func(*args, **keywords)
        self.keep(*asked(func, args, keywords, result))
        return result

    def keep(self, tensors: Sequence[Tensor], asks: str) -> None:
        """Note what these tensors, whose values the graph keeps, are computed from; an error where that may change."""
        for tensor in tensors:
            self.kept += self._sources(tensor, asks)

    def finish(self, results: Any) -> fx.GraphModule:
        """The graph that gives `results`: a tensor, or a list or tuple of tensors and None."""
        self.graph.output(self._encode(results))
        module = graph_module(self.root, self.graph)
        module.meta[KEPT] = self.kept
        return module

    def forget(self) -> None:
        """Leave nothing on tensors that live on."""
        for tensor in self._outside:
            vars(tensor).pop(_NODE, None)

    def _stands_for(self, node: fx.Node, result: Any) -> None:
        if isinstance(result, Tensor):
            if result.layout not in (torch.strided, torch.sparse_coo):
                raise LayoutError(f"a tensor with the layout {result.layout}")
            node.meta["val"] = abstract(result)
            setattr(result, _NODE, node)
        elif isinstance(result, (tuple, list)):
            node.meta["val"] = tuple([abstract(x) if isinstance(x, Tensor) else x for x in result])
            for place, part in enumerate(result):
                if isinstance(part, Tensor):
                    self._stands_for(self.graph.call_function(operator.getitem, (node, place)), part)

    def _note_write(self, node: fx.Node) -> None:
        """Remember it for what it writes to, and for what that is a view of: x[0] = w changes x by select(x, 0)."""
        kind = kind_of_operation(node.target)
        targets = [part for place, part in enumerate(node.args) if place in kind.written]
        targets += [part for name, part in node.kwargs.items() if name in kind.written]
        while targets:
            target = targets.pop()
            if isinstance(target, (list, tuple)):
                targets += target
            elif isinstance(target, fx.Node):
                self._writes.setdefault(target, []).append(node)
                if target.op == "call_function" and may_be_view(target.target):
                    targets.append(target.args[0])

    def _encode(self, argument: Any) -> Any:
        if isinstance(argument, Tensor):
            return self._node(argument)
        if isinstance(argument, (list, tuple)):
            return type(argument)([self._encode(part) for part in argument])
        if isinstance(argument, dict):
            return {name: self._encode(value) for name, value in argument.items()}
        return argument

    def _node(self, tensor: Tensor) -> fx.Node:
        node: fx.Node | None = getattr(tensor, _NODE, None)
        if node is None or node.graph is not self.graph:
            name = f"outside_{len(self._outside)}"
            self.root.register_buffer(name, tensor)
            self._outside.append(tensor)
            node = self.graph.get_attr(name)
            self._stands_for(node, tensor)
        return node

    def _sources(self, tensor: Tensor, asks: str) -> list[Tensor]:
        """The tensors from outside of which this one is computed; an error if inputs or random numbers are among
        them."""
        nodes, seen, sources = [self._node(tensor)], set[fx.Node](), list[Tensor]()
        while nodes:
            node = nodes.pop()
            if node.op == "placeholder" or torch.Tag.nondeterministic_seeded in tags_of(node.target):
                raise ValueDependenceError(asks)
            if node.op == "get_attr":
                sources.append(getattr(self.root, str(node.target)))
            if node not in seen:
                seen.add(node)
                nodes += [*node.all_input_nodes, *self._writes.get(node, ())]
        return sources


def record_graph(function: Callable[..., Any], arguments: Sequence[Tensor]) -> fx.GraphModule:
    """What `function` computes of `arguments`; :class:`ControlFlowError`, :class:`ValueDependenceError`,
    :class:`LayoutError`."""
    recorder = GraphRecorder()
    inputs = [recorder.placeholder(tensor) for tensor in arguments]
    try:
        with compiled_code_discarded(), recorder, ValueReads(recorder.keep):
            results = function(*inputs)
        return recorder.finish(results)
    finally:
        recorder.forget()
