"""How a term is executed: engines linearize a problem and run a solver on the linearization."""

from __future__ import annotations

from collections.abc import Callable

from hvp_engine._support.arguments import shown
from hvp_engine.engines.auto import AutoEngine
from hvp_engine.engines.base import Engine
from hvp_engine.engines.compiled import CompiledEngine
from hvp_engine.engines.cudagraph import CudaGraphEngine
from hvp_engine.engines.eager import EagerEngine
from hvp_engine.engines.finite_difference import FiniteDifferenceEngine
from hvp_engine.engines.recorded import RecordedEngine
from hvp_engine.engines.traced import LinearizedEngine

ENGINES: dict[str, Callable[[], Engine]] = {
    "eager": EagerEngine,
    "recorded": RecordedEngine,
    "linearized": LinearizedEngine,
    "compiled": CompiledEngine,
    "cudagraph": CudaGraphEngine,
    "finite_difference": FiniteDifferenceEngine,
    "auto": AutoEngine,
}
"""Every engine by the name that the public API takes."""


def create(engine: str | Engine) -> Engine:
    """A new engine by name, or the given one; `ValueError` for an unknown name, `TypeError` for anything else."""
    if isinstance(engine, Engine):
        return engine
    if not isinstance(engine, str):
        raise TypeError(
            f"engine: expected a name, such as 'auto', or an engine, such as hvp.engines.AutoEngine(); got "
            f"{shown(engine)}"
        )
    if engine not in ENGINES:
        raise ValueError(f"engine: expected one of {', '.join(map(repr, ENGINES))}; got {engine!r}")
    return ENGINES[engine]()


__all__ = [
    "ENGINES",
    "AutoEngine",
    "CompiledEngine",
    "CudaGraphEngine",
    "EagerEngine",
    "Engine",
    "FiniteDifferenceEngine",
    "LinearizedEngine",
    "RecordedEngine",
    "create",
]
