"""When a tuning run is saved: every few hyper steps or minutes, at its end, and when it is interrupted or fails."""

from __future__ import annotations

import math
import signal
import threading
import time
import warnings
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from hvp_engine.tuning import checkpoint, state

if TYPE_CHECKING:
    from hvp_engine.tuning.tuner import Tuner


class Saver:
    """Saves `tuner` to `path` around and during a run; does nothing if `path` is None.

    An exception in the middle of a step rewinds random numbers, loaders and buffers to the end of the step before,
    so that the saved run continues exactly. SIGINT (Ctrl-C) and SIGTERM are held back until the step ends, a hyper step
    with its evaluation and callbacks, which would be missed otherwise; then they raise `KeyboardInterrupt` and
    `SystemExit(143)`. What comes a second time raises at once. A handler that the program has set stays, and so do both
    in other threads than the main one, where Python allows no handlers.

    Arguments:
        every: hyper steps between checkpoints.
        minutes: between checkpoints, at most, whatever steps they take; None: no limit.
        saved: whether the state is in the file already.
    """

    def __init__(self, tuner: Tuner, path: Path | None, every: int, minutes: float | None, saved: bool):
        self._tuner, self._path, self._every = tuner, path, every
        self._seconds = math.inf if minutes is None else 60 * minutes
        self._saved, self._saved_at = saved, time.monotonic()
        self._received: int | None = None
        self._outer_handlers: dict[int, Any] = {}

    def __enter__(self) -> Saver:
        if self._path is not None:
            self._settled = state.position(self._tuner)
            if threading.current_thread() is threading.main_thread():
                for number, default in _DEFAULTS.items():
                    if signal.getsignal(number) == default:
                        self._outer_handlers[number] = signal.signal(number, self._hold_back)
        return self

    def settle(self) -> None:
        """A step, or what follows it, has ended: the state is whole."""
        if self._path is not None:
            self._settled = state.position(self._tuner)
            self._saved = False

    def stop_if_asked(self) -> None:
        """Here a held-back signal acts."""
        if self._received is not None:
            raise _error_of(self._received)

    def save_if_late(self) -> None:
        """Save if the last time is too long ago."""
        if time.monotonic() - self._saved_at >= self._seconds:
            self._save_or_warn()

    def save_if_due(self) -> None:
        """Save if this is the hyper step for it."""
        if self._tuner.hyper_steps % self._every == 0:
            self._save_or_warn()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        try:
            self._save_at_end(error)
        finally:
            for number, handler in self._outer_handlers.items():
                signal.signal(number, handler)
        if error is None and self._received is not None:  # after the last step
            raise _error_of(self._received)

    def _save_at_end(self, error: BaseException | None) -> None:
        if self._path is None:
            return
        if error is None:
            self._save_or_warn()
        elif self._settled.moves != state.moves(self._tuner):
            warnings.warn(
                f"{self._path}: not written, since {type(error).__name__} came in the middle of an optimizer's step; "
                "it holds the last state saved before",
                stacklevel=3,
            )
        else:
            try:
                self._save()
            except Exception as failure:  # the error that came first is the one to show
                warnings.warn(
                    f"{self._path}: could not be written after {type(error).__name__}: {failure}", stacklevel=3
                )

    def _save_or_warn(self) -> None:
        """A full disk does not end the training: later there may be room."""
        self._saved_at = time.monotonic()
        try:
            self._save()
        except OSError as failure:
            warnings.warn(
                f"{self._path}: could not be written ({failure}); training goes on, and it holds the last state saved "
                "before: make room, or call Tuner.save with another place",
                stacklevel=3,
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
        if self._received is not None:
            raise _error_of(number)
        self._received = number


_DEFAULTS = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
"""The signals that are held back, where their handler is this one."""


def _error_of(number: int) -> BaseException:
    """What ends the run: what Python itself makes of Ctrl-C, or an exit with the code that shells use for a signal."""
    return KeyboardInterrupt() if number == signal.SIGINT else SystemExit(128 + number)
