"""The gradient of a loss with respect to all that it is a function of."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from hvp_engine._support.torch_compat import NOT_BATCHED
from hvp_engine.differentiation.differentiable_kernels import plain_kernels
from hvp_engine.differentiation.double_backward import check_reached, differentiate, filled, leaves
from hvp_engine.differentiation.missing_derivatives import other_leaves
from hvp_engine.differentiation.problem import Problem
from hvp_engine.errors import GraphError, SecondDerivativeError

DIRECT_ALONE = "the hypergradient is the direct term alone"


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
    fast ones do not let us differentiate, or a batch of recurrent layers, which torch's do not make."""
    try:
        return _differentiated(problem)
    except RuntimeError as error:
        if not isinstance(error, SecondDerivativeError) and NOT_BATCHED not in str(error):
            raise
        with plain_kernels():
            return _differentiated(problem)


def _differentiated(problem: Problem) -> Gradient:
    weights, hyperparameters = leaves(problem.weights), leaves(problem.hyperparameters)
    loss = problem.evaluate(weights, hyperparameters)
    found = derivatives(loss, weights, hyperparameters, problem.name)
    count = len(weights)
    return Gradient(loss.detach(), filled(found[:count], weights), found[count:])


def derivatives(
    loss: Tensor, weights: Sequence[Tensor], hyperparameters: Sequence[Tensor], name: str
) -> list[Tensor | None]:
    """The derivatives by weights and hyperparameters, None where there is no path; `GraphError` for a loss that depends
    on something else in place of the weights, and a warning for one that depends on hyperparameters alone."""
    if not loss.requires_grad:
        raise GraphError(f"{name}: expected a loss that depends on weights or hyperparameters; got one without a graph")
    found = differentiate(loss, [*weights, *hyperparameters], retain_graph=False)
    if all(derivative is None for derivative in found[: len(weights)]):
        if other_leaves([loss], hyperparameters):
            check_reached(found[: len(weights)], name)
        warnings.warn(f"{name} does not depend on the weights: {DIRECT_ALONE}", stacklevel=4)
    return found
