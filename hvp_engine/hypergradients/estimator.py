"""Estimators: the interface between Algorithm 1 and the ways to compute a hypergradient."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from hvp_engine.engines.replays import Counted
from hvp_engine.solvers.solution import Solution


@dataclass(frozen=True)
class Estimate:
    """A hypergradient at one point.

    Attributes:
        grads: dL_V*/dlambda, in the container of the hyperparameters, detached.
        train_loss, val_loss: 0-dim tensors, detached.
        gradient_norm: ||dL_T/dw|| as a 0-dim float64 tensor; zero where the implicit function theorem holds exactly.
        unfinished: how much the validation loss would change if training ran to convergence, to first order; None if
            the estimator does not know.
        solution: the linear solve behind the hypergradient; None if there was none.
    """

    grads: Any
    train_loss: Tensor
    val_loss: Tensor
    gradient_norm: Tensor
    unfinished: Tensor | None = field(default=None, kw_only=True)
    solution: Solution | None = field(default=None, kw_only=True)


class Estimator:
    """A way to compute a hypergradient. Subclasses implement `__call__`, which must leave its arguments unchanged.

    An estimator that carries something from call to call (a random seed, a warm start) also overrides
    :meth:`state_dict` and :meth:`load_state_dict`; checkpoints then include it.
    """

    def __call__(self, weights: Any, hyper: Any, train_batch: Any, val_batch: Any) -> Estimate:
        """The hypergradient at these weights and hyperparameters."""
        raise NotImplementedError(f"{type(self).__name__}: expected a __call__(weights, hyper, train_batch, val_batch)")

    def recorder(self, device: torch.device) -> Counted | None:
        """What records the steps around hypergradients too, if the engine behind them makes recordings."""
        return None

    def report(self) -> str:
        """How hypergradients are computed, and why so; empty if there is nothing to say."""
        return ""

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs to continue with the same numbers, as tensors and plain values."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a saved state."""


def check_functions(remedy: str = "", **functions: object) -> None:
    """`TypeError` for one that is no function, naming the argument."""
    for name, function in functions.items():
        if not callable(function):
            got = type(function).__name__
            raise TypeError(f"{name}: expected a function of (weights, hyper, batch); got {got}{remedy}")


EstimatorLike = Estimator | Callable[[Any, Any, Any, Any], Estimate]


class _Wrapped(Estimator):
    """A plain callable as an :class:`Estimator`, with its own state methods if it has any."""

    def __init__(self, function: Callable[[Any, Any, Any, Any], Estimate]):
        self._function = function
        for name in ("state_dict", "load_state_dict"):
            if hasattr(function, name):
                setattr(self, name, getattr(function, name))

    def __call__(self, weights: Any, hyper: Any, train_batch: Any, val_batch: Any) -> Estimate:
        found = self._function(weights, hyper, train_batch, val_batch)
        if not isinstance(found, Estimate):
            raise TypeError(f"estimator: expected a function that returns an hvp.Estimate; got {type(found).__name__}")
        return found


def as_estimator(given: EstimatorLike) -> Estimator:
    """`given` itself, or wrapped if it is a plain callable."""
    if isinstance(given, Estimator):
        return given
    if not callable(given):
        raise TypeError(
            f"estimator: expected a callable of (weights, hyper, train_batch, val_batch); got {type(given).__name__}"
        )
    return _Wrapped(given)
