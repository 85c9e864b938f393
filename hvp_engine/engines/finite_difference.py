"""The finite-difference engine: products from two gradients, for losses without second derivatives; only on request."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hvp_engine._support.flat_vector import Layout, detached, norm_of
from hvp_engine._support.random_state import random_state_kept
from hvp_engine.differentiation.double_backward import differentiate, filled, leaves
from hvp_engine.differentiation.linear_map import Linearization
from hvp_engine.differentiation.problem import Problem
from hvp_engine.engines.base import Engine
from hvp_engine.errors import GraphError


class DifferenceLinearization(Linearization):
    """H t = (f(w + e t) - f(w - e t)) / 2e, and the same difference of dL/dlambda for the mixed product.

    The caller's weights are never written to: each gradient is taken at new tensors, with the same random draws.
    Where a loss holds something fixed by `detach()`, autograd's products hold it fixed as well; in a difference of
    gradients it moves.

    The error is of order e^2 plus rounding / e; e = eps^(1/3) (1 + ||w||) / ||t|| balances the two.
    """

    def __init__(self, problem: Problem):
        self.layout = Layout.of(problem.weights)
        self.name = problem.name
        self._problem = problem
        self.loss, gradient, _ = self._gradients(problem.weights)
        self.gradient = filled(gradient, problem.weights)
        self._size = 1.0 + float(norm_of(detached(problem.weights)))
        self._relative_step = torch.finfo(_coarsest(problem.weights)).eps ** (1 / 3)

    def product(self, tangents: Sequence[Tensor]) -> Sequence[Tensor]:
        weights, _ = self._differences(tangents)
        return filled(weights, self._problem.weights)

    def mixed(self, tangents: Sequence[Tensor]) -> list[Tensor | None]:
        return self._differences(tangents)[1]

    def _differences(self, tangents: Sequence[Tensor]) -> tuple[list[Tensor | None], list[Tensor | None]]:
        norm = float(norm_of(tangents))
        step = self._relative_step * self._size / norm if norm > 0 else 1.0
        sides = []
        for sign in (1.0, -1.0):
            moved = [w.detach() + (sign * step) * t for w, t in zip(self._problem.weights, tangents, strict=True)]
            _, weights, hyperparameters = self._gradients(moved)
            sides.append([*weights, *hyperparameters])
        differences = [
            None if above is None or below is None else (above - below) / (2 * step)
            for above, below in zip(*sides, strict=True)
        ]
        count = len(self._problem.weights)
        return differences[:count], differences[count:]

    def _gradients(self, weights: Sequence[Tensor]) -> tuple[Tensor, list[Tensor | None], list[Tensor | None]]:
        here, hyperparameters = leaves(weights), leaves(self._problem.hyperparameters)
        with random_state_kept(self.layout.device), torch.enable_grad():
            loss = self._problem.evaluate(here, hyperparameters)
            if not loss.requires_grad:
                raise GraphError(f"{self.name}: expected a loss that depends on the weights; got one without a graph")
            found = differentiate(loss, [*here, *hyperparameters], retain_graph=False)
        return loss.detach(), found[: len(here)], found[len(here) :]


class FiniteDifferenceEngine(Engine):
    """Central differences of the gradient: about half the digits of the dtype, so use float64.

    Cost of a product: two gradients. Memory: one gradient's graph at a time.
    """

    name = "finite_difference"

    def linearize(self, problem: Problem) -> Linearization:
        return DifferenceLinearization(problem)


def _coarsest(tensors: Sequence[Tensor]) -> torch.dtype:
    return max((t.dtype for t in tensors), key=lambda dtype: torch.finfo(dtype).eps)
