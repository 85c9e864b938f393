"""Preconditioners M as solvers apply them, and the M-norm, in which a preconditioned series contracts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from hvp_engine._support.arguments import shown
from hvp_engine._support.flat_vector import FlatVector
from hvp_engine._support.pytree import check_like
from hvp_engine._support.user_code import left_as_it_is

Preconditioner = Callable[[list[Tensor]], Sequence[Tensor]]
"""v -> M v on the list of the weights' leaves, symmetric and positive definite; it must not change its argument."""


def check_preconditioner(preconditioner: Any) -> None:
    if preconditioner is not None and (not callable(preconditioner) or isinstance(preconditioner, type)):
        raise TypeError(
            "preconditioner: expected a callable v -> M v on lists of tensors such as hvp.DiagonalPreconditioner, or "
            f"None; got {shown(preconditioner)}"
        )


def precondition(preconditioner: Preconditioner, source: FlatVector, target: FlatVector) -> None:
    """target <- M source; `TypeError` or `ValueError` if the result is not like the source."""
    with torch.no_grad(), left_as_it_is([source.data], "preconditioner(v)", "x * d in place of x.mul_(d)"):
        result = preconditioner(list(source.views))
    check_like(result, source.layout, "preconditioner(v)", "v", widest=torch.float64)
    target.copy_(result)


class MNorm:
    """The M-norm sqrt(r . M r) of a residual r, given its image M r, at the start and at the end of a solve.

    The residuals of a preconditioned series are p(A M) v. Their M-norms are 2-norms of p(M^(1/2) A M^(1/2)) M^(1/2) v,
    so they cannot grow if |p| <= 1 at the eigenvalues. In the 2-norm they may grow by the square root of M's condition
    number and still converge.
    """

    def __init__(self, residual: FlatVector, image: FlatVector):
        self._residual, self._image = residual, image
        self._first = torch.zeros((), dtype=torch.float64, device=residual.data.device)

    def start(self) -> None:
        self._first.copy_(self._squared())

    def sums(self, partials: Tensor, value: FlatVector) -> Tensor:
        """The figures that :func:`outcome_of` reads after those of v: ||r||^2 of the last residual (from `partials`),
        ||value||^2, a flag, and the squared M-norms of the first and of the last residual."""
        _, squared, bad = partials.sum(0).unbind()
        sums = [squared, value.data.double().square().sum(), bad, self._first, self._squared()]
        return value.layout.total(torch.stack(sums))

    def _squared(self) -> Tensor:
        return (self._residual.data.double() * self._image.data.double()).sum()
