"""What a preconditioner M is, how a solver applies one, and the norm in which a preconditioned series contracts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from hvp_engine._support.flat_vector import FlatVector
from hvp_engine._support.pytree import check_like

Preconditioner = Callable[[list[Tensor]], Sequence[Tensor]]
"""v -> M v on the list of the weights' leaves, symmetric and positive definite; it must not change its argument."""


def check_preconditioner(preconditioner: Any) -> None:
    if preconditioner is not None and not callable(preconditioner):
        raise TypeError(
            "preconditioner: expected a callable v -> M v on lists of tensors such as hvp.DiagonalPreconditioner, or "
            f"None; got {type(preconditioner).__name__}"
        )


def precondition(preconditioner: Preconditioner, source: FlatVector, target: FlatVector) -> None:
    """target <- M source; `TypeError` or `ValueError` for a result that does not fit."""
    with torch.no_grad():
        result = preconditioner(list(source.views))
    check_like(result, source.layout, "preconditioner(v)", "v", widest=torch.float64)
    target.copy_(result)


class MetricNorm:
    """sqrt(r . M r) of a residual r with its image M r, at the start and at the end of a solve.

    The residuals of a series with a preconditioner are p(A M) v. In the norm of M they are those of the symmetric
    M^(1/2) A M^(1/2), so a polynomial that is at most 1 at its eigenvalues makes none larger. In the 2-norm they may
    grow by the square root of M's condition and converge all the same.
    """

    def __init__(self, residual: FlatVector, image: FlatVector):
        self._residual, self._image = residual, image
        self._first = torch.zeros((), dtype=torch.float64, device=residual.data.device)

    def start(self) -> None:
        self._first.copy_(self._squared())

    def sums(self, partials: Tensor, value: FlatVector) -> Tensor:
        """What :func:`outcome_of` reads after the figures of v: those of the last residual, of which `partials` has
        the 2-norm, and of the sum, and the squared norms of the first and the last residual here."""
        _, squared, bad = partials.sum(0).unbind()
        sums = [squared, value.data.double().square().sum(), bad, self._first, self._squared()]
        return value.layout.total(torch.stack(sums))

    def _squared(self) -> Tensor:
        return (self._residual.data.double() * self._image.data.double()).sum()
