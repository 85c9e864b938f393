"""Products with several vectors at once, where the operator supports them and they are faster.

Small problems spend their time on launching operations rather than in them, so a product with 32 vectors costs
little more than one with a single vector. Large problems gain nothing: one vector at a time takes less memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from hvp_engine._support.flat_vector import FlatVector, Layout
from hvp_engine.differentiation.linear_map import LinearMap

MOST = 32
"""At most this many vectors go into one product: more cost memory and gain nothing (measured on a CPU)."""

LEAST = 8
"""A batched product needs at least this many vectors: with 4 it is slower for some networks (measured)."""

_LARGEST = 1 << 14
"""On a CPU, products are batched up to this many weights: at 80,000 that is no longer faster (measured)."""


class Vectors(Protocol):
    """Vectors to multiply with, one after another or in blocks."""

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
    return count >= LEAST and small and operator.batches


def fill(vectors: Vectors, operator: LinearMap) -> None:
    """Multiply with all of `vectors`, at most :data:`MOST` at once."""
    while vectors.steps < vectors.limit:
        count = min(MOST, vectors.limit - vectors.steps)
        if pays(operator, count):
            vectors.step_block(operator.products(vectors.block(count)))
        else:
            vectors.step(operator.product(vectors.direction.tangents))


def multiply(operator: LinearMap, rows: Tensor, products: Tensor) -> None:
    """Overwrite the rows of `products` by A times those of `rows`, flat vectors with zeros in their gaps."""
    layout, count = operator.layout, len(rows)
    blocks = -(-count // MOST)
    if pays(operator, count // blocks):
        for part, target in zip(rows.tensor_split(blocks), products.tensor_split(blocks), strict=True):
            found = operator.products(stacked_tangents(layout, part))
            for view, product in zip(stacked_views(layout, target), found, strict=True):
                view.copy_(product.detach())
        return
    for row, target in zip(rows, products, strict=True):
        FlatVector(layout, target).copy_(operator.product(FlatVector(layout, row).tangents))


def stacked_views(layout: Layout, rows: Tensor) -> list[Tensor]:
    """Views of the flat vectors in `rows`, stacked along a first dimension of each weight's tensor."""
    return [
        rows.as_strided((len(rows), *shape), (rows.stride(0), *stride), rows.storage_offset() + offset)
        for shape, stride, offset in zip(layout.shapes, layout.strides, layout.offsets, strict=True)
    ]


def stacked_tangents(layout: Layout, rows: Tensor) -> list[Tensor]:
    """The vectors stacked as in :func:`stacked_views`, in the weights' dtypes, as products take them."""
    return [view.to(dtype) for view, dtype in zip(stacked_views(layout, rows), layout.dtypes, strict=True)]
