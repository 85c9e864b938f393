"""The implicit hypergradient with the Gauss-Newton matrix in place of the Hessian."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from hvp_engine._support.random_state import random_state_kept
from hvp_engine.differentiation.linear_map import Linearization
from hvp_engine.differentiation.problem import Problem
from hvp_engine.engines.eager import EagerEngine
from hvp_engine.hypergradients.implicit import Hypergradient
from hvp_engine.operators.gauss_newton import GaussNewtonProducts
from hvp_engine.solvers import Exact, Solver

Model = Callable[[Any, Any, Any], Any]
OutputLoss = Callable[[Any, Any, Any, Any], Tensor]


def larsen(
    model: Model, loss: OutputLoss, val_loss: Callable[..., Tensor], solver: Solver | None = None
) -> Hypergradient:
    """dL_V/dlambda - (d2L_T/dlambda dw^T) [G + d2L_T/dw dw^T at fixed outputs]^-1 dL_V/dw.

    G = J^T (d2L_T/d outputs2) J leaves out the curvature of the model. For a loss that is convex in outputs and weights
    the matrix is therefore positive semi-definite, however far from a minimum the weights are. The mixed product is
    that of the training loss itself.

    Arguments:
        model: `model(weights, hyper, batch)` -> outputs, a tensor or any tree of floating tensors.
        loss: `loss(outputs, weights, hyper, batch)` -> scalar tensor; terms that use `weights` directly, such as a
            weight decay, keep their exact curvature. The training loss is `loss(model(...), ...)`.
        val_loss: `val_loss(weights, hyper, batch)` -> scalar tensor.
        solver: any solver; the default is `Exact()`, as in Larsen et al.

    Returns a :class:`Hypergradient`.

    Cost and errors: as :class:`Hypergradient`; a product costs about three backward passes.

    Source: Larsen, Hansen, Svarer, Ohlsson, Design and Regularization of Neural Networks: the Optimal Use of a
    Validation Set, NNSP 1996; Table 1 of Lorraine, Vicol, Duvenaud 2019, which prints the outer product of gradients.

    >>> import torch
    >>> from baselines.estimators import larsen
    >>> model = lambda w, decay, batch: w
    >>> loss = lambda o, w, decay, batch: ((o - batch) ** 2).sum() / 2 + decay * (w ** 2).sum() / 2
    >>> estimator = larsen(model, loss, lambda w, decay, batch: (w ** 2).sum() / 2)
    >>> target = torch.tensor([1.0, 2.0])
    >>> estimator(target / 2, torch.tensor(1.0), target, None).grads
    tensor(-0.6250)
    """
    for name, function in (("model", model), ("loss", loss)):
        if not callable(function):
            raise TypeError(f"{name}: expected a function; got {type(function).__name__}: define one")

    def train_loss(weights: Any, hyper: Any, batch: Any) -> Tensor:
        return loss(model(weights, hyper, batch), weights, hyper, batch)

    return Hypergradient(train_loss, val_loss, Exact() if solver is None else solver, GaussNewtonEngine(model, loss))


class GaussNewtonEngine(EagerEngine):
    """The eager engine with products of the Gauss-Newton matrix; see :func:`larsen`."""

    name = "gauss-newton"

    def __init__(self, model: Model, loss: OutputLoss):
        super().__init__()
        self.model, self.loss = model, loss

    def linearize(self, problem: Problem) -> Linearization:
        with random_state_kept(problem.weights[0].device):
            whole = super().linearize(problem)
        assert problem.hyperparameter_structure is not None
        hyper = problem.hyperparameter_structure.rebuild([h.detach() for h in problem.hyperparameters])
        (batch,) = problem.inputs

        def outputs(weights: Any, batch: Any) -> Any:
            # The weights are outputs too, so the Gauss-Newton matrix has the full curvature of terms that use them.
            return self.model(weights, hyper, batch), weights

        def loss(outputs: Any, batch: Any) -> Tensor:
            predicted, weights = outputs
            return self.loss(predicted, weights, hyper, batch)

        curvature = GaussNewtonProducts(outputs, replace(problem, loss=loss, inputs=(batch, batch)))
        return _Linearization(whole, curvature)


class _Linearization(Linearization):
    """The loss, gradient and mixed product of one linearization, with the products of another matrix."""

    def __init__(self, whole: Linearization, curvature: GaussNewtonProducts):
        self.layout, self.loss, self.gradient = whole.layout, whole.loss, whole.gradient
        self._whole, self._curvature = whole, curvature

    def product(self, tangents: Sequence[Tensor]) -> Sequence[Tensor]:
        return self._curvature.product(tangents)

    def mixed(self, tangents: Sequence[Tensor]) -> list[Tensor | None]:
        return self._whole.mixed(tangents)
