"""The automatic engine: measure what is supported on first use, remember the fastest, and say why."""

from __future__ import annotations

import hashlib
import math
import sys
import time
from collections import OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from hvp_engine._support.random_state import random_state_kept
from hvp_engine.differentiation.linear_map import Linearization, LinearMap
from hvp_engine.differentiation.problem import Problem, is_constant, split_inputs
from hvp_engine.differentiation.self_check import probe
from hvp_engine.engines.base import Engine
from hvp_engine.engines.compiled import CompiledEngine, estimated_seconds
from hvp_engine.engines.cudagraph import CudaGraphEngine
from hvp_engine.engines.eager import EagerEngine
from hvp_engine.engines.traced import LinearizedEngine, TracedLinearization, signature
from hvp_engine.errors import BackendError
from hvp_engine.solvers.base import Solver
from hvp_engine.solvers.iteration import FinishedIteration
from hvp_engine.solvers.neumann import Neumann
from hvp_engine.solvers.spectrum import SpectralEstimate

_TRACE_SECONDS_PER_NODE = 4e-3
"""What a trace and its check cost for each node of the gradient's autograd graph, roughly (on a 2.4 GHz core)."""

_FIRST_TRACE_SECONDS = 3.0
"""What the first trace of a process costs on top: torch imports sympy and more."""

_FEW_TERMS, _SHORT_SECONDS = 200, 0.5
"""A trace that takes less than so many terms of eager, or so many seconds, is made at first sight."""

_MOST_CHOICES = 256
"""Problems whose choices are kept, the latest used."""

_TIE = 1.03
"""Eager must be faster by this to be taken: a choice should not hang on noise."""

_TERMS = 3
"""Terms of the trial solve that engines are compared on."""

_TRIAL_SECONDS = 0.3
_FEWEST_TRIALS, _MOST_TRIALS = 4, 50
"""Trials go on for the fewest rounds, the first one to warm up, and until one of the others is reached."""


@dataclass
class Choice:
    """What was chosen for one problem, and the evidence: seconds for each term, by engine.

    `terms` counts the terms run so far, `spent` the seconds they took. `trace_seconds` is what a trace that was put off
    would take, `compile_seconds` what compiling would; None once that is settled.
    """

    engine: Engine
    reason: str
    seconds: dict[str, float] = field(default_factory=dict)
    setup_seconds: float = 0.0
    terms: int = 0
    spent: float = 0.0
    trace_seconds: float | None = None
    compile_seconds: float | None = None

    def as_long_as(self, seconds: float | None) -> bool:
        """Whether as much time has gone into terms as setting up another engine takes: waiting longer saves nothing."""
        measured = self.terms * self.seconds.get(self.engine.name, 0.0)  # a GPU may still be busy when a run returns
        return seconds is not None and max(self.spent, measured) > seconds

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


class AutoEngine(Engine):
    """Chooses the fastest engine for each (loss, shapes, device, number of threads) by short measurements.

    Engines round differently; where two are about equally fast, two runs may choose differently. Name the engine
    where every bit has to be the same in every run.

    On first use eager and linearized are compared, on a CUDA device cudagraph as well. What takes long to set up is put
    off until as much time has gone into terms as it is expected to take: then no choice would have been better by more
    than a factor of two. That holds for compiling; for a trace that takes more than some 200 terms; and for
    every further shape of a loss, since a batch whose length changes may never come again.

    Arguments:
        expected_products: products with the Hessian within which a trace should pay for itself; where it cannot,
            eager is taken without trying.
        compile_budget_s: seconds that compiling one problem may be expected to take; 0 never compiles.
    """

    name = "auto"

    ORDER = ("eager", "linearized", "cudagraph", "compiled")
    """What is chosen from, simplest first: where one works, so do those before it."""

    def __init__(self, expected_products: int = 200_000, compile_budget_s: float = 120.0) -> None:
        self.expected_products = expected_products
        self.compile_budget_s = compile_budget_s
        self._eager = EagerEngine()
        self._linearized = LinearizedEngine(self._eager)
        self._cudagraph = CudaGraphEngine(linearized=self._linearized)
        self._compiled = CompiledEngine(compile_budget_s, self._eager)
        self.choices: OrderedDict[Hashable, Choice] = OrderedDict()
        self._descriptions: dict[Hashable, str] = {}
        self._losses: dict[Hashable, float] = {}
        self._remembered: dict[str, str] = {}
        self._made: WeakKeyDictionary[LinearMap, tuple[Engine, Choice]] = WeakKeyDictionary()

    def linearize(self, problem: Problem) -> Linearization:
        tensors, others, spec = split_inputs(problem)
        key = signature(problem, tensors, others, spec), _threads(problem)
        choice = self.choices.get(key)
        if choice is None:
            self._descriptions[key] = description = describe(problem, tensors, others)
            if all(is_constant(leaf) for leaf in others):
                choice = self._first_choice(problem, self._remembered.get(description))
            else:  # untried, since a batch that is an iterator could be read once only
                choice = Choice(self._eager, "a trace cannot follow what is in the batch beside tensors")
            self.choices[key] = choice
            if len(self.choices) > _MOST_CHOICES:
                self._descriptions.pop(self.choices.popitem(last=False)[0])
        elif choice.as_long_as(choice.trace_seconds):
            choice = self.choices[key] = self._first_choice(problem, None, at_once=True)
        elif choice.as_long_as(choice.compile_seconds):
            self._try_compiled(problem, choice)
        self.choices.move_to_end(key)
        linearization = choice.engine.linearize(problem)
        self._made[linearization] = choice.engine, choice
        return linearization

    def linearize_by(self, name: str, problem: Problem) -> Linearization:
        """By the engine of this name, whatever would be chosen."""
        return self._engine(name).linearize(problem)

    def engine_of(self, linearization: LinearMap) -> str:
        """The engine that was chosen for a linearization made here."""
        return self._made[linearization][0].name

    def credit(self, linearization: LinearMap, terms: int, seconds: float) -> None:
        """So many terms were run on a linearization; if it was made here, they count towards what was put off."""
        if linearization in self._made:
            choice = self._made[linearization][1]
            choice.terms, choice.spent = choice.terms + terms, choice.spent + seconds

    def run(
        self, operator: LinearMap, v: Sequence[Tensor], solver: Solver, estimate: SpectralEstimate | None
    ) -> FinishedIteration:
        """By the engine that made the linearization."""
        engine = self._made[operator][0] if operator in self._made else self._eager
        start = time.perf_counter()
        iteration = engine.run(operator, v, solver, estimate)
        self.credit(operator, iteration.steps, time.perf_counter() - start)
        return iteration

    def state_dict(self) -> dict[str, dict[str, str]]:
        """The choices made so far, by what the problems look like."""
        settled = {key: choice for key, choice in self.choices.items() if choice.trace_seconds is None}
        chosen = {self._descriptions[key]: choice.engine.name for key, choice in settled.items()}
        return {"engines": self._remembered | chosen}

    def load_state_dict(self, state: dict[str, dict[str, str]]) -> None:
        """Choose the same again, without measuring: a continued run must round as it did before."""
        self._remembered = dict(state.get("engines", {}))  # another engine's state has none
        self.choices.clear()

    def report(self) -> str:
        """One line for each problem met so far."""
        lines = [choice.describe() for choice in self.choices.values()] or ["not used yet"]
        considered = {name for choice in self.choices.values() for name in choice.seconds}
        used = [e for e in self._engines if e is not self._eager and (e is not self._cudagraph or e.name in considered)]
        return "\n".join([*lines, *(f"{engine.name}: {engine.report()}" for engine in used)])

    def _engine(self, name: str) -> Engine:
        return next(engine for engine in self._engines if engine.name == name)

    @property
    def _engines(self) -> tuple[Engine, ...]:
        return self._eager, self._linearized, self._cudagraph, self._compiled

    def _first_choice(self, problem: Problem, remembered: str | None, at_once: bool = False) -> Choice:
        if remembered is not None:
            return Choice(self._engine(remembered), "as before the checkpoint")
        known = self._losses.get(problem.identity)
        if known is not None and not at_once and self._linearized.known(problem) is None:
            reason = (
                f"another shape of a loss: a trace takes about {known:.2g} s, and waits until terms have taken as much"
            )
            return Choice(self._eager, reason, trace_seconds=known)
        with random_state_kept(problem.weights[0].device):
            return self._measured_choice(problem, self._eager.linearize(problem), at_once)

    def _measured_choice(self, problem: Problem, eager: Linearization, at_once: bool) -> Choice:
        (term,) = _seconds_per_term([(self._eager, eager)])
        seconds = {"eager": term}
        cost = _TRACE_SECONDS_PER_NODE * eager.nodes
        first = 0.0 if "sympy" in sys.modules else _FIRST_TRACE_SECONDS
        if cost + first > self.expected_products * term:
            reason = f"a trace would take about {cost + first:.1g} s, more than {self.expected_products} products do"
            return Choice(self._eager, reason, seconds)
        loss = problem.identity
        self._losses.setdefault(loss, cost)
        if not at_once and cost > max(_FEW_TERMS * term, _SHORT_SECONDS):
            reason = f"a trace takes about {cost:.2g} s, and waits until terms have taken as much"
            return Choice(self._eager, reason, seconds, trace_seconds=cost)
        start = time.perf_counter()
        try:
            traced = self._linearized.linearize(problem)
        except BackendError as error:  # our own fault
            return Choice(self._eager, str(error), seconds)
        except Exception as error:  # eager has just worked, so this is about tracing; the reason is reported
            return Choice(self._eager, f"the loss cannot be traced: {type(error).__name__}: {error}", seconds)
        if traced.fallback is not None:
            return Choice(self._eager, f"the trace is not used: {traced.fallback}", seconds)
        contenders: list[tuple[Engine, Linearization]] = [(self._eager, eager), (self._linearized, traced)]
        if self._cudagraph.missing(problem.weights[0].device) is None:
            recorded = self._cudagraph.linearize(problem)
            if recorded.fallback is None:  # else its report says why
                contenders.append((self._cudagraph, recorded))
        setup = time.perf_counter() - start
        self._losses[loss] = max(cost, setup + _TRIAL_SECONDS - first)
        seconds = dict(zip((engine.name for engine, _ in contenders), _seconds_per_term(contenders), strict=True))
        engines = [engine for engine, _ in contenders]
        fastest = min(engines, key=lambda e: seconds[e.name] * (_TIE if e is self._eager else 1.0))
        choice = Choice(fastest, "measured fastest", seconds, setup)
        if isinstance(traced, TracedLinearization):
            made = self._compiled.known(problem) is not None
            expected = 0.0 if made else estimated_seconds(traced.functions.partition)
            choice.compile_seconds = expected if expected <= self.compile_budget_s else None
        return choice

    def _try_compiled(self, problem: Problem, choice: Choice) -> None:
        choice.compile_seconds = None
        start = time.perf_counter()
        try:
            with random_state_kept(problem.weights[0].device):
                linearization = self._compiled.linearize(problem)
                contenders = [(choice.engine, choice.engine.linearize(problem)), (self._compiled, linearization)]
                before, after = _seconds_per_term(contenders)  # again, since the machine may be busier by now
        except Exception as error:  # the choice so far stays; the reason is reported
            choice.reason += f"; compiling failed: {type(error).__name__}: {error}"
            return
        if linearization.fallback is not None:
            return  # it did not agree with eager, which has been warned about
        choice.seconds |= {choice.engine.name: before, "compiled": after}
        if after < before:
            choice.engine, choice.setup_seconds = self._compiled, time.perf_counter() - start


def describe(problem: Problem, tensors: Sequence[Tensor], others: Sequence[Any]) -> str:
    """What a problem looks like, the same in every process."""
    leaves = [*problem.weights, *problem.hyperparameters, *tensors]
    shapes = [(tuple(leaf.shape), leaf.stride(), str(leaf.dtype), leaf.device.type) for leaf in leaves]
    constants = [other for other in others if isinstance(other, (bool, int, float, str))]
    return hashlib.sha256(repr((problem.name, shapes, constants, _threads(problem))).encode()).hexdigest()


def _threads(problem: Problem) -> int:
    """Threads that the problem's operations are spread over: on a CPU what is fastest depends on them."""
    return torch.get_num_threads() if problem.weights[0].device.type == "cpu" else 0


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
        if trial + 1 >= _FEWEST_TRIALS and time.perf_counter() - started > _TRIAL_SECONDS:
            break
    return best
