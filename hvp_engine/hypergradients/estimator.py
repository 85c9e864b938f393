"""What an estimator of hypergradients is: the seam between Algorithm 1 and the ways to a hypergradient."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor


@dataclass(frozen=True)
class Estimate:
    """A hypergradient at one point.

    Attributes:
        grads: dL_V*/dlambda, in the container of the hyperparameters, detached.
        train_loss, val_loss: 0-dim tensors, detached.
        gradient_norm: ||dL_T/dw|| as a 0-dim float64 tensor: zero where the theorem applies exactly.
    """

    grads: Any
    train_loss: Tensor
    val_loss: Tensor
    gradient_norm: Tensor


class Estimator(Protocol):
    """A way to a hypergradient; it leaves the weights and hyperparameters as they are.

    With methods `state_dict()` and `load_state_dict(state)` (tensors and plain values), its own state becomes part
    of checkpoints.
    """

    def __call__(self, weights: Any, hyper: Any, train_batch: Any, val_batch: Any) -> Estimate: ...
