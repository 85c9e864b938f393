"""The eager engine: double backward over the retained gradient graph, and the fused step. Any code runs on it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from hvp_engine.differentiation.differentiable_kernels import plain_kernels
from hvp_engine.differentiation.double_backward import FastKernelError, Tape, gradients, leaves
from hvp_engine.differentiation.problem import Linearization, LinearMap, Problem
from hvp_engine.solvers.base import Iteration, Solver
from hvp_engine.solvers.spectrum import SpectralEstimate


def begin(operator: LinearMap, v: Sequence[Tensor], solver: Solver, estimate: SpectralEstimate | None) -> Iteration:
    """A new iteration of `solver` on `operator`, ready for its first step."""
    iteration = solver.allocate(operator.layout)
    iteration.adapt(estimate)
    iteration.start(v)
    return iteration


def advance(iteration: Iteration, operator: LinearMap, term: Callable[[], None] | None = None) -> None:
    """Alternate products and steps until the solver is done; `term`, if given, stands for all of them but the last.

    A product lives until the next one is there: given back at once, its memory goes to the system and comes back page
    by page, which tripled the page faults of a solve and cost up to a third of its time on a CPU.
    """
    while iteration.steps < iteration.limit and not iteration.finished():
        if term is not None and iteration.steps < iteration.limit - 1:
            term()
            iteration.steps += 1
        else:
            product = operator.product(iteration.direction.tangents)
            iteration.step(product)


class EagerEngine:
    """Builds the gradient graph once for each linearization; every product is one `torch.autograd.grad`.

    Where a fast kernel of the forward has no second derivative, or a wrong one, the graph is built on the plain kernels
    instead, from then on, with one warning.
    """

    name = "eager"

    def __init__(self) -> None:
        self._plain = False

    def linearize(self, problem: Problem) -> Linearization:
        if not self._plain:
            try:
                tape = self._record(problem)
                if not tape.incomplete:
                    return tape
            except FastKernelError:
                pass
            self._plain = True
            warnings.warn(
                f"{problem.name}: a kernel in it has no second derivative; it is evaluated on plain kernels from "
                "now on (math attention, no cuDNN, no fused weight normalization, no sparse gradients)",
                stacklevel=4,
            )
        with plain_kernels():
            return self._record(problem)

    def _record(self, problem: Problem) -> Tape:
        weights, hyperparameters = leaves(problem.weights), leaves(problem.hyperparameters)
        with torch.enable_grad():
            loss = problem.evaluate(weights, hyperparameters)
            gradient = gradients(loss, weights, problem.name)
        return Tape(gradient, weights, hyperparameters, loss, problem.name)

    def run(
        self,
        operator: LinearMap,
        v: Sequence[Tensor],
        solver: Solver,
        estimate: SpectralEstimate | None,
    ) -> Iteration:
        """Alternate products and steps until the solver is done."""
        iteration = begin(operator, v, solver, estimate)
        advance(iteration, operator)
        return iteration

    def report(self) -> str:
        """What the engine did, in a line."""
        return "no set-up"
