"""The recorded engine: the loss runs eagerly, and products run a program that its gradient's graph is turned into."""

from __future__ import annotations

from hvp_engine.differentiation.recorded.library import LIBRARY
from hvp_engine.differentiation.recorded.owned import OwnedLinearization
from hvp_engine.engines.eager import EagerEngine


class RecordedEngine(EagerEngine):
    """As eager, until a kind of gradient graph has been seen twice; from then on its products run a program.

    Nothing of the loss is traced: Python may ask tensors for values, shapes may change, closures may be bound anew.
    What happened is in the graph that autograd has recorded, and graphs of one kind share a program, across losses.
    """

    name = "recorded"

    _linearization = OwnedLinearization

    def report(self) -> str:
        """What was built in this process, and what was not and why."""
        return LIBRARY.report()
