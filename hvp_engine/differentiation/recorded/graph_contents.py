"""What a gradient's autograd graph is and holds, read without running anything.

A product with the Hessian is decided by the graph of the gradient: by its nodes and edges, the numbers that they keep,
and the tensors that they have saved. All but the values of those tensors makes up the graph's *text*. Two gradients of
one text have one program, which runs on the saved tensors of either.

Example: of f = 3 x^2 the text says "a product with 3 of a power of 2 of the leaf"; x itself is a saved tensor.
"""

from __future__ import annotations

import threading
from array import array
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from itertools import count
from operator import attrgetter
from typing import Any

from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from hvp_engine._support.torch_compat_nodes import (
    NodeFields,
    fields_of,
    has_hooks,
    has_unpack_hook,
    hooks_registered,
    input_metadata,
    sequence_number,
    sequence_number_of,
)
from hvp_engine.differentiation.recorded.tensor_kinds import is_plain, kind_of


class HiddenContentsError(Exception):
    """Some node does not show what it holds; the message says which."""


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


@dataclass(frozen=True)
class _Reader:
    """How to read the nodes of one class: `tensors` are names of saved tensors, as they are and before unpacking."""

    number: int
    hidden: str = ""
    tensors: tuple[tuple[str, str], ...] = ()
    plain: Callable[[Any], Any] | None = None
    of_several: bool = False


_READERS: dict[type, _Reader] = {}

_READER_NUMBERS = count()


def _reader(node: Any) -> _Reader:
    fields: NodeFields | str = fields_of(node)
    number = next(_READER_NUMBERS)  # two threads never get the same
    if isinstance(fields, str):
        return _Reader(number, hidden=fields)
    return _Reader(
        number,
        tensors=tuple((name, f"_raw_{name.lstrip('_')}") for name in fields.tensors),
        plain=attrgetter(*fields.plain) if fields.plain else None,
        of_several=type(node).__name__ == "CatBackward0",
    )


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


def read_graph(outputs: Sequence[Tensor], inputs: Sequence[Tensor]) -> GraphContents:
    """The contents of the graph from `outputs` back to `inputs`; :class:`HiddenContentsError` where it hides some.

    Cost: some 3 us for each node.
    """
    try:
        return _read(outputs, inputs)
    except (RuntimeError, TypeError) as error:  # a freed or changed tensor, about which autograd itself will say more
        raise HiddenContentsError("a saved tensor that cannot be read any more") from error


def _read(outputs: Sequence[Tensor], inputs: Sequence[Tensor]) -> GraphContents:
    if any(has_hooks(x) for x in inputs):
        raise HiddenContentsError("hooks on the weights")
    order: list[Any] = []
    index: dict[Any, int] = {None: -1}
    roots = [get_gradient_edge(output) for output in outputs]
    stack: list[Any] = [edge.node for edge in reversed(roots)]
    edges: list[Any] = []
    while stack:
        node = stack.pop()
        if node in index:
            continue
        index[node] = len(order)
        order.append(node)
        following = node.next_functions
        edges.append(following)
        for after, _ in following:
            if after not in index:
                stack.append(after)
    contents = _Contents()
    add, hold, text = contents.text.append, contents.hold, contents.text
    add(_HOOKS.possible(order))
    for edge in roots:
        text += index[edge.node], edge.output_nr
    for x in inputs:
        edge = get_gradient_edge(x)
        text += index.get(edge.node, -1), edge.output_nr, _NUMBERS[kind_of(x)]
    for node, following in zip(order, edges, strict=True):
        reader = _READERS.get(type(node))
        if reader is None:
            reader = _READERS[type(node)] = _reader(node)
        if reader.hidden:
            raise HiddenContentsError(reader.hidden)
        add(reader.number)
        add(-len(following))
        for after, number in following:
            add(index[after])
            add(number)
        checked = False
        for name, raw in reader.tensors:
            if not checked and has_unpack_hook(getattr(node, raw)):
                raise HiddenContentsError("saved-tensor hooks, as of gradient checkpointing")
            saved = getattr(node, name)
            checked = isinstance(saved, Tensor) and saved.dim() > 0  # all of a node's are packed alike, but numbers
            hold(saved)
        if reader.plain is not None:
            add(_NUMBERS[_hashable(reader.plain(node))])
        if reader.of_several and sum(after is None for after, _ in following) > 1:
            raise HiddenContentsError("a cat of several constants, whose sizes the graph does not show")
        add(_NUMBERS[input_metadata(node)])
    return GraphContents(array("q", text).tobytes(), contents.tensors, contents.numbers)


class _Contents:
    """The text so far, and the tensors met."""

    def __init__(self) -> None:
        self.text: list[int] = []
        self.tensors: list[Tensor] = []
        self.numbers: list[int] = []
        self._places: dict[int, int] = {}

    def hold(self, x: Any) -> None:
        """A tensor, by its kind and by which earlier one shows the same memory; or a list of such."""
        add = self.text.append
        if isinstance(x, Tensor):
            if not is_plain(x):
                raise HiddenContentsError(f"a {type(x).__name__} that is not strided, or is a lazy view")
            place = len(self.tensors)
            self.tensors.append(x)
            add(_NUMBERS[kind_of(x)])
            address = x.data_ptr()  # 0: zeros without memory, or nothing
            add(self._places.setdefault(address, place) if address else -1)
            if x.dim() == 0 and x.device.type == "cpu":
                self.numbers.append(place)
        elif type(x) in (tuple, list):
            add(-len(x))
            for y in x:
                self.hold(y)
        else:
            add(_NUMBERS[_hashable(x)])


def _hashable(value: Any) -> Any:
    """`value` with its type, since True == 1 == 1.0, and with tuples for lists."""
    if type(value) in (tuple, list):
        return tuple([_hashable(part) for part in value])
    return type(value), value
