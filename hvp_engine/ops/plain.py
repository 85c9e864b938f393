"""The reference backend: :mod:`hvp_engine.ops.reference`, bound."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from hvp_engine._support.flat_vector import Layout
from hvp_engine.ops import reference
from hvp_engine.ops.backend import Bound
from hvp_engine.ops.schemas import OPS, check_products


def missing(device_type: str) -> str | None:
    return None


def bind(
    name: str,
    states: Sequence[Tensor],
    layout: Layout,
    scalars: Sequence[Tensor],
    damping: float,
    partials: Tensor,
) -> Bound:
    op, step = OPS[name], getattr(reference, name)
    trailing = (*scalars, damping, partials) if op.damped else (*scalars, partials)

    def run(products: Sequence[Tensor]) -> None:
        check_products(op, layout, states[0].dtype, products)
        step(*states, layout.rows(products, apart_from=(*states, partials)), *trailing)

    return run
