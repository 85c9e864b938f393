"""Models of the best response w*(lambda): linear, and the structured one of self-tuning networks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor


class Response(Protocol):
    """w_phi as a function of how far the hyperparameters have moved since it was made."""

    @property
    def parameters(self) -> list[Tensor]:
        """phi: leaves that require grad."""

    def __call__(self, change: Tensor) -> list[Tensor]:
        """The weights for `change`, one vector with the elements of all hyperparameters."""


class LinearResponse:
    """w_phi(change) = base + slope change / sqrt(H), with a slope for each weight and each hyperparameter.

    Because of the root, random changes of size 1 move the weights by about the size of the slopes, however many
    hyperparameters there are, so optimizers with steps of a fixed size, such as Adam, work for any number of them.

    Arguments:
        weights: the initial base, copied; slopes start at zero.
        size: H, the number of elements of all hyperparameters.

    Memory: P (H + 1) numbers.

    Source: Lorraine and Duvenaud, Stochastic Hyperparameter Optimization through Hypernetworks, 2018.
    """

    def __init__(self, weights: Sequence[Tensor], size: int):
        self.base = [w.detach().clone().requires_grad_() for w in weights]
        self.slopes = [w.new_zeros((*w.shape, size)).requires_grad_() for w in weights]

    @property
    def parameters(self) -> list[Tensor]:
        return [*self.base, *self.slopes]

    def __call__(self, change: Tensor) -> list[Tensor]:
        scaled = change / math.sqrt(len(change))
        return [b + slope @ scaled.to(b.dtype) for b, slope in zip(self.base, self.slopes, strict=True)]


class StructuredResponse:
    """Each output unit scales a second set of weights: W + (V change / sqrt(H)) * U row by row, for each weight tensor.

    A row is all that belongs to one index of the first dimension: the incoming weights of a unit, a filter, a bias. So
    W and U have the shape of the weights, and V has one row of H numbers for each unit. The root is there for the same
    reason as in :class:`LinearResponse`.

    Arguments:
        weights: the initial W, copied; U starts at zero, V at random numbers from torch's generator.
        size: H, the number of elements of all hyperparameters.

    Memory: 2 P + (units) H numbers, O((P + H) K) for K units.

    Source: MacKay, Vicol, Lorraine, Duvenaud, Grosse, Self-Tuning Networks, ICLR 2019, section 3.1.
    """

    def __init__(self, weights: Sequence[Tensor], size: int):
        self.base = [w.detach().clone().requires_grad_() for w in weights]
        self.scaled = [torch.zeros_like(w).requires_grad_() for w in weights]
        self.mixing = [
            torch.randn(len(w) if w.dim() else 1, size, dtype=w.dtype).to(w.device).requires_grad_() for w in weights
        ]

    @property
    def parameters(self) -> list[Tensor]:
        return [*self.base, *self.scaled, *self.mixing]

    def __call__(self, change: Tensor) -> list[Tensor]:
        weights = []
        for base, scaled, mixing in zip(self.base, self.scaled, self.mixing, strict=True):
            factors = mixing @ change.to(base.dtype) / math.sqrt(len(change))
            rows = factors.view(-1, *[1] * (base.dim() - 1)) if base.dim() else factors[0]
            weights.append(base + rows * scaled)
        return weights
