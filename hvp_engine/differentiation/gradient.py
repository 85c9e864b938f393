"""The gradient of a loss with respect to all that it is a function of."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from hvp_engine.differentiation.differentiable_kernels import plain_kernels
from hvp_engine.differentiation.double_backward import differentiate, filled, leaves
from hvp_engine.differentiation.problem import Problem
from hvp_engine.errors import GraphError, SecondDerivativeError


@dataclass(frozen=True)
class Gradient:
    """A loss at one point, detached, and its derivatives.

    Attributes:
        weights: dL/dw, zeros where there is no path.
        hyperparameters: dL/dlambda, None where there is no path.
    """

    loss: Tensor
    weights: list[Tensor]
    hyperparameters: list[Tensor | None]


def by_autograd(problem: Problem) -> Gradient:
    """The gradient of the problem's loss at its point; on plain kernels if the loss itself takes a derivative which
    fast ones do not let us differentiate."""
    try:
        return _differentiated(problem)
    except SecondDerivativeError:
        with plain_kernels():
            return _differentiated(problem)


def _differentiated(problem: Problem) -> Gradient:
    weights, hyperparameters = leaves(problem.weights), leaves(problem.hyperparameters)
    loss = problem.evaluate(weights, hyperparameters)
    if not loss.requires_grad:
        raise GraphError(
            f"{problem.name}: expected a loss that depends on weights or hyperparameters; got one without a graph"
        )
    found = differentiate(loss, [*weights, *hyperparameters], retain_graph=False)
    count = len(weights)
    return Gradient(loss.detach(), filled(found[:count], weights), found[count:])
