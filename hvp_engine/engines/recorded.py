"""The recorded engine: the loss runs eagerly, and products run a program that its gradient's graph is turned into."""

from __future__ import annotations

from functools import partial
from weakref import WeakKeyDictionary

from hvp_engine.differentiation.linear_map import Linearization
from hvp_engine.differentiation.problem import Problem
from hvp_engine.differentiation.recorded.known_graphs import Known
from hvp_engine.differentiation.recorded.library import LIBRARY
from hvp_engine.differentiation.recorded.owned import OwnedLinearization
from hvp_engine.engines.base import Engine
from hvp_engine.engines.eager import EagerEngine


class RecordedEngine(Engine):
    """As eager, but products run a program that the graph of the gradient is turned into.

    Nothing of the loss is traced: Python may ask tensors for values, shapes may change, closures may be bound anew.
    What happened is in the graph that autograd has recorded, and graphs of one kind share a program, across losses.

    Arguments:
        eager: the engine that records, and knows whether the loss needs plain kernels.
    """

    name = "recorded"

    def __init__(self, eager: EagerEngine | None = None) -> None:
        self._eager = EagerEngine() if eager is None else eager
        self._met: WeakKeyDictionary[Known, None] = WeakKeyDictionary()

    def __reduce__(self) -> tuple[type[RecordedEngine], tuple[EagerEngine]]:
        """A copy has met no graphs: those are known in this process."""
        return RecordedEngine, (self._eager,)

    def linearize(self, problem: Problem) -> Linearization:
        return self._eager.recorded_as(partial(OwnedLinearization, met=self._met), problem)

    def report(self) -> str:
        """Which products of its losses are not by programs, and why."""
        return LIBRARY.report(list(self._met))
