"""What an engine is."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

from torch import Tensor

from hvp_engine.differentiation.problem import Linearization, LinearMap, Problem
from hvp_engine.solvers.base import FinishedIteration, Solver
from hvp_engine.solvers.spectrum import SpectralEstimate


class Engine(Protocol):
    """Linearizes a problem and runs a solver on it; see :class:`hvp_engine.engines.eager.EagerEngine`."""

    @property
    def name(self) -> str: ...

    def linearize(self, problem: Problem) -> Linearization:
        """The gradient of the problem's loss and its derivatives, at the problem's point."""

    def run(
        self, operator: LinearMap, v: Sequence[Tensor], solver: Solver, estimate: SpectralEstimate | None
    ) -> FinishedIteration:
        """The finished iteration of `solver` on `operator` for the right-hand side `v`."""

    def report(self) -> str:
        """What the engine did and why, in words."""


class BatchEngine(Engine, Protocol):
    """An engine that shares work between right-hand sides; others are run once for each."""

    def run_batch(
        self, operator: LinearMap, vs: Sequence[Sequence[Tensor]], solver: Solver, estimate: SpectralEstimate | None
    ) -> Iterable[FinishedIteration]:
        """The finished iterations for the right-hand sides `vs`, in order."""
