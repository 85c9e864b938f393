"""Recorded products of a gradient that the library has computed itself."""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import Any

from hvp_engine._support.precision import without_autocast
from hvp_engine.differentiation.double_backward import Pullback
from hvp_engine.differentiation.recorded.known_graphs import Known
from hvp_engine.differentiation.recorded.linearization import RecordedLinearization
from hvp_engine.differentiation.self_check import probe


class OwnedLinearization(RecordedLinearization):
    """One whose graph nobody else needs: it is freed as soon as a program has taken over.

    A program is made at first sight and always used, whatever was measured, so that numbers do not depend on when a
    process began.

    Arguments:
        met: takes down what is known of its graph, where it was asked for products.
    """

    _waits = False

    def __init__(self, *arguments: Any, met: MutableMapping[Known, None] | None = None, **options: Any):
        self._met = {} if met is None else met
        super().__init__(*arguments, **options)

    def _decide(self) -> None:
        self._met[self._known] = None
        super()._decide()

    def _reading_pays_from(self) -> float:
        return 0

    def _hesitation(self, known: Known, expected: int) -> float:
        return 0

    def _patience(self, known: Known, expected: int) -> float:
        return 0

    @property
    def learning(self) -> bool:
        """A product of a random tangent is written down first: a process's first solve rounds as all that follow do."""
        self._begin()
        if self._program is None and self._contents is not None and self._record_at <= self._asked:
            with without_autocast(self.layout.device):
                self._written_down(probe(self.layout))
        return super().learning

    def _settle(self) -> None:
        _ = self.gradient  # of the graph that goes
        self._graph, self._saved, self._versions = (), [], []
        self._product = self._mixed = self._both = Pullback((), ())
