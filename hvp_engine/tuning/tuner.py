"""Algorithm 1: train the weights, and every few steps move the hyperparameters along their hypergradient."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from hvp_engine._support.arguments import check_count
from hvp_engine._support.pytree import refuse_inference_mode
from hvp_engine._support.random_state import RandomState
from hvp_engine._support.timing import Moment
from hvp_engine.hypergradients.estimator import Estimate, EstimatorLike
from hvp_engine.solvers import Solver
from hvp_engine.tuning import checkpoint as checkpoints
from hvp_engine.tuning.autosave import Autosave, resume
from hvp_engine.tuning.bilevel import BilevelProblem, Loss
from hvp_engine.tuning.callbacks import Callback, Callbacks, Evaluation, Function
from hvp_engine.tuning.data_stream import Batches, Streams
from hvp_engine.tuning.history import History, Record
from hvp_engine.tuning.monitor import EarlyStopping, ProgressBar, TensorBoard
from hvp_engine.tuning.optimizer_step import OptimizerLike, SchedulerLike


class Tuner:
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

    def __init__(
        self,
        module: Any,
        hyper: Any,
        train_loss: Loss,
        val_loss: Loss,
        *,
        weight_optimizer: OptimizerLike,
        hyper_optimizer: OptimizerLike,
        solver: Solver | None = None,
        inner_steps: int = 5,
        engine: str = "auto",
        inner_tolerance: float | None = None,
        warmup_steps: int = 0,
        accumulate: int = 1,
        train_batches: int = 1,
        val_batches: int = 1,
        weight_scheduler: SchedulerLike | None = None,
        hyper_scheduler: SchedulerLike | None = None,
        weight_clip: float | None = None,
        hyper_clip: float | None = None,
        bounds: Any = None,
        estimator: EstimatorLike | None = None,
    ):
        self.inner_steps = check_count(inner_steps, "inner_steps")
        self.warmup_steps = check_count(warmup_steps, "warmup_steps", least=0)
        self.accumulate = check_count(accumulate, "accumulate")
        self.train_batches = check_count(train_batches, "train_batches")
        self.val_batches = check_count(val_batches, "val_batches")
        if inner_tolerance is not None and not inner_tolerance >= 0:
            raise ValueError(f"inner_tolerance: expected a number >= 0 or None; got {inner_tolerance!r}")
        self.inner_tolerance, self.module = inner_tolerance, module
        self.problem = problem = BilevelProblem(
            module, hyper, train_loss, val_loss,
            weight_optimizer=weight_optimizer, weight_scheduler=weight_scheduler, weight_clip=weight_clip,
            hyper_optimizer=hyper_optimizer, hyper_scheduler=hyper_scheduler, hyper_clip=hyper_clip, bounds=bounds,
            estimator=estimator, solver=solver, engine=engine, train_batches=train_batches, val_batches=val_batches,
        )  # fmt: skip
        self.weights, self.weight_names = problem.weights.tensors, problem.weights.names
        self.hyper, self.hyper_names = problem.hyper.tensors, problem.hyper.names
        self.weight_side, self.hyper_side = problem.weight_side, problem.hyper_side
        self.estimator, self.processes, self.device = problem.given_estimator, problem.processes, self.weights[0].device
        self.buffers, self.initial_weights = problem.buffers, problem.initial_weights
        self.history = History()
        self.hyper_steps = 0
        self.steps_to_go = self.warmup_steps + self.inner_steps
        self.streams = Streams(self.device)

    @property
    def weight_optimizer(self) -> torch.optim.Optimizer:
        return self.weight_side.optimizer

    @property
    def hyper_optimizer(self) -> torch.optim.Optimizer:
        return self.hyper_side.optimizer

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
        callbacks: Sequence[Callback | Callable[[Tuner, Record], bool | None]] = (),
        evaluate: Callable[[Tuner], Mapping[str, float]] | None = None,
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
        attached: list[Callback] = []
        if checkpoint is not None:
            path = self.processes.own(checkpoint)
            saved = resume(self, path, self.processes)
            minutes = checkpoint_minutes if self.processes.one_clock else None
            attached.append(Autosave(path, checkpoint_every, minutes, saved))
        if evaluate is not None:
            attached.append(Evaluation(evaluate, evaluate_every))
        if patience is not None:
            attached.append(EarlyStopping(metric, patience))
        attached.append(ProgressBar(hyper_steps, progress, verbose))
        with self.processes.together():
            train = self.streams.open("train_loader", train_loader)
            val = self.streams.open("val_loader", val_loader)
            if tensorboard is not None:
                attached.append(TensorBoard(tensorboard))
        attached += [given if isinstance(given, Callback) else Function(given) for given in callbacks]
        events = Callbacks(self, attached, self.processes)
        with events.running():
            while self.hyper_steps < hyper_steps and not events.stop:
                start = Moment(self.device)
                while self.steps_to_go > 0:
                    loss = self._inner_step(train)
                    events.train_step(loss)
                record = self._outer_step(train, val, start)
                events.hyper_step(record)
        return self.history

    def train_step(self, *batches: Any) -> Tensor:
        """One step of the weight optimizer on the average over `batches`; returns the loss, detached."""
        return self.problem.train_step(batches)[0]

    def hyper_step(self, train_batch: Any, val_batch: Any) -> Estimate | None:
        """One step of the hyper optimizer; None, and a warning, if the hypergradient failed.

        The batches are lists where `train_batches`, `val_batches` are above 1.
        """
        return self.problem.hyper_step(train_batch, val_batch)[0]

    def _inner_step(self, train: Batches) -> Tensor:
        """A training step of a round, which it ends if the gradient is small enough; returns the loss."""
        batches = self._batches(train)
        warm = self.steps_to_go <= self.inner_steps
        loss, moved = self.problem.train_step(batches, self.inner_tolerance if warm else None)
        self.steps_to_go = self.steps_to_go - 1 if moved else 0
        return loss

    def _batches(self, train: Batches) -> list[Any]:
        """The batches of a training step, in all processes or none."""
        with self.processes.together():
            return train.take(self.accumulate)

    def _outer_step(self, train: Batches, val: Batches, start: Moment) -> Record | None:
        """The hyper step of a round that began at `start`; returns its record, or None if it was left out."""
        trained = Moment(self.device)
        with self.processes.together():
            train_batch = train.next() if self.train_batches == 1 else train.take(self.train_batches)
            val_batch = val.next() if self.val_batches == 1 else val.take(self.val_batches)
        estimate, figures = self.problem.hyper_step(train_batch, val_batch)
        record = None
        if estimate is not None:
            record = Record(
                hyper_step=self.hyper_steps,
                weight_steps=self.weight_side.steps,
                **figures,
                training_seconds=trained.seconds_since(start),
                hypergradient_seconds=Moment(self.device).seconds_since(trained),
            )
            self.history.append(record)
        self.hyper_steps += 1
        self.steps_to_go = self.inner_steps
        return record

    def train(self, train_loader: Iterable[Any], steps: int, *, progress: bool = True) -> list[float]:
        """`steps` training steps with the hyperparameters as they are; returns the loss of each.

        Called again with the same loader object, the epoch goes on where it stopped.
        """
        check_count(steps, "steps", least=0)
        stream = self.streams.open("train", train_loader, "train_loader")
        losses = [
            self.train_step(*self._batches(stream))
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
        self.problem.restart()
        if init is not None:
            with torch.no_grad():
                init(self.module)
        self.streams.close("train")
        return self.train(train_loader, steps, progress=progress)

    def save(self, path: str | Path) -> None:
        """Write a checkpoint, as :meth:`fit` does.

        Errors: :class:`CheckpointError` if it cannot be written; existing checkpoints stay.
        """
        checkpoints.save(self.processes.own(path), self.state_dict())

    def load(self, path: str | Path) -> None:
        """:meth:`load_state_dict` from a file.

        Errors: :class:`CheckpointError` also for a file that is damaged (if the one before it is, too), of something
        else, or of a newer version.
        """
        path = self.processes.own(path)
        self.load_state_dict(checkpoints.read(path), source=str(path))

    def state_dict(self, at: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Everything that a run needs to continue exactly, as tensors and plain values; tensors are not copied.

        With `at`, an earlier :meth:`position`, what a position holds is as it was then.
        """
        at = self.position() if at is None else at
        return {
            **self.problem.state_dict(),
            "history": self.history.state_dict(),
            **at,
            "random": at["random"].state_dict(),
            "streams": at["streams"].state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any], source: str = "state") -> None:
        """Continue from a saved state; `source` is what messages call it.

        Learning rates and the like are those of the state; `inner_steps`, bounds, clipping and batch counts are this
        tuner's. The loaders take up their positions in the next :meth:`fit`.

        Errors: :class:`CheckpointError` for the state of a tuner with other tensors, optimizers, schedulers or another
        estimator; nothing has changed then.
        """
        checkpoints.check_fits(source, self.state_dict(), state)
        self.problem.load_state_dict(state)
        for name, buffer in self.buffers().items():
            buffer.copy_(state["buffers"][name])
        self.history = History.from_state_dict(state["history"])
        self.hyper_steps = state["counters"]["hyper_steps"]
        self.steps_to_go = state["counters"]["steps_to_go"]
        self.problem.failures = state["counters"]["failures"]
        self.problem.estimator.load_state_dict(state["estimator"])
        self.streams.load_state_dict(state["streams"])
        RandomState.from_state_dict(state["random"]).restore(self.device)

    def position(self) -> dict[str, Any]:
        """The part of the state that changes in the middle of a step before an optimizer moves anything.

        Cheap enough to be taken after every step: random states and buffers are copied, the rest is referenced.
        """
        counters = {"hyper_steps": self.hyper_steps, "steps_to_go": self.steps_to_go, "failures": self.problem.failures}
        return {
            "counters": counters,
            "random": RandomState.now(self.device),
            "streams": self.streams.position(),
            "estimator": self.problem.estimator.state_dict(),
            "buffers": {name: buffer.clone() for name, buffer in self.buffers().items()},
        }

    @property
    def moves(self) -> tuple[int, int]:
        """Steps begun by the two optimizers. While they stay the same, a step can be taken back to a position."""
        return self.weight_side.steps, self.hyper_side.steps
