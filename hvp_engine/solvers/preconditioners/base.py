"""What a preconditioner is, and how a solver applies one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from hvp_engine._support.flat_vector import FlatVector
from hvp_engine._support.pytree import check_like
from hvp_engine.differentiation.linear_map import LinearMap

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


def check_operator(operator: Any) -> None:
    if not isinstance(operator, LinearMap):
        raise TypeError(f"operator: expected an operator such as hvp.HessianOperator; got {type(operator).__name__}")
