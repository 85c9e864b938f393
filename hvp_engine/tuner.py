"""Algorithm 1: train the weights, and every few steps move the hyperparameters along their hypergradient."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from hvp_engine.batches import Batches
from hvp_engine.errors import DivergenceError
from hvp_engine.implicit import Hypergradient, HypergradientResult
from hvp_engine.solvers import Solver
from hvp_engine.trees import flatten

OptimizerLike = torch.optim.Optimizer | Callable[[Sequence[Tensor]], torch.optim.Optimizer]

_PATIENCE = 10
"""Hypergradients in a row that may fail before the run stops."""


@dataclass(frozen=True)
class Record:
    """One hyper step: losses at its hypergradient, norms, the solve, and seconds for training and hypergradient."""

    hyper_step: int
    train_loss: float
    val_loss: float
    gradient_norm: float
    hypergradient_norm: float
    residual_norm: float
    status: str
    training_seconds: float
    hypergradient_seconds: float


class Tuner:
    """Tunes hyperparameters while the weights train (Algorithm 1).

    Arguments:
        module: the module to train, or a tree of weight tensors.
        hyper: hyperparameters: any tree of tensors, or a module whose parameters they are; updated in place.
        train_loss, val_loss: `loss(weights, hyper, batch)` -> scalar tensor; weights are the named parameters of
            `module` (or its tree), usually passed to `hvp.functional(module)`.
        weight_optimizer, hyper_optimizer: torch optimizers over these tensors, or functions that make one from the
            list of tensors, as in `lambda tensors: torch.optim.Adam(tensors, lr=1e-3)`.
        solver: how to invert the Hessian; default `Neumann(20)`.
        inner_steps: training steps before each hyper step, >= 1.
        engine: see :class:`Hypergradient`.

    Source: Algorithm 1 of Lorraine, Vicol, Duvenaud 2019.

    >>> import torch, hvp_engine as hvp
    >>> data, target = torch.tensor([1.0, 3.0]), torch.tensor([0.8, 1.5])
    >>> weights, decay = torch.zeros(2), torch.zeros(2)                # w* = data / (1 + exp(decay))
    >>> train = lambda w, d, batch: ((w - batch) ** 2).sum() / 2 + (d.exp() * w ** 2).sum() / 2
    >>> val = lambda w, d, batch: ((w - batch) ** 2).sum() / 2
    >>> tuner = hvp.Tuner(weights, decay, train, val,
    ...                   weight_optimizer=lambda tensors: torch.optim.SGD(tensors, lr=0.3),
    ...                   hyper_optimizer=lambda tensors: torch.optim.Adam(tensors, lr=0.1))
    >>> history = tuner.fit([data], [target], hyper_steps=200, progress=False)
    >>> weights
    tensor([0.8000, 1.5000])
    """

    def __init__(
        self,
        module: Any,
        hyper: Any,
        train_loss: Callable[[Any, Any, Any], Tensor],
        val_loss: Callable[[Any, Any, Any], Tensor],
        *,
        weight_optimizer: OptimizerLike,
        hyper_optimizer: OptimizerLike,
        solver: Solver | None = None,
        inner_steps: int = 5,
        engine: str = "auto",
    ):
        if isinstance(inner_steps, bool) or not isinstance(inner_steps, int) or inner_steps < 1:
            raise ValueError(f"inner_steps: expected an int >= 1; got {inner_steps!r}")
        self.module = module
        self.weights, self._weight_structure = flatten(module, "module")
        self.hyper, self._hyper_structure = flatten(hyper, "hyper")
        self.train_loss = train_loss
        self.inner_steps = inner_steps
        self.hypergradient = Hypergradient(train_loss, val_loss, solver=solver, engine=engine)
        self.weight_optimizer = _optimizer(weight_optimizer, self.weights, "weight_optimizer")
        self.hyper_optimizer = _optimizer(hyper_optimizer, self.hyper, "hyper_optimizer")
        self.history: list[Record] = []
        self._failures = 0

    def fit(
        self,
        train_loader: Iterable[Any],
        val_loader: Iterable[Any],
        hyper_steps: int = 1000,
        progress: bool = True,
    ) -> list[Record]:
        """Run `hyper_steps` rounds of `inner_steps` training steps and one hyper step; return the history so far.

        Arguments:
            train_loader, val_loader: re-iterable loaders of batches; `[batch]` for a full batch.
            hyper_steps: rounds to run.
            progress: show a progress bar.

        Errors: `ValueError`/`TypeError` for loaders that are empty or not re-iterable; :class:`DivergenceError` if
        ten hypergradients in a row fail. A failed or non-finite hypergradient never reaches the optimizer: the
        hyper step is left out with a warning.
        """
        device = self.weights[0].device
        train = Batches(train_loader, device, "train_loader")
        val = Batches(val_loader, device, "val_loader")
        with tqdm(total=hyper_steps, disable=not progress, desc="hyper steps", unit="step") as bar:
            for _ in range(hyper_steps):
                start = time.perf_counter()
                for _ in range(self.inner_steps):
                    self.train_step(train.next())
                trained = time.perf_counter()
                result = self.hyper_step(train.next(), val.next())
                if result is not None:
                    self._record(result, trained - start, time.perf_counter() - trained)
                    last = self.history[-1]
                    bar.set_postfix(train=f"{last.train_loss:.4f}", val=f"{last.val_loss:.4f}", refresh=False)
                bar.update()
        return self.history

    def train_step(self, batch: Any) -> Tensor:
        """One step of the weight optimizer; returns the loss, detached."""
        weights = [w.detach().requires_grad_() for w in self.weights]
        loss = self.train_loss(
            self._weight_structure.rebuild(weights),
            self._hyper_structure.rebuild([h.detach() for h in self.hyper]),
            batch,
        )
        grads = torch.autograd.grad(loss, weights, allow_unused=True)
        _step(self.weight_optimizer, self.weights, grads)
        return loss.detach()

    def hyper_step(self, train_batch: Any, val_batch: Any) -> HypergradientResult | None:
        """One step of the hyper optimizer; None, and a warning, if the hypergradient failed."""
        try:
            result = self.hypergradient(
                self._weight_structure.rebuild(self.weights),
                self._hyper_structure.rebuild(self.hyper),
                train_batch,
                val_batch,
            )
            grads, _ = flatten(result.grads, "grads")
            if not torch.isfinite(torch.stack(torch._foreach_norm(grads)).sum()):
                raise DivergenceError("hypergradient: expected finite values; got NaN or Inf in the mixed product")
        except DivergenceError as error:
            self._failures += 1
            if self._failures >= _PATIENCE:
                raise
            warnings.warn(f"hyper step left out: {error}", stacklevel=2)
            return None
        self._failures = 0
        _step(self.hyper_optimizer, self.hyper, grads)
        return result

    def _record(self, result: HypergradientResult, training: float, hypergradient: float) -> None:
        grads, _ = flatten(result.grads, "grads")
        squares = torch.stack([norm.double() for norm in torch._foreach_norm(grads)])
        self.history.append(
            Record(
                hyper_step=len(self.history),
                train_loss=float(result.train_loss),
                val_loss=float(result.val_loss),
                gradient_norm=float(result.gradient_norm),
                hypergradient_norm=float(torch.linalg.vector_norm(squares)),
                residual_norm=result.solution.residual_norm,
                status=result.solution.status.name,
                training_seconds=training,
                hypergradient_seconds=hypergradient,
            )
        )


def _optimizer(given: OptimizerLike, tensors: list[Tensor], name: str) -> torch.optim.Optimizer:
    optimizer = given if isinstance(given, torch.optim.Optimizer) else given(tensors)
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(
            f"{name}: expected a torch optimizer or a function that makes one; got {type(optimizer).__name__}"
        )
    known = {id(p) for group in optimizer.param_groups for p in group["params"]}
    if not known & {id(t) for t in tensors}:
        raise ValueError(f"{name}: expected an optimizer over the tuner's tensors; got one over none of them")
    return optimizer


def _step(optimizer: torch.optim.Optimizer, tensors: Sequence[Tensor], grads: Sequence[Tensor | None]) -> None:
    """One optimizer step with these gradients; the tensors' own `.grad` are put back afterwards."""
    kept = [tensor.grad for tensor in tensors]
    try:
        for tensor, grad in zip(tensors, grads, strict=True):
            tensor.grad = grad
        optimizer.step()
    finally:
        for tensor, grad in zip(tensors, kept, strict=True):
            tensor.grad = grad
