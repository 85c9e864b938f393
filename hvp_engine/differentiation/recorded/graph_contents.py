"""What a gradient's autograd graph is and holds, read without running anything.

A product with the Hessian is decided by the graph of the gradient: by its nodes and edges, the numbers that they keep,
and the tensors that they have saved. All but the values of those tensors makes up the graph's *text*. Two gradients of
one text have one program, which runs on the saved tensors of either.

Example: of f = 3 x^2 the text says "a product with 3 of a power of 2 of the leaf"; x itself is a saved tensor.
"""

from __future__ import annotations

import threading
from array import array
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

from torch import Tensor

from hvp_engine._support.torch_compat_nodes import (
    PRIVATE_NAMES,
    has_hooks,
    has_unpack_hook,
    hooks_registered,
    input_metadata,
    sequence_number,
    sequence_number_of,
)
from hvp_engine.differentiation.graph_structure import Graph, HiddenContentsError, NodeReader, WalkedGraph
from hvp_engine.differentiation.recorded.tensor_kinds import is_plain


@dataclass(frozen=True)
class GraphContents:
    """A graph, read.

    Attributes:
        text: everything that a product depends on but the values of `tensors`.
        tensors: what the nodes have saved.
        numbers: which of `tensors` may be Python numbers: autograd keeps those as 0-dim tensors on the CPU.
    """

    text: Hashable
    tensors: list[Tensor]
    numbers: list[int]

    def number(self, place: int) -> Any:
        """The number that a tensor stands for."""
        return self.tensors[place].item()


class _Numbers(dict[Hashable, int]):
    """A number for each thing that a text holds, so that texts are made, compared and hashed as bytes.

    It is emptied when it is full; numbers are not used twice, so that texts from before just match no others.
    """

    def __init__(self) -> None:
        self._next = count(1)

    def __missing__(self, thing: Hashable) -> int:
        if len(self) >= _MOST_NUMBERS:
            self.clear()
        number = self[thing] = next(self._next)
        return number


_MOST_NUMBERS = 1 << 18

_NUMBERS = _Numbers()


class _Hooks(threading.local):
    """Which graphs of this thread may have hooks: those with a node from before the last hook that was registered.

    A hook on an inner tensor changes products, and autograd does not show it. So graphs that may have one have another
    text, and what they hold is not taken to be what graphs without hooks do.
    """

    def __init__(self) -> None:
        self._registered = hooks_registered()
        self._since = 0

    def possible(self, nodes: Sequence[Any]) -> bool:
        if self._registered != hooks_registered():
            self._registered, self._since = hooks_registered(), sequence_number()
        return self._since > 0 and min(map(sequence_number_of, nodes), default=0) < self._since


_HOOKS = _Hooks()


def contents_of(graph: Graph, inputs: Sequence[Tensor]) -> GraphContents:
    """What a graph that reaches `inputs` holds; :class:`HiddenContentsError` where it hides some.

    Cost: some 1 us for each node; without the extension 3.
    """
    if any(has_hooks(x) for x in inputs):
        raise HiddenContentsError("hooks on the weights")
    try:
        if isinstance(graph, WalkedGraph):
            found = contents_by_python(graph, _NUMBERS)
        else:
            found = graph.contents(_NUMBERS, PRIVATE_NAMES)
    except (RuntimeError, TypeError) as error:  # a freed or changed tensor, about which autograd itself will say more
        raise HiddenContentsError("a saved tensor that cannot be read any more") from error
    if isinstance(found, str):
        raise HiddenContentsError(found)
    text, tensors, numbers = found
    return GraphContents((_HOOKS.possible(graph.nodes), graph.structure, text), tensors, numbers)


def contents_by_python(graph: WalkedGraph, things: dict[Hashable, int]) -> tuple[bytes, list[Tensor], list[int]] | str:
    """What `_C.Graph.contents` does too: the text of what nodes hold, what they have saved, and which of that may be
    numbers; or what hides some of it.

    Arguments:
        things: numbers of what is no integer.
    """
    contents = _Contents(things)
    for x in graph.inputs:
        contents.add_kind(x)
    try:
        for node, following, reader in zip(graph.nodes, graph.following, graph.readers, strict=True):
            contents.add_node(node, following, reader)
    except HiddenContentsError as reason:
        return str(reason)
    return array("q", contents.text).tobytes(), contents.tensors, contents.numbers


class _Contents:
    """The text so far, and the tensors met."""

    def __init__(self, things: dict[Hashable, int]) -> None:
        self.text: list[int] = []
        self.tensors: list[Tensor] = []
        self.numbers: list[int] = []
        self._places: dict[int, int] = {}
        self._things = things

    def add_node(self, node: Any, following: list[tuple[int, int]], reader: NodeReader) -> None:
        checked = False
        for name, raw in reader.tensors:
            if not checked and has_unpack_hook(getattr(node, raw)):
                raise HiddenContentsError("saved-tensor hooks, as of gradient checkpointing")
            saved = getattr(node, name)
            checked |= isinstance(saved, Tensor) and saved.dim() > 0  # all of a node's are packed alike, but numbers
            self._add_value(saved)
        for name in reader.plain:
            self._add_value(getattr(node, name))
        if reader.of_several and sum(after < 0 for after, _ in following) > 1:
            raise HiddenContentsError("a cat of several constants, whose sizes the graph does not show")
        metadata = input_metadata(node)
        self.text.append(len(metadata))
        for dtype, shape in metadata:
            self.text += self._things[dtype], len(shape), *shape

    def add_kind(self, x: Tensor) -> None:
        """All that a program depends on of a tensor whose values it is given."""
        self.text += x.dim(), *x.shape, x.dim(), *x.stride(), self._things[x.dtype], self._things[x.device]

    def _add_value(self, x: Any) -> None:
        """A tensor, by its kind and by which earlier one shows the same memory; a list of such; or something plain."""
        if isinstance(x, Tensor):
            if not is_plain(x):
                raise HiddenContentsError(f"a {type(x).__name__} that is not strided, or is a lazy view")
            place = len(self.tensors)
            self.tensors.append(x)
            self.text.append(_TENSOR)
            self.add_kind(x)
            address = x.data_ptr()  # 0: zeros without memory, or nothing
            self.text.append(self._places.setdefault(address, place) if address else -1)
            if x.dim() == 0 and x.device.type == "cpu":
                self.numbers.append(place)
        elif type(x) in (tuple, list):
            self.text += _LIST, len(x)
            for y in x:
                self._add_value(y)
        elif type(x) is int and -(1 << 63) <= x < 1 << 63:
            self.text += _INTEGER, x
        else:  # with its type, since True == 1 == 1.0
            self.text += _OTHER, self._things[type(x), x]


_TENSOR, _INTEGER, _LIST, _OTHER = range(4)
"""In front of a value in a text."""
