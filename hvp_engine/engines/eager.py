"""The eager engine: double backward over the retained gradient graph, and the fused step. Any code runs on it."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Hashable
from contextlib import AbstractContextManager

import torch

from hvp_engine._support.random_state import RandomState
from hvp_engine.differentiation.differentiable_kernels import plain_kernels
from hvp_engine.differentiation.double_backward import FastKernelError, Tape, gradients, leaves
from hvp_engine.differentiation.linear_map import Linearization
from hvp_engine.differentiation.problem import Problem
from hvp_engine.engines.base import Engine


class EagerEngine(Engine):
    """Builds the gradient graph once for each linearization; every product is one `torch.autograd.grad`.

    Where a fast kernel of the forward has no second derivative, or a wrong one, the graph is built on the plain kernels
    instead, from then on, with one warning.
    """

    name = "eager"

    def __init__(self) -> None:
        self._plain = False
        self._complete: Hashable = None
        """The last loss whose kernels all have second derivatives."""

    def linearize(self, problem: Problem) -> Linearization:
        return self.recorded_as(Tape, problem)

    def recorded_as(self, kind: type[Tape], problem: Problem) -> Linearization:
        """The gradient graph, with products as this kind of linearization makes them."""
        if not self._plain:
            # A second recording has to draw the same masks. Keeping the state takes 0.1 ms, so not in every call.
            device = problem.weights[0].device
            before = RandomState.now(device) if self._complete != problem.identity else None
            try:
                tape = self._record(kind, problem)
                if not tape.facts.incomplete:
                    self._complete = problem.identity
                    return tape
            except FastKernelError:
                pass
            if before is not None:
                before.restore(device)
            self._plain = True
            warnings.warn(
                f"{problem.name}: a kernel in it has no second derivative; it is evaluated on plain kernels from "
                "now on (math attention, no cuDNN, no fused weight normalization, no sparse gradients, formulas for "
                "hardsigmoid, distances, embedding bags, margin and CTC losses)",
                stacklevel=4,
            )
        with plain_kernels():
            return self._record(kind, problem, plain_kernels)

    def _record(
        self,
        kind: type[Tape],
        problem: Problem,
        inside: Callable[[], AbstractContextManager[None]] = contextlib.nullcontext,
    ) -> Tape:
        weights, hyperparameters = leaves(problem.weights), leaves(problem.hyperparameters)
        with torch.enable_grad():
            loss = problem.evaluate(weights, hyperparameters)
            gradient = gradients(loss, weights, problem.name)
        return kind(gradient, weights, hyperparameters, loss, problem.name, inside=inside)
