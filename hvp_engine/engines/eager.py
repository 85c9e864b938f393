"""The eager engine: double backward over the retained gradient graph, and the fused step. Any code runs on it."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Hashable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch

from hvp_engine._support.random_state import RandomState
from hvp_engine.differentiation.differentiable_kernels import own_kernels, plain_kernels
from hvp_engine.differentiation.double_backward import Tape, gradients, leaves
from hvp_engine.differentiation.linear_map import Linearization
from hvp_engine.differentiation.missing_derivatives import ThirdDerivativeError
from hvp_engine.differentiation.problem import Problem
from hvp_engine.engines.base import Engine
from hvp_engine.errors import SecondDerivativeError


class EagerEngine(Engine):
    """Builds the gradient graph once for each linearization; every product is one `torch.autograd.grad`.

    Attention and recurrent layers run on operations that have a second derivative. Where another fast kernel of the
    forward has none, or a wrong one, the graph is built on the plain kernels instead, from then on, with one warning;
    where the loss differentiates through normalizations, on their formulas.
    """

    name = "eager"

    def __init__(self) -> None:
        self._own = False
        self._instead: Callable[[], AbstractContextManager[Any]] | None = None
        self._complete: Hashable = None
        """The last loss whose kernels all have second derivatives."""

    def linearize(self, problem: Problem) -> Linearization:
        return self.recorded_as(Tape, problem)

    def recorded_as(self, kind: Callable[..., Tape], problem: Problem) -> Linearization:
        """The gradient graph, with products as this kind of linearization makes them."""
        if self._instead is not None:
            with contextlib.suppress(ThirdDerivativeError):
                return self._record(kind, problem, self._instead)
        # A second recording has to draw the same masks. Keeping the state takes 0.1 ms, so not in every call.
        device = problem.weights[0].device
        known = self._complete == problem.identity
        before = None if known else RandomState.now(device)
        thrice = False
        try:
            tape = self._record(kind, problem, contextlib.nullcontext if known and not self._own else own_kernels)
            if not tape.facts.incomplete:
                self._complete = problem.identity
                return tape
        except SecondDerivativeError as error:
            thrice = isinstance(error, ThirdDerivativeError)
        if before is not None:
            before.restore(device)
        instead = partial(plain_kernels, thrice)
        tape = self._record(kind, problem, instead)
        self._instead = instead
        if not thrice:
            warnings.warn(
                f"{problem.name}: a kernel in it has no second derivative; it is evaluated on plain kernels from "
                "now on (no cuDNN, no fused weight normalization, no sparse gradients, formulas for hardsigmoid, "
                "distances, embedding bags, margin and CTC losses)",
                stacklevel=4,
            )
        return tape

    def _record(
        self, kind: Callable[..., Tape], problem: Problem, kernels: Callable[[], AbstractContextManager[Any]]
    ) -> Tape:
        weights, hyperparameters = leaves(problem.weights), leaves(problem.hyperparameters)
        with torch.enable_grad(), kernels() as replacing:
            loss = problem.evaluate(weights, hyperparameters)
            gradient = gradients(loss, weights, problem.name)
            # What is recomputed in products must be computed as it was here.
            inside = kernels if replacing is not None and replacing.used else contextlib.nullcontext
            self._own |= kernels is own_kernels and inside is own_kernels
            return kind(gradient, weights, hyperparameters, loss, problem.name, inside=inside)
