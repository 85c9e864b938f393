"""What is known of the graphs seen so far: their programs, and whether those are faster than autograd.

A graph is known by its structure, which is read fast, and by its text, which says all that a product depends on. Solves
by autograd and by a program are timed; where autograd is faster for as many products as were asked for, graphs of such
a structure are not read at all.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from hvp_engine.differentiation.double_backward import GraphFacts
from hvp_engine.differentiation.recorded.graph_contents import GraphContents
from hvp_engine.differentiation.recorded.product_recorder import Entry
from hvp_engine.differentiation.recorded.programs import Program

_SAMPLES, _CONFIRMING = 4, 2
"""Solves by autograd, and by the program, that are timed in turns before one of them is chosen; and before what was
chosen is confirmed."""

_FIRST, _INTERVAL = 16, 512
"""Graphs of a structure after which both are timed again, at intervals that double up to the second: a choice that was
made in a busy moment is revised soon, one that was confirmed costs little."""

_GAIN = 0.97
"""Of the time that autograd takes for a product, what a program must stay below: closer than that noise decides."""

_LATEST = 8
"""Kinds of graphs of one structure that are looked at before another is read."""


@dataclass(frozen=True)
class Source:
    """Where a graph keeps a constant: which of its tensors; with a dtype, the number that the tensor stands for."""

    place: int
    dtype: torch.dtype | None = None


@dataclass(frozen=True)
class Shortcut:
    """A program whose constants the graph itself holds, so that no product needs to be written down.

    Attributes:
        guards: numbers that the program has taken as they are, by their place in the graph.
        entries: what was written down, for comparison with another that differs in a number.
        equal: places of numbers of which the program takes the first for all, since they have been the same.
    """

    program: Program
    sources: tuple[Source, ...]
    guards: dict[int, Any]
    entries: tuple[Entry, ...]
    equal: tuple[tuple[int, ...], ...] = ()

    def fits(self, contents: GraphContents) -> bool:
        """Whether the graph has the numbers that are part of the program, and the same ones where it has had those."""
        number = contents.number
        return all(number(place) == value for place, value in self.guards.items()) and all(
            number(place) == number(places[0]) for places in self.equal for place in places
        )

    def constants(self, contents: GraphContents) -> list[Tensor]:
        """The constants of a graph of the same text."""
        tensors = [contents.tensors[source.place].detach() for source in self.sources]
        return [
            t if source.dtype is None else t.to(source.dtype) for t, source in zip(tensors, self.sources, strict=True)
        ]


@dataclass
class Solve:
    """What a solve has taken so far.

    Attributes:
        fixed: seconds before its first product that plain products do without.
        whole: seconds of all that was done, where it is known.
        began, ended: when its first product began, and its last one ended.
        products: how many there were.
        by_program: who made them.
        mixed: whether both did, which tells nothing.
    """

    fixed: float = 0.0
    whole: float = 0.0
    began: float = 0.0
    ended: float = 0.0
    products: int = 0
    by_program: bool = False
    mixed: bool = False


@dataclass(eq=False)
class Known:
    """What is known of graphs of one text.

    Attributes:
        sights: how many there were.
        hidden: why the graph does not show all constants, so that each solve has to write down a product.
        refused: why there is no program at all.
        awaited: operations of a program that is not built yet, since as much time has not been earned.
        plain_seconds: what products by autograd have taken.
        adoptions: solves that a program has served.
        solve: the latest, whose time is taken when the next one begins.
        plain, program, fixed: seconds of each product by autograd and by the program, the mean of a solve, and of what
            only solves by the program spend before, since they were timed last. The fastest of a few neighbours is
            what a busy machine does not change much, and both are measured in the same way: cold, as solves between
            other work are.
        verdict: products from which a solve is faster by the program, as far as it is known.
        judged: whether that is of the latest samples.
    """

    sights: int = 0
    hidden: str = ""
    refused: str = ""
    shortcuts: list[Shortcut] = field(default_factory=list)
    awaited: int = 0
    plain_seconds: float = 0.0
    adoptions: int = 0
    solve: Solve = field(default_factory=Solve)
    plain: list[float] = field(default_factory=list)
    program: list[float] = field(default_factory=list)
    fixed: list[float] = field(default_factory=list)
    verdict: float = math.nan
    judged: bool = False

    @property
    def settled(self) -> bool:
        """Whether it is known what is faster, or that there is no choice."""
        return bool(self.refused) or self.judged

    @property
    def breaks_even(self) -> float:
        """Products from which a solve is made by the program; 0 or infinite for a trial of the one or the other."""
        if self.judged:
            return self.verdict
        return 0.0 if not self.adoptions or len(self.program) <= len(self.plain) else math.inf

    def begin(self, solve: Solve) -> None:
        """Take the time of the solve before this one."""
        before, self.solve = self.solve, solve
        if self.judged or before.mixed or not before.products:
            return
        seconds = before.ended - before.began
        (self.program if before.by_program else self.plain).append(seconds / before.products)
        if before.by_program:
            self.fixed.append(max(before.fixed, before.whole - seconds))
        count = min(len(self.plain), len(self.program))
        if count < _CONFIRMING:
            return
        gain = _GAIN * min(self.plain) - min(self.program)
        even = min(self.fixed) / gain if gain > 0 else math.inf
        confirmed = not math.isnan(self.verdict) and (even > before.products) is (self.verdict > before.products)
        if count >= _SAMPLES or confirmed:
            self.verdict, self.judged = even, True

    def time_again(self) -> None:
        """Doubt what is known."""
        self.solve, self.judged = Solve(), False
        for samples in (self.plain, self.program, self.fixed):
            samples.clear()

    def fitting(self, contents: GraphContents) -> Shortcut | None:
        """A program for such a graph."""
        return next((shortcut for shortcut in self.shortcuts if shortcut.fits(contents)), None)


@dataclass(eq=False)
class Outline:
    """What is known of graphs of one structure, whatever their nodes hold.

    Attributes:
        facts: what a walk through one of them found.
        sights: how many there were.
        products: how many the last one was asked for.
        kinds: those that were read lately.
    """

    facts: GraphFacts | None = None
    sights: int = 0
    products: int = 0
    kinds: deque[Known] = field(default_factory=lambda: deque(maxlen=_LATEST))

    @property
    def waits(self) -> bool:
        """Whether a program for such a graph is to be built."""
        return any(known.awaited for known in self.kinds)

    def pays_from(self, affords: Callable[[Known, int], bool]) -> float:
        """Products from which a solve is faster if the graph is read: as for the kind of it that gains most. Where a
        program waits until its operations can be afforded, nothing is read until then. A kind that is not judged by the
        next time is not waited for, since it may never come again: of weight norm, the first graph of all."""
        self.sights += 1
        if self.sights >= _FIRST and (self.sights % _INTERVAL == 0 or self.sights.bit_count() == 1):
            self.kinds = deque((known for known in self.kinds if known.settled), _LATEST)
            for known in self.kinds:
                known.time_again()
        least = math.inf if self.kinds else 0.0
        for known in self.kinds:
            if known.awaited and not affords(known, known.awaited):
                continue
            if not known.settled:
                return 0.0
            if not known.refused:
                least = min(least, known.breaks_even)
        return least

    def read(self, known: Known) -> None:
        """Keep a kind that was read among the latest."""
        if known not in self.kinds:
            self.kinds.append(known)
