"""Linear maps on lists of tensors, with which solvers work, and the linearization of a loss, which is one of them."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hvp_engine._support.flat_vector import FlatVector, Layout
from hvp_engine.differentiation.closing import Closing


@dataclass(frozen=True)
class Mixing:
    """target <- own target + factor source, with the pair (own, factor) of each step; without factors, their sum."""

    target: FlatVector
    source: FlatVector
    factors: Sequence[tuple[float, float]] | None = None

    def factors_at(self, step: int) -> tuple[float, float]:
        return (1.0, 1.0) if self.factors is None else self.factors[step]

    def __call__(self, step: int) -> None:
        own, factor = self.factors_at(step)
        if own != 1.0:
            self.target.data.mul_(own)
        self.target.data.add_(self.source.data, alpha=factor)


@dataclass(frozen=True)
class Accumulation:
    """A step linear in the product: target <- target - scale (A direction + damping direction); then each mixing.

    A map that can subtract a product without forming it does this instead of `Iteration.step`. Such a step computes no
    norms, so the last step of a solve is always an ordinary one.
    """

    direction: FlatVector
    target: FlatVector
    scale: float
    mixings: tuple[Mixing, ...]

    def complete(self, step: int) -> None:
        """What follows the product of this step, counted from 0."""
        for mixing in self.mixings:
            mixing(step)


Terms = Callable[[range], None]
"""Makes the steps of a range, counted from the beginning of a solve."""


Work = Callable[[Callable[[Sequence[Tensor]], Sequence[Tensor]], FlatVector], Sequence[Tensor]]
"""Makes tensors of a product with a linear map, and a vector."""


class LinearMap:
    """A linear map A on lists of tensors of one layout. A subclass sets `layout` and defines :meth:`product`; all else
    has a default.

    Attributes:
        layout: shapes, strides, dtypes and device of the tensors in and out.
        name: what messages call the map.
        loss: the loss whose curvature A is, detached; None if it is not known.
        symmetric: whether A = A^T, as most solvers need.
        fixed: whether A is the same at every product; if not, :meth:`hold` returns a fixed one.
        batches: whether :meth:`products` does more than one product after another.
        origin: what an engine that chooses among others has to know of a map it has made: which, and why.
    """

    layout: Layout
    name: str = "operator"
    loss: Tensor | None = None
    symmetric: bool = True
    fixed: bool = True
    origin: Any = None

    @property
    def batches(self) -> bool:
        return False

    @property
    def learning(self) -> bool:
        """Whether the next product shows the map a faster way for those after it."""
        return False

    @property
    def linear_map(self) -> LinearMap:
        """The map that makes the products: this one, unless it wraps another."""
        return self

    def product(self, tangents: Sequence[Tensor]) -> Sequence[Tensor]:
        """A times the vector whose parts are `tangents`; a part of the result may alias a tangent."""
        raise NotImplementedError

    def products(self, stacked: Sequence[Tensor]) -> Sequence[Tensor]:
        """A times several vectors, stacked along a new first dimension of each tensor, in and out."""
        singles = [self.product([part[index] for part in stacked]) for index in range(len(stacked[0]))]
        return [torch.stack(list(parts)) for parts in zip(*singles, strict=True)]

    def at_once(self, key: Hashable, work: Work, vector: FlatVector) -> Sequence[Tensor]:
        """What `work` makes of products and `vector`, without waiting for the device or drawing random numbers. A map
        may record that once for each key; the results are then copies."""
        return work(self.product, vector)

    def hold(self) -> LinearMap:
        """A map that is the same at every product."""
        return self

    def decays(self) -> list[Tensor] | None:
        """A part of the diagonal of A that is known without products, as the decays of weights are, for each weight in
        its shape; None if one has no such part."""
        return None

    def accumulating_terms(self, accumulation: Accumulation, damping: float) -> Terms | None:
        """The terms of a solve, without forming products; None if the map has no such terms or they are no faster."""
        return None


class Linearization(LinearMap):
    """The gradient f = dL/dw of a loss at one point, and its derivatives: products with H = df/dw, and mixed ones.

    Attributes:
        gradient: dL/dw, detached.
        fallback: why an engine returned this linearization instead of one of its own; None if it is its own.
        nodes: size of the gradient's autograd graph; 0 if there is none.
    """

    gradient: Sequence[Tensor]
    fallback: str | None = None
    nodes: int = 0

    def mixed(self, tangents: Sequence[Tensor]) -> list[Tensor | None]:
        """(d2L/dlambda dw^T) tangents: one for each hyperparameter, None where there is no path."""
        return []

    def closing(self, x: Sequence[Tensor]) -> Closing:
        """What follows a solve with the solution x."""
        indirect = [None if term is None else -term.detach() for term in self.mixed(x)]
        return Closing(indirect, x, self.gradient, self.layout)


def check_operator(operator: Any, name: str) -> None:
    """`TypeError` unless `operator` is one of this package."""
    if not isinstance(operator, LinearMap):
        raise TypeError(f"{name}: expected an operator such as hvp.HessianOperator; got {type(operator).__name__}")


def check_fixed(operator: LinearMap, name: str) -> None:
    """`ValueError` unless `operator` is the same at every product."""
    if not operator.fixed:
        raise ValueError(
            f"{name}: expected an operator that is the same at every product; got one that draws new batches for each: "
            "use hvp.HessianOperator(hvp.Averaged(loss), weights, batches)"
        )
