"""The eager engine: double backward over the retained gradient graph, and the fused step. Any code runs on it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hvp_engine.engines.tape import Tape, gradients
from hvp_engine.linearization import LinearMap, Linearization, Problem
from hvp_engine.solvers.base import Iteration, Solver
from hvp_engine.spectrum import SpectralEstimate


def leaves(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Fresh leaves that share memory with `tensors`, so that the caller's own are not touched."""
    return [tensor.detach().requires_grad_() for tensor in tensors]


class EagerEngine:
    """Builds the gradient graph once for each linearization; every product is one `torch.autograd.grad`."""

    name = "eager"

    def linearize(self, problem: Problem) -> Linearization:
        weights, hyperparameters = leaves(problem.weights), leaves(problem.hyperparameters)
        with torch.enable_grad():
            loss = problem.evaluate(weights, hyperparameters)
            gradient = gradients(loss, weights, problem.name)
        return Tape(gradient, weights, hyperparameters, loss)

    def run(
        self,
        operator: LinearMap,
        v: Sequence[Tensor],
        solver: Solver,
        estimate: SpectralEstimate | None,
    ) -> Iteration:
        """Alternate products and steps until the solver is done."""
        iteration = solver.init(operator.layout, v, estimate)
        for _ in range(iteration.limit):
            iteration.step(operator.product(iteration.direction.tangents))
            if iteration.finished():
                break
        return iteration
