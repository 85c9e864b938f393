"""What an estimator of hypergradients is: the seam between Algorithm 1 and the ways to a hypergradient."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
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


class Averaged:
    """A loss of a list of batches: the mean of `loss` over them, as one problem with one Hessian.

    Arguments:
        loss: `loss(..., batch)` -> scalar tensor, the batch last: of (weights, batch), or (weights, hyper, batch).

    Where a loss is taken: `HessianOperator(hvp.Averaged(loss), weights, batches)`. Cost and memory: those of all
    batches together. (`Tuner` does this by itself, with `train_batches` and `val_batches`.)

    >>> import torch, hvp_engine as hvp
    >>> loss = lambda w, batch: batch * w**2 / 2
    >>> batches = [torch.tensor(1.0), torch.tensor(3.0)]
    >>> hvp.HessianOperator(hvp.Averaged(loss), torch.tensor(5.0), batches) @ torch.tensor(1.0)
    tensor(2.)
    """

    def __init__(self, loss: Callable[..., Tensor]):
        self.loss = loss

    def __call__(self, *arguments: Any) -> Tensor:
        *point, batches = arguments
        losses = [self.loss(*point, batch) for batch in batches]
        return torch.stack([loss.reshape(()) for loss in losses]).mean()
