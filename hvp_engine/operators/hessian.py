"""Curvature as linear operators: H @ v and H.solve(v, solver)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from torch import Tensor

from hvp_engine import engines
from hvp_engine._support.flat_vector import FlatVector, Layout
from hvp_engine._support.isolation import Draws, isolated
from hvp_engine._support.pytree import Structure, check_like, flatten
from hvp_engine._support.torch_compat import pytree, version_of
from hvp_engine.differentiation.problem import LinearMap, Problem
from hvp_engine.distributed import for_loss
from hvp_engine.operators.batched import fill
from hvp_engine.solvers.base import Solver
from hvp_engine.solvers.dense import Columns
from hvp_engine.solvers.driver import solve
from hvp_engine.solvers.solution import Solution
from hvp_engine.solvers.spectrum import Spectrum


class CurvatureMap(LinearMap, Protocol):
    """The products of a curvature matrix of a loss, with the loss and its gradient, at one point."""

    @property
    def loss(self) -> Tensor | None: ...

    @property
    def gradient(self) -> Sequence[Tensor]: ...


_EXPECTED_PRODUCTS = 200
"""Products that one operator is expected to make: "auto" traces only where that many repay it."""


def engine_for_operator(engine: str | engines.Engine, loss: Callable[..., Tensor]) -> engines.Engine:
    """As `engines.create`, for an operator of `loss` that lives as long as one solve or a few."""
    return for_loss(loss, engines.AutoEngine(_EXPECTED_PRODUCTS) if engine == "auto" else engines.create(engine))


class Curvature:
    """What the operators share: a symmetric linear map on trees like the weights, at fixed weights.

    `made_of`, any tree, has the caller's tensors that products read: one that has changed in place since makes them
    wrong.
    """

    def __init__(
        self,
        linearization: CurvatureMap,
        structure: Structure,
        engine: engines.Engine,
        made_of: Any = (),
    ):
        self._linearization, self.engine = linearization, engine
        self.spectrum = Spectrum()
        self._structure = structure
        read = [leaf for leaf in pytree.tree_leaves(made_of) if isinstance(leaf, Tensor)]
        self._versions = [(tensor, version_of(tensor)) for tensor in read if not tensor.is_inference()]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_versions": []}  # a copy has tensors of its own

    @property
    def linearization(self) -> CurvatureMap:
        """What makes the products; `ValueError` where what it was made of is no more what it was."""
        for tensor, version in self._versions:
            if version_of(tensor) != version:
                raise ValueError(
                    "operator: expected weights and arguments as they were when it was made; got one of shape "
                    f"{tuple(tensor.shape)} that was changed in place since: make a new operator, or clone it before"
                )
        return self._linearization

    @property
    def layout(self) -> Layout:
        """Shapes, strides, dtypes and device of the weights' leaves."""
        return self._linearization.layout

    @property
    def loss(self) -> Tensor | None:
        """The loss at the weights, detached."""
        return self._linearization.loss

    @property
    def gradient(self) -> Any:
        """d loss / dw, detached, in the container of the weights."""
        return self._structure.rebuild(self.linearization.gradient)

    @property
    def shape(self) -> tuple[int, int]:
        """(number of weights, number of weights)."""
        size = self.layout.numel
        return size, size

    def product(self, tangents: Sequence[Tensor]) -> Sequence[Tensor]:
        """The operator times the list of leaves `tangents`, unchecked: what solvers call."""
        return self.linearization.product(tangents)

    def __matmul__(self, v: Any) -> Any:
        """The operator times v, in the container of the weights; `v` is a tree like them, whose NaN propagate."""
        leaves, structure = flatten(v, "v", sharded=True)
        layout = self.layout
        check_like(leaves, layout, "v", "weights")
        tangents = FlatVector.of(layout, leaves).tangents  # a trace relies on the strides of the weights
        return structure.rebuild([p.detach().clone() for p in self.product(tangents)])

    def solve(self, v: Any, solver: Solver, *, batched: bool = False, x0: Any = None) -> Solution:
        """(A + damping I)^-1 v by `solver`, for several v with `batched`, from a first guess x0; see :func:`solve`."""
        return solve(self, v, solver, batched=batched, x0=x0)

    def dense(self) -> Tensor:
        """The operator as a matrix, by one product for each weight: for tests and small problems."""
        columns = Columns(self.layout, self.layout.state_dtype)
        fill(columns, self.linearization)
        return columns.matrix


class HessianOperator(Curvature):
    """The Hessian H = d2 loss / dw dw^T of a loss at given weights, as a symmetric linear operator.

    Arguments:
        loss: `loss(weights, *args)` -> scalar tensor.
        weights: any tree of real floating tensors on one device; they are not modified and need not require grad.
        *args: passed on to the loss; like the weights, not to be changed in place while the operator is used.
        engine: how products are executed, by name; see `hvp_engine.engines`.

    The gradient graph is built once, here; random layers draw one mask for the lifetime of the operator. Every
    product costs about two gradients. Memory: the graph, and per product one vector of weights.

    Errors: `ValueError` for an unknown engine, a loss that is no scalar or has no graph to the weights, and in a
    product for weights or arguments that were changed in place since; :class:`SecondDerivativeError` for a loss
    without a second derivative.

    >>> import torch, hvp_engine as hvp
    >>> H = hvp.HessianOperator(lambda w: (w ** 3).sum(), torch.tensor([1.0, 2.0]))
    >>> H @ torch.ones(2)
    tensor([ 6., 12.])
    >>> H.solve(torch.ones(2), hvp.Neumann(200)).value
    tensor([0.1667, 0.0833])
    """

    def __init__(self, loss: Callable[..., Tensor], weights: Any, *args: Any, engine: str | engines.Engine = "auto"):
        chosen = engine_for_operator(engine, loss)
        leaves, structure = flatten(weights, "weights", sharded=True)
        problem = Problem(loss, leaves, structure, [], None, args)
        with isolated(Draws().next_seed(), leaves[0].device):
            super().__init__(chosen.linearize(problem), structure, chosen, (leaves, args))
