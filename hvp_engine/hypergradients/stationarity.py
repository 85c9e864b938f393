"""How far the weights are from a minimum of the training loss, in units of the validation loss."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

_FAR = 0.5
"""Share of the validation loss that further training may promise to change before the weights count as far away."""


def unfinished_change(solution: Sequence[Tensor], gradient: Sequence[Tensor]) -> Tensor:
    """-(H^-1 dL_V/dw) . dL_T/dw, a 0-dim float64 tensor: the change of L_V by a Newton step on L_T, to first order.

    Arguments:
        solution: H^-1 dL_V/dw, as far as the solve went: a truncated series stands for as many steps of training.
        gradient: dL_T/dw.
    """
    products = [x.reshape(-1) @ g.to(x.dtype).reshape(-1) for x, g in zip(solution, gradient, strict=True)]
    return -torch.stack([product.double() for product in products]).sum()


class Stationarity:
    """Warns, once, when the weights are so far from their goal that the implicit function theorem says little.

    The criterion: finishing the training would change the validation loss by more than half of it, to first order.
    Calls 1, 2, 4, 8, ... look, since a look waits for the device.

    Arguments:
        goal: where the weights should be, in words.
        distance: what measures how far they are, and vanishes there.
    """

    def __init__(self, goal: str = "a minimum of the training loss", distance: str = "||dL_T/dw||") -> None:
        self._goal, self._distance = goal, distance
        self._calls = 0
        self._warned = False

    def look(self, unfinished: Tensor, val_loss: Tensor, gradient_norm: Tensor) -> None:
        """Count a call, and perhaps warn."""
        self._calls += 1
        if self._warned or self._calls & (self._calls - 1):
            return
        change, loss, norm = torch.stack([unfinished, val_loss.double(), gradient_norm]).tolist()
        if abs(change) > _FAR * abs(loss):
            self._warned = True
            warnings.warn(
                f"the weights are far from {self._goal}: {self._distance} is {norm:.3g}, and finishing "
                f"the training would change the validation loss, {loss:.3g}, by about {change:.3g}; the hypergradient "
                "assumes that they are at one: train longer before and between hypergradients (warmup_steps and "
                "inner_steps of a Tuner)",
                stacklevel=3,
            )
