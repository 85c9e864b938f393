"""A tuning run that uses everything a checkpoint must hold. As a script it kills itself.

Dropout, BatchNorm, shuffling and augmentation by every global generator, optimizers with state, schedulers on both
sides, a Lanczos estimate that goes on from its last vector, accumulation, warm-up, evaluation.
"""

from __future__ import annotations

import os
import random
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, Dataset

import hvp_engine as hvp

Event = Callable[[str], None]


class Points(Dataset):
    """Two clouds of points, with noise that is drawn at each access."""

    def __init__(self, size: int, seed: int):
        generator = torch.Generator().manual_seed(seed)
        self.labels = torch.arange(size) % 2
        self.points = torch.randn(size, 4, generator=generator) + self.labels[:, None]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        noise = torch.randn(4) + random.gauss(0, 1) + numpy.random.randn()
        return self.points[index] + 0.1 * noise, self.labels[index]


class TuningRun:
    """A tuner with loaders; `event` is called with "train" or "val" whenever a loss is evaluated."""

    def __init__(self, event: Event = lambda kind: None, engine: str = "eager"):
        torch.manual_seed(0), random.seed(0), numpy.random.seed(0)
        module = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.2), nn.Linear(8, 2))
        net = hvp.functional(module)
        hyper = {name: torch.full_like(weight, -4.0) for name, weight in module.named_parameters()}

        def val_loss(weights: dict[str, Tensor], hyper: dict[str, Tensor], batch: list[Tensor]) -> Tensor:
            event("val")
            return cross_entropy(net(weights, batch[0]), batch[1])

        def train_loss(weights: dict[str, Tensor], hyper: dict[str, Tensor], batch: list[Tensor]) -> Tensor:
            event("train")
            decay = sum((hyper[name].exp() * weight.square()).sum() for name, weight in weights.items())
            return cross_entropy(net(weights, batch[0]), batch[1]) + decay / 2

        self.tuner = hvp.Tuner(
            module,
            hyper,
            train_loss,
            val_loss,
            weight_optimizer=lambda tensors: torch.optim.Adam(tensors, lr=0.05),
            hyper_optimizer=lambda tensors: torch.optim.RMSprop(tensors, lr=0.05, momentum=0.5),
            weight_scheduler=lambda optimizer: torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.05, total_steps=500),
            hyper_scheduler=lambda optimizer: torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=2),
            solver=hvp.Neumann(4, damping=1.0),
            inner_steps=3,
            warmup_steps=4,
            accumulate=2,
            engine=engine,
        )
        self.train_loader = DataLoader(Points(40, 1), batch_size=8, shuffle=True)
        self.val_loader = DataLoader(Points(20, 2), batch_size=8, shuffle=True)

    def fit(self, hyper_steps: int, **options: Any) -> dict[str, Tensor]:
        """Run, and return everything that must be equal to another run's."""
        settings = {"progress": False, "evaluate": lambda tuner: {"draw": float(torch.rand(()))}, "evaluate_every": 4}
        self.tuner.fit(self.train_loader, self.val_loader, hyper_steps, **settings | options)
        return self.result()

    def result(self) -> dict[str, Tensor]:
        tuner = self.tuner
        losses = [[record.val_loss, record.train_loss, record.metrics.get("draw", 0.0)] for record in tuner.history]
        state = {f"hyper{name}": tensor for name, tensor in zip(tuner.problem.hyper.names, tuner.hyper, strict=True)}
        state |= {
            f"weights{name}": tensor for name, tensor in zip(tuner.problem.weights.names, tuner.weights, strict=True)
        }
        return state | tuner.buffers() | {"losses": torch.tensor(losses), "random": torch.get_rng_state()}


def main(path: str, kill_at: int, name: str = "SIGKILL") -> None:
    """Run 20 hyper steps with a checkpoint every 5, and get a signal at the `kill_at`-th evaluation of a loss."""
    torch.set_num_threads(1)
    evaluations = 0

    def event(kind: str) -> None:
        nonlocal evaluations
        evaluations += 1
        if evaluations == kill_at:
            os.kill(os.getpid(), signal.Signals[name])

    TuningRun(event).fit(20, checkpoint=Path(path), checkpoint_every=5)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), *sys.argv[3:])
