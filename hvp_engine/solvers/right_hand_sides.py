"""Multiple right-hand sides, and warm starts: from a first guess x0, a solve looks for A^-1 (v - A x0)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from hvp_engine._support.flat_vector import FlatVector, Layout
from hvp_engine._support.pytree import Structure, check_like, flatten
from hvp_engine.differentiation.linear_map import LinearMap
from hvp_engine.errors import NonFiniteError
from hvp_engine.solvers.solution import Solution, Status


class WarmStart:
    """One right-hand side with a first guess, at the cost of one product.

    `residual` is v - (A + damping I) x0, the right-hand side that is left; `norm` is its norm, `share` that divided by
    ||v||.
    """

    def __init__(self, operator: LinearMap, v: Sequence[Tensor], x0: Sequence[Tensor], damping: float):
        layout, self._damping = operator.layout, damping
        self._start = FlatVector.of(layout, x0)
        product = FlatVector.of(layout, operator.product(self._start.tangents))
        residual, right = FlatVector(layout), FlatVector.of(layout, v)
        torch.sub(right.data, product.data, out=residual.data)
        residual.data.sub_(self._start.data, alpha=damping)
        norms = torch.stack([vector.norm() for vector in (right, residual)])
        of_v, of_residual = norms.double().tolist()
        self.residual = [view.to(dtype) for view, dtype in zip(residual.views, layout.dtypes, strict=True)]
        share = of_residual / of_v if of_v > 0 else float(of_residual > 0)
        self.share = share if math.isfinite(share) else 1.0  # the solve reports what is not finite
        self.norm = of_residual if math.isfinite(of_residual) else math.inf

    def complete(self, value: Sequence[Tensor], solution: Solution) -> tuple[list[Tensor], Solution]:
        """x0 + value, and the solution with its figures relative to v."""
        total = [
            (start + part.to(start.dtype)).to(dtype)
            for start, part, dtype in zip(self._start.views, value, self._start.layout.dtypes, strict=True)
        ]
        return total, replace(solution, hvps=solution.hvps + 1, residual_norm=solution.residual_norm * self.share)

    def unchanged(self) -> tuple[list[Tensor], Solution]:
        """x0 itself, if it is good enough."""
        layout = self._start.layout
        nothing = [
            torch.zeros_like(view, dtype=dtype) for view, dtype in zip(self._start.views, layout.dtypes, strict=True)
        ]
        return self.complete(nothing, Solution(None, 0, 0, 1.0, "returned", Status.CONVERGED, damping=self._damping))


def guesses(
    x0: Any, structure: Structure, vs: Sequence[Sequence[Tensor]], layout: Layout, batched: bool
) -> list[list[Tensor]]:
    """The first guesses, one for each right-hand side."""
    leaves, found = flatten(structure.of_autograd(x0), "x0", sharded=not batched)
    if found != structure:
        raise ValueError(f"x0: expected the container of v, {structure.spec}; got {found.spec}")
    x0s = unstacked(leaves, "x0") if batched else [[leaf.detach() for leaf in leaves]]
    if len(x0s) != len(vs):
        raise ValueError(f"x0: expected one for each of the {len(vs)} right-hand sides; got {len(x0s)}")
    check_like(x0s[0], layout, "x0", "v")
    bad = torch.stack([(~torch.isfinite(leaf)).sum().double() for leaf in leaves]).sum()
    if layout.total(bad) > 0:
        raise NonFiniteError("x0: expected finite values; got NaN or Inf: start without it")
    return x0s


def unstacked(leaves: Sequence[Tensor], name: str) -> list[list[Tensor]]:
    """The right-hand sides of a batch, one by one."""
    lengths = [len(leaf) if leaf.dim() else None for leaf in leaves]
    if lengths[0] is None or any(length != lengths[0] for length in lengths) or lengths[0] == 0:
        raise ValueError(
            f"{name}: expected leaves with a first dimension of one length >= 1, for batched=True; got shapes "
            f"{', '.join(str(tuple(leaf.shape)) for leaf in leaves)}"
        )
    return [[leaf[index].detach() for leaf in leaves] for index in range(lengths[0])]
