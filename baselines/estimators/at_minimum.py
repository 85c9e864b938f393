"""An estimator evaluated at a minimum of the training loss, where the implicit function theorem holds exactly."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from hvp_engine._support.pytree import flatten
from hvp_engine.diagnostics.hypergradient_check.refitting import Pair, minimize
from hvp_engine.differentiation.problem import Problem
from hvp_engine.hypergradients.estimator import Estimate, Estimator, EstimatorLike, as_estimator


class AtMinimum(Estimator):
    """`estimator` at w*(lambda), the minimum of the training loss that Newton's method finds from the given weights.

    With `Hypergradient(train_loss, val_loss, hvp.Exact())` this is the exact implicit function theorem of the paper's
    Table 1. That estimator by itself, at weights near a minimum, is the method of Bengio 2000.

    Arguments:
        train_loss: `loss(weights, hyper, batch)` -> scalar tensor, the one that `estimator` differentiates.
        estimator: called at the minimum of `train_loss` on the training batch of the call.

    Cost: up to 60 steps of Newton's method with up to 500 products each, then the estimator's own. Memory: the graph
    of a gradient and a few vectors of weights. Meant for problems small enough to be solved to rounding.

    The given weights are not changed.

    Source: Lorraine, Vicol, Duvenaud, Optimizing Millions of Hyperparameters by Implicit Differentiation, 2019; Bengio,
    Gradient-Based Optimization of Hyperparameters, Neural Computation 2000.

    >>> import torch, hvp_engine as hvp
    >>> from baselines.estimators import AtMinimum
    >>> train = lambda w, decay, batch: ((w - batch) ** 2).sum() / 2 + decay * (w ** 2).sum() / 2
    >>> val = lambda w, decay, batch: (w ** 2).sum() / 2
    >>> exact = AtMinimum(train, hvp.Hypergradient(train, val, hvp.Exact()))
    >>> exact(torch.zeros(2), torch.tensor(1.0), torch.tensor([1.0, 2.0]), None).grads     # w* = (1, 2) / 2
    tensor(-0.6250)
    """

    def __init__(self, train_loss: Callable[[Any, Any, Any], Tensor], estimator: EstimatorLike):
        for name, function in (("train_loss", train_loss), ("estimator", estimator)):
            if not callable(function):
                raise TypeError(f"{name}: expected a callable; got {type(function).__name__}: see AtMinimum")
        self.train_loss, self.estimator = train_loss, as_estimator(estimator)

    def __call__(self, weights: Any, hyper: Any, train_batch: Any, val_batch: Any) -> Estimate:
        weight_list, weight_structure = flatten(weights, "weights")
        hyper_list, hyper_structure = flatten(hyper, "hyper")
        point = ([w.detach() for w in weight_list], weight_structure, [h.detach() for h in hyper_list], hyper_structure)
        train = Problem(self.train_loss, *point, (train_batch,), "train_loss")
        minimum = minimize(Pair(train, train, seed=0))
        return self.estimator(weight_structure.rebuild(minimum), hyper, train_batch, val_batch)

    def state_dict(self) -> dict[str, Any]:
        """The estimator's."""
        return self.estimator.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a saved state."""
        self.estimator.load_state_dict(state)
