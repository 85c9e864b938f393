"""Watching a tuning run: progress bar, printed lines, TensorBoard, and when to stop early."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Protocol

from tqdm.auto import tqdm

from hvp_engine._support.arguments import check_count
from hvp_engine.errors import HvpError
from hvp_engine.tuning.history import Record


class ScalarWriter(Protocol):
    """What TensorBoard's SummaryWriter offers."""

    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> None: ...


class Monitor:
    """Shows records as they come.

    Arguments:
        total, done: hyper steps of the run, and those made already.
        progress: show a progress bar.
        verbose: print each record's line.
        tensorboard: a folder for TensorBoard's event files, a writer with `add_scalar`, or None.
    """

    def __init__(self, total: int, done: int, progress: bool, verbose: bool, tensorboard: Any):
        self._verbose = verbose
        self._owned = isinstance(tensorboard, str | Path)
        self._writer: Any = summary_writer(tensorboard) if self._owned else tensorboard
        self._bar = tqdm(total=total, initial=done, disable=not progress, desc="hyper steps", unit="step")

    def __enter__(self) -> Monitor:
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.close()
        if self._owned:
            self._writer.close()

    def advance(self) -> None:
        """A hyper step was made or left out."""
        self._bar.update()

    def report(self, record: Record) -> None:
        self._bar.set_postfix(train=f"{record.train_loss:.4f}", val=f"{record.val_loss:.4f}", refresh=False)
        if self._verbose:
            self._bar.write(record.line())
        if self._writer is not None:
            for name, value in record.row().items():
                if name != "hyper_step" and isinstance(value, int | float):
                    self._writer.add_scalar(f"hvp_engine/{name}", value, record.hyper_step)


def summary_writer(folder: str | Path) -> ScalarWriter:
    """TensorBoard's writer into `folder`; :class:`HvpError` if TensorBoard is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise HvpError(
            f"tensorboard: expected the package tensorboard to be installed ({error}): `pip install tensorboard`, or "
            "pass a writer of your own with add_scalar(name, value, step)"
        ) from error
    return SummaryWriter(str(folder))


class EarlyStopping:
    """Over when `patience` hyper steps brought no new minimum of `metric`.

    Arguments:
        metric: a field of :class:`Record`, a name that the evaluation returns, or a function of the record; lower
            is better. Records without the metric count as no improvement.
        patience: hyper steps; None never stops.
        past: records of the run so far.
    """

    def __init__(self, metric: str | Callable[[Record], float], patience: int | None, past: Iterable[Record]):
        if patience is not None:
            check_count(patience, "patience", what="or None")
        self._metric, self._patience = metric, patience
        self._best, self._best_step, self._last = math.inf, 0, 0
        self._known = False
        for record in past:
            self.see(record)

    def see(self, record: Record) -> None:
        if self._patience is None:
            return
        self._last = record.hyper_step
        value = self._metric(record) if callable(self._metric) else record.row().get(self._metric, math.nan)
        if not self._known or value < self._best:  # the first step begins the count even without a value
            self._best_step, self._known = record.hyper_step, True
            self._best = value if value < self._best else self._best

    @property
    def over(self) -> bool:
        return self._patience is not None and self._last - self._best_step >= self._patience
