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
from hvp_engine._support.timing import Moment
from hvp_engine.differentiation.linear_map import Linearization, LinearMap, Terms
from hvp_engine.differentiation.problem import Problem
from hvp_engine.solvers.base import Solver
from hvp_engine.solvers.iteration import FinishedIteration, Iteration
from hvp_engine.solvers.spectrum import SpectralEstimate

WHOLE, GRADIENT, LINEARIZE, TERM, STEP, MIXED = (
    "hypergradient", "gradient", "linearize", "term", "step", "mixed product",
)  # fmt: skip


class Phases:
    """Marks phases, and times them on the device that computes.

    A profiler knows which thread launched a kernel. On a GPU autograd launches those of a backward pass from its own
    thread, so that none would be in a range of the caller. What lies between two points of the device's own timeline
    is a phase's, whoever launched it.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self._spans: list[tuple[str, Moment, Moment]] = []

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """A range with this name."""
        on_gpu = self.device.type == "cuda"
        nvtx = torch.cuda.nvtx.range(name) if on_gpu else contextlib.nullcontext()
        with nvtx, record_function(name):
            if on_gpu and torch.cuda.is_current_stream_capturing():
                yield  # what a graph replays later is no part of this moment
                return
            begin = Moment(self.device)
            yield
            self._spans.append((name, begin, Moment(self.device)))

    def forget(self) -> None:
        """Forget the ranges so far."""
        self._spans.clear()

    def seconds(self) -> list[tuple[str, float]]:
        """The name of each range that has ended, and how long the device was in it."""
        return [(name, end.seconds_since(begin)) for name, begin, end in self._spans]

    def within(self, name: Callable[[], str], function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, each call of which is a range."""

        def wrapped(*arguments: Any) -> Any:
            with self(name()):
                return function(*arguments)

        return wrapped


class PhasedSolver(Solver):
    """A solver whose steps are ranges."""

    def __init__(self, solver: Solver, phases: Phases):
        self._solver, self._phases = solver, phases
        self.damping = solver.damping

    @property
    def estimates_spectrum(self) -> bool:
        return self._solver.estimates_spectrum

    def allocate(self, layout: Layout) -> Iteration:
        iteration = self._solver.allocate(layout)
        iteration.step = self._phases.within(lambda: STEP, iteration.step)  # type: ignore[method-assign]
        return iteration


class PhasedEngine(engines.Engine):
    """An engine whose phases are ranges. Terms are numbered; one that an engine fuses with its step has no step.

    The gradient of the validation loss is what comes before the linearization, so its range is opened by
    :meth:`hypergradient` and closed here.
    """

    def __init__(self, engine: engines.Engine, phases: Phases):
        self._engine, self._phases = engine, phases
        self.name = engine.name
        self._before = contextlib.ExitStack()
        self._terms = 0

    @contextlib.contextmanager
    def hypergradient(self) -> Iterator[None]:
        """The range of one call, to be made inside."""
        self._terms = 0
        with self._phases(WHOLE), self._before:
            self._before.enter_context(self._phases(GRADIENT))
            yield

    def report(self) -> str:
        return self._engine.report()

    def linearize(self, problem: Problem) -> Linearization:
        self._before.close()
        with self._phases(LINEARIZE):
            linearization: Any = self._engine.linearize(problem)
        linearization.product = self._phases.within(self._next_term, linearization.product)
        linearization.closing = self._phases.within(lambda: MIXED, linearization.closing)
        bind = linearization.accumulating_terms

        def accumulating_terms(*arguments: Any) -> Terms | None:
            terms = bind(*arguments)
            if terms is None:
                return None

            def one_by_one(steps: range) -> None:
                for step in steps:
                    with self._phases(self._next_term()):
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
