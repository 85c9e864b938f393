"""When a tuning run is saved: every few hyper steps or minutes, at its end, and when it is interrupted or fails."""

from __future__ import annotations

import math
import signal
import threading
import time
import warnings
from collections.abc import Iterable
from pathlib import Path
from types import FrameType
from typing import Any

from torch import Tensor

from hvp_engine._support.arguments import shown
from hvp_engine.errors import CheckpointError
from hvp_engine.tuning import checkpoint
from hvp_engine.tuning.callbacks import Callback
from hvp_engine.tuning.history import Record

_DEFAULTS = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
"""The signals that are held back while they have these, Python's own, handlers."""


class Autosave(Callback):
    """Saves a tuner to `path` during and after a run. It must be the first callback.

    It notes the tuner's position whenever a step, or what follows it, is complete. If an exception comes in the middle
    of a step, random numbers, loaders and buffers are saved as they were at the last such position, so that the
    saved run continues exactly.

    SIGINT (Ctrl-C) and SIGTERM are held back until the step ends, a hyper step with its evaluation and callbacks; then
    they raise `KeyboardInterrupt` and `SystemExit(143)`. A second signal raises at once. Handlers set by the program
    are left alone, and so are all handlers outside of the main thread, where Python does not allow to set any.

    Arguments:
        path: the checkpoint file.
        every: hyper steps between checkpoints.
        minutes: save after a step if the last checkpoint is this old; None: never.
        saved: whether the file already holds the state at the start of the run.
    """

    def __init__(self, path: Path, every: int, minutes: float | None, saved: bool):
        self._path, self._every = path, every
        self._seconds = math.inf if minutes is None else 60 * minutes
        self._saved, self._saved_at = saved, time.monotonic()
        self._received: int | None = None
        self._outer_handlers: dict[int, Any] = {}

    @classmethod
    def resuming(cls, tuner: Any, file: str | Path, every: int, minutes: float | None) -> Autosave:
        """Load the checkpoint `file`, if it exists and `tuner` has not made a step yet; then save there.

        In many processes each has a file of its own. If a kill came between the writes of two processes, all continue
        from the older of the two states.
        """
        if not isinstance(file, str | Path):
            raise TypeError(f"checkpoint: expected the path of a file; got {shown(file)}")
        processes = tuner.processes
        path: Path = processes.own(file)
        with processes.together():
            checkpoint.check_place(path)
            found = tuner.problem.moves == (0, 0) and tuner.hyper_steps == 0 and checkpoint.exists(path)
            if found:
                tuner.load_state_dict(checkpoint.read(path), source=str(path))
        steps = processes.gather(tuner.problem.moves[0])
        if len(set(steps)) > 1:
            with processes.together():
                if tuner.problem.moves[0] > min(steps):
                    tuner.load_state_dict(checkpoint.read(checkpoint.previous(path)), source=str(path))
            steps = processes.gather(tuner.problem.moves[0])
        if len(set(steps)) > 1:
            raise CheckpointError(
                f"{path}: expected checkpoints of one moment in all processes; got training steps "
                f"{', '.join(f'{step:.0f}' for step in steps)}: delete them to begin again"
            )
        return cls(path, every, minutes if processes.clock_is_shared else None, saved=found)

    def on_fit_start(self, tuner: Any) -> None:
        self._settled, self._moves = tuner.position(), tuner.problem.moves
        if threading.current_thread() is threading.main_thread():
            for number, default in _DEFAULTS.items():
                if signal.getsignal(number) == default:
                    self._outer_handlers[number] = signal.signal(number, self._hold_back)

    def on_train_step(self, tuner: Any, loss: Tensor) -> None:
        self._settle(tuner)
        if time.monotonic() - self._saved_at >= self._seconds:
            self._save_or_warn(tuner)
        self._stop_if_asked()

    def on_evaluate(self, tuner: Any, record: Record) -> None:
        self._settle(tuner)

    def on_hyper_step(self, tuner: Any, record: Record) -> None:
        self._settle(tuner)

    def on_round_end(self, tuner: Any) -> None:
        self._settle(tuner)
        if tuner.hyper_steps % self._every == 0:
            self._save_or_warn(tuner)
        self._stop_if_asked()

    def on_fit_end(self, tuner: Any, error: BaseException | None) -> None:
        try:
            self._save_or_warn(tuner) if error is None else self._save_after(tuner, error)
        finally:
            for number, handler in self._outer_handlers.items():
                signal.signal(number, handler)
        if error is None:
            self._stop_if_asked()  # a signal that came after the last step

    def _settle(self, tuner: Any) -> None:
        """The tuner is between two steps."""
        self._settled, self._moves = tuner.position(), tuner.problem.moves
        self._saved = False

    def _stop_if_asked(self) -> None:
        """Let a signal that was held back take effect."""
        if self._received is not None:
            raise _error_of(self._received)

    def _save_after(self, tuner: Any, error: BaseException) -> None:
        name = type(error).__name__
        if self._moves != tuner.problem.moves:
            self._warn(f"not written, since {name} came in the middle of an optimizer's step; {_HOLDS_LAST}")
            return
        try:
            self._save(tuner)
        except Exception as failure:  # the error that came first is the one to raise
            self._warn(f"could not be written after {name}: {failure}")

    def _save_or_warn(self, tuner: Any) -> None:
        """A full disk does not end the training: later there may be room."""
        self._saved_at = time.monotonic()
        try:
            self._save(tuner)
        except OSError as failure:
            self._warn(
                f"could not be written ({failure}); training goes on, and {_HOLDS_LAST}: make room, or call "
                "Tuner.save with another place"
            )

    def _save(self, tuner: Any) -> None:
        if self._saved:
            return
        if _broken(tuner.weights, tuner.hyper):  # saved again and again, it would push out the last good state
            self._warn(f"not written, since weights or hyperparameters are NaN or infinite; {_HOLDS_LAST}")
            return
        checkpoint.write(self._path, tuner.state_dict(self._settled))
        self._saved = True

    def _warn(self, text: str) -> None:
        warnings.warn(f"{self._path}: {text}", stacklevel=2)

    def _hold_back(self, number: int, frame: FrameType | None) -> None:
        if self._received is not None:
            raise _error_of(number)
        self._received = number


_HOLDS_LAST = "it holds the last state saved before"


def _broken(weights: Iterable[Tensor], hyper: Iterable[Tensor]) -> bool:
    """Whether training cannot recover: a weight is NaN or infinite, or a hyperparameter NaN.

    (An infinite hyperparameter can be intended: a log-decay of -inf is no decay.)
    """
    lost = any(not bool(weight.isfinite().all()) for weight in weights)
    return lost or any(bool(h.isnan().any()) for h in hyper)


def _error_of(number: int) -> BaseException:
    """What a signal raises: as Python does for Ctrl-C, otherwise an exit with the code that shells use."""
    return KeyboardInterrupt() if number == signal.SIGINT else SystemExit(128 + number)
