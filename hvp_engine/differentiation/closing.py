"""What follows a solve: mixed products, and how far the weights are from a minimum."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from hvp_engine._support.flat_vector import Layout, norm_of


class Closing:
    """What a linearization makes of x = H^-1 dL_V/dw.

    Arguments:
        indirect: -(d2L/dlambda dw^T) x in new memory, one for each hyperparameter, None where there is no path.
        x, gradient, layout: to work out the rest from where it is not given, and only if it is asked for.
        figures: (x . dL/dw, ||dL/dw||^2), if they are known.
    """

    def __init__(
        self,
        indirect: list[Tensor | None],
        x: Sequence[Tensor],
        gradient: Sequence[Tensor],
        layout: Layout,
        figures: tuple[Tensor, Tensor] | None = None,
    ):
        self.indirect = indirect
        self._x, self._gradient, self._layout, self._figures = x, gradient, layout, figures

    @cached_property
    def unfinished(self) -> Tensor:
        """-x . dL/dw, a 0-dim float64 tensor: the change of L_V by a Newton step on L, to first order.

        A series truncated after i terms stands for i training steps.
        """
        if self._figures is not None:
            return self._figures[0].double().neg_()
        pairs = zip(self._x, self._gradient, strict=True)
        products = [x.reshape(-1) @ g.to(x.dtype).reshape(-1) for x, g in pairs]
        return self._layout.total(-torch.stack([product.double() for product in products]).sum())

    @cached_property
    def gradient_norm(self) -> Tensor:
        """||dL/dw||, a 0-dim float64 tensor."""
        if self._figures is not None:
            return self._figures[1].double().sqrt_()
        return norm_of(self._gradient, self._layout)
