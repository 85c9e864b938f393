"""A library of programs for products, and the decision when another one is worth making."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Collection, Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from hvp_engine._support.random_state import one_thread
from hvp_engine.differentiation.recorded.graph_contents import GraphContents
from hvp_engine.differentiation.recorded.known_graphs import Known, Outline, Shortcut, Source
from hvp_engine.differentiation.recorded.product_recorder import (
    Constant,
    Entry,
    RecordedProduct,
    constant_of,
)
from hvp_engine.differentiation.recorded.programs import Program, literals
from hvp_engine.differentiation.recorded.tensor_kinds import whereabouts

aten = torch.ops.aten

_SECONDS_PER_NODE = 5e-4
"""What it takes to build a program for each operation that was written down, roughly (on a 2.4 GHz core)."""

_CREDIT, _SHARE = 10.0, 0.25
"""Building may take so many seconds, and such a share of the time that plain products have taken; beyond that, the
program of one kind of graphs may take as long as plain products of this kind have taken."""

_MOST_GRAPHS, _MOST_NODES = 1024, 1 << 18
"""Graphs that are remembered, and operations in all programs that are kept, the latest used."""

MOST_VALUES = 4
"""Programs of one graph that differ in a number."""

_TENSOR_FORMS = {
    aten.mul.Tensor: aten.mul.Tensor,
    aten.mul.Scalar: aten.mul.Tensor,
    aten.div.Tensor: aten.div.Tensor,
    aten.div.Scalar: aten.div.Tensor,
}
"""Operations whose second argument may be a number, in the form that takes a tensor."""


Kept = TypeVar("Kept")


class Library:
    """Programs by the text of the graph, and by the text of what was written down. Threads may share one."""

    def __init__(self) -> None:
        self._graphs: OrderedDict[Hashable, Known] = OrderedDict()
        self._outlines: OrderedDict[Hashable, Outline] = OrderedDict()
        self._programs: OrderedDict[Hashable, Program | str] = OrderedDict()
        self._lock = threading.RLock()
        self.built = 0
        self.build_seconds = 0.0
        self.plain_seconds = 0.0

    def known(self, text: Hashable) -> Known:
        """What is known of graphs of this text."""
        with self._lock:
            return _latest(self._graphs, text, Known)

    def outline(self, structure: Hashable) -> Outline:
        """What is known of graphs of this structure."""
        with self._lock:
            return _latest(self._outlines, structure, Outline)

    def affords(self, known: Known, nodes: int) -> bool:
        """Whether a program of so many operations may be built by now for graphs of this kind.

        Where 40 kinds alternate, as batches of 40 lengths, each has to earn what 40 programs take.
        """
        cost = _SECONDS_PER_NODE * nodes
        if self.build_seconds + cost <= _CREDIT + _SHARE * self.plain_seconds:
            return True
        if known.plain_seconds < cost:
            return False
        with self._lock:
            alike = [kind for kind in self._graphs.values() if kind.awaited and 2 * kind.plain_seconds >= cost]
        return known.plain_seconds >= cost * len(alike)

    def program(
        self, product: RecordedProduct, tangents: Sequence[Tensor], known: Known, waits: bool
    ) -> Program | str | None:
        """The program of what was written down of a graph; why there is none; or None, if that `waits` until it is
        affordable."""
        text = product.text()
        with self._lock:
            found = self._programs.get(text)
            if found is None and (not waits or self.affords(known, len(product.entries))):
                try:
                    with one_thread():
                        found = Program(product, tangents)
                    self.built += 1
                    self.build_seconds += found.seconds
                except Exception as error:  # our own fault, and no reason to stop: autograd goes on
                    found = f"a program could not be built: {type(error).__name__}: {error}"
                self._programs[text] = found
                self._forget()
            if found is not None:
                self._programs.move_to_end(text)
        return found

    def refuse(self, product: RecordedProduct, reason: str) -> None:
        """Never use the program of this product again."""
        with self._lock:
            self._programs[product.text()] = reason

    @property
    def _nodes(self) -> int:
        return sum(program.nodes for program in self._programs.values() if isinstance(program, Program))

    def _forget(self) -> None:
        while self._nodes > _MOST_NODES and len(self._programs) > 1:
            _, dropped = self._programs.popitem(last=False)
            if isinstance(dropped, Program):
                for known in self._graphs.values():
                    known.shortcuts = [shortcut for shortcut in known.shortcuts if shortcut.program is not dropped]

    def report(self, met: Collection[Known]) -> str:
        """Of the graphs that were `met`, whose products are not by programs and why, in a line; and what was built."""
        served = sum(known.adoptions > 0 for known in met)
        text = f"{served} of {len(met)} kinds of gradients by programs"
        hidden = {known.hidden for known in met if known.hidden and not known.refused}
        text += "".join(f"; one product of each solve written down: {reason}" for reason in sorted(hidden))
        text += "".join(f"; by autograd: {reason}" for reason in sorted({known.refused for known in met} - {""}))
        return f"{text} ({self.built} programs built in {self.build_seconds:.2f} s, for all losses of this process)"


def _latest(of: OrderedDict[Hashable, Kept], key: Hashable, make: Callable[[], Kept]) -> Kept:
    """The entry of `key`, made if it is missing; the one that was not asked for the longest is forgotten."""
    found = of.get(key)
    if found is None:
        found = of[key] = make()
        if len(of) > _MOST_GRAPHS:
            of.popitem(last=False)
    of.move_to_end(key)
    return found


LIBRARY = Library()
"""The programs of this process: they belong to no loss, but to what autograd has recorded."""


def place_constants(product: RecordedProduct, contents: GraphContents) -> list[Source] | None:
    """Where the graph keeps the constants; None if it does not show one of them."""
    places: dict[Any, int] = {}
    for place, tensor in enumerate(contents.tensors):
        places.setdefault(whereabouts(tensor), place)
    found = [places.get(whereabouts(tensor)) for tensor in product.constants]
    return None if None in found else [Source(place) for place in found if place is not None]


def numbers_taken(
    product: RecordedProduct, sources: Sequence[Source], contents: GraphContents, free: Collection[int] = ()
) -> dict[int, Any]:
    """Numbers of the graph that occur in what was written down, by place: autograd hands them on as Python numbers.

    Those at the places `free` do not, whatever their values.
    """
    read = {*(source.place for source in sources), *free}
    written = set[Any]().union(*(literals((entry.arguments, entry.keywords)) for entry in product.entries))
    values = {place: contents.number(place) for place in contents.numbers if place not in read}
    return {place: value for place, value in values.items() if value in written}


@dataclass(frozen=True)
class Loosened:
    """A product with numbers as constants.

    Attributes:
        sources: where the new constants are.
        equal: places of numbers that must be equal.
        free: places of numbers that may have any value, as far as no constant is read there.
    """

    product: RecordedProduct
    sources: tuple[Source, ...] = ()
    equal: tuple[tuple[int, ...], ...] = ()
    free: frozenset[int] = frozenset()


def with_numbers_as_constants(product: RecordedProduct, contents: GraphContents, other: Shortcut) -> Loosened | None:
    """`product` with those numbers as constants in which it differs from `other`; None if it differs otherwise.

    mul(t, 0.5) now and mul(t, 0.7) then, where the graph keeps 0.5 now and kept 0.7 then in the same place, becomes
    mul(t, constant): a schedule's number changes from call to call. Where several numbers were 0.5 and are 0.7, which
    of them this one is cannot be told: the first is taken, and the program fits as long as they are equal.

    A number of the graph that has changed, while an operation has the same 0.5 as then, is not what that one takes.
    """
    now = {place: contents.number(place) for place in other.guards}
    changed = {place for place, value in other.guards.items() if now[place] != value}
    entries: list[Entry] = []
    constants, fills = list(product.constants), list(product.fills)
    sources: list[Source] = []
    equal: set[tuple[int, ...]] = set()
    if len(product.entries) != len(other.entries):
        return None
    for ours, theirs in zip(product.entries, other.entries, strict=True):
        if ours.text == theirs.text:
            entries.append(ours)
            continue
        form = _TENSOR_FORMS.get(ours.operation)
        places = tuple(p for p in sorted(changed) if _differs_by(ours, theirs, now[p], other.guards[p]))
        if form is None or not places:
            return None
        equal.add(places)
        constant = constant_of(len(constants))
        constants.append(contents.tensors[places[0]].detach().to(ours.dtype))
        fills.append(None)
        sources.append(Source(places[0], ours.dtype))
        entries.append(replace(ours, operation=form, arguments=(ours.arguments[0], constant)))
    loosened = replace(product, entries=entries, constants=constants, fills=fills)
    return Loosened(loosened, tuple(sources), tuple(equal), frozenset(changed)) if sources else None


def _differs_by(ours: Entry, theirs: Entry, now: Any, then: Any) -> bool:
    """Whether two entries are the same but for their second argument, which is `now` in ours and `then` in theirs."""
    if len(ours.arguments) != 2 or len(theirs.arguments) != 2 or isinstance(ours.arguments[1], Constant):
        return False
    same = replace(theirs, arguments=(theirs.arguments[0], ours.arguments[1])).text == ours.text
    return same and ours.arguments[1] == now and theirs.arguments[1] == then
