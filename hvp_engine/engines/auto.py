"""The automatic engine: measure what is supported on first use, remember the fastest, and say why."""

from __future__ import annotations

import sys
import time
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from hvp_engine.engines.agreement import probe
from hvp_engine.engines.base import Engine
from hvp_engine.engines.eager import EagerEngine
from hvp_engine.engines.linearized import LinearizedEngine, signature
from hvp_engine.engines.tape import Tape
from hvp_engine.engines.trace import split_inputs
from hvp_engine.isolation import same_draws
from hvp_engine.linearization import Linearization, LinearMap, Problem
from hvp_engine.solvers.base import Iteration, Solver
from hvp_engine.solvers.neumann import Neumann
from hvp_engine.spectrum import SpectralEstimate

_TRACE_SECONDS_PER_NODE = 2e-3
"""What tracing costs for each node of the gradient's autograd graph, roughly (measured on a 2.4 GHz core)."""

_FIRST_TRACE_SECONDS = 3.0
"""What the first trace of a process costs on top: torch imports sympy and more."""

_TERMS = 3
"""Terms of the trial solve that engines are compared on."""


@dataclass
class Choice:
    """What was chosen for one problem, and the evidence: seconds for each term, by engine."""

    engine: Engine
    reason: str
    seconds: dict[str, float] = field(default_factory=dict)
    setup_seconds: float = 0.0

    def describe(self) -> str:
        timings = ", ".join(f"{name} {1e3 * seconds:.3g} ms" for name, seconds in self.seconds.items())
        text = f"{self.engine.name}: {self.reason}"
        if timings:
            text += f" (one term: {timings})"
        if self.setup_seconds and self.engine.name in self.seconds:
            gain = self.seconds["eager"] - self.seconds[self.engine.name]
            if gain > 0:
                text += f"; set up in {self.setup_seconds:.2f} s, which {self.setup_seconds / gain:.0f} terms repay"
        return text


class AutoEngine:
    """Chooses between eager and linearized for each (loss, shapes, device) by a short measurement on first use.

    Arguments:
        expected_products: products with the Hessian within which a trace should pay for itself; where it cannot,
            eager is taken without trying.
    """

    name = "auto"

    def __init__(self, expected_products: int = 20_000) -> None:
        self.expected_products = expected_products
        self._eager = EagerEngine()
        self._linearized = LinearizedEngine(self._eager)
        self.choices: dict[Hashable, Choice] = {}

    def linearize(self, problem: Problem) -> Linearization:
        tensors, others, spec = split_inputs(problem)
        key = signature(problem, tensors, others, spec)
        if key in self.choices:
            return self.choices[key].engine.linearize(problem)
        with same_draws(problem.weights[0].device):
            eager = self._eager.linearize(problem)
            self.choices[key], traced = self._choose(problem, eager)
        if self.choices[key].engine is self._eager or traced is None:
            return eager
        return self.choices[key].engine.linearize(problem)

    def run(
        self, operator: LinearMap, v: Sequence[Tensor], solver: Solver, estimate: SpectralEstimate | None
    ) -> Iteration:
        """By the engine that made the linearization."""
        return self._linearized.run(operator, v, solver, estimate)

    def report(self) -> str:
        """One line for each problem met so far."""
        lines = [choice.describe() for choice in self.choices.values()] or ["not used yet"]
        return "\n".join([*lines, self._linearized.report()])

    def _choose(self, problem: Problem, eager: Linearization) -> tuple[Choice, Linearization | None]:
        term = _seconds_per_term(self._eager, eager)
        seconds = {"eager": term}
        cost = _TRACE_SECONDS_PER_NODE * (eager.size if isinstance(eager, Tape) else 0)
        if "sympy" not in sys.modules:
            cost += _FIRST_TRACE_SECONDS
        if cost > self.expected_products * term:
            reason = f"a trace would take about {cost:.1g} s, more than {self.expected_products} products do"
            return Choice(self._eager, reason, seconds), None
        start = time.perf_counter()
        try:
            traced = self._linearized.linearize(problem)
        except Exception as error:  # eager has just worked, so this is about tracing; the reason is reported
            return Choice(self._eager, f"the loss cannot be traced: {type(error).__name__}: {error}", seconds), None
        setup = time.perf_counter() - start
        if isinstance(traced, Tape):
            return Choice(self._eager, "the traced product did not agree with eager's", seconds), None
        seconds["linearized"] = _seconds_per_term(self._linearized, traced)
        fastest: Engine = self._linearized if seconds["linearized"] < term else self._eager
        return Choice(fastest, "measured fastest", seconds, setup), traced


def _seconds_per_term(engine: Engine, linearization: Linearization) -> float:
    """Seconds of a term: the faster of two short solves after a first one."""
    tangents = probe(linearization.layout)
    solver = Neumann(_TERMS, alpha=1e-9)
    device = linearization.layout.device
    timings = []
    for _ in range(3):
        start = time.perf_counter()
        engine.run(linearization, tangents, solver, None)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        timings.append((time.perf_counter() - start) / _TERMS)
    return min(timings[1:])
