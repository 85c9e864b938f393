"""The two steps of Algorithm 1, training step and hyper step, and when which is due."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from hvp_engine._support.arguments import check_count
from hvp_engine._support.pytree import Structure, flatten, trainable
from hvp_engine._support.timing import Moment
from hvp_engine._support.torch_compat import pytree
from hvp_engine.distributed import DataParallel, ShardedList, averaged, together
from hvp_engine.errors import DivergenceError
from hvp_engine.hypergradients.estimator import Estimate, Estimator
from hvp_engine.hypergradients.implicit import Hypergradient
from hvp_engine.solvers import Solver
from hvp_engine.tuning.bounds import Bounds
from hvp_engine.tuning.data_stream import Batches
from hvp_engine.tuning.descent import Descent, Grads, OptimizerLike, SchedulerLike, global_norm
from hvp_engine.tuning.history import History, Record

Loss = Callable[[Any, Any, Any], Tensor]

_PATIENCE = 10
"""Hypergradients in a row that may fail before the run stops."""


class Steps:
    """Weights and hyperparameters, each with an optimizer, and the estimator between them.

    The arguments are those of :class:`hvp_engine.Tuner`, which runs the steps in a loop.
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
        estimator: Estimator | None = None,
    ):
        self.inner_steps = check_count(inner_steps, "inner_steps")
        self.warmup_steps = check_count(warmup_steps, "warmup_steps", least=0)
        self.accumulate = check_count(accumulate, "accumulate")
        self.train_batches = check_count(train_batches, "train_batches")
        self.val_batches = check_count(val_batches, "val_batches")
        if inner_tolerance is not None and not inner_tolerance >= 0:
            raise ValueError(f"inner_tolerance: expected a number >= 0 or None; got {inner_tolerance!r}")
        self.inner_tolerance = inner_tolerance
        self.module, self.hyper_module, self.train_loss = module, hyper, train_loss
        weight_tree, hyper_tree = trainable(module), trainable(hyper)
        self.processes = train_loss.processes if isinstance(train_loss, DataParallel) else None
        self.weights, self._weight_structure = flatten(weight_tree, "module", sharded=True)
        self.hyper, self._hyper_structure = flatten(hyper_tree, "hyper", sharded=True)
        _check_memory(self.weights, "module")
        _check_memory(self.hyper, "hyper")
        self.weight_names, self.hyper_names = _names(weight_tree), _names(hyper_tree)
        self.device = self.weights[0].device
        self.estimator = self._estimator(estimator, val_loss, solver, engine)
        self._weight_norm = self._norm_of(self.weights, self._weight_structure)
        self._hyper_norm = self._norm_of(self.hyper, self._hyper_structure)
        limits = None if bounds is None else Bounds(bounds, self.hyper, self._hyper_structure)
        self.weight_side = Descent(
            self.weights, weight_optimizer, weight_scheduler, weight_clip, "weight", self._weight_norm
        )
        self.hyper_side = Descent(
            self.hyper, hyper_optimizer, hyper_scheduler, hyper_clip, "hyper", self._hyper_norm, limits
        )
        if self.hyper_side.needs_closure:
            raise TypeError(
                "hyper_optimizer: expected an optimizer that takes one gradient a step; got "
                f"{type(self.hyper_optimizer).__name__}: a hypergradient is valid only where the weights are trained"
            )
        self.initial_weights = [weight.detach().to("cpu", copy=True) for weight in self.weights]
        self.initial_buffers = {name: buffer.to("cpu", copy=True) for name, buffer in self.buffers().items()}
        self.history = History()
        self.hyper_steps = 0
        self.steps_to_go = self.warmup_steps + self.inner_steps
        self.failures = 0
        self.streams: dict[str, Batches] = {}
        self.stream_states: dict[str, Any] = {}

    def _estimator(self, estimator: Estimator | None, val_loss: Loss, solver: Solver | None, engine: str) -> Estimator:
        if estimator is None:
            train = _averaged(self.train_loss, self.train_batches)
            val = _averaged(val_loss, self.val_batches)
            return Hypergradient(train, val, solver=solver, engine=engine)
        if solver is not None:
            raise ValueError("solver: expected None beside an estimator, which has its own; got both")
        if not callable(estimator):
            raise TypeError(
                "estimator: expected a callable of (weights, hyper, train_batch, val_batch); "
                f"got {type(estimator).__name__}"
            )
        return estimator

    @property
    def weight_optimizer(self) -> torch.optim.Optimizer:
        return self.weight_side.optimizer

    @property
    def hyper_optimizer(self) -> torch.optim.Optimizer:
        return self.hyper_side.optimizer

    def buffers(self) -> dict[str, Tensor]:
        """Buffers of the module, and of the hyperparameters if they are a module's."""
        modules = (("module", self.module), ("hyper", self.hyper_module))
        return {
            f"{prefix}.{name}": buffer
            for prefix, module in modules
            if isinstance(module, torch.nn.Module)
            for name, buffer in module.named_buffers()
        }

    def train_step(self, *batches: Any) -> Tensor:
        """One step of the weight optimizer on the average over `batches`; returns the loss, detached."""
        loss, grads = self._gradients(batches)
        self.weight_side.step(loss, grads, lambda: self._gradients(batches))
        return loss

    def hyper_step(self, train_batch: Any, val_batch: Any) -> Estimate | None:
        """One step of the hyper optimizer; None, and a warning, if the hypergradient failed.

        The batches are lists where `train_batches`, `val_batches` are above 1.
        """
        found = self._hyper_step(train_batch, val_batch)
        return None if found is None else found[0]

    def inner_step(self, batches: Sequence[Any]) -> None:
        """A training step, or none if the gradient is small enough for the round's training to end."""
        loss, grads = self._gradients(batches)
        warm = self.steps_to_go <= self.inner_steps
        if self.inner_tolerance is not None and warm and float(self._weight_norm(grads)) <= self.inner_tolerance:
            self.steps_to_go = 0
            return
        self.weight_side.step(loss, grads, lambda: self._gradients(batches))
        self.steps_to_go -= 1

    @torch.enable_grad()
    def _gradients(self, batches: Sequence[Any]) -> tuple[Tensor, Grads]:
        """The training loss and its gradient, averaged over `batches`."""
        total = torch.zeros((), device=self.device)
        sums: list[Tensor | None] = [None] * len(self.weights)
        hyper = self._hyper_structure.rebuild([h.detach() for h in self.hyper])
        for batch in batches:
            weights = [w.detach().requires_grad_() for w in self.weights]
            loss = self.train_loss(self._weight_structure.rebuild(weights), hyper, batch)
            loss = loss if len(batches) == 1 else loss / len(batches)
            grads = torch.autograd.grad(loss, weights, allow_unused=True)
            total = total + loss.detach()
            sums = [_sum(old, new) for old, new in zip(sums, grads, strict=True)]
        return total, sums

    def round(self, train: Batches, val: Batches, start: Moment) -> Record | None:
        """The hyper step of a round that began at `start`; its record, None if it was left out."""
        trained = Moment(self.device)
        with self._together():
            train_batch = train.next() if self.train_batches == 1 else train.take(self.train_batches)
            val_batch = val.next() if self.val_batches == 1 else val.take(self.val_batches)
        found = self._hyper_step(train_batch, val_batch)
        record = None
        if found is not None:
            estimate, figures = found
            solution = getattr(estimate, "solution", None)
            record = Record(
                hyper_step=self.hyper_steps,
                weight_steps=self.weight_side.steps,
                **figures,  # type: ignore[arg-type]
                residual_norm=math.nan if solution is None else solution.residual_norm,
                status="" if solution is None else solution.status.name,
                alpha=None if solution is None else solution.alpha,
                training_seconds=trained.seconds_since(start),
                hypergradient_seconds=Moment(self.device).seconds_since(trained),
            )
            self.history.append(record)
        self.hyper_steps += 1
        self.steps_to_go = self.inner_steps
        return record

    def _norm_of(self, tensors: Sequence[Tensor], structure: Structure) -> Callable[[Grads], Tensor]:
        """The norm of gradients of these tensors."""
        return global_norm if self.processes is None else ShardedList(self.processes, tensors, structure.shards).norm

    def _take(self, stream: Batches, count: int) -> list[Any]:
        """The next batches of a stream, in all processes or none."""
        with self._together():
            return stream.take(count)

    def _together(self) -> AbstractContextManager[None]:
        """What one process raises in the block, all raise."""
        return together(self.train_loss, self.device)

    def _any(self, flag: bool) -> bool:
        """Whether `flag` is true in some process."""
        return flag if self.processes is None else any(self.processes.gather(flag, self.device))

    def _hyper_step(self, train_batch: Any, val_batch: Any) -> tuple[Estimate, dict[str, float]] | None:
        """One step of the hyper optimizer: the estimate, and its figures read from the device at once."""
        try:
            estimate = self.estimator(
                self._weight_structure.rebuild(self.weights),
                self._hyper_structure.rebuild(self.hyper),
                train_batch,
                val_batch,
            )
            grads, structure = flatten(estimate.grads, "grads", sharded=True)
            if structure != self._hyper_structure:
                raise ValueError(
                    f"estimator: expected grads in the container of hyper, {self._hyper_structure.spec}; got "
                    f"{structure.spec}"
                )
            figures = _figures(estimate, self._hyper_norm(grads))
            if not math.isfinite(figures["hypergradient_norm"]):
                raise DivergenceError("hypergradient: expected finite values; got NaN or Inf in the mixed product")
        except DivergenceError as error:
            self.failures += 1
            if self.failures >= _PATIENCE:
                raise
            warnings.warn(f"hyper step left out: {error}", stacklevel=4)
            return None
        self.failures = 0
        self.hyper_side.step(estimate.val_loss, grads)
        return estimate, figures


def _averaged(loss: Loss, batches: int) -> Loss:
    """`loss` over so many batches; what is no function stays, to be refused by name."""
    return averaged(loss) if batches > 1 and callable(loss) else loss


def _figures(estimate: Estimate, hypergradient_norm: Tensor) -> dict[str, float]:
    """The numbers of a record that are on the device, by one transfer."""
    unknown = torch.full_like(hypergradient_norm, math.nan)
    tensors = {
        "train_loss": estimate.train_loss,
        "val_loss": estimate.val_loss,
        "gradient_norm": estimate.gradient_norm,
        "hypergradient_norm": hypergradient_norm,
        "unfinished": getattr(estimate, "unfinished", unknown),
    }
    values = torch.stack([tensor.detach().to(unknown).reshape(()) for tensor in tensors.values()]).tolist()
    return dict(zip(tensors, values, strict=True))


def _sum(old: Tensor | None, new: Tensor | None) -> Tensor | None:
    if old is None or new is None:
        return new if old is None else old
    return old + new


def _check_memory(tensors: Sequence[Tensor], name: str) -> None:
    """Raise for an expanded tensor, whose elements share memory: it cannot be updated in place."""
    for index, tensor in enumerate(tensors):
        if any(stride == 0 and size > 1 for stride, size in zip(tensor.stride(), tensor.shape, strict=True)):
            raise ValueError(
                f"{name}[{index}]: expected memory for every element, to be updated in place; got an expanded tensor "
                f"with strides {tensor.stride()}: use .clone(memory_format=torch.contiguous_format)"
            )


def _names(tree: Any) -> list[str]:
    """What the leaves are called in checkpoints."""
    return [pytree.keystr(path) for path, _ in pytree.tree_flatten_with_path(tree)[0]]
