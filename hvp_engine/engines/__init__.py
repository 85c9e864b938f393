"""How a term is executed: engines linearize a problem and run a solver on the linearization."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from torch import Tensor

from hvp_engine.engines.auto import AutoEngine
from hvp_engine.engines.eager import EagerEngine
from hvp_engine.engines.linearized import LinearizedEngine
from hvp_engine.linearization import Linearization, LinearMap, Problem
from hvp_engine.solvers.base import Iteration, Solver
from hvp_engine.spectrum import SpectralEstimate


class Engine(Protocol):
    """See :class:`hvp_engine.engines.eager.EagerEngine` for the plainest one."""

    name: str

    def report(self) -> str: ...

    def linearize(self, problem: Problem) -> Linearization: ...

    def run(
        self,
        operator: LinearMap,
        v: Sequence[Tensor],
        solver: Solver,
        estimate: SpectralEstimate | None,
    ) -> Iteration: ...


ENGINES: dict[str, Callable[[], Engine]] = {"eager": EagerEngine, "linearized": LinearizedEngine, "auto": AutoEngine}
"""Every engine by the name that the public API takes."""


def create(engine: str | Engine) -> Engine:
    """A new engine by name, or the given one; `ValueError` for an unknown name."""
    if not isinstance(engine, str):
        return engine
    if engine not in ENGINES:
        raise ValueError(f"engine: expected one of {', '.join(map(repr, ENGINES))}; got {engine!r}")
    return ENGINES[engine]()
