"""Engines linearize a problem and run a solver's terms on the linearization."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from hvp_engine.differentiation.gradient import Gradient, by_autograd
from hvp_engine.differentiation.linear_map import Linearization, LinearMap, Terms
from hvp_engine.differentiation.problem import Problem
from hvp_engine.engines.replays import Counted
from hvp_engine.solvers.base import Runner, Solver
from hvp_engine.solvers.batched import MOST, pays
from hvp_engine.solvers.iteration import FinishedIteration, Iteration
from hvp_engine.solvers.solution import Solution
from hvp_engine.solvers.spare_iterations import allocated
from hvp_engine.solvers.spectrum import SpectralEstimate


def begin(operator: LinearMap, v: Sequence[Tensor], solver: Solver, estimate: SpectralEstimate | None) -> Iteration:
    """A new iteration of `solver` on `operator`, ready for its first step."""
    iteration = allocated(solver, operator.layout)
    iteration.adapt(estimate)
    iteration.start(v)
    return iteration


def advance(iteration: Iteration, operator: LinearMap, terms: Terms | None = None, limit: float = math.inf) -> None:
    """Alternate products and steps until the solver is done, or has made `limit` steps; `terms`, if given, make all of
    them but the last.

    A product is kept until the next one exists: freed at once, its memory would return to the system and come back page
    by page, which tripled the page faults of a solve and cost up to a third of its time on a CPU.
    """
    if terms is not None and iteration.steps < iteration.limit - 1:
        terms(range(iteration.steps, iteration.limit - 1))
        iteration.steps = iteration.limit - 1
    limit = min(limit, iteration.limit)
    while iteration.steps < limit and not iteration.finished():
        product = operator.product(iteration.direction.tangents)
        iteration.step(product)


def make_steps(iteration: Iteration, operator: LinearMap, damping: float) -> Iteration:
    """All steps of an iteration that has been started, by the fastest way that the operator knows."""
    if operator.learning:
        advance(iteration, operator, limit=1)
    accumulation = iteration.accumulation if iteration.limit > 1 else None
    terms = None if accumulation is None else operator.accumulating_terms(accumulation, damping)
    advance(iteration, operator, terms)
    return iteration


def advance_together(iterations: Sequence[Iteration], operator: LinearMap) -> None:
    """One product and one step for each iteration; by one batched product if that pays off."""
    if not pays(operator, len(iterations)):
        for one in iterations:
            one.step(operator.product(one.direction.tangents))
        return
    directions = zip(*(one.direction.tangents for one in iterations), strict=True)
    images = operator.products([torch.stack(parts) for parts in directions])
    for index, one in enumerate(iterations):
        one.step([image[index] for image in images])


@dataclass(frozen=True)
class Parts:
    """A hypergradient, as lists of tensors that are the caller's, and what else came out on the way.

    Attributes:
        value: of the solve, which `solution` describes.
    """

    train_loss: Tensor
    val_loss: Tensor
    grads: list[Tensor]
    value: list[Tensor]
    solution: Solution
    gradient_norm: Tensor
    unfinished: Tensor


class Whole(Runner, Protocol):
    """What makes whole hypergradients of problems that look alike. It is an engine of their solves, too."""

    def begin(self, train: Problem, val: Problem, solver: Solver) -> bool:
        """Take these problems, until :meth:`end`; false if it cannot serve them, or not now."""

    def at_once(self) -> Parts | None:
        """The hypergradient by a solve that starts from zero; None if it takes a look at something in between, or is no
        use."""

    def differentiated(self) -> tuple[Gradient, Linearization]:
        """The gradient of the validation loss, and the linearization of the training loss."""

    def end(self) -> None:
        """Let the problems go."""


class Engine:
    """A way to execute the terms of a solve. A subclass defines :meth:`linearize`; the rest has defaults.

    Attributes:
        name: what the public API calls it.
    """

    name: str = ""

    def linearize(self, problem: Problem) -> Linearization:
        """The gradient of the problem's loss and its derivatives, at the problem's point."""
        raise NotImplementedError

    def foresee(self, train: Problem, val: Problem, solver: Solver) -> None:
        """A hypergradient follows: the gradient of `val`, a linearization of `train` and a solve by `solver` from zero.
        An engine that can do all at once does, and hands over each part when it is asked for."""

    def gradient(self, problem: Problem) -> Gradient:
        """The problem's loss and its first derivatives by all that it is a function of."""
        return by_autograd(problem)

    def whole(self, train: Problem, val: Problem, solver: Solver) -> Whole | None:
        """What makes the hypergradient of such problems all at once, without running the caller's code or drawing from
        a global generator; None where nothing can, or not now."""
        return None

    def run(
        self, operator: LinearMap, v: Sequence[Tensor], solver: Solver, estimate: SpectralEstimate | None
    ) -> FinishedIteration:
        return make_steps(begin(operator, v, solver, estimate), operator, solver.damping)

    def run_all(
        self, operator: LinearMap, vs: Sequence[Sequence[Tensor]], solver: Solver, estimate: SpectralEstimate | None
    ) -> Iterable[FinishedIteration]:
        """The finished iterations for multiple right-hand sides, with batched products if they pay off."""
        if not pays(operator, len(vs)):
            return (self.run(operator, v, solver, estimate) for v in vs)
        return side_by_side(operator, vs, solver, estimate)

    def recorder(self, device: torch.device) -> Counted | None:
        """What records other work on the device that goes on around hypergradients; None where that would not do."""
        return None

    def report(self) -> str:
        """A description of what the engine did and why."""
        return "no set-up"

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs to continue with the same numbers."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a saved state; that of another engine is ignored."""


def side_by_side(
    operator: LinearMap, vs: Sequence[Sequence[Tensor]], solver: Solver, estimate: SpectralEstimate | None
) -> Iterator[Iteration]:
    """Solves that advance together, at most :data:`MOST` at once, with one batched product per term."""
    for start in range(0, len(vs), MOST):
        group = [begin(operator, v, solver, estimate) for v in vs[start : start + MOST]]
        while active := [one for one in group if one.steps < one.limit and not one.finished()]:
            advance_together(active, operator)
        yield from group
