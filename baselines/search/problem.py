"""What every search is given and returns, and how its work is counted."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from hvp_engine._support.arguments import check_count
from hvp_engine._support.pytree import flatten
from hvp_engine._support.torch_compat import pytree
from hvp_engine.differentiation.problem import Problem
from hvp_engine.tuning.bounds import Bounds

Loss = Callable[[Any, Any, Any], Tensor]
Kind = Literal["train", "val"]
Point = tuple[Sequence[Tensor], Sequence[Tensor]]
"""Weights and hyperparameters."""


@dataclass(frozen=True)
class TuningProblem:
    """A training loss, a validation loss, and the hyperparameters to be found.

    Attributes:
        train_loss, val_loss: `loss(weights, hyper, batch)` -> scalar tensor.
        weights: where every training starts; any tree of tensors, not changed.
        hyper: where a search starts that moves gradually; any tree of tensors, not changed.
        train_batches, val_batches: iterables of batches that can be iterated over repeatedly; `[batch]` for one batch.
        bounds: (low, high), each a number or a tree like `hyper`: the box that trials are drawn from and that moving
            hyperparameters are projected to.
    """

    train_loss: Loss
    val_loss: Loss
    weights: Any
    hyper: Any
    train_batches: Iterable[Any]
    val_batches: Iterable[Any]
    bounds: tuple[Any, Any] = (None, None)


@dataclass(frozen=True)
class SearchResult:
    """What every search returns.

    Attributes:
        hyper: the hyperparameters found, a tree like the problem's.
        weights: the weights trained for them, a tree like the problem's.
        val_loss: their mean validation loss over all validation batches.
        training_gradients, validation_gradients: how many times a loss and its gradient were evaluated on one batch; a
            Hessian-vector product counts as two.
        validation_losses: how many times the validation loss alone was evaluated on one batch, to choose between trials
            and to draw the curve; these do not count towards the budget.
        curve: pairs (gradients of both kinds so far, lowest mean validation loss so far), in the order of the search.
        scales: for a self-tuning network, the standard deviations of the perturbations, a tree like `hyper`; else None.
    """

    hyper: Any
    weights: Any
    val_loss: float
    training_gradients: int
    validation_gradients: int
    validation_losses: int
    curve: tuple[tuple[int, float], ...]
    scales: Any = None

    @property
    def gradients(self) -> int:
        """Training and validation gradients: how much of the budget was used."""
        return self.training_gradients + self.validation_gradients


class Search(Protocol):
    """What every search is: `search(problem, gradients)` makes at most `gradients` gradient evaluations."""

    def __call__(self, problem: TuningProblem, gradients: int) -> SearchResult: ...


class Run:
    """One search in progress: the problem's parts, endless streams of batches, and the count of gradients."""

    def __init__(self, problem: TuningProblem, gradients: int):
        check_count(gradients, "gradients", what="the budget")
        weights, self.weight_structure = flatten(problem.weights, "weights")
        hyper, self.hyper_structure = flatten(problem.hyper, "hyper")
        self.weights, self.hyper = ([t.detach().clone() for t in tensors] for tensors in (weights, hyper))
        self.bounds = Bounds(problem.bounds, self.hyper, self.hyper_structure)
        self.flat_bounds = _flat(self.bounds, self.hyper)
        self.device = self.weights[0].device
        self.budget = gradients
        self.training_gradients = self.validation_gradients = self.validation_losses = 0
        self.curve: list[tuple[int, float]] = []
        self._problem = problem
        self._train, self._val = (
            _endless(batches, name)
            for batches, name in ((problem.train_batches, "train_batches"), (problem.val_batches, "val_batches"))
        )

    @property
    def spent(self) -> int:
        return self.training_gradients + self.validation_gradients

    def train_loss(self, weights: Sequence[Tensor], hyper: Sequence[Tensor]) -> Tensor:
        """The training loss on the next batch, to be differentiated; counts as a gradient."""
        loss, batch, name = self._next("train")
        return self._evaluate(loss, weights, hyper, batch, name)

    def val_loss(self, weights: Sequence[Tensor], hyper: Sequence[Tensor]) -> Tensor:
        """The validation loss on the next batch, to be differentiated; counts as a gradient."""
        loss, batch, name = self._next("val")
        return self._evaluate(loss, weights, hyper, batch, name)

    def perturbed_loss(self, kind: Kind, at: Callable[[Tensor], Point], size: int, parts: int | None) -> Tensor:
        """The mean loss on the next batch, to be differentiated; counts as one gradient.

        Each of `parts` equal parts of the batch (each example if None) draws its own normal noise (size,) and has the
        weights and hyperparameters `at(noise)`.
        """
        loss, batch, name = self._next(kind)
        like = self.hyper[0]
        if parts == 1:
            noise = torch.randn(size, dtype=like.dtype, device=like.device)
            return self._evaluate(loss, *at(noise), batch, name)
        leaves, spec = pytree.tree_flatten(batch)
        stacked = _in_parts(leaves, parts)
        noise = torch.randn(len(stacked[0]), size, dtype=like.dtype, device=like.device)

        def evaluate(row: Tensor, *part: Tensor) -> Tensor:
            return self._evaluate(loss, *at(row), pytree.tree_unflatten(list(part), spec), name)

        losses: Tensor = torch.func.vmap(evaluate, randomness="different")(noise, *stacked)
        return losses.mean()

    def _next(self, kind: Kind) -> tuple[Loss, Any, str]:
        """A loss, its next batch and its name; counts as a gradient."""
        if kind == "train":
            self.training_gradients += 1
            return self._problem.train_loss, next(self._train), "train_loss"
        self.validation_gradients += 1
        return self._problem.val_loss, next(self._val), "val_loss"

    @property
    def look_is_due(self) -> bool:
        """Whether a search that moves gradually should validate again: about fifty times in all."""
        return not self.curve or self.spent - self.curve[-1][0] >= self.budget / 50

    @torch.no_grad()
    def validate(self, weights: Sequence[Tensor], hyper: Sequence[Tensor]) -> float:
        """The mean validation loss over all batches, added to the curve."""
        losses = [
            float(self._evaluate(self._problem.val_loss, weights, hyper, batch, "val_loss"))
            for batch in self._problem.val_batches
        ]
        self.validation_losses += len(losses)
        mean = sum(losses) / len(losses)
        lowest = min([mean if math.isfinite(mean) else math.inf, *(loss for _, loss in self.curve[-1:])])
        self.curve.append((self.spent, lowest))
        return mean

    def result(self, weights: Sequence[Tensor], hyper: Sequence[Tensor], val_loss: float) -> SearchResult:
        return SearchResult(
            self.hyper_structure.rebuild([h.detach().clone() for h in hyper]),
            self.weight_structure.rebuild([w.detach().clone() for w in weights]),
            val_loss,
            self.training_gradients,
            self.validation_gradients,
            self.validation_losses,
            tuple(self.curve),
        )

    def _evaluate(
        self, loss: Loss, weights: Sequence[Tensor], hyper: Sequence[Tensor], batch: Any, name: str
    ) -> Tensor:
        problem = Problem(loss, list(weights), self.weight_structure, list(hyper), self.hyper_structure, (batch,), name)
        return problem.evaluate(weights, hyper)


def _in_parts(leaves: Sequence[Any], parts: int | None) -> list[Tensor]:
    """The leaves of a batch, split along their first dimension (the examples) into (parts, examples per part, ...)."""
    counts = [len(leaf) if isinstance(leaf, Tensor) and leaf.dim() else None for leaf in leaves]
    count = counts[0] if counts else None
    if not count or any(other != count for other in counts):
        raise ValueError(
            "perturbations: expected batches that are trees of tensors whose first dimension counts the examples; "
            f"got leaves with {counts}: use perturbations=1, one for the whole batch"
        )
    parts = count if parts is None else parts
    if count % parts:
        raise ValueError(
            f"perturbations: expected a divisor of the {count} examples of a batch; got {parts}: use None, one for "
            "each example, or 1"
        )
    return [leaf.reshape(parts, count // parts, *leaf.shape[1:]) for leaf in leaves]


def _endless(batches: Iterable[Any], name: str) -> Iterator[Any]:
    if isinstance(batches, Tensor) or not hasattr(batches, "__iter__") or hasattr(batches, "__next__"):
        raise TypeError(
            f"{name}: expected an iterable of batches that can be iterated again; got {type(batches).__name__}: "
            "pass a list or a DataLoader, [batch] for one batch"
        )

    def stream() -> Iterator[Any]:
        while True:
            empty = True
            for batch in batches:
                empty = False
                yield batch
            if empty:
                raise ValueError(f"{name}: expected at least one batch; got none")

    return stream()


def _flat(bounds: Bounds, tensors: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """(low, high) as flat vectors over all elements of the hyperparameters; infinite without a bound."""
    low, high = (
        torch.cat([
            (t.new_tensor(unbounded) if side is None else side).expand_as(t).reshape(-1)
            for t, side in zip(tensors, sides, strict=True)
        ])
        for sides, unbounded in ((bounds.low, -math.inf), (bounds.high, math.inf))
    )  # fmt: skip
    return low, high
