"""A gradient with its graph: autograd makes the first products, a program learned from them the others.

Three levels, each of which falls back to the next:

1. The graph shows all that a product depends on, and its program is known: it runs on the tensors that autograd saved.
2. The graph hides something (checkpointing, a Python function): the first product of each solve is written down while
   autograd computes it, and its program, if known, serves the others.
3. Neither can be followed: every product is autograd's.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Sequence

from torch import Tensor

from hvp_engine._support.precision import without_autocast
from hvp_engine.differentiation.double_backward import filled
from hvp_engine.differentiation.linear_map import Accumulation, Terms
from hvp_engine.differentiation.recorded.choice import Choice
from hvp_engine.differentiation.recorded.graph_contents import GraphContents
from hvp_engine.differentiation.recorded.known_graphs import Shortcut
from hvp_engine.differentiation.recorded.library import (
    Loosened,
    numbers_taken,
    place_constants,
    with_numbers_as_constants,
)
from hvp_engine.differentiation.recorded.product_recorder import RecordedProduct, record
from hvp_engine.differentiation.recorded.programs import Program
from hvp_engine.differentiation.self_check import difference_of_products, probe
from hvp_engine.differentiation.trace.evaluated import PartitionedLinearization


class RecordedLinearization(Choice):
    """A :class:`Tape` whose products run a program, where there is one; its numbers are those of autograd, to rounding.

    Arguments:
        gradient, weights, hyperparameters, loss, name, symmetric, inside: as of :class:`Tape`.
        library: where programs are kept.

    Cost: a walk through the graph, 0.5 us for each node, and where a program may gain, reading it, 2 to 4 us for each
    node; at the second sight of a kind of graph, building the program, about 0.5 ms for each operation of a product;
    from the third on it runs, where it is faster.

    Autocast around products is off for the program and for what it is made from: the graph has what the forward cast.
    """

    @property
    def program(self) -> PartitionedLinearization | None:
        """What runs in place of autograd by now, if anything does."""
        return self._program

    @property
    def learning(self) -> bool:
        self._begin()
        return self._program is None and min(self._record_at, self._adopt_at) <= self._asked

    def product(self, tangents: Sequence[Tensor]) -> Sequence[Tensor]:
        """H t; a weight that f does not depend on gets zeros."""
        if not self._begun:
            self._begin()
        if self._asked >= self._read_at:
            self._read()
            self._decide()
        if self._program is None and self._asked >= self._adopt_at and self._shortcut is not None:
            self._run_on_graph(self._shortcut)
        self._asked = self._outline.products = self._asked + 1
        start = time.thread_time()
        if self._program is not None:
            with without_autocast(self.layout.device):
                products = self._program.product(tangents)
            self._timed(start, 1, True)
        elif self._asked > self._record_at:
            with without_autocast(self.layout.device):
                products = self._written_down(tangents)
        else:
            products = super().product(tangents)
            self._timed(start, 1, False)
        return products

    @property
    def batches(self) -> bool:
        self._begin()
        return self._program is not None and self._program.batches

    def products(self, stacked: Sequence[Tensor]) -> Sequence[Tensor]:
        """H t for several t."""
        if self._program is None:
            return super().products(stacked)
        with without_autocast(self.layout.device):
            return self._program.products(stacked)

    def decays(self) -> list[Tensor] | None:
        return None if self._program is None else self._program.decays()

    def mixed(self, tangents: Sequence[Tensor]) -> list[Tensor | None]:
        """(df/dlambda)^T t."""
        if self._program is None:
            return super().mixed(tangents)
        with without_autocast(self.layout.device):
            return self._program.mixed(tangents)

    def accumulating_terms(self, accumulation: Accumulation, damping: float) -> Terms | None:
        if not self._begun:
            self._begin()
        terms = None if self._program is None else self._program.accumulating_terms(accumulation, damping)
        if terms is None:
            return None

        def counted(steps: range) -> None:
            self._asked = self._outline.products = self._asked + len(steps)
            start = time.thread_time()
            with without_autocast(self.layout.device):
                terms(steps)
            self._timed(start, len(steps), True)

        return counted

    def _run_on_graph(self, shortcut: Shortcut) -> None:
        """Adopt a program whose constants the graph holds."""
        assert self._contents is not None
        start = time.thread_time()
        with without_autocast(self.layout.device):
            self._adopt(shortcut.program, shortcut.constants(self._contents))
            self._solve.fixed += time.thread_time() - start
            self._contents = self._shortcut = None
            if not shortcut.program.schedule.due() or self._check(shortcut.program):
                self._settle()

    def _adopt(self, program: Program, constants: Sequence[Tensor]) -> None:
        self._known.adoptions += 1
        residuals = program.residuals(constants)
        self._program = PartitionedLinearization(program.functions, self.layout, self.name, residuals)

    def _settle(self) -> None:
        """What remains to be done when a program has been adopted, and checked."""

    def _written_down(self, tangents: Sequence[Tensor]) -> Sequence[Tensor]:
        """The product by autograd, written down; a program for the next ones, if possible."""
        contents, self._contents, self._record_at = self._contents, None, math.inf
        start = time.thread_time()
        try:
            with self._inside():
                products, written = record(self._both, tangents, whole=contents is not None)
        except Exception as error:  # if it is not the recorder's, autograd's own product raises it again
            products, written = [], f"{type(error).__name__}: {error}"
        count = len(self.weights)
        if isinstance(written, str):
            self._refuse(written, contents)
            return filled(products[:count], self.weights) if products else super().product(tangents)
        if contents is None:
            self._learn(written, tangents)
        else:
            self._learn_from_graph(written, contents, tangents)
        if self._program is not None:
            if contents is None:
                self._solve.fixed += time.thread_time() - start
            if self._waits and self._known.adoptions == 1 and self._asked == 1:
                self._program = None  # for the next solve: two calls in a row give the same, bit for bit
                return filled(products[:count], self.weights)
            self._settle()
            if contents is not None:  # from now on the program's numbers, whenever it was made
                return self._program.product(tangents)
        return filled(products[:count], self.weights)

    def _refuse(self, reason: str, contents: GraphContents | None) -> None:
        """Remember why a product could not be written down; one of a whole graph may still be in part."""
        if contents is None:
            self._known.refused = self.fallback = reason
        else:
            self._known.hidden = reason
            self._record_at = self._asked  # the next one, in part

    def _learn(self, written: RecordedProduct, tangents: Sequence[Tensor]) -> None:
        """A program for the rest of this solve, on the constants that were met."""
        program = self._library.program(written, tangents, self._known, self._waits)
        self._known.awaited = len(written.entries) if program is None else 0
        if isinstance(program, str):
            self._refuse(program, None)
        elif program is not None:
            self._adopt(program, written.constants)
            self._watch(self._inputs)
            if program.schedule.due() and not self._check(program):
                self._library.refuse(written, "a program that disagreed with autograd")

    def _learn_from_graph(self, written: RecordedProduct, contents: GraphContents, tangents: Sequence[Tensor]) -> None:
        """A program for this solve and for every other one whose graph has the same text."""
        known = self._known
        sources = place_constants(written, contents)
        if sources is None:
            self._refuse("a tensor that the graph does not show", contents)
            return
        found = (with_numbers_as_constants(written, contents, other) for other in known.shortcuts)
        taken = next((loosened for loosened in found if loosened is not None), Loosened(written))
        sources = [*sources, *taken.sources]
        program = self._library.program(taken.product, tangents, known, self._waits)
        known.awaited = len(written.entries) if program is None else 0
        if isinstance(program, str):
            self._refuse(program, contents)
        elif program is not None:
            guards = numbers_taken(taken.product, sources, contents, taken.free)
            shortcut = Shortcut(program, tuple(sources), guards, tuple(written.entries), taken.equal)
            self._adopt(program, shortcut.constants(contents))
            program.schedule.due()
            if self._check(program):
                known.shortcuts.append(shortcut)

    def _check(self, program: Program) -> bool:
        """Compare the program with autograd on random tangents, and give it up where they disagree."""
        evaluated, known = self._program, self._known
        assert evaluated is not None
        tangents = probe(self.layout)
        with self._inside():
            theirs = self._both(tangents)
        ours = [*evaluated.product(tangents), *evaluated.mixed(tangents)]
        full = [*filled(theirs[: len(self.weights)], self.weights), *theirs[len(self.weights) :]]
        reason = difference_of_products(ours, full, program.functions.partition.dtypes)
        if reason is None:
            return True
        known.refused = self.fallback = f"a recorded product does not agree with autograd's: {reason}"
        warnings.warn(f"{self.name}: {known.refused}; autograd makes the products from now on", stacklevel=2)
        self._program = None
        known.shortcuts = [shortcut for shortcut in known.shortcuts if shortcut.program is not program]
        return False
