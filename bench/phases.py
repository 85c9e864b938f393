"""Named ranges around the phases of a hypergradient, put there from outside: the library knows nothing of them.

Every range is a `record_function` for torch.profiler and, on a CUDA device, an NVTX range for nsys and ncu.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.profiler import record_function

from hvp_engine import engines
from hvp_engine._support.flat_vector import Layout
from hvp_engine.differentiation.linear_map import Linearization, LinearMap, Terms
from hvp_engine.differentiation.problem import Problem
from hvp_engine.solvers.base import Solver
from hvp_engine.solvers.iteration import FinishedIteration, Iteration
from hvp_engine.solvers.spectrum import SpectralEstimate

WHOLE, GRADIENT, LINEARIZE, TERM, STEP, MIXED = (
    "hypergradient", "gradient", "linearize", "term", "step", "mixed product",
)  # fmt: skip


@contextlib.contextmanager
def phase(name: str) -> Iterator[None]:
    """A range with this name."""
    nvtx = torch.cuda.nvtx.range(name) if torch.cuda.is_available() else contextlib.nullcontext()
    with nvtx, record_function(name):
        yield


def _within(name: Callable[[], str], function: Callable[..., Any]) -> Callable[..., Any]:
    def wrapped(*arguments: Any) -> Any:
        with phase(name()):
            return function(*arguments)

    return wrapped


class PhasedSolver(Solver):
    """A solver whose steps are ranges."""

    def __init__(self, solver: Solver):
        self._solver = solver
        self.damping = solver.damping

    @property
    def estimates_spectrum(self) -> bool:
        return self._solver.estimates_spectrum

    def allocate(self, layout: Layout) -> Iteration:
        iteration = self._solver.allocate(layout)
        iteration.step = _within(lambda: STEP, iteration.step)  # type: ignore[method-assign]
        return iteration


class PhasedEngine(engines.Engine):
    """An engine whose phases are ranges. Terms are numbered; one that an engine fuses with its step has no step.

    The gradient of the validation loss is what comes before the linearization, so its range is opened by
    :meth:`hypergradient` and closed here.
    """

    def __init__(self, engine: engines.Engine):
        self._engine = engine
        self.name = engine.name
        self._before = contextlib.ExitStack()
        self._terms = 0

    @contextlib.contextmanager
    def hypergradient(self) -> Iterator[None]:
        """The range of one call, to be made inside."""
        self._terms = 0
        with phase(WHOLE), self._before:
            self._before.enter_context(phase(GRADIENT))
            yield

    def report(self) -> str:
        return self._engine.report()

    def linearize(self, problem: Problem) -> Linearization:
        self._before.close()
        with phase(LINEARIZE):
            linearization: Any = self._engine.linearize(problem)
        linearization.product = _within(self._next_term, linearization.product)
        linearization.mixed = _within(lambda: MIXED, linearization.mixed)
        bind = linearization.accumulating_terms

        def accumulating_terms(*arguments: Any) -> Terms | None:
            terms = bind(*arguments)
            if terms is None:
                return None

            def one_by_one(steps: range) -> None:
                for step in steps:
                    with phase(self._next_term()):
                        terms(range(step, step + 1))

            return one_by_one

        linearization.accumulating_terms = accumulating_terms
        return linearization

    def run(
        self, operator: LinearMap, v: Sequence[Tensor], solver: Solver, estimate: SpectralEstimate | None
    ) -> FinishedIteration:
        return self._engine.run(operator, v, solver, estimate)

    def _next_term(self) -> str:
        self._terms += 1
        return f"{TERM} {self._terms}"
