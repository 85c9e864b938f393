"""A traced loss: its callables, what else it read when it was traced, and its linearization at a point."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from hvp_engine._support.flat_vector import Layout, detached
from hvp_engine._support.torch_compat import below_autograd
from hvp_engine.differentiation.problem import Problem
from hvp_engine.differentiation.self_check import Schedule
from hvp_engine.differentiation.trace.evaluated import PartitionedLinearization, PartitionFunctions
from hvp_engine.differentiation.trace.functionalize import is_random
from hvp_engine.differentiation.trace.partial_evaluation import Partition
from hvp_engine.engines.surroundings import Surroundings


class Functions(PartitionFunctions):
    """The callables of a traced loss, and what else the loss has read when it was traced."""

    def __init__(self, parts: Partition, surroundings: Surroundings):
        super().__init__(parts)
        self.undone = parts.undone
        self.schedule = Schedule()
        self.distrust: str | None = None
        self.surroundings = surroundings

    def at(self, problem: Problem, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        """What the primal part gives at the problem's point: loss, gradient, residuals."""
        with below_autograd():
            return self.primal(*detached(problem.weights), *detached(problem.hyperparameters), *tensors)

    def outdated(self) -> bool:
        """Whether the loss has to be traced anew."""
        return self.distrust is None and self.surroundings.outdated()

    def is_quiet(self) -> bool:
        """Whether the next use runs neither the loss, for a check or a trace, nor anything random."""
        there = self.distrust is None and self.native is not None and self.calm
        return there and self.surroundings.settled(self.schedule)

    @cached_property
    def calm(self) -> bool:
        """Whether nothing in it draws random numbers."""
        parts = self.partition
        graphs = (parts.primal, parts.tangent.module, parts.mixed.module)
        return not any(is_random(node) for graph in graphs for node in graph.graph.nodes)


@dataclass(frozen=True)
class Refused:
    """Instead of functions: why there are none."""

    distrust: str

    def outdated(self) -> bool:
        return False


class TracedLinearization(PartitionedLinearization):
    """A traced loss at one point. `values` are what the primal part gave there."""

    functions: Functions

    def __init__(self, functions: Functions, layout: Layout, name: str, values: Sequence[Tensor]):
        count = 1 + len(layout.shapes)
        super().__init__(functions, layout, name, values[count:])
        self.loss = values[0]
        self.gradient = list(values[1:count])
