"""Plain training to compare with Algorithm 1, schedules of its learning rate, and the processor time of both."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

import hvp_engine as hvp
from hvp_engine.hypergradients.estimator import Estimate


class NoTuning:
    """An estimator for a tuner that should only train: it returns hypergradients of zero and the two losses."""

    def __init__(self, train_loss: Callable[..., Tensor], val_loss: Callable[..., Tensor]):
        self.train_loss, self.val_loss = train_loss, val_loss

    @torch.no_grad()
    def __call__(self, weights: Any, hyper: Mapping[str, Tensor], train_batch: Any, val_batch: Any) -> Estimate:
        return Estimate(
            {name: torch.zeros_like(tensor) for name, tensor in hyper.items()},
            self.train_loss(weights, hyper, train_batch),
            self.val_loss(weights, hyper, val_batch),
            gradient_norm=torch.tensor(math.nan, dtype=torch.float64),
        )


def last_quarter(steps: int) -> Callable[[torch.optim.Optimizer], torch.optim.lr_scheduler.LRScheduler]:
    """A learning rate that falls linearly, to a twentieth, in the last quarter of `steps`."""
    return lambda optimizer: torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: max(0.05, min(1.0, 4 * (1 - step / steps)))
    )


def nonmonotone(metric: str, patience: int) -> Callable[[hvp.Tuner, hvp.Record], None]:
    """Divides the learning rate by 4 at each evaluation that is worse than the best one before the last `patience`."""

    def callback(tuner: hvp.Tuner, record: hvp.Record) -> None:
        seen = [earlier.metrics[metric] for earlier in tuner.history if metric in earlier.metrics]
        if metric in record.metrics and len(seen) > patience and seen[-1] > min(seen[:-patience]):
            for group in tuner.weight_optimizer.param_groups:
                group["lr"] /= 4

    return callback


class ProcessorTime(hvp.tuning.Callback):
    """Adds `processor_seconds` to every record: of all steps so far, without what :meth:`untimed` has wrapped.

    Other work on the machine does not count. Threads of OpenMP that wait do, so it is meant for one thread. After an
    interruption the time of the step that it hit is missing.
    """

    def __init__(self) -> None:
        self._start = 0.0

    def untimed(
        self, evaluate: Callable[[hvp.Tuner], Mapping[str, float]]
    ) -> Callable[[hvp.Tuner], Mapping[str, float]]:
        def wrapped(tuner: hvp.Tuner) -> Mapping[str, float]:
            before = time.process_time()
            found = evaluate(tuner)
            self._start += time.process_time() - before
            return found

        return wrapped

    def on_fit_start(self, tuner: hvp.Tuner) -> None:
        measured = [record.metrics for record in tuner.history if "processor_seconds" in record.metrics]
        self._start = time.process_time() - (measured[-1]["processor_seconds"] if measured else 0.0)

    def on_evaluate(self, tuner: hvp.Tuner, record: hvp.Record) -> dict[str, float]:
        return {"processor_seconds": time.process_time() - self._start}
