"""Curvature of an objective over many batches: a fresh mini-batch for every product (LiSSA)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import Tensor

from hvp_engine import engines
from hvp_engine._support.arguments import check_count, check_function
from hvp_engine._support.data_stream import Batches
from hvp_engine._support.flat_vector import Layout
from hvp_engine._support.isolation import Draws, isolated
from hvp_engine._support.pytree import flatten
from hvp_engine.differentiation.linear_map import LinearMap
from hvp_engine.differentiation.problem import Problem
from hvp_engine.distributed import averaged, together
from hvp_engine.engines.eager import EagerEngine
from hvp_engine.operators.base import LinearOperator
from hvp_engine.operators.hessian import engine_for_operator


class StochasticHessianOperator(LinearOperator):
    """The Hessian of a loss averaged over batches, with fresh batches for every product.

    Each term of a solve with `Neumann(i)` has its own Hessian H_s, x <- v + (I - alpha (H_s + damping I)) x.
    With batches drawn independently, the mean over solves is the series of the mean Hessian, term by term; a single
    solve scatters around it, less so with larger batches and a smaller alpha. If all batches fit into memory together,
    `HessianOperator(hvp.Averaged(loss), weights, batches)` is the mean Hessian itself.

    Arguments:
        loss: `loss(weights, batch)` -> scalar tensor, a mean over the batch.
        weights: any tree of real floating tensors on one device; not modified.
        batches: a loader, iterated epoch after epoch; let it shuffle, so that batches are independent.
        batches_per_product: how many batches each product averages.
        engine: how products are executed, by name; one trace serves all batches of a shape.

    Solvers: :class:`Neumann` and :class:`Identity`; the others need the same operator at every product and are
    refused. alpha="auto" is estimated on one draw of batches: give a smaller alpha if batches differ much. A solve's
    residual norm is measured on the batches of its last product.

    Cost of a product: one gradient and one Hessian-vector product for each batch. Memory: the graph of
    `batches_per_product` batches.

    Errors: `TypeError`/`ValueError` naming the argument; as :class:`HessianOperator` at the first product.

    Source: Agarwal, Bullins and Hazan, Second-Order Stochastic Optimization for Machine Learning in Linear Time, JMLR
    2017 (LiSSA).

    >>> import torch, hvp_engine as hvp
    >>> loss = lambda w, batch: (batch * w**2).mean(0).sum() / 2            # the Hessian is the mean of the batch
    >>> batches = [torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, 6.0]])]
    >>> H = hvp.StochasticHessianOperator(loss, torch.ones(2), batches)
    >>> H @ torch.ones(2), H @ torch.ones(2)
    (tensor([1., 2.]), tensor([1., 6.]))
    >>> H.solve(torch.ones(2), hvp.Neumann(2, alpha=0.1)).value            # 0.1 (1 + 0.4 (1 + 0.8)) for w[1]
    tensor([0.2710, 0.1720])
    """

    def __init__(
        self,
        loss: Callable[[Any, Any], Tensor],
        weights: Any,
        batches: Iterable[Any],
        *,
        batches_per_product: int = 1,
        engine: str | engines.Engine = "auto",
    ):
        batches_per_product = check_count(batches_per_product, "batches_per_product")
        check_function(loss, "loss", "(weights, batch)", 2)
        leaves, structure = flatten(weights, "weights")
        stream = Batches(batches, leaves[0].device, "batches")
        maker = engine_for_operator(engine, loss)
        of_batches = loss if batches_per_product == 1 else averaged(loss)
        problem = Problem(of_batches, leaves, structure, [], None, ())
        draws = _Draws(problem, stream, batches_per_product, maker)
        super().__init__(draws, structure, EagerEngine())  # runs the terms; `maker` linearizes


class _Draws(LinearMap):
    """A map that draws new batches for every product."""

    fixed = False

    def __init__(self, problem: Problem, stream: Batches, count: int, maker: engines.Engine):
        self.layout = Layout.of(problem.weights)
        self._problem, self._stream, self._count, self._maker = problem, stream, count, maker
        self._seeds = Draws()

    def hold(self) -> LinearMap:
        """The Hessian on the next batches, as a fixed map."""
        with isolated(self._seeds.next_seed(), self.layout.device):
            with together(self._problem.loss, self.layout.device):
                batch = self._stream.next() if self._count == 1 else self._stream.take(self._count)
            return self._maker.linearize(self._problem.at((batch,)))

    def product(self, tangents: Sequence[Tensor]) -> Sequence[Tensor]:
        return self.hold().product(tangents)
