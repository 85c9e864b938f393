"""The automatic engine: measure what is supported on first use, remember the fastest, and say why."""

from __future__ import annotations

import math
import sys
import time
from collections import OrderedDict
from collections.abc import Hashable, Sequence
from typing import Any

from torch import Tensor

from hvp_engine._support.random_state import random_state_kept
from hvp_engine.differentiation.gradient import Gradient
from hvp_engine.differentiation.linear_map import Linearization, LinearMap
from hvp_engine.differentiation.problem import Problem, is_constant
from hvp_engine.differentiation.recorded.library import LIBRARY
from hvp_engine.differentiation.self_check import probe
from hvp_engine.engines.base import Engine, Whole
from hvp_engine.engines.choice import Choice, describe, threads
from hvp_engine.engines.compiled import CompiledEngine, estimated_seconds
from hvp_engine.engines.cudagraph import CudaGraphEngine
from hvp_engine.engines.eager import EagerEngine
from hvp_engine.engines.functions import TracedLinearization
from hvp_engine.engines.recorded import RecordedEngine
from hvp_engine.engines.traced import LinearizedEngine
from hvp_engine.engines.trial import SHORT, seconds_around, seconds_per_term
from hvp_engine.errors import BackendError
from hvp_engine.solvers.base import Solver
from hvp_engine.solvers.iteration import FinishedIteration
from hvp_engine.solvers.spectrum import SpectralEstimate

_TRACE_SECONDS_PER_NODE = 3e-3
"""What a trace and its check cost for each node of the gradient's autograd graph, roughly (on a 2.4 GHz core)."""

_BUILD_SECONDS_PER_NODE = 1e-3
"""What turning the gradient's graph into a program costs for each of its nodes, roughly."""

_SHORT_SECONDS = 0.5
"""A trace that takes less than so many seconds is made at first sight; that of a validation loss at the second."""

_MOST_CHOICES = 256
"""Problems whose choices are kept, the latest used."""

_TIE = 1.03
"""Eager must be faster by this to be taken: a choice should not hang on noise."""


class AutoEngine(Engine):
    """Chooses the fastest engine for each (loss, shapes, device, number of threads) by short measurements.

    Engines round differently; where two are about equally fast, two runs may choose differently. Name the engine
    where every bit has to be the same in every run.

    On first use eager and recorded are compared, linearized too if the trace is short, on a CUDA device cudagraph as
    well. What takes long to set up is put off until as much time has gone into what it could save as it is expected to
    take: then no choice would have been better by more than a factor of two. That holds for compiling; for a trace that
    takes more than half a second; and for every further shape of a loss, since a batch whose length changes may never
    come again.

    Arguments:
        expected_products: products with the Hessian within which a trace should pay for itself; where it cannot,
            eager is taken without trying.
        compile_budget_s: seconds that compiling one problem may be expected to take; 0 never compiles. Where the
            extension runs the traced products, nothing is compiled.
    """

    name = "auto"

    ORDER = ("eager", "recorded", "linearized", "cudagraph", "compiled")
    """What is chosen from, simplest first: where one works, so do those before it."""

    def __init__(self, expected_products: int = 200_000, compile_budget_s: float = 120.0, terms: int = 10) -> None:
        self.expected_products = expected_products
        self.compile_budget_s = compile_budget_s
        self.terms = terms
        self._eager = EagerEngine()
        self._recorded = RecordedEngine(self._eager)
        self._linearized = LinearizedEngine(self._eager)
        self._cudagraph = CudaGraphEngine(linearized=self._linearized)
        self._compiled = CompiledEngine(compile_budget_s, self._eager)
        self._expected_seconds = math.inf
        self._captures: Problem | None = None
        self.choices: OrderedDict[Hashable, Choice] = OrderedDict()
        self._descriptions: dict[Hashable, str] = {}
        self._losses: dict[Hashable, float] = {}
        self._remembered: dict[str, str] = {}

    def linearize(self, problem: Problem) -> Linearization:
        (tensors, others, _), key = problem.split, (problem.signature, threads(problem))
        choice = self.choices.get(key)
        if choice is None:
            self._descriptions[key] = description = describe(problem, tensors, others)
            if all(is_constant(leaf) for leaf in others):
                choice = self._first_choice(problem, self._remembered.get(description))
            else:  # untried, since a batch that is an iterator could be read once only
                choice = Choice(self._recorded, "untried: what is in the batch beside tensors may be read once only")
            self.choices[key] = choice
            if len(self.choices) > _MOST_CHOICES:
                self._descriptions.pop(self.choices.popitem(last=False)[0])
        elif choice.trace_is_due():
            choice = self.choices[key] = self._first_choice(problem, None, choice)
        elif choice.compiling_is_due():
            self._try_compiled(problem, choice)
        elif choice.builds_too_much():
            choice = self.choices[key] = choice.without_programs(self._eager)
        self.choices.move_to_end(key)
        start = time.perf_counter()
        engine = choice.engine
        linearization = engine.linearize(problem)
        choice.around += time.perf_counter() - start
        linearization.origin = engine, choice
        if linearization.fallback is not None and engine is not self._recorded:
            self.choices[key] = Choice(self._recorded, f"{engine.name} was given up: {linearization.fallback}")
        return linearization

    def foresee(self, train: Problem, val: Problem, solver: Solver) -> None:
        choice = self.choices.get((train.signature, threads(train)))
        self._captures = val if choice is not None and choice.engine is self._cudagraph else None
        if self._captures is not None:
            self._cudagraph.foresee(train, val, solver)

    def gradient(self, problem: Problem) -> Gradient:
        """As a CUDA graph where the terms are one. Otherwise by autograd until a trace can repay itself, or from the
        second call on if it is short; then by whichever is faster. A trace takes what that of the training loss was
        expected to take: in a busy moment it takes longer."""
        if self._captures is problem:
            self._captures = None
            return self._cudagraph.gradient(problem)
        seconds = min(self._linearized.seconds_of_a_trace, self._expected_seconds)
        return self._linearized.gradients(problem, sys.float_info.min if seconds < _SHORT_SECONDS else seconds)

    def whole(self, train: Problem, val: Problem, solver: Solver) -> Whole | None:
        """Where the choice is final."""
        choice = self.choices.get((train.signature, threads(train)))
        if choice is None or choice.engine is not self._linearized or not choice.is_final:
            return None
        return self._linearized.whole(train, val, solver)

    def linearize_by(self, name: str, problem: Problem) -> Linearization:
        """By the engine of this name, whatever would be chosen."""
        return self._engine(name).linearize(problem)

    def engine_of(self, linearization: LinearMap) -> str:
        """The engine that was chosen for a linearization."""
        return linearization.origin[0].name

    def credit(self, linearization: LinearMap, terms: int, seconds: float, building: float = 0.0) -> None:
        """So many terms were run on a linearization, which count towards what was put off."""
        if linearization.origin is not None:
            linearization.origin[1].credit(terms, seconds, building)

    def run(
        self, operator: LinearMap, v: Sequence[Tensor], solver: Solver, estimate: SpectralEstimate | None
    ) -> FinishedIteration:
        """By the engine that made the linearization."""
        engine = self._eager if operator.origin is None else operator.origin[0]
        start, built = time.perf_counter(), LIBRARY.build_seconds
        iteration = engine.run(operator, v, solver, estimate)
        self.credit(operator, iteration.steps, time.perf_counter() - start, LIBRARY.build_seconds - built)
        return iteration

    def state_dict(self) -> dict[str, dict[str, Any]]:
        """The choices made so far, by what the problems look like."""
        settled = {key: choice for key, choice in self.choices.items() if choice.trace_seconds is None}
        chosen = {self._descriptions[key]: choice.engine.name for key, choice in settled.items()}
        return {"engines": self._remembered | chosen, "gradients": self._linearized.gradients.state_dict()}

    def load_state_dict(self, state: dict[str, dict[str, Any]]) -> None:
        """Choose the same again, without measuring: a continued run must round as it did before."""
        self._remembered = dict(state.get("engines", {}))  # another engine's state has none
        self.choices.clear()
        self._linearized.gradients.load_state_dict(state.get("gradients", {}))

    def report(self) -> str:
        """One line for each problem met so far."""
        lines = [choice.describe() for choice in self.choices.values()] or ["not used yet"]
        considered = {name for choice in self.choices.values() for name in (*choice.seconds, choice.engine.name)}
        used = [e for e in self._engines if e is not self._eager and (e is not self._cudagraph or e.name in considered)]
        return "\n".join([*lines, *(f"{engine.name}: {engine.report()}" for engine in used)])

    def _engine(self, name: str) -> Engine:
        return next(engine for engine in self._engines if engine.name == name)

    @property
    def _engines(self) -> tuple[Engine, ...]:
        return self._eager, self._recorded, self._linearized, self._cudagraph, self._compiled

    def _first_choice(self, problem: Problem, remembered: str | None, before: Choice | None = None) -> Choice:
        """The engine for a problem that is met for the first time; or that was chosen `before`, with something put off
        that is due now: a program or, where that is there already, the trace."""
        if remembered is not None:
            return Choice(self._engine(remembered), "as before the checkpoint")
        known = self._losses.get(problem.identity)
        if known is not None and before is None and self._linearized.known(problem) is None:
            reason = f"another shape of a loss: a program takes about {known:.2g} s, and waits for terms to take that"
            return Choice(self._eager, reason, trace_seconds=known)
        with random_state_kept(problem.weights[0].device):
            return self._measured_choice(problem, before is not None and before.program_tried)

    def _measured_choice(self, problem: Problem, trace_too: bool) -> Choice:
        began = time.perf_counter()
        eager = self._eager.linearize(problem)
        start = time.perf_counter()
        self._try(eager)
        affordable = self.expected_products * (time.perf_counter() - start)
        nodes = eager.nodes
        del eager  # of what is tried, as little as possible is there at once: each takes the memory of a graph
        choice = self._with_or_without_autograd(problem, nodes, affordable)
        cost = _TRACE_SECONDS_PER_NODE * nodes
        if cost > affordable:
            choice.reason += f"; a trace would take about {cost:.1g} s, more than {self.expected_products} products do"
        elif not trace_too and cost > _SHORT_SECONDS:
            choice.trace_seconds = cost
            choice.reason += f"; a trace takes about {cost:.2g} s, and waits until it can repay itself"
        else:
            self._try_traces(problem, choice)
            self._expected_seconds = cost
        choice.program_tried = True
        choice.setup_seconds = time.perf_counter() - began
        return choice

    def _with_or_without_autograd(self, problem: Problem, nodes: int, affordable: float) -> Choice:
        """Eager or recorded, whichever is faster, if building a program is affordable."""
        building = _BUILD_SECONDS_PER_NODE * nodes
        self._losses.setdefault(problem.identity, building)
        if building > affordable:
            reason = f"a program would take about {building:.1g} s, more than {self.expected_products} products do"
            return Choice(self._eager, reason)
        recorded = self._recorded.linearize(problem)
        for _ in range(2):  # a graph that hides something is recorded in part at the second product
            self._try(recorded)
        if recorded.fallback is not None:
            return Choice(self._eager, f"products cannot be recorded: {recorded.fallback}")
        contenders = [(self._eager, self._eager.linearize(problem)), (self._recorded, recorded)]
        del recorded
        return self._fastest(problem, contenders, {})

    def _try(self, linearization: Linearization) -> None:
        """Make a product; where solves have no terms, a mixed one."""
        (linearization.product if self.terms else linearization.mixed)(probe(linearization.layout))

    def _try_traces(self, problem: Problem, choice: Choice) -> None:
        """Choose an engine that needs a trace where one is faster; remarks on why there is none."""
        try:
            traced = self._linearized.linearize(problem)
        except BackendError as error:  # our own fault
            choice.reason += f"; {error}"
            return
        except Exception as error:  # the loss has just worked, so this is about tracing; the reason is reported
            choice.reason += f"; the loss cannot be traced: {type(error).__name__}: {error}"
            return
        if traced.fallback is not None:
            choice.reason += f"; the trace is not used: {traced.fallback}"
            return
        contenders = [(choice.engine, choice.engine.linearize(problem)), (self._linearized, traced)]
        if self._cudagraph.missing(problem.weights[0].device) is None:
            captured = self._cudagraph.linearize(problem)
            if captured.fallback is None:  # else its report says why
                contenders.append((self._cudagraph, captured))
            del captured
        if isinstance(traced, TracedLinearization):
            made = self._compiled.known(problem) is not None
            expected = 0.0 if made else estimated_seconds(traced.functions.partition)
            # What the extension makes has been faster than compiled code wherever both were measured.
            tried = expected <= self.compile_budget_s and not traced.by_extension
            choice.compile_seconds = expected if tried else None
        del traced
        found = self._fastest(problem, contenders, choice.seconds)
        choice.engine, choice.seconds = found.engine, found.seconds
        choice.reason = "; ".join(dict.fromkeys([found.reason, choice.reason]))
        self._drop_recordings(problem, choice)

    def _drop_recordings(self, problem: Problem, choice: Choice) -> None:
        """Graphs hold a copy of all inputs and a pool of memory: none are kept of a problem that goes without them."""
        if choice.engine is not self._cudagraph and "cudagraph" in choice.seconds:
            self._cudagraph.forget(problem)

    def _fastest(
        self, problem: Problem, contenders: list[tuple[Engine, Linearization]], before: dict[str, float]
    ) -> Choice:
        """The engine that is fastest for a solve of :attr:`terms` terms, set-up for each solve included; the
        contenders' linearizations are gone afterwards. Its seconds include those measured `before`."""
        seconds_of_terms = seconds_per_term(contenders) if self.terms else [0.0] * len(contenders)
        engines = [engine for engine, _ in contenders]
        contenders.clear()
        totals = {
            engine.name: seconds_around(engine, problem, term, min(self.terms, SHORT)) + self.terms * term
            for engine, term in zip(engines, seconds_of_terms, strict=True)
        }
        fastest = min(engines, key=lambda e: totals[e.name] * (_TIE if e is self._eager else 1.0))
        seconds = dict(zip(totals, seconds_of_terms, strict=True)) if self.terms else totals
        return Choice(fastest, "measured fastest", before | seconds, unit="term" if self.terms else "call")

    def _try_compiled(self, problem: Problem, choice: Choice) -> None:
        start = time.perf_counter()
        try:
            with random_state_kept(problem.weights[0].device):
                choice.compile_seconds = None  # not before it is this thread's turn: who gives up comes back
                linearization = self._compiled.linearize(problem)
                contenders = [(choice.engine, choice.engine.linearize(problem)), (self._compiled, linearization)]
                before, after = seconds_per_term(contenders)  # again, since the machine may be busier by now
        except Exception as error:  # the choice so far stays; the reason is reported
            choice.reason += f"; compiling failed: {type(error).__name__}: {error}"
            return
        if linearization.fallback is not None:
            return  # it did not agree with eager, which has been warned about
        choice.seconds |= {choice.engine.name: before, "compiled": after}
        if after < before:
            choice.engine, choice.setup_seconds = self._compiled, time.perf_counter() - start
            del contenders
            self._drop_recordings(problem, choice)
