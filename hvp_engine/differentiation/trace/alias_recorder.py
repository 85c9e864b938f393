"""Records graphs of Python code that makes tensors of tensors where no dispatch mode sees it.

`nn.Parameter(x)`, `x.as_subclass(kind)` and `y.data = x` make another tensor on the memory of x without an operation.
It is known by that memory: the graph has alias(x) for it. Without that it would count as a tensor from outside, with
the values of that moment in all later runs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from hvp_engine._support.torch_compat import shares_storage, subclass_of, without_torch_functions
from hvp_engine._support.torch_compat_traces import has_internal_overlap, has_own_dispatch, memory_of
from hvp_engine.differentiation.trace.graph_recorder import NODE, GraphRecorder, LayoutError, ValueDependenceError

aten = torch.ops.aten


class AliasRecorder(GraphRecorder):
    """Knows tensors by their memory, too."""

    def __init__(self) -> None:
        super().__init__()
        self._memories: dict[fx.Node, int] = {}
        self._shared: set[int] = set()

    def taken(self, tensor: Tensor) -> Tensor:
        if has_own_dispatch(type(tensor)):
            raise LayoutError(f"a {type(tensor).__name__}, which is made of other tensors,")
        shared = tensor.layout is torch.strided and shares_storage(tensor)
        if shared and (memory := _memory(tensor)) is not None:
            self._shared.add(memory._cdata)  # the function may have it from outside, too
        return super().taken(tensor)

    def stands_for(self, node: fx.Node, result: Any) -> None:
        super().stands_for(node, result)
        if isinstance(result, Tensor) and (memory := _memory(result)) is not None:
            nodes = vars(memory).get(NODE) or {}
            nodes[_place(result)] = node
            self.mark(memory, nodes)
            self._memories[node] = memory._cdata

    def known_node(self, tensor: Tensor) -> fx.Node | None:
        node, memory = super().known_node(tensor), _memory(tensor)
        if memory is None or node is not None and self._memories.get(node) == memory._cdata:
            return node
        nodes = {place: one for place, one in (vars(memory).get(NODE) or {}).items() if one.graph is self.graph}
        if not nodes or any(one.op == "get_attr" for one in nodes.values()):
            return None
        if memory._cdata in self._shared:
            raise ValueDependenceError("a tensor on the memory of an input, which may be that or another one, is used")
        if _place(tensor) not in nodes:
            raise ValueDependenceError("Python has made another view of a tensor's memory")
        node = self.graph.call_function(aten.alias.default, (nodes[_place(tensor)],))
        self.stands_for(node, tensor)
        return node


def of_own_memory(tensor: Tensor) -> Tensor:
    """A copy, if it can be one, that stands for an input alone: the function may have the same tensor from outside."""
    value = tensor.detach()
    if has_own_dispatch(type(tensor)) or value.layout is not torch.strided or has_internal_overlap(value):
        return value
    with without_torch_functions():
        own = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device).copy_(value)
        return own if type(value) is Tensor else subclass_of(type(value), own)


def _memory(tensor: Tensor) -> Any:
    """What holds the numbers of a tensor that is not made of others, which lives as long as that."""
    return None if has_own_dispatch(type(tensor)) or tensor.layout is not torch.strided else memory_of(tensor)


def _place(tensor: Tensor) -> tuple[Any, ...]:
    """Which part of its memory a tensor shows, and as what."""
    with without_torch_functions():
        form = tensor.dtype, tensor.is_conj(), tensor.is_neg()
        return tuple(tensor.shape), tensor.stride(), tensor.storage_offset(), form
