"""A step of an optimizer as Algorithm 1 makes it: clip the gradient, step, project to bounds, step the scheduler."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from hvp_engine._support.arguments import check_limit
from hvp_engine._support.flat_vector import norm_of
from hvp_engine._support.torch_compat import pytree
from hvp_engine.engines.replays import Counted
from hvp_engine.tuning.bounds import Bounds
from hvp_engine.tuning.replayed import Grads
from hvp_engine.tuning.replayed_step import ReplayedStep

OptimizerLike = torch.optim.Optimizer | Callable[[Sequence[Tensor]], torch.optim.Optimizer]
SchedulerLike = LRScheduler | Callable[[torch.optim.Optimizer], LRScheduler]


class Descent:
    """Steps of an optimizer over `tensors`, with clipping, bounds and a learning-rate schedule.

    Arguments:
        tensors: updated in place.
        optimizer: an optimizer over them, or a function that makes one from the list.
        scheduler: a learning-rate scheduler of that optimizer, or a function that makes one from it. Stepped after each
            step; `ReduceLROnPlateau` gets the step's loss, which waits for the device.
        clip: largest norm of the gradient over all tensors together; None for no limit.
        name: "weight" or "hyper", for messages.
        norm: computes the norm of a gradient.
        bounds: the tensors are projected to them after each step.

    `steps` counts the steps that were begun: it is increased before anything else changes. After :meth:`replay_by` they
    are replayed where they can be.
    """

    def __init__(
        self,
        tensors: Sequence[Tensor],
        optimizer: OptimizerLike,
        scheduler: SchedulerLike | None,
        clip: float | None,
        name: str,
        norm: Callable[[Grads], Tensor],
        bounds: Bounds | None = None,
    ):
        clip = check_limit(clip, f"{name}_clip", positive=True)
        self.tensors, self.clip, self.norm, self.bounds = tensors, clip, norm, bounds
        self.optimizer = _optimizer(optimizer, tensors, f"{name}_optimizer")
        self.scheduler = None if scheduler is None else _scheduler(scheduler, self.optimizer, f"{name}_scheduler")
        closure = inspect.signature(self.optimizer.step).parameters.get("closure")
        self.needs_closure = closure is not None and closure.default is inspect.Parameter.empty
        self.steps = 0
        self.name = name
        self.replayed: ReplayedStep | None = None
        self._initial = copy.deepcopy(self.state_dict())

    def replay_by(self, recorder: Counted) -> ReplayedStep:
        """Record the steps, and replay them, where that is possible; returns what tells about it."""
        self.replayed = ReplayedStep(f"{self.name} step", recorder, self.optimizer, self.tensors)
        if self.needs_closure:
            self.replayed.refuse(f"{type(self.optimizer).__name__} evaluates the loss in the middle of its step")
        return self.replayed

    def step(self, loss: Tensor, grads: Grads, again: Callable[[], tuple[Tensor, Grads]] | None = None) -> None:
        """One step with these gradients; the tensors' `.grad` fields are restored afterwards.

        `again` evaluates loss and gradients at the updated tensors, for an optimizer that `needs_closure` (L-BFGS).
        """
        self.steps += 1
        if self.replayed is None or not self.replayed(grads, self._move):
            self._move(grads, loss, again)
        if isinstance(self.scheduler, ReduceLROnPlateau):
            self.scheduler.step(float(loss))
        elif self.scheduler is not None:
            self.scheduler.step()

    def _move(
        self, grads: Grads, loss: Tensor | None = None, again: Callable[[], tuple[Tensor, Grads]] | None = None
    ) -> None:
        """The part of a step that moves the tensors."""
        kept = [tensor.grad for tensor in self.tensors]
        known: list[tuple[Tensor | None, Grads]] = [(loss, grads)]

        def closure() -> Tensor | None:
            value, found = known.pop() if known else again()  # type: ignore[misc]
            for tensor, grad in zip(self.tensors, self._clipped(found), strict=True):
                tensor.grad = grad
            return value

        try:
            if self.needs_closure:
                self.optimizer.step(closure)  # type: ignore[arg-type]
            else:
                closure()
                self.optimizer.step()
        finally:
            for tensor, grad in zip(self.tensors, kept, strict=True):
                tensor.grad = grad
        if self.bounds is not None:
            self.bounds.project(self.tensors)

    def _clipped(self, grads: Grads) -> Grads:
        """The gradients scaled down to the norm `clip`; not in place, since autograd may return one tensor twice."""
        if self.clip is None:
            return grads
        scale = (self.clip / self.norm(grads).clamp_min(1e-300)).clamp_max(1.0)
        return [None if grad is None else grad * scale.to(grad.dtype) for grad in grads]

    def reset(self) -> None:
        """Put optimizer and scheduler back to their state at construction; `steps` goes on."""
        steps = self.steps
        self.load_state_dict(self._initial)
        self.steps = steps

    def state_dict(self) -> dict[str, Any]:
        """The state for checkpoints; tensors are not copied."""
        return {
            "steps": self.steps,
            "optimizer": self.optimizer.state_dict(),
            "optimizer_type": type(self.optimizer).__name__,
            "scheduler": None if self.scheduler is None else self.scheduler.state_dict(),
            "scheduler_type": type(self.scheduler).__name__,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a saved state."""
        state = copy.deepcopy(state)  # an optimizer would go on to update the tensors of `state` in place
        self.optimizer.load_state_dict(state["optimizer"])
        _undo_casts(self.optimizer, state["optimizer"])
        if self.scheduler is not None:
            self.scheduler.load_state_dict(state["scheduler"])
        self.steps = state["steps"]


def global_norm(grads: Grads) -> Tensor:
    """The norm over all of `grads` as a 0-dim float64 tensor; None counts as zero."""
    dense = [grad.coalesce().values() if grad.is_sparse else grad for grad in grads if grad is not None]
    if not dense:
        return torch.zeros((), dtype=torch.float64)
    return norm_of(dense)


def _undo_casts(optimizer: torch.optim.Optimizer, saved: dict[str, Any]) -> None:
    """Give tensors of the state, which torch has cast to the dtypes of their parameters, the dtypes and the values with
    which they were saved: a run that goes on with rounded ones, or wider ones, gets other numbers."""

    def uncast(loaded: Any, saved: Any) -> Any:
        cast = isinstance(loaded, Tensor) and isinstance(saved, Tensor) and loaded.dtype != saved.dtype
        return saved.to(loaded.device) if cast else loaded

    groups = zip(saved["param_groups"], optimizer.param_groups, strict=True)
    pairs = [pair for old, new in groups for pair in zip(old["params"], new["params"], strict=True)]
    for number, parameter in pairs:
        before, loaded = saved["state"].get(number, {}), optimizer.state.get(parameter, {})
        loaded.update({key: pytree.tree_map(uncast, loaded[key], before[key]) for key in before.keys() & loaded.keys()})


def _optimizer(given: OptimizerLike, tensors: Sequence[Tensor], name: str) -> torch.optim.Optimizer:
    optimizer = given(tensors) if callable(given) else given
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(
            f"{name}: expected a torch optimizer or a function that makes one; got {type(optimizer).__name__}"
        )
    known = {id(p) for group in optimizer.param_groups for p in group["params"]}
    if not known & {id(t) for t in tensors}:
        raise ValueError(f"{name}: expected an optimizer over the tuner's tensors; got one over none of them")
    return optimizer


def _scheduler(given: SchedulerLike, optimizer: torch.optim.Optimizer, name: str) -> LRScheduler:
    scheduler = given(optimizer) if callable(given) else given
    if not isinstance(scheduler, LRScheduler):
        raise TypeError(
            f"{name}: expected a torch scheduler or a function that makes one from the optimizer; "
            f"got {type(scheduler).__name__}"
        )
    if scheduler.optimizer is not optimizer:
        raise ValueError(
            f"{name}: expected a scheduler of the tuner's optimizer; got one of another optimizer: pass a function, "
            "as in lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 10)"
        )
    return scheduler
