"""The automatic engine: measure what is supported on first use, remember the fastest, and say why."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from hvp_engine.engines.agreement import probe
from hvp_engine.engines.base import Engine
from hvp_engine.engines.compiled import CompiledEngine, estimated_seconds
from hvp_engine.engines.eager import EagerEngine
from hvp_engine.engines.linearized import LinearizedEngine, TracedLinearization, signature
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

_TIE = 1.03
"""Eager must be faster by this to be taken: a choice should not hang on noise."""

_TERMS = 3
"""Terms of the trial solve that engines are compared on."""

_TRIAL_SECONDS = 0.1
_MOST_TRIALS = 50
"""Trials go on for at least three rounds, and until one of these is reached."""


@dataclass
class Choice:
    """What was chosen for one problem, and the evidence: seconds for each term, by engine.

    `terms` counts the terms run so far; `compile_seconds` is what compiling would take, None once that is settled.
    """

    engine: Engine
    reason: str
    seconds: dict[str, float] = field(default_factory=dict)
    setup_seconds: float = 0.0
    terms: int = 0
    compile_seconds: float | None = None

    @property
    def compiling_would_have_paid(self) -> bool:
        """Whether as much time has gone into terms as compiling takes, so that waiting longer is no saving."""
        if self.compile_seconds is None:
            return False
        return self.terms * self.seconds[self.engine.name] > self.compile_seconds

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
    """Chooses the fastest engine for each (loss, shapes, device) by short measurements.

    Engines round differently; where two are about equally fast, two runs may choose differently. Name the engine
    where every bit has to be the same in every run.

    On first use eager and linearized are compared. Compiling takes longer, so it is tried once as much time has
    gone into terms as it is expected to take: then no choice would have been better by more than a factor of two.

    Arguments:
        expected_products: products with the Hessian within which a trace should pay for itself; where it cannot,
            eager is taken without trying.
        compile_budget_s: seconds that compiling one problem may be expected to take; 0 never compiles.
    """

    name = "auto"

    def __init__(self, expected_products: int = 200_000, compile_budget_s: float = 120.0) -> None:
        self.expected_products = expected_products
        self.compile_budget_s = compile_budget_s
        self._eager = EagerEngine()
        self._linearized = LinearizedEngine(self._eager)
        self._compiled = CompiledEngine(compile_budget_s, self._eager)
        self.choices: dict[Hashable, Choice] = {}
        self._remembered: list[str] = []
        self._current: Choice | None = None

    def linearize(self, problem: Problem) -> Linearization:
        tensors, others, spec = split_inputs(problem)
        key = signature(problem, tensors, others, spec)
        if key in self.choices:
            choice = self._current = self.choices[key]
            if choice.compiling_would_have_paid:
                self._try_compiled(problem, choice)
            return choice.engine.linearize(problem)
        if len(self.choices) < len(self._remembered):
            remembered = self._by_name(self._remembered[len(self.choices)])
            self._current = self.choices[key] = Choice(remembered, "as before the checkpoint")
            return remembered.linearize(problem)
        with same_draws(problem.weights[0].device):
            eager = self._eager.linearize(problem)
            self.choices[key], traced = self._choose(problem, eager)
            self._current = self.choices[key]
        if self.choices[key].engine is self._eager or traced is None:
            return eager
        return self.choices[key].engine.linearize(problem)

    def run(
        self, operator: LinearMap, v: Sequence[Tensor], solver: Solver, estimate: SpectralEstimate | None
    ) -> Iteration:
        """By the engine that made the linearization."""
        iteration = self._linearized.run(operator, v, solver, estimate)
        if self._current is not None:
            self._current.terms += iteration.steps
        return iteration

    def state_dict(self) -> dict[str, list[str]]:
        """The choices made so far, in the order in which problems were met."""
        return {"engines": [choice.engine.name for choice in self.choices.values()]}

    def load_state_dict(self, state: dict[str, list[str]]) -> None:
        """Choose the same again, without measuring: a continued run must round as it did before."""
        self._remembered = list(state["engines"])
        self.choices.clear()

    def _by_name(self, name: str) -> Engine:
        return next(engine for engine in (self._eager, self._linearized, self._compiled) if engine.name == name)

    def report(self) -> str:
        """One line for each problem met so far."""
        lines = [choice.describe() for choice in self.choices.values()] or ["not used yet"]
        return "\n".join([*lines, f"linearized: {self._linearized.report()}", f"compiled: {self._compiled.report()}"])

    def _choose(self, problem: Problem, eager: Linearization) -> tuple[Choice, Linearization | None]:
        (term,) = _seconds_per_term([(self._eager, eager)])
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
        contenders: list[tuple[Engine, Linearization]] = [(self._eager, eager), (self._linearized, traced)]
        seconds["eager"], seconds["linearized"] = _seconds_per_term(contenders)
        fastest: Engine = self._linearized if seconds["linearized"] < _TIE * seconds["eager"] else self._eager
        choice = Choice(fastest, "measured fastest", seconds, setup)
        if isinstance(traced, TracedLinearization):
            expected = estimated_seconds(traced.functions.partition)
            choice.compile_seconds = expected if expected <= self.compile_budget_s else None
        return choice, traced

    def _try_compiled(self, problem: Problem, choice: Choice) -> None:
        choice.compile_seconds = None
        start = time.perf_counter()
        try:
            with same_draws(problem.weights[0].device):
                linearization = self._compiled.linearize(problem)
                (seconds,) = _seconds_per_term([(self._compiled, linearization)])
        except Exception as error:  # the choice so far stays; the reason is reported
            choice.reason += f"; compiling failed: {type(error).__name__}: {error}"
            return
        if isinstance(linearization, Tape):
            return  # it did not agree with eager, which has been warned about
        choice.seconds["compiled"] = seconds
        if seconds < choice.seconds[choice.engine.name]:
            choice.engine, choice.setup_seconds = self._compiled, time.perf_counter() - start


def _seconds_per_term(contenders: Sequence[tuple[Engine, Linearization]]) -> list[float]:
    """Seconds of a term by each engine on its linearization: the fastest of short solves, in turns.

    In turns and often, so that a busy moment of the machine does not decide.
    """
    tangents = probe(contenders[0][1].layout)
    device = contenders[0][1].layout.device
    solver = Neumann(_TERMS, alpha=1e-9)
    best = [math.inf] * len(contenders)
    started = time.perf_counter()
    for trial in range(_MOST_TRIALS):
        for index, (engine, linearization) in enumerate(contenders):
            start = time.perf_counter()
            engine.run(linearization, tangents, solver, None)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            if trial > 0:  # the first one warms up
                best[index] = min(best[index], (time.perf_counter() - start) / _TERMS)
        if trial >= 2 and time.perf_counter() - started > _TRIAL_SECONDS:
            break
    return best
