"""The reference backend: :mod:`hvp_engine.reference`, bound."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from hvp_engine import reference
from hvp_engine.backend import Bound
from hvp_engine.ops import OPS, check_products
from hvp_engine.vectors import Layout


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
