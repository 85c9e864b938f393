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
import weakref
from collections.abc import Callable, Sequence
from enum import Enum, auto
from functools import cache
from typing import Any

import torch
from torch import Tensor, fx

from hvp_engine._support.torch_compat import DispatchMode, is_fake, tags_of, without_torch_functions
from hvp_engine._support.torch_compat_traces import (
    compiled_code_discarded,
    compiler_is_imported,
    graph_module,
    has_own_dispatch,
    is_composite,
    is_higher_order,
    is_of_profiler,
)
from hvp_engine.differentiation.abstract_tensor import abstract
from hvp_engine.differentiation.operations import METADATA, WITH_MEMORY

aten = torch.ops.aten

NODE = "_hvp_engine_node"
"""Attribute of a tensor: the node that stands for it, in the graph that was recorded last."""

_INSTEAD = WITH_MEMORY | {aten.lift_fresh.default: aten.lift_fresh_copy.default}
"""What is done instead: a tensor that Python code makes of numbers (torch.tensor) is new at each run."""


class ControlFlowError(RuntimeError):
    """A graph would have to follow an operator that runs functions."""


class ValueDependenceError(RuntimeError):
    """A graph would keep a value of its inputs; the message says what asks for it."""


class LayoutError(RuntimeError):
    """A tensor is of a kind that no graph can hold; the message says of which."""


class _Way(Enum):
    """What is done about an operator."""

    WRITTEN = auto()
    NUMBER = auto()
    """It gives Python a number, or nothing."""
    REPLACED = auto()
    REFUSED = auto()


@cache
def _way(operation: Any) -> tuple[Any, _Way]:
    """What is done in place of an operator, and how."""
    if is_higher_order(operation):
        return operation, _Way.REFUSED
    if operation in METADATA or torch.Tag.data_dependent_output in tags_of(operation) or is_of_profiler(operation):
        return operation, _Way.NUMBER
    return _INSTEAD.get(operation, operation), _Way.REPLACED if is_composite(operation) else _Way.WRITTEN


class GraphRecorder(DispatchMode):
    """Writes down every operation, with the values of that moment for what Python reads, and their sizes."""

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()
        self.graph = fx.Graph()
        self.root = torch.nn.Module()
        self._outside = 0
        self._marked: list[weakref.ref[Any]] = []

    def record(self, function: Callable[..., Any], arguments: Sequence[Tensor]) -> fx.GraphModule:
        """What `function` computes of `arguments`: a tensor, or a list or tuple of tensors and None.

        Raises :class:`ControlFlowError` and :class:`LayoutError`.
        """
        inputs = list(map(self.taken, arguments))
        for number, value in enumerate(inputs):
            self.stands_for(self.graph.placeholder(f"input_{number}"), value)
        try:
            with compiled_code_discarded(), self:
                results = function(*inputs)
            self.graph.output(self._encode(results))
        finally:  # leave nothing on tensors that live on
            for reference in self._marked:
                if (owner := reference()) is not None:
                    vars(owner).pop(NODE, None)
        return graph_module(self.root, self.graph)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if types and any(map(has_own_dispatch, types)):
            return NotImplemented  # which makes it operations on what it holds
        with without_torch_functions():
            return self._recorded(*_way(func), args, kwargs or {})

    def _recorded(self, func: Any, way: _Way, args: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
        node = None
        if way is _Way.WRITTEN:
            node = self.graph.call_function(func, self._encode(args), self._encode(keywords))
        elif way is _Way.REFUSED:
            raise ControlFlowError(str(func))
        elif way is _Way.REPLACED:
            with self:
                return func.decompose(*args, **keywords)
        result = func(*args, **keywords)
        if node is not None:
            self.stands_for(node, result)
        self.done(func, node, args, keywords, result)
        return result

    def done(
        self, func: Any, node: fx.Node | None, args: tuple[Any, ...], keywords: dict[str, Any], result: Any
    ) -> None:
        """An operation was done; without a node where it gives Python a number."""

    def taken(self, tensor: Tensor) -> Tensor:
        """What stands for an argument while the function runs; of a 0-dim one a copy, since what autograd has made of a
        number would reach operators as that number."""
        return tensor.detach() if tensor.dim() else tensor.detach().clone()

    def stands_for(self, node: fx.Node, result: Any) -> None:
        """The node gives the result, or the tensors in it."""
        if isinstance(result, Tensor):
            if result.layout not in (torch.strided, torch.sparse_coo):
                raise LayoutError("a compressed sparse one")
            if is_fake(result):
                raise LayoutError("one without values")
            # Rewrites know nothing of sparse ones, for which torch has other operations of the same names.
            node.meta["val"] = abstract(result) if result.layout is torch.strided else None
            self.mark(result, node)
        elif isinstance(result, (tuple, list)):
            node.meta["val"] = tuple([abstract(x) if isinstance(x, Tensor) else x for x in result])
            for place, part in enumerate(result):
                if isinstance(part, Tensor):
                    self.stands_for(self.graph.call_function(operator.getitem, (node, place)), part)

    def mark(self, owner: Any, mark: Any) -> None:
        """Let a tensor, or its memory, remember something until the end."""
        if NODE not in vars(owner):
            self._marked.append(weakref.ref(owner))
        setattr(owner, NODE, mark)

    def _encode(self, argument: Any) -> Any:
        if isinstance(argument, Tensor):
            return self.node_of(argument)
        if isinstance(argument, (list, tuple)):
            return type(argument)([self._encode(part) for part in argument])
        if isinstance(argument, dict):
            return {name: self._encode(value) for name, value in argument.items()}
        if isinstance(argument, (torch.UntypedStorage, torch.TypedStorage)):
            raise ValueDependenceError("Python takes the memory of a tensor")
        return argument

    def node_of(self, tensor: Tensor) -> fx.Node:
        """The node that gives the tensor: an attribute for one from outside."""
        node = self.known_node(tensor)
        if node is None:
            name = f"outside_{self._outside}"
            self._outside += 1
            self.root.register_buffer(name, tensor)
            node = self.graph.get_attr(name)
            self.stands_for(node, tensor)
        return node

    def known_node(self, tensor: Tensor) -> fx.Node | None:
        """The node that stands for the tensor already."""
        node: fx.Node | None = vars(tensor).get(NODE)
        return None if node is None or node.graph is not self.graph else node


def record_graph(
    function: Callable[..., Any], arguments: Sequence[Tensor], recorder: type[GraphRecorder] = GraphRecorder
) -> fx.GraphModule:
    """See :meth:`GraphRecorder.record`. Where a function that compiles itself has just brought in torch.compile, which
    makes errors of its own of what the recorder raises, once more, with torch.compile standing aside."""
    imported = compiler_is_imported()
    try:
        return recorder().record(function, arguments)
    except Exception:
        if imported or not compiler_is_imported():
            raise
    return recorder().record(function, arguments)
