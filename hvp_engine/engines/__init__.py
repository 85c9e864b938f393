"""How a term is executed: engines linearize a problem and run a solver on the linearization."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from hvp_engine.engines.eager import EagerEngine
from hvp_engine.engines.linearized import LinearizedEngine
from hvp_engine.linearization import Linearization, LinearMap, Problem
from hvp_engine.solvers.base import Iteration, Solver
from hvp_engine.spectrum import SpectralEstimate


class Engine(Protocol):
    """See :class:`hvp_engine.engines.eager.EagerEngine` for the plainest one."""

    name: str

    def linearize(self, problem: Problem) -> Linearization: ...

    def run(
        self,
        operator: LinearMap,
        v: Sequence[Tensor],
        solver: Solver,
        estimate: SpectralEstimate | None,
    ) -> Iteration: ...


ENGINES = {"eager": EagerEngine, "linearized": LinearizedEngine, "auto": EagerEngine}
"""Every engine by the name that the public API takes."""


def create(name: str) -> Engine:
    """A new engine by name; `ValueError` for an unknown one."""
    if name not in ENGINES:
        raise ValueError(f"engine: expected one of {', '.join(map(repr, ENGINES))}; got {name!r}")
    return ENGINES[name]()
