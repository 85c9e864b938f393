"""Products with several vectors at once, where an operator can make them and where that pays.

Small problems spend their time between operations rather than in them, so that a product with 32 vectors costs
little more than one with a single vector. Large ones gain nothing and go one after the other, with less memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from hvp_engine._support.flat_vector import FlatVector, Layout
from hvp_engine.differentiation.linear_map import LinearMap

MOST = 32
"""Vectors in one product: more cost memory and gain nothing (measured on a CPU)."""

_LEAST = 8
"""Vectors from which a batched product is faster than single ones (measured: with 4, not for every network)."""

_LARGEST = 1 << 14
"""Weights up to which it is faster, on a CPU (measured: at 80,000 it is not any more)."""


class Vectors(Protocol):
    """Vectors that products are wanted of: one after another, or in blocks."""

    limit: int
    steps: int
    direction: FlatVector

    def step(self, product: Sequence[Tensor]) -> None:
        """Advance by the product with `direction`."""

    def block(self, count: int) -> Sequence[Tensor]:
        """The next `count` vectors, stacked along a first dimension of each weight's tensor."""

    def step_block(self, products: Sequence[Tensor]) -> None:
        """Advance by the products with :meth:`block`."""


def pays(operator: LinearMap, count: int) -> bool:
    """Whether one product with `count` vectors is possible, and faster than `count` products."""
    small = operator.layout.size <= _LARGEST or operator.layout.device.type != "cpu"
    return count >= _LEAST and small and operator.batches


def fill(vectors: Vectors, operator: LinearMap) -> None:
    """Make all products that `vectors` wants, at most :data:`MOST` at once."""
    while vectors.steps < vectors.limit:
        count = min(MOST, vectors.limit - vectors.steps)
        if pays(operator, count):
            vectors.step_block(operator.products(vectors.block(count)))
        else:
            vectors.step(operator.product(vectors.direction.tangents))


def stacked_views(layout: Layout, rows: Tensor) -> list[Tensor]:
    """Views of the flat vectors in `rows`, stacked along a first dimension of each weight's tensor."""
    return [
        rows.as_strided((len(rows), *shape), (rows.stride(0), *stride), rows.storage_offset() + offset)
        for shape, stride, offset in zip(layout.shapes, layout.strides, layout.offsets, strict=True)
    ]


def stacked_tangents(layout: Layout, rows: Tensor) -> list[Tensor]:
    """The same in the weights' dtypes, as products take them."""
    return [view.to(dtype) for view, dtype in zip(stacked_views(layout, rows), layout.dtypes, strict=True)]
