"""Two losses at a point, and the minimum of the first by Newton's method, as a reference for :func:`hvp_engine.check`.

The solves here share no code with the package's solvers, which are what is being checked.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from hvp_engine._support.isolation import isolated
from hvp_engine._support.mappings import map_leaves
from hvp_engine.differentiation.double_backward import differentiate, filled, leaves
from hvp_engine.differentiation.linear_map import Linearization
from hvp_engine.differentiation.problem import Problem
from hvp_engine.distributed import for_loss
from hvp_engine.engines.eager import EagerEngine

_NEWTON_STEPS = 60
_PRODUCTS = 500
_REFERENCE_PRODUCTS = 2000
_SUFFICIENT_DECREASE = 1e-4
_CLOSE = 1e-6
"""A predicted gain below this fraction of the loss's rounding is too small to change a finite difference."""


def flat(tensors: Sequence[Tensor]) -> Tensor:
    """`tensors` in row-major order as one float64 vector."""
    return torch.cat([tensor.detach().reshape(-1).double() for tensor in tensors])


def like(vector: Tensor, tensors: Sequence[Tensor]) -> list[Tensor]:
    """The inverse of :func:`flat`: `vector` in the shapes and dtypes of `tensors`."""
    parts = vector.split([tensor.numel() for tensor in tensors])
    return [part.reshape(tensor.shape).to(tensor.dtype) for part, tensor in zip(parts, tensors, strict=True)]


@dataclass(frozen=True)
class Pair:
    """The training and the validation loss at the same weights and hyperparameters; every call draws from `seed`."""

    train: Problem
    val: Problem
    seed: int

    @property
    def weights(self) -> list[Tensor]:
        return self.train.weights

    @property
    def hyper(self) -> list[Tensor]:
        return self.train.hyperparameters

    @property
    def losses(self) -> tuple[Problem, Problem]:
        return self.train, self.val

    def at(self, weights: Sequence[Tensor], hyper: Sequence[Tensor] | None = None) -> Pair:
        """The losses at other weights, and hyperparameters if given."""
        point: dict[str, Any] = {
            "weights": list(weights),
            "hyperparameters": list(self.hyper if hyper is None else hyper),
        }
        return replace(self, train=replace(self.train, **point), val=replace(self.val, **point))

    def value(self, problem: Problem) -> float:
        """One of the two losses."""
        with isolated(self.seed, self.weights[0].device), torch.no_grad():
            return float(problem.evaluate(problem.weights, problem.hyperparameters))

    def gradient(self, problem: Problem) -> tuple[Tensor, Tensor]:
        """Its gradients with respect to weights and hyperparameters, flat."""
        with isolated(self.seed, self.weights[0].device):
            inputs = leaves([*self.weights, *self.hyper])
            loss = problem.evaluate(inputs[: len(self.weights)], inputs[len(self.weights) :])
            found = filled(
                differentiate(loss, inputs, retain_graph=False) if loss.requires_grad else [None] * len(inputs), inputs
            )
        return flat(found[: len(self.weights)]), flat(found[len(self.weights) :])

    def linearization(self) -> Linearization:
        """The gradient of the training loss and its derivatives, by the plainest engine."""
        with isolated(self.seed, self.weights[0].device):
            return for_loss(self.train.loss, EagerEngine()).linearize(self.train)

    def widened(self) -> Pair | None:
        """The same in float64, batches included; None if it is already, or if the losses do not take that."""
        if {t.dtype for t in (*self.weights, *self.hyper)} == {torch.float64}:
            return None

        def wide(problem: Problem) -> Problem:
            return replace(
                problem,
                weights=[w.detach().double() for w in problem.weights],
                hyperparameters=[h.detach().double() for h in problem.hyperparameters],
                inputs=map_leaves(lambda t: t.double() if t.is_floating_point() else t, problem.inputs),
            )

        pair = replace(self, train=wide(self.train), val=wide(self.val))
        try:
            with isolated(self.seed, self.weights[0].device):
                values = [problem.evaluate(pair.weights, pair.hyper) for problem in (pair.train, pair.val)]
        except (RuntimeError, TypeError):  # a tensor that the loss brings along itself is still narrow
            return None
        return pair if all(value.dtype == torch.float64 for value in values) else None


@dataclass(frozen=True)
class LinearSolve:
    """Conjugate gradients: the solution, the relative residual after each product, and whether curvature was <= 0."""

    value: Tensor
    residuals: tuple[float, ...]
    indefinite: bool


def conjugate_gradients(product: Callable[[Tensor], Tensor], v: Tensor, tolerance: float, limit: int) -> LinearSolve:
    """A x = v from x = 0 until ||v - A x|| <= tolerance ||v||; stops at a direction without positive curvature."""
    x, residual, direction = torch.zeros_like(v), v.clone(), v.clone()
    first = square = float(v @ v)
    residuals: list[float] = []
    largest = 0.0
    while square > tolerance**2 * first and len(residuals) < limit:
        image = product(direction)
        curvature = float(direction @ image / (direction @ direction))
        largest = max(largest, abs(curvature))
        if not curvature > 1e-15 * largest:
            return LinearSolve(x, tuple(residuals), True)
        step = square / float(direction @ image)
        x = x + step * direction
        residual = residual - step * image
        previous, square = square, float(residual @ residual)
        residuals.append(math.sqrt(square / first))
        direction = residual + (square / previous) * direction
    return LinearSolve(x, tuple(residuals), False)


def product_of(linearization: Linearization, weights: Sequence[Tensor]) -> Callable[[Tensor], Tensor]:
    """v -> H v on flat float64 vectors."""
    return lambda vector: flat(linearization.product(like(vector, weights)))


def reference_hypergradient(pair: Pair) -> tuple[Tensor, LinearSolve]:
    """dL_V/dlambda - (d2L_T/dlambda dw^T) H^-1 dL_V/dw, flat, by conjugate gradients to rounding; and that solve."""
    linearization = pair.linearization()
    vector, direct = pair.gradient(pair.val)
    tolerance = torch.finfo(pair.weights[0].dtype).eps ** 0.75
    solve = conjugate_gradients(product_of(linearization, pair.weights), vector, tolerance, _REFERENCE_PRODUCTS)
    mixed = linearization.mixed(like(solve.value, pair.weights))
    indirect = [torch.zeros_like(h) if m is None else m for m, h in zip(mixed, pair.hyper, strict=True)]
    return direct - flat(indirect), solve


def minimize(pair: Pair) -> list[Tensor]:
    """Weights near `pair`'s at which the gradient of the training loss is as small as rounding lets it be.

    Newton's method with conjugate gradients and a line search; near the minimum, where losses differ by rounding
    only, a step is judged by the gradient. The best point is returned, whatever was reached.

    Source: Nocedal and Wright, Numerical Optimization, algorithm 7.1.
    """
    weights, loss = list(pair.weights), pair.value(pair.train)
    best, smallest, first, stalled = weights, math.inf, None, 0
    for _ in range(_NEWTON_STEPS):
        linearization = pair.at(weights).linearization()
        gradient = flat(linearization.gradient)
        norm = float(torch.linalg.vector_norm(gradient))
        if not math.isfinite(norm):
            break
        first = norm if first is None else first
        stalled = 0 if norm < 0.5 * smallest else stalled + 1
        if norm < smallest:
            best, smallest = weights, norm
        rounding = 100 * torch.finfo(weights[0].dtype).eps * abs(loss)
        accuracy = min(0.1, math.sqrt(norm / first)) if first else 0.1
        solve = conjugate_gradients(product_of(linearization, weights), -gradient, max(accuracy, 1e-8), _PRODUCTS)
        direction = solve.value if solve.residuals else -gradient
        slope = float(direction @ gradient)
        if norm == 0 or (stalled >= 2 and -slope <= rounding):
            break
        if 0 <= -slope <= _CLOSE * rounding:  # too close to tell by the loss; the full step is the best guess
            return like(flat(weights) + direction, weights)
        weights, loss, moved = _line_search(pair, weights, loss, direction, slope, rounding)
        if not moved:
            break
    return best


def _line_search(
    pair: Pair, weights: list[Tensor], loss: float, direction: Tensor, slope: float, rounding: float
) -> tuple[list[Tensor], float, bool]:
    """Backtracking from the full step until the loss falls enough, apart from rounding."""
    start, step = flat(weights), 1.0
    for _ in range(40):
        candidate = like(start + step * direction, weights)
        value = pair.value(pair.at(candidate).train)
        if value <= loss + _SUFFICIENT_DECREASE * step * slope + rounding:
            return candidate, value, True
        step /= 2
    return weights, loss, False
