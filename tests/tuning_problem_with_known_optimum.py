"""A tuning problem with a known optimum: the h at which w* = data / (1 + e^h) equals the target."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from problems_with_known_answers import DTYPE
from torch import Tensor

import hvp_engine as hvp

DATA, TARGET = torch.tensor([1.0, 3.0, -2.0], dtype=DTYPE), torch.tensor([0.8, 1.5, -0.5], dtype=DTYPE)


def zeros(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=DTYPE)


def sgd(lr: float) -> Callable[[Any], torch.optim.Optimizer]:
    return lambda tensors: torch.optim.SGD(tensors, lr=lr)


def adam(lr: float) -> Callable[[Any], torch.optim.Optimizer]:
    return lambda tensors: torch.optim.Adam(tensors, lr=lr)


def shrink(w: Tensor, h: Tensor, batch: Tensor) -> Tensor:
    """w* = batch / (1 + e^h)."""
    return (w - batch).square().sum() / 2 + (h.exp() * w.square()).sum() / 2


def distance(w: Tensor, h: Tensor, batch: Tensor) -> Tensor:
    return (w - batch).square().sum() / 2


def tuner_of(w: Any, h: Any, **options: Any) -> hvp.Tuner:
    settings = {
        "weight_optimizer": sgd(0.3),
        "hyper_optimizer": adam(0.1),
        "solver": hvp.Neumann(20),
        "engine": "eager",
        **options,
    }
    if "estimator" in options:
        settings["solver"] = None
    return hvp.Tuner(w, h, settings.pop("train", shrink), settings.pop("val", distance), **settings)
