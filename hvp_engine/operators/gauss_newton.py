"""The generalized Gauss-Newton matrix of a loss of a model's outputs."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from hvp_engine._support.arguments import check_function
from hvp_engine._support.flat_vector import Layout
from hvp_engine._support.isolation import Draws, isolated
from hvp_engine._support.pytree import check_scalar, flatten
from hvp_engine.differentiation.differentiable_kernels import own_kernels, plain_kernels
from hvp_engine.differentiation.double_backward import Tape, differentiate, filled, leaves
from hvp_engine.differentiation.linear_map import Linearization
from hvp_engine.differentiation.missing_derivatives import (
    ThirdDerivativeError,
    nodes_between,
    refuse_wrong_third_derivative,
)
from hvp_engine.differentiation.problem import Problem
from hvp_engine.distributed import for_loss
from hvp_engine.engines.eager import EagerEngine
from hvp_engine.errors import GraphError
from hvp_engine.operators.hessian import CurvatureOperator


class GaussNewtonOperator(CurvatureOperator):
    """G = J^T (d2 loss / d outputs2) J, with J = d outputs / dw, as a symmetric linear operator.

    It is the Hessian of `loss(model(weights, inputs), targets)` without the curvature of the model, and equals
    the Hessian if the model is linear in the weights or the loss is at its minimum for each output. For a loss that is
    convex in the outputs it is positive semi-definite for any model, so conjugate gradients with some damping are safe.

    Arguments:
        model: `model(weights, inputs)` -> outputs, a tensor or any tree of floating tensors.
        loss: `loss(outputs, targets)` -> scalar tensor, or a :class:`DataParallel` of that.
        weights: any tree of real floating tensors on one device; they are not modified and need not require grad.
        inputs, targets: passed on; anything.

    The graphs are built once, here; random layers draw one mask for the lifetime of the operator. A product costs
    about three backward passes. Memory: the graphs of the model's forward and of its vector-Jacobian product.

    Errors: `TypeError`/`ValueError` for outputs that are not tensors or a loss that is not a scalar;
    :class:`GraphError` for outputs that do not depend on the weights, or a loss that does not depend on the outputs;
    :class:`SecondDerivativeError` for a model or a loss without a second derivative.

    Source: Schraudolph, Fast Curvature Matrix-Vector Products for Second-Order Gradient Descent, Neural Computation
    2002; J v by two backward passes: Townsend, A New Trick for Calculating Jacobian Vector Products, 2017.

    >>> import torch, hvp_engine as hvp
    >>> x, y = torch.tensor([1.0, 2.0]), torch.tensor([0.0, 9.0])
    >>> G = hvp.GaussNewtonOperator(lambda w, x: w**2 * x, lambda o, y: (o - y).square().sum() / 2, torch.ones(2), x, y)
    >>> G @ torch.ones(2)                                      # J = diag(2 w x)
    tensor([ 4., 16.])
    >>> G.solve(torch.ones(2), hvp.ConjugateGradient(2)).value
    tensor([0.2500, 0.0625])
    """

    def __init__(
        self,
        model: Callable[[Any, Any], Any],
        loss: Callable[[Any, Any], Tensor],
        weights: Any,
        inputs: Any,
        targets: Any,
    ):
        check_function(model, "model", "(weights, inputs)", 2)
        check_function(loss, "loss", "(outputs, targets)", 2)
        tensors, structure = flatten(weights, "weights", sharded=True)
        problem = Problem(loss, tensors, structure, [], None, (inputs, targets))
        with isolated(Draws().next_seed(), tensors[0].device):
            linearization = for_loss(loss, _GaussNewtonEngine(model)).linearize(problem)
        super().__init__(linearization, structure, EagerEngine(), (tensors, inputs, targets))


class _GaussNewtonEngine(EagerEngine):
    """Linearizes to products with the Gauss-Newton matrix."""

    def __init__(self, model: Callable[[Any, Any], Any]):
        super().__init__()
        self._model = model

    def linearize(self, problem: Problem) -> GaussNewtonProducts:
        try:
            with own_kernels():
                found = GaussNewtonProducts(self._model, problem)
        except ThirdDerivativeError:
            with plain_kernels(thrice=True):
                return GaussNewtonProducts(self._model, problem)
        if found.incomplete:
            warnings.warn(
                "model: a kernel in it has no second derivative; it is evaluated on plain kernels (no cuDNN, "
                "formulas for hardsigmoid, distances and embedding bags)",
                stacklevel=4,
            )
            with plain_kernels():
                found = GaussNewtonProducts(self._model, problem)
        return found


class GaussNewtonProducts(Linearization):
    """Three tapes: v -> J v, the loss's Hessian in the outputs, and u -> J^T u.

    Reverse mode gives J v, too: u -> J^T u is linear, and its transpose, by a second backward pass, is v -> J v.
    """

    def __init__(self, model: Callable[[Any, Any], Any], problem: Problem):
        self.layout, self._weights = Layout.of(problem.weights), leaves(problem.weights)
        inputs, targets = problem.inputs
        outputs = model(problem.weight_structure.rebuild(self._weights), inputs)
        outputs, output_structure = flatten(outputs, "model(weights, inputs)")
        reached = [output for output in outputs if output.requires_grad]
        if not reached:
            raise GraphError(
                "model: expected outputs that depend on the weights; got outputs without an autograd graph: compute "
                "them from the weights that the model is given, with grad mode on"
            )
        refuse_wrong_third_derivative(nodes_between(reached, self._weights))
        self._outputs = leaves(reached)
        points = iter(self._outputs)
        differentiated = [next(points) if output.requires_grad else output for output in outputs]
        value = problem.loss(output_structure.rebuild(differentiated), targets)
        check_scalar(value, "loss")
        found = differentiate(value, self._outputs, create_graph=True) if value.requires_grad else [None]
        if all(gradient is None for gradient in found):
            raise GraphError("loss: expected a loss that depends on the outputs; got one that uses none of them")
        gradient = filled(found, self._outputs)
        # J^T u is linear in u, so its derivative is the same at u = 0: only the graph matters.
        cotangents = leaves([torch.zeros_like(output) for output in reached])
        pulled = filled(differentiate(reached, self._weights, cotangents, create_graph=True), self._weights)

        self._pull = Tape(reached, self._weights, name="model", symmetric=False)
        self._push = Tape(pulled, cotangents, name="model", symmetric=False)
        self._curvature = Tape(gradient, self._outputs, name="loss")
        self.loss = value.detach()
        self.gradient = [g.detach() for g in self._pull.product([g.detach() for g in gradient])]

    @property
    def incomplete(self) -> bool:
        """Whether a kernel without a second derivative was met."""
        return self._push.facts.incomplete or self._curvature.facts.incomplete

    def product(self, tangents: Sequence[Tensor]) -> Sequence[Tensor]:
        return self._pull.product(self._curvature.product(self._push.product(tangents)))
