"""When a tuning run is saved: every few hyper steps, at its end, and when it is interrupted or fails."""

from __future__ import annotations

import signal
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from hvp_engine.tuning import checkpoint, state

if TYPE_CHECKING:
    from hvp_engine.tuning.tuner import Tuner


class Saver:
    """Saves `tuner` to `path` around and during a run; does nothing if `path` is None.

    An exception in the middle of a step rewinds random numbers, loaders and buffers to the end of the step before,
    so that the saved run continues exactly. Ctrl-C is held back until the step ends; pressed again it acts at once.

    Arguments:
        every: hyper steps between checkpoints.
        saved: whether the state is in the file already.
    """

    def __init__(self, tuner: Tuner, path: Path | None, every: int, saved: bool):
        self._tuner, self._path, self._every = tuner, path, every
        self._saved = saved
        self._interrupted = False
        self._outer_handler: Callable[[int, FrameType | None], Any] | None = None

    def __enter__(self) -> Saver:
        if self._path is not None:
            self._settled = state.position(self._tuner)
            is_main = threading.current_thread() is threading.main_thread()
            if is_main and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
                self._outer_handler = signal.default_int_handler
                signal.signal(signal.SIGINT, self._hold_back)
        return self

    def settle(self) -> None:
        """A step has ended: the state is whole, and here a held-back Ctrl-C acts."""
        if self._path is None:
            return
        self._settled = state.position(self._tuner)
        self._saved = False
        if self._interrupted:
            raise KeyboardInterrupt

    def save_if_due(self) -> None:
        """Save if this is the hyper step for it."""
        if self._tuner.hyper_steps % self._every == 0:
            self._save()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if self._outer_handler is not None:
            signal.signal(signal.SIGINT, self._outer_handler)
        if self._path is None:
            return
        if error is None:
            self._save()
        elif self._settled.moves != state.moves(self._tuner):
            warnings.warn(
                f"{self._path}: not written, since {type(error).__name__} came in the middle of an optimizer's step; "
                "it holds the last state saved before",
                stacklevel=2,
            )
        else:
            try:
                self._save()
            except Exception as failure:  # the error that came first is the one to show
                warnings.warn(
                    f"{self._path}: could not be written after {type(error).__name__}: {failure}", stacklevel=2
                )

    def _save(self) -> None:
        if self._path is None or self._saved:
            return
        if state.broken(self._tuner):  # written again and again, it would push out the last good one
            warnings.warn(
                f"{self._path}: not written, since weights or hyperparameters are NaN or infinite; it holds the last "
                "state saved before",
                stacklevel=3,
            )
        else:
            checkpoint.write(self._path, state.state_dict(self._tuner, self._settled))
            self._saved = True

    def _hold_back(self, number: int, frame: FrameType | None) -> None:
        if self._interrupted:
            signal.default_int_handler(number, frame)
        self._interrupted = True
