"""Callbacks: what is done around the steps of Algorithm 1."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor

from hvp_engine.tuning.history import Record
from hvp_engine.tuning.processes import OneProcess


class Callback:
    """Something to do at certain moments of :meth:`Tuner.fit`. Override the methods that you need; all do nothing.

    `tuner` is the running :class:`hvp_engine.Tuner`. After each hyper step the three methods `on_evaluate`,
    `on_hyper_step`, `on_round_end` are called in this order, each for all callbacks in the order of the list. With
    `fit(..., checkpoint=...)` a run that is interrupted inside a callback is saved as it was before that method was
    called for the first callback, and calls it no more when it continues.

    In many processes an exception in one of them ends the run in all, and so does a True that asks to stop.

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
        """After a training step; `loss` is its training loss, detached. (With `inner_tolerance` also where the
        gradient was found to be small enough and no step was made.)"""

    def on_evaluate(self, tuner: Any, record: Record) -> Mapping[str, float] | None:
        """After a hyper step; the numbers that are returned join its record."""

    def on_hyper_step(self, tuner: Any, record: Record) -> bool | None:
        """After a hyper step and all evaluations. True: stop here."""

    def on_round_end(self, tuner: Any) -> None:
        """After everything else of a round, also if its hyper step was left out because the hypergradient failed."""

    def on_fit_end(self, tuner: Any, error: BaseException | None) -> None:
        """At the end of a run whose `on_fit_start` returned; `error` is the exception that ended it. Called for the
        last callback first, and for all of them even if one raises."""


HyperStepFunction = Callable[[Any, Record], "bool | None"]


class Function(Callback):
    """A plain function of (tuner, record), called after each hyper step."""

    def __init__(self, function: HyperStepFunction):
        self._function = function

    def on_hyper_step(self, tuner: Any, record: Record) -> bool | None:
        return self._function(tuner, record)


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
                    self.stop |= callback.on_fit_start(self._tuner) is True
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
                    self.stop |= callback.on_hyper_step(self._tuner, history[-1]) is True
            for callback in self._callbacks:
                callback.on_round_end(self._tuner)
        self.stop = any(self._processes.gather(self.stop))
