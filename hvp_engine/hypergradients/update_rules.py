"""Training steps that autograd can differentiate: SGD, with or without momentum, and Adam.

A rule keeps its state (momenta, moments) in a flat list of tensors, so that a step maps tensors to tensors. The
numbers are those of `torch.optim` with the same arguments.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

Rate = float | Callable[[Any], Tensor]
"""A learning rate: a number, or a function of the hyperparameters that gives a 0-dim tensor."""

Tensors = Sequence[Tensor]

Moved = tuple[list[Tensor], list[Tensor]]
"""The weights and the state after a step."""


@runtime_checkable
class UpdateRule(Protocol):
    """One step of an optimizer, without side effects."""

    @property
    def learning_rate(self) -> Rate: ...

    def initial_state(self, weights: Tensors) -> list[Tensor]:
        """The state before the first step."""

    def step(self, weights: Tensors, gradient: Tensors, state: Tensors, rate: float | Tensor, count: int) -> Moved:
        """Step number `count` (from 1), with learning rate `rate`."""


@dataclass(frozen=True)
class SGD:
    """w <- w - learning_rate b, with b <- momentum b + dL/dw.

    Arguments:
        learning_rate: a number > 0, or a function `hyper -> 0-dim tensor`, through which it is differentiated too.
        momentum: in [0, 1); 0 keeps no state.

    Errors: `TypeError`/`ValueError` naming the argument.
    """

    learning_rate: Rate
    momentum: float = 0.0

    def __post_init__(self) -> None:
        _check_rate(self.learning_rate)
        _check_fraction(self.momentum, "momentum")

    def initial_state(self, weights: Tensors) -> list[Tensor]:
        return [torch.zeros_like(weight) for weight in weights] if self.momentum else []

    def step(self, weights: Tensors, gradient: Tensors, state: Tensors, rate: float | Tensor, count: int) -> Moved:
        change = gradient
        if self.momentum:
            change = [self.momentum * b + g for b, g in zip(state, gradient, strict=True)]
        moved = [w - rate * c for w, c in zip(weights, change, strict=True)]
        return moved, list(change) if self.momentum else []


@dataclass(frozen=True)
class Adam:
    """w <- w - learning_rate m / (sqrt(s) + eps), m and s the moving averages of dL/dw and its square, bias-corrected.

    Arguments:
        learning_rate: as for :class:`SGD`.
        betas: of the two averages, in [0, 1).
        eps: > 0. At a gradient of exactly zero a first step has the slope learning_rate / eps.

    Errors: `TypeError`/`ValueError` naming the argument.

    Source: Kingma and Ba, Adam: A Method for Stochastic Optimization, ICLR 2015.
    """

    learning_rate: Rate
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8

    def __post_init__(self) -> None:
        _check_rate(self.learning_rate)
        if not isinstance(self.betas, tuple) or len(self.betas) != 2:
            raise TypeError(f"betas: expected a pair of numbers in [0, 1); got {self.betas!r}")
        for beta in self.betas:
            _check_fraction(beta, "betas")
        if not (_is_number(self.eps) and self.eps > 0):
            raise ValueError(f"eps: expected a finite number > 0; got {self.eps!r}")

    def initial_state(self, weights: Tensors) -> list[Tensor]:
        return [torch.zeros_like(weight) for weight in (*weights, *weights)]

    def step(self, weights: Tensors, gradient: Tensors, state: Tensors, rate: float | Tensor, count: int) -> Moved:
        first, second = self.betas
        size = len(weights)
        means = [first * m + (1 - first) * g for m, g in zip(state[:size], gradient, strict=True)]
        squares = [second * s + (1 - second) * g * g for s, g in zip(state[size:], gradient, strict=True)]
        scale = rate / (1 - first**count)
        roots = [_root(s) / math.sqrt(1 - second**count) for s in squares]
        moved = [w - scale * m / (r + self.eps) for w, m, r in zip(weights, means, roots, strict=True)]
        return moved, means + squares


def _root(square: Tensor) -> Tensor:
    """sqrt with derivative 0 at 0 instead of infinity: there the mean is 0 too, and inf * 0 would be NaN."""
    positive = square > 0
    return torch.where(positive, torch.where(positive, square, 1.0).sqrt(), 0.0)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _check_rate(rate: Any) -> None:
    if not callable(rate) and not _is_number(rate):
        raise TypeError(f"learning_rate: expected a number or a function of the hyperparameters; got {rate!r}")
    if not callable(rate) and not rate > 0:
        raise ValueError(f"learning_rate: expected a number > 0; got {rate!r}")


def _check_fraction(value: Any, name: str) -> None:
    if not _is_number(value) or not 0 <= value < 1:
        raise ValueError(f"{name}: expected a number in [0, 1); got {value!r}")
