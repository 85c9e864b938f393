"""Watching a tuning run: progress bar, printed lines, TensorBoard; and stopping it early."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from hvp_engine._support.arguments import check_count
from hvp_engine.errors import HvpError
from hvp_engine.tuning.callbacks import Callback
from hvp_engine.tuning.history import Record


class ProgressBar(Callback):
    """A progress bar over the `total` hyper steps of a run; with `verbose` also one printed line for each of them."""

    def __init__(self, total: int, progress: bool, verbose: bool):
        self._total, self._progress, self._verbose = total, progress, verbose

    def on_fit_start(self, tuner: Any) -> None:
        self._bar = tqdm(
            total=self._total, initial=tuner.hyper_steps, disable=not self._progress, desc="hyper steps", unit="step"
        )

    def on_hyper_step(self, tuner: Any, record: Record) -> None:
        self._bar.set_postfix(train=f"{record.train_loss:.4f}", val=f"{record.val_loss:.4f}", refresh=False)
        if self._verbose:
            self._bar.write(record.line())

    def on_round_end(self, tuner: Any) -> None:
        self._bar.update()

    def on_fit_end(self, tuner: Any, error: BaseException | None) -> None:
        self._bar.close()


class TensorBoard(Callback):
    """Writes every number of a record to `target`: a folder for event files, or a writer with `add_scalar`."""

    def __init__(self, target: Any):
        self._writer, self._owned = target, isinstance(target, str | Path)
        if self._owned:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError as error:
                raise HvpError(
                    f"tensorboard: expected the package tensorboard to be installed ({error}): `pip install "
                    "tensorboard`, or pass a writer of your own with add_scalar(name, value, step)"
                ) from error
            self._writer = SummaryWriter(str(target))

    def on_hyper_step(self, tuner: Any, record: Record) -> None:
        for name, value in record.row().items():
            if name != "hyper_step" and isinstance(value, int | float):
                self._writer.add_scalar(f"hvp_engine/{name}", value, record.hyper_step)

    def on_fit_end(self, tuner: Any, error: BaseException | None) -> None:
        if self._owned:
            self._writer.close()


class EarlyStopping(Callback):
    """Stops after `patience` hyper steps without a new minimum of `metric`.

    Arguments:
        metric: a field of :class:`Record`, a name from the evaluation, or a function of the record. A record without
            the metric counts as no improvement.
        patience: hyper steps.
    """

    def __init__(self, metric: str | Callable[[Record], float], patience: int):
        self._metric, self._patience = metric, check_count(patience, "patience", what="or None")
        self._best, self._best_step, self._found = math.inf, -1, False

    def on_fit_start(self, tuner: Any) -> bool:
        """Early stopping is decided by the whole history, so a run that was stopped early stays stopped."""
        for record in tuner.history:
            self._note(record)
        return bool(tuner.history) and self._over(tuner.history[-1])

    def on_hyper_step(self, tuner: Any, record: Record) -> bool:
        self._note(record)
        return self._over(record)

    def _note(self, record: Record) -> None:
        known: dict[Any, Any] = {self._metric: self._metric(record)} if callable(self._metric) else record.row()
        self._found |= self._metric in known
        value = known.get(self._metric, math.nan)
        if value < self._best:
            self._best, self._best_step = value, record.hyper_step

    def _over(self, record: Record) -> bool:
        over = record.hyper_step - self._best_step >= self._patience
        if over and not self._found:
            raise ValueError(
                f"metric: expected a field of the record or a name from evaluate; got {self._metric!r}, which no "
                f"record has, the last one {', '.join(record.row())}: correct it, or, where evaluate_every is larger "
                "than patience, raise patience"
            )
        return over
