"""Algorithm 1: train the weights, and every few steps move the hyperparameters along their hypergradient."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from hvp_engine._support.arguments import check_count
from hvp_engine._support.pytree import refuse_inference_mode
from hvp_engine._support.timing import Moment
from hvp_engine.distributed import Processes
from hvp_engine.errors import CheckpointError
from hvp_engine.tuning import checkpoint as checkpoints
from hvp_engine.tuning import state
from hvp_engine.tuning.autosave import Saver
from hvp_engine.tuning.data_stream import Batches
from hvp_engine.tuning.history import History, Record
from hvp_engine.tuning.monitor import EarlyStopping, Monitor
from hvp_engine.tuning.optimizer_step import Steps

Callback = Callable[["Tuner", Record], "bool | None"]
Evaluation = Callable[["Tuner"], Mapping[str, float]]


class Tuner(Steps):
    """Tunes hyperparameters while the weights train (Algorithm 1).

    A round is `inner_steps` training steps and one hyper step; :meth:`fit` runs them.

    Arguments:
        module: the module to train (its parameters that require grad), or a tree of weight tensors. With a module
            its buffers become part of checkpoints.
        hyper: hyperparameters: any tree of tensors, or a module whose parameters they are; updated in place.
        train_loss, val_loss: `loss(weights, hyper, batch)` -> scalar tensor; weights are the named parameters of
            `module` (or its tree), usually passed to `hvp.functional(module)`.
        weight_optimizer, hyper_optimizer: torch optimizers over these tensors, or functions that make one from the
            list of tensors, as in `lambda tensors: torch.optim.Adam(tensors, lr=1e-3)`.
        solver: how to invert the Hessian; default `Neumann(20)`.
        inner_steps: training steps before each hyper step, >= 1; with `inner_tolerance` at most so many.
        engine: see :class:`Hypergradient`.
        inner_tolerance: a round's training ends as soon as ||dL_T/dw|| of a step's batches is not above it.
        warmup_steps: training steps before the first round.
        accumulate: batches over which a training step averages its gradient, one after the other.
        train_batches, val_batches: batches over which the losses of a hypergradient are averaged, as one problem:
            its products are averages over these batches, at their cost in time and memory.
        weight_scheduler, hyper_scheduler: learning-rate schedulers of the optimizers, or functions that make one
            from the optimizer; stepped after each training step and hyper step. `ReduceLROnPlateau` gets the
            training loss of the step (which waits for the device), or the validation loss.
        weight_clip, hyper_clip: largest norm of the gradient and the hypergradient.
        bounds: a pair (low, high) to which the hyperparameters are projected after each hyper step; each a number,
            None, or a tree like `hyper` of numbers or tensors.
        estimator: another way to a hypergradient, called as `estimator(weights, hyper, train_batch, val_batch)` (lists
            of batches where `train_batches`, `val_batches` are above 1), returning an
            :class:`~hvp_engine.hypergradients.estimator.Estimate`; instead of `solver` and `engine`.

    Attributes:
        history: a :class:`~hvp_engine.tuning.history.History` of :class:`Record`.
        hyper_steps: rounds made so far, those left out included.

    In many processes, as started by torchrun, the losses are :class:`DataParallel` and each process has its own
    loaders, for example with a `DistributedSampler`; the steps are then those of one process on all their batches. What
    one process raises, its loaders, callbacks and files included, ends the run in all of them; a callback that returns
    True in one stops all. Each writes a checkpoint of its own, `run-0-of-4.pt` for `run.pt`. Beside the sums of the
    losses this takes two small messages for each training step and three for each hyper step.

    Memory: beside what the hypergradient needs, a copy of the initial weights on the CPU, for :meth:`retrain`.

    Errors: `TypeError`/`ValueError` naming the argument.

    Source: Algorithm 1 of Lorraine, Vicol, Duvenaud 2019.

    >>> import torch, hvp_engine as hvp
    >>> data, target = torch.tensor([1.0, 3.0]), torch.tensor([0.8, 1.5])
    >>> weights, decay = torch.zeros(2), torch.zeros(2)                # w* = data / (1 + exp(decay))
    >>> train = lambda w, d, batch: ((w - batch) ** 2).sum() / 2 + (d.exp() * w ** 2).sum() / 2
    >>> val = lambda w, d, batch: ((w - batch) ** 2).sum() / 2
    >>> tuner = hvp.Tuner(weights, decay, train, val,
    ...                   weight_optimizer=lambda tensors: torch.optim.SGD(tensors, lr=0.3),
    ...                   hyper_optimizer=lambda tensors: torch.optim.Adam(tensors, lr=0.1), warmup_steps=20)
    >>> history = tuner.fit([data], [target], hyper_steps=200, progress=False)
    >>> weights
    tensor([0.8000, 1.5000])
    """

    def fit(
        self,
        train_loader: Iterable[Any],
        val_loader: Iterable[Any],
        hyper_steps: int = 1000,
        progress: bool = True,
        *,
        checkpoint: str | Path | None = None,
        checkpoint_every: int = 50,
        checkpoint_minutes: float | None = 10.0,
        verbose: bool = False,
        callbacks: Sequence[Callback] = (),
        evaluate: Evaluation | None = None,
        evaluate_every: int = 1,
        metric: str | Callable[[Record], float] = "val_loss",
        patience: int | None = None,
        tensorboard: Any = None,
    ) -> History:
        """Run rounds until `hyper_steps` have been made in this tuner's life; return the history so far.

        So `hyper_steps` is the total of a run: called again, or with a checkpoint in another process, it continues
        where the run stopped and ends where it would have ended.

        Arguments:
            train_loader, val_loader: re-iterable loaders of batches; `[batch]` for a full batch. Called again with
                the same objects, the epochs go on where they stopped.
            hyper_steps: rounds in all, those that were left out included.
            progress: show a progress bar.
            checkpoint: a file to continue from, if it exists and this tuner has not made a step yet, and to save to:
                every `checkpoint_every` hyper steps, after the step at which the last time is `checkpoint_minutes`
                ago (a round may take hours), at the end, on a signal and on any exception, atomically, with the one
                before kept as `<checkpoint>.previous`; but never weights that are NaN or infinite. It holds weights,
                buffers, hyperparameters, optimizers, schedulers, random states, the estimator's state, the
                loaders' positions and the history. On the CPU the continued run is the uninterrupted one, bit for bit
                (with engine="auto", which measures, as long as both chose alike; a checkpoint keeps the choice). A
                disk that is full in the meantime gives a warning, and the training goes on.

                With a checkpoint SIGINT (Ctrl-C) and SIGTERM stop the run at the end of the step, a hyper step with its
                evaluation and callbacks; it is saved, and `KeyboardInterrupt` or `SystemExit(143)` raised. A second
                signal raises at once. That is so in the main thread, for the time of this call, and for a signal that
                the program itself does not handle.
            checkpoint_minutes: None for no checkpoints by time; many processes, whose clocks differ, make none.
            verbose: print one line for each hyper step.
            callbacks: functions of (tuner, record), called after each hyper step; one that returns True stops the run.
            evaluate: a function of the tuner that returns a dict of numbers, which join the record, called every
                `evaluate_every` hyper steps.
            metric, patience: stop early after `patience` hyper steps without a new minimum of `metric`: a field of
                the record, a name from `evaluate`, or a function of the record.
            tensorboard: a folder for event files (TensorBoard must be installed), or a writer with `add_scalar`.

        Errors: `ValueError`/`TypeError` for loaders that are empty or not re-iterable; :class:`CheckpointError` for
        a checkpoint that is damaged or of something else, or where none can be written; :class:`DivergenceError` if
        ten hypergradients in a row fail. A failed or non-finite hypergradient never reaches the optimizer: the hyper
        step is left out with a warning.
        """
        refuse_inference_mode("fit")
        check_count(hyper_steps, "hyper_steps", least=0)
        check_count(checkpoint_every, "checkpoint_every")
        check_count(evaluate_every, "evaluate_every")
        if checkpoint_minutes is not None and not checkpoint_minutes >= 0:
            raise ValueError(f"checkpoint_minutes: expected a number >= 0 or None; got {checkpoint_minutes!r}")
        path = None if checkpoint is None else self._own(checkpoint)
        with self._together():
            loaded = self._continue_from(path)
        if path is not None and self.processes is not None:
            self._agree_on_start(path, self.processes)
        with self._together():
            train, val = self._stream("train_loader", train_loader), self._stream("val_loader", val_loader)
        stopping = EarlyStopping(metric, patience, self.history)
        monitor = Monitor(hyper_steps, self.hyper_steps, progress, verbose, tensorboard)
        stopped = self._any(stopping.over)
        minutes = checkpoint_minutes if self.processes is None else None
        with monitor, Saver(self, path, checkpoint_every, minutes, saved=loaded) as saver:
            while self.hyper_steps < hyper_steps and not stopped:
                start = Moment(self.device)
                while self.steps_to_go > 0:
                    self.inner_step(self._take(train, self.accumulate))
                    with self._together():
                        saver.settle()
                        saver.save_if_late()
                        saver.stop_if_asked()
                record = self.round(train, val, start)
                with self._together():
                    saver.settle()
                    monitor.advance()
                    if record is not None:
                        if evaluate is not None and self.hyper_steps % evaluate_every == 0:
                            record = self._evaluated(record, evaluate)
                            saver.settle()
                        stopping.see(record)
                        monitor.report(record)
                        for callback in callbacks:
                            stopped |= callback(self, record) is True
                        saver.settle()
                    saver.save_if_due()
                    saver.stop_if_asked()
                stopped = self._any(stopped or stopping.over)
        return self.history

    def train(self, train_loader: Iterable[Any], steps: int, *, progress: bool = True) -> list[float]:
        """`steps` training steps with the hyperparameters as they are; returns the loss of each.

        Called again with the same loader object, the epoch goes on where it stopped.
        """
        check_count(steps, "steps", least=0)
        stream = self._stream("train", train_loader)
        losses = [
            self.train_step(*self._take(stream, self.accumulate))
            for _ in tqdm(range(steps), disable=not progress, desc="training", unit="step")
        ]
        return torch.stack(losses).tolist() if losses else []

    def retrain(
        self,
        train_loader: Iterable[Any],
        steps: int,
        *,
        init: Callable[[Any], object] | None = None,
        progress: bool = True,
    ) -> list[float]:
        """Train from scratch, `steps` steps with the tuned hyperparameters; returns the loss of each step.

        Weights and buffers go back to what they were when the tuner was made, or to what `init` makes of them; weight
        optimizer and scheduler begin anew. The loader may hold more than the one of :meth:`fit`: training and
        validation data together, as in the paper.

        Arguments:
            train_loader: a re-iterable loader of batches.
            steps: training steps.
            init: a function that is given `module` and sets its weights in place, as in
                `lambda module: module.reset_parameters()`.

        Source: section 5.6 of Lorraine, Vicol, Duvenaud 2019.
        """
        with torch.no_grad():
            for weight, initial in zip(self.weights, self.initial_weights, strict=True):
                weight.copy_(initial)
            for name, buffer in self.buffers().items():
                if name.startswith("module."):
                    buffer.copy_(self.initial_buffers[name])
            if init is not None:
                init(self.module)
        self.weight_side.reset()
        self.streams.pop("train", None)
        return self.train(train_loader, steps, progress=progress)

    def save(self, path: str | Path) -> None:
        """Write a checkpoint as :meth:`fit` does.

        Errors: :class:`CheckpointError` where it cannot be written; the checkpoints that were there stay.
        """
        path = self._own(path)
        checkpoints.check_place(path)
        try:
            checkpoints.write(path, state.state_dict(self, state.position(self)))
        except OSError as error:
            raise CheckpointError(
                f"{path}: expected a disk that takes the checkpoint; got {error}: make room, or save to another place"
            ) from error

    def load(self, path: str | Path) -> None:
        """Become what the tuner was that wrote this checkpoint.

        Learning rates and the like are the checkpoint's; `inner_steps`, bounds, clipping and batch counts this
        tuner's. The loaders' positions are taken up by the next :meth:`fit`.

        Errors: :class:`CheckpointError` for a file that is damaged (if the one before it is, too), of something
        else, of a newer version, or of a tuner with other tensors, optimizers or schedulers; nothing has changed then.
        """
        self._read(self._own(path))

    def _continue_from(self, path: Path | None) -> bool:
        """Whether a checkpoint was loaded."""
        if path is None:
            return False
        checkpoints.check_place(path)
        fresh = state.moves(self) == (0, 0) and self.hyper_steps == 0
        if fresh and checkpoints.exists(path):
            self._read(path)
            return True
        return False

    def _read(self, path: Path) -> None:
        state.load_state_dict(self, checkpoints.read(path), str(path))

    def _own(self, path: str | Path) -> Path:
        """The file of this process."""
        path = Path(path)
        if self.processes is None:
            return path
        return path.with_name(f"{path.stem}-{self.processes.rank}-of-{self.processes.count}{path.suffix}")

    def _agree_on_start(self, path: Path, processes: Processes) -> None:
        """Where a kill came between the writes of two processes, go on from the older of the two moments."""
        steps = processes.gather(self.weight_side.steps, self.device)
        if len(set(steps)) > 1:
            with self._together():
                if self.weight_side.steps > min(steps):
                    self._read(checkpoints.previous(path))
            steps = processes.gather(self.weight_side.steps, self.device)
        if len(set(steps)) > 1:
            raise CheckpointError(
                f"{path}: expected checkpoints of one moment in all processes; got training steps "
                f"{', '.join(f'{step:.0f}' for step in steps)}: delete them to begin again"
            )

    def _stream(self, name: str, loader: Iterable[Any]) -> Batches:
        stream = self.streams.get(name)
        if stream is None or stream.loader is not loader:
            stream = Batches(loader, self.device, name if name.endswith("loader") else f"{name}_loader")
            if name in self.stream_states:
                stream.load_state_dict(self.stream_states[name])
                del self.stream_states[name]  # only now: a loader that was refused can be corrected
            self.streams[name] = stream
        return stream

    def _evaluated(self, record: Record, evaluate: Evaluation) -> Record:
        """The record with the metrics of `evaluate`, also in the history."""
        metrics = {name: float(value) for name, value in evaluate(self).items()}
        if taken := metrics.keys() & record.row().keys():
            raise ValueError(
                f"evaluate: expected names that are no fields of the record; got {sorted(taken)[0]!r}: rename it"
            )
        self.history[-1] = replace(record, metrics=metrics)
        return self.history[-1]
