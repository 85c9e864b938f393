"""Recorded products of a gradient that the library has computed itself."""

from __future__ import annotations

from hvp_engine.differentiation.double_backward import Pullback
from hvp_engine.differentiation.recorded.library import Known
from hvp_engine.differentiation.recorded.linearization import RecordedLinearization


class OwnedLinearization(RecordedLinearization):
    """One whose graph nobody else needs: it is freed as soon as a program has taken over.

    A program is made at first sight and always used, whatever was measured, so that numbers do not depend on when a
    process began.
    """

    _waits = False

    def _hesitation(self, known: Known, expected: int) -> float:
        return 0

    def _patience(self, known: Known, expected: int) -> float:
        return 0

    def _settle(self) -> None:
        self._product = self._mixed = self._both = Pullback((), ())
        self._watched = []
