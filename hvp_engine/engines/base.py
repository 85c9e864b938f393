"""What an engine is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from hvp_engine.linearization import Linearization, LinearMap, Problem
from hvp_engine.solvers.base import Iteration, Solver
from hvp_engine.spectrum import SpectralEstimate


class Engine(Protocol):
    """Linearizes a problem and runs a solver on it; see :class:`hvp_engine.engines.eager.EagerEngine`."""

    @property
    def name(self) -> str: ...

    def linearize(self, problem: Problem) -> Linearization:
        """The gradient of the problem's loss and its derivatives, at the problem's point."""

    def run(
        self, operator: LinearMap, v: Sequence[Tensor], solver: Solver, estimate: SpectralEstimate | None
    ) -> Iteration:
        """The finished iteration of `solver` on `operator` for the right-hand side `v`."""

    def report(self) -> str:
        """What the engine did and why, in words."""
