"""Who makes the products of a gradient with its graph: autograd, or a program that is known for such a graph."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import cached_property

from torch import Tensor

from hvp_engine._support.torch_compat import versions_of
from hvp_engine.differentiation.double_backward import GraphFacts, Made, Pullback, Tape
from hvp_engine.differentiation.graph_structure import Graph, HiddenContentsError, walk
from hvp_engine.differentiation.recorded.graph_contents import GraphContents, contents_of
from hvp_engine.differentiation.recorded.known_graphs import Known, Shortcut, Solve
from hvp_engine.differentiation.recorded.library import LIBRARY, MOST_VALUES, Library
from hvp_engine.differentiation.recorded.tensor_kinds import kind_of
from hvp_engine.differentiation.trace.evaluated import PartitionedLinearization

_MANY = 200
"""Products of one gradient after which a program is made at first sight."""


class Choice(Tape):
    """A :class:`Tape` that knows when a program should make its products, which a subclass has it do.

    Arguments:
        gradient, weights, hyperparameters, loss, name, symmetric, inside: as of :class:`Tape`.
        library: where programs are kept.
    """

    _waits = True
    """Whether a program waits until the time that building takes has been earned."""

    # What a linearization begins with: few of them change in the solves of a tiny model, whose every line counts.
    _contents: GraphContents | None = None
    _program: PartitionedLinearization | None = None
    _shortcut: Shortcut | None = None
    _walked: Graph | None = None
    _saved: Sequence[Tensor] = ()
    _versions: Sequence[int] = ()
    _begun = False
    _before = 0.0
    _asked = 0
    _read_at = _record_at = _adopt_at = math.inf

    def __init__(
        self,
        gradient: Sequence[Tensor] | Tensor,
        weights: Sequence[Tensor],
        hyperparameters: Sequence[Tensor] = (),
        loss: Tensor | None = None,
        name: str = "loss",
        symmetric: bool = True,
        inside: Callable[[], AbstractContextManager[None]] = contextlib.nullcontext,
        library: Library = LIBRARY,
    ):
        self._inputs = (*weights, *hyperparameters)
        self._solve = Solve()
        self._both = Pullback(gradient, self._inputs)
        self._library = library
        super().__init__(gradient, weights, hyperparameters, loss, name, symmetric, inside)

    def _examined(self, hyperparameters: Sequence[Tensor]) -> GraphFacts:
        """Walk through the graph; what a full examination finds is known of an earlier one of the same structure."""
        try:
            graph = walk(self._both.outputs, self._both.active)
        except HiddenContentsError as reason:
            facts = super()._examined(hyperparameters)
            self._outline = self._library.outline((str(reason), facts.nodes))
            self._hidden(str(reason), facts)
        else:
            self._outline = self._library.outline((graph.structure, self._both.pattern, len(self.weights)))
            facts = self._outline.facts or super()._examined(hyperparameters)
            self._outline.facts, self._walked = facts, graph
        return facts

    def _reading_pays_from(self) -> float:
        """Products from which a solve should read the graph."""
        return self._outline.pays_from(self._library.affords)

    def _read(self) -> None:
        """Read the graph, to look for a program of its kind."""
        assert self._walked is not None and self._outline.facts is not None
        start = time.thread_time()
        try:
            contents = contents_of(self._walked, self._both.active)
        except HiddenContentsError as reason:
            self._hidden(str(reason), self._outline.facts)
        else:
            self._known = self._library.known((contents.text, self._both.pattern, len(self.weights)))
            if not self._known.hidden and not self._known.refused:
                self._contents = contents
                self._watch(contents.tensors)
        self._walked, self._read_at = None, math.inf
        self._outline.read(self._known)
        self._solve.fixed += time.thread_time() - start

    def _hidden(self, reason: str, facts: GraphFacts) -> None:
        """Go on with a graph that does not show all that it holds."""
        kinds = tuple(map(kind_of, self._both.active))
        self._known = self._library.known((reason, facts.nodes, kinds))
        self._known.hidden = reason

    @cached_property
    def _product(self) -> Pullback:
        return self._both if len(self._inputs) == len(self.weights) else Pullback(self._graph, self.weights)

    def plainly(self, count: int, work: Callable[[Pullback], Made]) -> Made | None:
        self._outline.products = count
        if not self._begun:
            self._begin()
            self._before = self._solve.fixed  # a general solve that follows does not see it
        if self._program is not None or self._asked + count > min(self._read_at, self._adopt_at, self._record_at):
            return None
        self._asked += count
        if self._walked is not None and not self._outline.waits:  # nothing is to be found out
            return super().plainly(count, work)
        start = time.thread_time()
        made = super().plainly(count, work)
        if made is not None:
            self._timed(start, count, False)
        return made

    def solved(self, seconds: float) -> None:
        self._solve.whole = seconds + self._before

    def _timed(self, start: float, products: int, by_program: bool) -> None:
        """Note that products have been made from `start` on."""
        solve, now = self._solve, time.thread_time()
        if not by_program:
            self._library.plain_seconds += now - start
            self._known.plain_seconds += now - start
        if not solve.products:
            solve.began, solve.by_program = start, by_program
        solve.mixed |= by_program is not solve.by_program
        solve.products += products
        solve.ended = now

    def _begin(self) -> None:
        """Before a solve: decide once how products will be made; give up a program whose tensors have changed."""
        if self._saved and versions_of(self._saved) != self._versions:
            self._program = self._shortcut = self._contents = None
            self._watch(())
        if self._begun:
            return
        self._begun = True
        pays_from = self._reading_pays_from()
        if self._walked is None:
            self._outline.read(self._known)
        else:
            self._read_at = pays_from
            if self._outline.products >= self._read_at:
                self._read()
            else:
                self._known = self._outline.kinds[-1]
                self.fallback = self._known.refused or None
                return
        self._decide()

    def _decide(self) -> None:
        """Choose who makes the products of a graph that has been read, or that cannot be."""
        known, expected = self._known, self._outline.products
        known.sights += 1
        known.begin(self._solve)
        if known.refused or not self._both.outputs:
            self.fallback = known.refused or None
            return
        if self._contents is not None:
            self._shortcut = known.fitting(self._contents)
        if self._shortcut is not None:
            self._adopt_at = self._hesitation(known, expected)
            if self._adopt_at == 0:
                self._run_on_graph(self._shortcut)
        elif len(known.shortcuts) >= MOST_VALUES:
            known.refused = self.fallback = f"a number in graphs of this kind has had more than {MOST_VALUES} values"
        else:
            self._record_at = self._patience(known, expected)

    def _hesitation(self, known: Known, expected: int) -> float:
        """Products by autograd before a known program is taken."""
        even = known.breaks_even
        return 0 if expected >= even else even

    def _patience(self, known: Known, expected: int) -> float:
        """Products by autograd before one is written down, where a solve is expected to need so many."""
        if known.sights == 1:
            return _MANY
        if not self._library.affords(known, max(self.nodes, known.awaited)):
            return math.inf
        return self._hesitation(known, expected)

    def _watch(self, tensors: Sequence[Tensor]) -> None:
        """Products are of the values that these have now."""
        self._saved, self._versions = tensors, versions_of(tensors)

    def _run_on_graph(self, shortcut: Shortcut) -> None:
        """Adopt a program whose constants the graph holds."""
        raise NotImplementedError
