"""The Hessian of a loss as a linear operator, and what operators of a loss share."""

from __future__ import annotations

from collections.abc import Callable
from types import FunctionType
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor

from hvp_engine import engines
from hvp_engine._support.arguments import check_function
from hvp_engine._support.isolation import Draws, isolated
from hvp_engine._support.pytree import Structure, flatten
from hvp_engine.differentiation.linear_map import Linearization
from hvp_engine.differentiation.problem import Problem
from hvp_engine.distributed import for_loss
from hvp_engine.operators.base import LinearOperator

_EXPECTED_PRODUCTS = 200
"""An operator is expected to make this many products: "auto" traces only if they repay the trace."""


_shared: WeakKeyDictionary[Callable[..., Tensor], engines.AutoEngine] = WeakKeyDictionary()
"""The automatic engine of each loss that is a function, as long as that lives: operators that are made anew, for each
task or batch, choose and trace once."""


def engine_for_operator(engine: str | engines.Engine, loss: Callable[..., Tensor]) -> engines.Engine:
    """The engine of this name for an operator of `loss`, which lives for one solve or a few."""
    if engine != "auto":
        return for_loss(loss, engines.create(engine))
    if not isinstance(loss, FunctionType):
        return for_loss(loss, engines.AutoEngine(_EXPECTED_PRODUCTS))
    if loss not in _shared:
        _shared[loss] = engines.AutoEngine(_EXPECTED_PRODUCTS)
    return _shared[loss]


class CurvatureOperator(LinearOperator):
    """A curvature matrix of a loss at fixed weights, with the loss and its gradient there."""

    def __init__(self, linearization: Linearization, structure: Structure, engine: engines.Engine, made_of: Any = ()):
        super().__init__(linearization, structure, engine, made_of)
        self._linearization = linearization

    @property
    def gradient(self) -> Any:
        """d loss / dw, detached, in the container of the weights."""
        return self._structure.rebuild(self._linearization.gradient)


class HessianOperator(CurvatureOperator):
    """The Hessian H = d2 loss / dw dw^T of a loss at given weights, as a symmetric linear operator.

    Arguments:
        loss: `loss(weights, *args)` -> scalar tensor.
        weights: any tree of real floating tensors on one device; they are not modified and need not require grad.
        *args: passed on to the loss; like the weights, they must not be changed in place while the operator is used.
        engine: how products are executed, by name; see `hvp_engine.engines`.

    The gradient graph is built once, here; random layers draw one mask for the lifetime of the operator. Every
    product costs about two gradients. Memory: the graph, and per product one vector of weights.

    Errors: `ValueError` for an unknown engine, a loss that is not a scalar or has no graph to the weights, and in
    a product after weights or arguments were changed in place; :class:`SecondDerivativeError` for a loss
    without a second derivative.

    >>> import torch, hvp_engine as hvp
    >>> H = hvp.HessianOperator(lambda w: (w ** 3).sum(), torch.tensor([1.0, 2.0]))
    >>> H @ torch.ones(2)
    tensor([ 6., 12.])
    >>> H.solve(torch.ones(2), hvp.Neumann(200)).value
    tensor([0.1667, 0.0833])
    """

    def __init__(self, loss: Callable[..., Tensor], weights: Any, *args: Any, engine: str | engines.Engine = "auto"):
        check_function(loss, "loss", "(weights, *args)", 1 + len(args))
        chosen = engine_for_operator(engine, loss)
        leaves, structure = flatten(weights, "weights", sharded=True)
        problem = Problem(loss, leaves, structure, [], None, args)
        with isolated(Draws().next_seed(), leaves[0].device):
            super().__init__(chosen.linearize(problem), structure, chosen, (leaves, args))
