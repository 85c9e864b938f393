"""The problem of Fig. 5, 8 and 10: one decay for each weight of a network, tuned by Algorithm 1 with T1-T2."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, Protocol

import torch
from torch import Tensor

import hvp_engine as hvp
from examples import models


class Rates(Protocol):
    """The optimizers' part of an experiment's settings."""

    @property
    def weight_learning_rate(self) -> float: ...

    @property
    def hyper_learning_rate(self) -> float: ...

    @property
    def bounds(self) -> tuple[float, float]: ...


class DecayPerWeight(ABC):
    """A network with one decay for each weight."""

    def __init__(self, module: torch.nn.Module, log_decay: float):
        self.module = module
        self.network = hvp.functional(module)
        self.decays = models.weight_decays(module, log_decay)

    @abstractmethod
    def val_loss(self, weights: dict[str, Tensor], decays: dict[str, Tensor], batch: Any) -> Tensor:
        """The loss without the decays."""

    def train_loss(self, weights: dict[str, Tensor], decays: dict[str, Tensor], batch: Any) -> Tensor:
        """The validation loss + 1/2 sum_i exp(decay_i) w_i^2."""
        penalties = [(decays[name].exp() * weight.square()).sum() for name, weight in weights.items()]
        return self.val_loss(weights, decays, batch) + torch.stack(penalties).sum() / 2

    def tuner(self, rates: Rates, inner_steps: int) -> hvp.Tuner:
        return hvp.Tuner(
            self.module,
            self.decays,
            self.train_loss,
            self.val_loss,
            weight_optimizer=lambda tensors: torch.optim.Adam(tensors, lr=rates.weight_learning_rate),
            hyper_optimizer=lambda tensors: torch.optim.RMSprop(tensors, lr=rates.hyper_learning_rate),
            solver=hvp.Identity(),
            inner_steps=inner_steps,
            bounds=rates.bounds,
        )
