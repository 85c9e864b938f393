"""Algorithm 1: train the weights, and every few steps move the hyperparameters along their hypergradient."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from hvp_engine._support.arguments import check_count, check_limit
from hvp_engine._support.data_stream import Batches, Streams
from hvp_engine._support.pytree import refuse_inference_mode
from hvp_engine._support.timing import Moment
from hvp_engine.hypergradients.estimator import Estimate, EstimatorLike
from hvp_engine.solvers import Solver
from hvp_engine.tuning import checkpoint as checkpoints
from hvp_engine.tuning.autosave import Autosave
from hvp_engine.tuning.bilevel import BilevelProblem, Loss, estimator_for
from hvp_engine.tuning.callbacks import Callback, Callbacks, Evaluation, listed
from hvp_engine.tuning.history import History, Record
from hvp_engine.tuning.monitor import EarlyStopping, ProgressBar, TensorBoard
from hvp_engine.tuning.optimizer_step import OptimizerLike, SchedulerLike


class Tuner:
    """Tunes hyperparameters while the weights train (Algorithm 1).

    A round is `inner_steps` training steps and one hyper step; :meth:`fit` runs them.

    Arguments:
        module: the module to train (its parameters that require grad), or a tree of weight tensors.
        hyper: any tree of tensors, or a module whose parameters they are; updated in place.
        train_loss, val_loss: `loss(weights, hyper, batch)` -> scalar tensor; weights are the named parameters of
            `module` (or its tree), usually passed to `hvp.functional(module)`.
        weight_optimizer, hyper_optimizer: torch optimizers over these tensors, or functions that make one from the
            list of tensors, as in `lambda tensors: torch.optim.Adam(tensors, lr=1e-3)`.
        solver, engine: how to compute the hypergradient, see :class:`Hypergradient`; default `Neumann(20)`, "auto".
            On a GPU "cudagraph" replays the training steps and the step of the hyperparameters, too.
        inner_steps: training steps before each hyper step, >= 1; the maximum if there is an `inner_tolerance`.
        inner_tolerance: end a round's training once ||dL_T/dw|| on the batches of a step is at most this.
        warmup_steps: training steps before the first round.
        accumulate: batches over which a training step averages its gradient, one after the other.
        train_batches, val_batches: batches over which each loss of a hypergradient, and so every product, is averaged.
        weight_scheduler, hyper_scheduler: learning-rate schedulers, or functions that make one from the optimizer;
            stepped after each of its steps. `ReduceLROnPlateau` gets the step's training loss (which waits for the
            device) or validation loss.
        weight_clip, hyper_clip: largest norm of the gradient and the hypergradient.
        bounds: a pair (low, high), each a number, None, or a tree like `hyper` of numbers or tensors; hyperparameters
            are projected to it after each hyper step.
        estimator: another way to compute the hypergradient, instead of `solver` and `engine`: an
            :class:`~hvp_engine.hypergradients.estimator.Estimator`, or a function of (weights, hyper, train_batch,
            val_batch), lists of batches where there are several, that returns an :class:`Estimate`.

    Attributes:
        history: a :class:`~hvp_engine.tuning.history.History` of :class:`Record`.
        hyper_steps: rounds made so far, including those whose hyper step was left out.

    In many processes (torchrun) the losses are :class:`DataParallel`, and each process has its own loaders, for example
    with a `DistributedSampler`, and its own checkpoint, for `run.pt` `run-0-of-4.pt`. The steps are those of one
    process on all batches together. An exception in one process, or a callback that returns True, ends the run in all.

    Memory: the hypergradient's, and a copy of the initial weights on the CPU.

    Errors: `TypeError`/`ValueError` naming the argument.

    Source: Algorithm 1 of Lorraine, Vicol, Duvenaud, AISTATS 2020 ("the paper").

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
        self.inner_tolerance = check_limit(inner_tolerance, "inner_tolerance")
        self.module, self.train_loss = module, train_loss
        losses, batches = (train_loss, val_loss), (self.train_batches, self.val_batches)
        estimator = estimator_for(estimator, losses, batches, solver, engine)
        weight_moves = weight_optimizer, weight_scheduler, weight_clip
        hyper_moves = hyper_optimizer, hyper_scheduler, hyper_clip
        problem = BilevelProblem(module, hyper, train_loss, estimator, weight_moves, hyper_moves, bounds)
        self.problem = problem
        self.weights, self.hyper = problem.weights.tensors, problem.hyper.tensors
        self.weight_side, self.hyper_side = problem.weight_side, problem.hyper_side
        self.estimator, self.processes, self.device = problem.given_estimator, problem.processes, self.weights[0].device
        self.history, self.streams, self.hyper_steps = History(), Streams(self.device), 0
        self.steps_to_go = self.warmup_steps + self.inner_steps

    def buffers(self) -> dict[str, Tensor]:
        """Buffers of the module, and of the hyperparameters if they are a module's."""
        return self.problem.buffers()

    weight_optimizer = property(lambda self: self.weight_side.optimizer, doc="The optimizer of the weights.")
    hyper_optimizer = property(lambda self: self.hyper_side.optimizer, doc="The optimizer of the hyperparameters.")
    failures = property(lambda self: self.problem.failures, doc="Hypergradients in a row that have failed.")

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
        """Run rounds until this tuner has made `hyper_steps` in total; return the history so far.

        Called again, or with a checkpoint in another process, it continues the run and ends where that would have.

        Arguments:
            train_loader, val_loader: re-iterable loaders of batches; `[batch]` for a full batch. Called again with
                the same objects, the epochs go on where they stopped.
            hyper_steps: rounds, including those whose hyper step was left out.
            progress, verbose: show a progress bar; print one line for each hyper step.
            checkpoint: a file to continue from, if it exists and this tuner has not made a step yet, and to save to:
                every `checkpoint_every` hyper steps, after a step if the last time was `checkpoint_minutes` ago, at the
                end, and on a signal or exception. It is replaced atomically, and the one before kept as
                `<checkpoint>.previous`; NaN or infinite weights are never saved; a full disk only warns. On the CPU the
                continued run equals the uninterrupted one bit for bit (with engine="auto" as long as both chose alike;
                a checkpoint keeps the choice).
                SIGINT (Ctrl-C) and SIGTERM then stop the run after the current step, a hyper step with its callbacks,
                and raise `KeyboardInterrupt` or `SystemExit(143)`; a second signal raises at once. (In the main thread,
                unless the program handles the signal itself.)
            checkpoint_minutes: None for never; ignored in many processes, whose clocks differ.
            callbacks: each a :class:`~hvp_engine.tuning.callbacks.Callback`, or a function of (tuner, record) that is
                called after each hyper step and ends the run by returning True.
            evaluate: a function of the tuner, called every `evaluate_every` hyper steps; its dict joins the record.
            metric, patience: stop early after `patience` hyper steps without a new minimum of `metric`: a field of
                the record, a name from `evaluate`, or a function of the record.
            tensorboard: a folder for event files (TensorBoard must be installed), or a writer with `add_scalar`.

        Errors: `ValueError`/`TypeError` for loaders that are empty or not re-iterable; :class:`CheckpointError` for
        a file that is damaged or no checkpoint of this tuner, or that cannot be written; :class:`DivergenceError` if
        ten hypergradients in a row fail; up to then their hyper steps are left out, with a warning.
        """
        refuse_inference_mode("fit")
        hyper_steps = check_count(hyper_steps, "hyper_steps", least=0)
        checkpoint_every = check_count(checkpoint_every, "checkpoint_every")
        evaluate_every = check_count(evaluate_every, "evaluate_every")
        checkpoint_minutes = check_limit(checkpoint_minutes, "checkpoint_minutes")
        given = listed(callbacks)
        attached: list[Callback] = []
        if checkpoint is not None:
            attached.append(Autosave.resuming(self, checkpoint, checkpoint_every, checkpoint_minutes))
        if evaluate is not None:
            attached.append(Evaluation(evaluate, evaluate_every))
        if patience is not None:
            attached.append(EarlyStopping(metric, patience))
        attached.append(ProgressBar(hyper_steps, progress, verbose))
        with self.processes.together():
            train = self.streams.open("train_loader", train_loader, "train_loader")
            val = self.streams.open("val_loader", val_loader, "val_loader")
            if tensorboard is not None:
                attached.append(TensorBoard(tensorboard))
        events = Callbacks(self, [*attached, *given], self.processes)
        with events.running():
            while self.hyper_steps < hyper_steps and not events.stop:
                start = Moment(self.device)
                while self.steps_to_go > 0:
                    events.train_step(self._inner_step(train))
                events.hyper_step(self._outer_step(train, val, start))
        return self.history

    def report(self) -> str:
        """How hypergradients are executed and why so; with engine "cudagraph" also the steps around them."""
        return self.problem.report()

    def train_step(self, *batches: Any) -> Tensor:
        """One step of the weight optimizer on the average over `batches`; returns the loss, detached."""
        return self.problem.train_step(batches)[0]

    def hyper_step(self, train_batch: Any, val_batch: Any) -> Estimate | None:
        """One step of the hyper optimizer, on lists of batches where there are several; None if it was left out."""
        return self.problem.hyper_step(train_batch, val_batch)[0]

    def _inner_step(self, train: Batches) -> Tensor:
        """A training step of a round, which it ends if the gradient is small enough; returns the loss."""
        with self.processes.together():
            batches = train.take(self.accumulate)
        warm = self.steps_to_go <= self.inner_steps
        loss, moved = self.problem.train_step(batches, self.inner_tolerance if warm else None)
        self.steps_to_go = self.steps_to_go - 1 if moved else 0
        return loss

    def _outer_step(self, train: Batches, val: Batches, start: Moment) -> bool:
        """The hyper step of a round that began at `start`; returns False if it had to be left out."""
        trained = Moment(self.device)
        with self.processes.together():
            train_batch = train.next() if self.train_batches == 1 else train.take(self.train_batches)
            val_batch = val.next() if self.val_batches == 1 else val.take(self.val_batches)
        estimate, figures = self.problem.hyper_step(train_batch, val_batch)
        if estimate is not None:
            record = Record(
                hyper_step=self.hyper_steps,
                weight_steps=self.weight_side.steps,
                training_seconds=trained.seconds_since(start),
                hypergradient_seconds=Moment(self.device).seconds_since(trained),
                **figures,
            )
            self.history.append(record)
        self.hyper_steps += 1
        self.steps_to_go = self.inner_steps
        return estimate is not None

    def train(self, train_loader: Iterable[Any], steps: int, *, progress: bool = True) -> list[float]:
        """Make `steps` training steps at these hyperparameters, in the loader's current epoch; returns the losses."""
        steps = check_count(steps, "steps", least=0)
        stream = self.streams.open("train", train_loader, "train_loader")
        losses = []
        for _ in tqdm(range(steps), disable=not progress, desc="training", unit="step"):
            with self.processes.together():
                batches = stream.take(self.accumulate)
            losses.append(self.train_step(*batches))
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

        Weights and buffers return to their values at construction, or to what `init` sets in place, as in
        `init=lambda module: module.reset_parameters()`; optimizer and scheduler of the weights start anew. As in
        section 5.6 of the paper, the loader may hold training and validation data together.
        """
        steps = check_count(steps, "steps", least=0)
        self.streams.close("train")
        self.streams.open("train", train_loader, "train_loader")  # refuses a wrong loader before the weights are lost
        self.problem.restart()
        if init is not None:
            with torch.no_grad():
                init(self.module)
        return self.train(train_loader, steps, progress=progress)

    def save(self, path: str | Path) -> None:
        """Write a checkpoint, as :meth:`fit` does; :class:`CheckpointError` if it cannot be written."""
        checkpoints.save(self.processes.own(path), self.state_dict())

    def load(self, path: str | Path) -> None:
        """:meth:`load_state_dict` from a file; :class:`CheckpointError` also if it and its previous one are damaged."""
        path = self.processes.own(path)
        self.load_state_dict(checkpoints.read(path), source=str(path))

    def state_dict(self, at: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Everything that a run needs to continue exactly, as tensors (not copied) and plain values. With `at`, an
        earlier :meth:`position`, the state as if everything since had been taken back."""
        at = self.position() if at is None else at
        late = {name: at[name]() for name in ("random", "streams")}
        return {**self.problem.state_dict(), "history": self.history.state_dict(), **at, **late}

    def load_state_dict(self, state: Mapping[str, Any], source: str = "state") -> None:
        """Continue from a saved state; `source` is its name in messages.

        Learning rates and the like are those of the state; `inner_steps`, bounds, clipping and batch counts stay. The
        next :meth:`fit` continues in the loaders' epochs.

        Errors: :class:`CheckpointError`, before anything has changed, if the state is of a tuner with other tensors,
        optimizers, schedulers or another estimator.
        """
        checkpoints.check_fits(source, self.state_dict(), state)
        self.problem.load_state_dict(state)
        self.history = History.from_state_dict(state["history"])
        self.hyper_steps, self.steps_to_go = (state["counters"][name] for name in ("hyper_steps", "steps_to_go"))
        self.streams.load_state_dict(state["streams"])

    def position(self) -> dict[str, Any]:
        """The part of the state that changes in a step before an optimizer moves anything; cheap to take."""
        counters = {"hyper_steps": self.hyper_steps, "steps_to_go": self.steps_to_go, "failures": self.failures}
        return {"counters": counters, "streams": self.streams.position(), **self.problem.position()}
