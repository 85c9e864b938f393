"""Callbacks: what is done around the steps of Algorithm 1."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor

from hvp_engine._support.arguments import shown, unwrapped
from hvp_engine.tuning.history import Record
from hvp_engine.tuning.processes import OneProcess


class Callback:
    """Something to do at certain moments of :meth:`hvp_engine.Tuner.fit`. Override the methods that you need.

    In every method `tuner` is the running :class:`hvp_engine.Tuner`. Methods are called in the order of the list of
    callbacks. After a hyper step come `on_evaluate` of all callbacks, then `on_hyper_step` of all, then `on_round_end`
    of all. An exception ends the run. With `fit(..., checkpoint=...)` it is then saved as it was before the first
    callback's turn, and the run that continues from there does not call that method again for this step.

    In many processes an exception, or a True that asks to stop, ends the run in all of them.

    >>> import torch, hvp_engine as hvp
    >>> class Decays(hvp.tuning.Callback):
    ...     def on_fit_start(self, tuner):
    ...         self.seen = []
    ...     def on_hyper_step(self, tuner, record):
    ...         self.seen.append(float(tuner.hyper[0]))
    ...         return self.seen[-1] < -0.25                           # True ends the run
    >>> train = lambda w, decay, batch: ((w - batch) ** 2).sum() / 2 + (decay.exp() * w ** 2).sum() / 2
    >>> val = lambda w, decay, batch: ((w - batch) ** 2).sum() / 2
    >>> tuner = hvp.Tuner(torch.zeros(2), torch.zeros(()), train, val,
    ...                   weight_optimizer=lambda tensors: torch.optim.SGD(tensors, lr=0.3),
    ...                   hyper_optimizer=lambda tensors: torch.optim.Adam(tensors, lr=0.1))
    >>> decays, batch = Decays(), torch.ones(2)
    >>> len(tuner.fit([batch], [batch], hyper_steps=100, progress=False, callbacks=[decays]))
    3
    >>> [round(decay, 1) for decay in decays.seen]
    [-0.1, -0.2, -0.3]
    """

    def on_fit_start(self, tuner: Any) -> bool | None:
        """Before the first step, with the checkpoint loaded. True: make no step."""

    def on_train_step(self, tuner: Any, loss: Tensor) -> None:
        """After a training step; `loss` is its training loss, detached. (With `inner_tolerance` it is also called where
        the gradient was small enough to end the round's training, and no step was made.)"""

    def on_evaluate(self, tuner: Any, record: Record) -> Mapping[str, float] | None:
        """After a hyper step: return numbers, by name, that join its record."""

    def on_hyper_step(self, tuner: Any, record: Record) -> bool | None:
        """After a hyper step, with all evaluations in its record. True: stop the run."""

    def on_round_end(self, tuner: Any) -> None:
        """At the end of every round, also if its hyper step was left out because the hypergradient failed."""

    def on_fit_end(self, tuner: Any, error: BaseException | None) -> None:
        """At the end; `error` is the exception that ended the run, if any. Called in reverse order, for all callbacks
        whose `on_fit_start` returned, even if one of them raises."""


class Function(Callback):
    """A plain function of (tuner, record), called after each hyper step."""

    def __init__(self, function: Callable[[Any, Record], bool | None]):
        self._function = function

    def on_hyper_step(self, tuner: Any, record: Record) -> bool | None:
        return self._function(tuner, record)


def listed(given: Any) -> list[Callback]:
    """Callbacks and functions as callbacks; `TypeError` for anything else."""
    if not isinstance(given, Sequence):
        raise TypeError(f"callbacks: expected a list; got {shown(given)}: pass [callback]")
    for index, one in enumerate(given):
        if isinstance(one, type) or not (isinstance(one, Callback) or callable(one)):
            raise TypeError(
                f"callbacks[{index}]: expected a Callback or a function of (tuner, record); got {shown(one)}"
            )
    return [one if isinstance(one, Callback) else Function(one) for one in given]


class Evaluation(Callback):
    """A function of the tuner, called every `every` hyper steps, whose numbers join the record."""

    def __init__(self, function: Callable[[Any], Mapping[str, float]], every: int):
        self._function, self._every = function, every

    def on_evaluate(self, tuner: Any, record: Record) -> Mapping[str, float] | None:
        return self._function(tuner) if tuner.hyper_steps % self._every == 0 else None


class Callbacks:
    """The callbacks of one run of `tuner`. `stop` turns True when one of them, in any process, asks to stop."""

    def __init__(self, tuner: Any, callbacks: Sequence[Callback], processes: OneProcess):
        self._tuner, self._callbacks, self._processes = tuner, callbacks, processes
        self.stop = False

    @contextmanager
    def running(self) -> Iterator[None]:
        """The start and the end of the run."""
        with ExitStack() as ends:
            with self._processes.together():
                for callback in self._callbacks:
                    self.stop |= _asks_to_stop(callback.on_fit_start(self._tuner))
                    ends.push(lambda kind, error, trace, callback=callback: callback.on_fit_end(self._tuner, error))
            self.stop = any(self._processes.gather(self.stop))
            yield

    def train_step(self, loss: Tensor) -> None:
        """A training step was made."""
        with self._processes.together():
            for callback in self._callbacks:
                callback.on_train_step(self._tuner, loss)

    def hyper_step(self, made: bool) -> None:
        """A hyper step was made, or left out."""
        history = self._tuner.history
        with self._processes.together():
            if made:
                for callback in self._callbacks:
                    if metrics := callback.on_evaluate(self._tuner, history[-1]):
                        history[-1] = history[-1].joined(metrics)
                for callback in self._callbacks:
                    self.stop |= _asks_to_stop(callback.on_hyper_step(self._tuner, history[-1]))
            for callback in self._callbacks:
                callback.on_round_end(self._tuner)
        self.stop = any(self._processes.gather(self.stop))


def _asks_to_stop(answer: Any) -> bool:
    """Whether a callback's answer is True: Python's, or what a comparison of NumPy's numbers or of tensors gives. Any
    other answer means nothing."""
    return unwrapped(answer) is True
