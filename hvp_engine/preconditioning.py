"""Preconditioners: cheap symmetric positive definite approximations M of an inverse, as a solver applies them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from hvp_engine.trees import Tree, flatten
from hvp_engine.vectors import FlatVector

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
    if not isinstance(result, (list, tuple)) or len(result) != len(source.views):
        got = f"{len(result)} of them" if isinstance(result, (list, tuple)) else type(result).__name__
        raise TypeError(f"preconditioner(v): expected a list of {len(source.views)} tensors, as v is; got {got}")
    for index, (tensor, view) in enumerate(zip(result, source.views, strict=True)):
        if not isinstance(tensor, Tensor) or tensor.shape != view.shape:
            shape = tuple(tensor.shape) if isinstance(tensor, Tensor) else type(tensor).__name__
            raise ValueError(f"preconditioner(v)[{index}]: expected shape {tuple(view.shape)} as v; got {shape}")
    target.copy_(result)


class DiagonalPreconditioner:
    """M = 1 / (diagonal + shift), element by element.

    A decay of its own for each weight, sum(decay * w**2) / 2, adds `decay` to the Hessian's diagonal: the part of
    the curvature that differs most between weights, known for free. `shift` stands for the rest of the Hessian.

    Arguments:
        diagonal: a tree of tensors like the weights (or that broadcasts to them), or a function without arguments
            that returns one and is called whenever M is applied, for a diagonal that changes between solves.
        shift: added to the diagonal, >= 0: about the typical eigenvalue of the rest of the Hessian; 0 where there is
            no rest.

    Cost: one pass over the weights for each application.

    Errors: `ValueError` where diagonal + shift is not finite and positive, or shift < 0; `TypeError` for leaves that
    are no tensors.

    >>> import torch, hvp_engine as hvp
    >>> decay = torch.tensor([1.0, 100.0, 1e4])
    >>> M = hvp.DiagonalPreconditioner(decay)
    >>> hvp.solve(lambda v: decay * v, torch.ones(3), hvp.ConjugateGradient(1, preconditioner=M)).value
    tensor([1.0000e+00, 1.0000e-02, 1.0000e-04])
    """

    def __init__(self, diagonal: Tree | Callable[[], Tree], shift: float = 0.0):
        if isinstance(shift, bool) or not isinstance(shift, (int, float)):
            raise TypeError(f"shift: expected a number; got {type(shift).__name__}")
        if not (math.isfinite(shift) and shift >= 0):
            raise ValueError(f"shift: expected a finite number >= 0; got {shift}")
        self.diagonal, self.shift = diagonal, shift
        for index, leaf in enumerate(self._leaves()):
            total = leaf.detach() + shift
            if not bool((torch.isfinite(total) & (total > 0)).all()):
                raise ValueError(
                    f"diagonal: expected diagonal + shift finite and > 0; got {float(total.min()):.3g} as the smallest "
                    f"in leaf {index}: use a larger shift"
                )

    def __call__(self, v: list[Tensor]) -> list[Tensor]:
        leaves = self._leaves()
        if len(leaves) != len(v):
            raise ValueError(f"diagonal: expected {len(v)} leaves, one for each of the weights; got {len(leaves)}")
        return [tensor / (leaf.to(tensor.dtype) + self.shift) for tensor, leaf in zip(v, leaves, strict=True)]

    def _leaves(self) -> list[Tensor]:
        module = isinstance(self.diagonal, torch.nn.Module)
        tree = self.diagonal() if callable(self.diagonal) and not module else self.diagonal
        return flatten(tree, "diagonal")[0]
