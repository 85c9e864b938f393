"""Models of the best response w*(lambda): linear, and the structured one of self-tuning networks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor


class Response(Protocol):
    """w_phi as a function of the change of the hyperparameters from where it was made."""

    @property
    def parameters(self) -> list[Tensor]:
        """phi: leaves that require grad."""

    def __call__(self, change: Tensor) -> list[Tensor]:
        """The weights for `change`, a vector of all hyperparameters' elements."""


class LinearResponse:
    """w_phi(change) = base + slope change / sqrt(H), with a slope for each weight and each hyperparameter.

    With the root, random changes of size 1 move the weights by about the size of the slopes, however many
    hyperparameters there are, so that steps of a fixed size, such as Adam's, suit them.

    Arguments:
        weights: the base to start from, copied; slopes start at zero.
        size: H, elements of all hyperparameters.

    Memory: P (H + 1) numbers.

    Source: Lorraine and Duvenaud 2018.
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

    A row is what belongs to one index of the first dimension: the incoming weights of a unit, a filter, a bias. So W
    and U have the shape of the weights, and V has one row of H numbers for each unit. The root is there as in
    :class:`LinearResponse`.

    Arguments:
        weights: W to start from, copied; U starts at zero, V at random, drawn from torch's generator.
        size: H, elements of all hyperparameters.

    Memory: 2 P + (units) H numbers: O((P + H) K), K the number of units.

    Source: MacKay et al. 2019, Self-Tuning Networks, section 3.1.
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
