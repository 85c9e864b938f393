"""The linearized engine: trace once, run the primal part once per hypergradient, the tangent part once per term."""

from __future__ import annotations

import math
import time
import warnings
from collections import OrderedDict
from collections.abc import Hashable, Sequence

from torch import Tensor

from hvp_engine._support.flat_vector import Layout
from hvp_engine._support.isolation import recorded_modules
from hvp_engine._support.random_state import RandomState, random_state_kept
from hvp_engine.differentiation.gradient import Gradient
from hvp_engine.differentiation.linear_map import Linearization
from hvp_engine.differentiation.problem import Problem
from hvp_engine.differentiation.self_check import disagreement
from hvp_engine.differentiation.trace.partial_evaluation import Partition, partition
from hvp_engine.differentiation.trace.tracing import trace
from hvp_engine.differentiation.trace.value_watch import KEPT
from hvp_engine.engines.base import Engine, Whole
from hvp_engine.engines.eager import EagerEngine
from hvp_engine.engines.functions import Functions, Refused, TracedLinearization
from hvp_engine.engines.gradients import Gradients
from hvp_engine.engines.native_whole import NativeWhole
from hvp_engine.engines.surroundings import Surroundings
from hvp_engine.solvers.base import Solver

_MOST_TRACES = 16
"""Traces that one engine keeps; one of a small recurrent net takes about 20 MB."""


class LinearizedEngine(Engine):
    """Traces each (shapes, batch constants) once; new values of the same shapes reuse the trace.

    A trace is made anew where modules of the loss are in another mode, or autocast is. Where something else that the
    loss reads beside its arguments has changed, as a variable of the function around it, eager takes over for good,
    with a warning. So it does where a linearization disagrees with eager's: the first of a trace, and later ones more
    and more rarely, are compared.
    """

    name = "linearized"
    linearization = TracedLinearization

    def __init__(self, eager: EagerEngine | None = None) -> None:
        self._eager = EagerEngine() if eager is None else eager
        self._cache: OrderedDict[Hashable, Functions | Refused] = OrderedDict()
        self.traces = 0
        self.trace_seconds = 0.0
        self._forgotten = 0
        self.gradients = Gradients()

    def linearize(self, problem: Problem) -> Linearization:
        tensors, key = problem.split[0], problem.signature
        functions = self._cache.get(key)
        if functions is None or functions.outdated():
            functions = self._cache[key] = self._trace(problem)
            if len(self._cache) > _MOST_TRACES:
                self._cache.popitem(last=False)
                self._forgotten += 1
        self._cache.move_to_end(key)
        if isinstance(functions, Refused) or functions.distrust:
            return self._instead(problem, functions.distrust)
        changed = functions.surroundings.changed()
        if changed is not None:
            self._give_up(problem, functions, f"it reads {changed}, which has changed since it was traced")
            return self._instead(problem, functions.distrust)
        if not functions.schedule.due_alone():
            return self._linearization(functions, problem, tensors)
        device = problem.weights[0].device
        before = RandomState.now(device)

        def eagers(nudged: bool = False) -> Linearization:
            with before.again(device):
                return self._eager.linearize(problem.nudged() if nudged else problem)

        eager, traced = eagers(), self._linearization(functions, problem, tensors)
        if traced.fallback is not None:
            return traced
        wrong = disagreement(traced, eager, problem.weights, functions.partition.dtypes, eagers)
        if wrong is None:
            return traced
        self._give_up(problem, functions, wrong)
        eager.fallback = wrong
        return eager

    def _give_up(self, problem: Problem, functions: Functions, reason: str) -> None:
        functions.distrust = reason
        warnings.warn(
            f"engine {self.name!r} is replaced by 'eager' for {problem.name}: {reason}; a loss must be a function of "
            "its arguments: pass what changes between calls in the batch or the hyperparameters",
            stacklevel=5,
        )

    def gradient(self, problem: Problem) -> Gradient:
        return self.gradients(problem)

    def whole(self, train: Problem, val: Problem, solver: Solver) -> Whole | None:
        functions = self._cache.get(train.signature)
        if not isinstance(functions, Functions) or not functions.is_quiet():
            return None
        gradient = self.gradients.settled(val)
        return None if gradient is None else NativeWhole.of(train, val, solver, functions, gradient)

    def _instead(self, problem: Problem, reason: str | None) -> Linearization:
        """Eager's linearization, with the reason why it is not this engine's."""
        eager = self._eager.linearize(problem)
        eager.fallback = reason
        return eager

    def report(self) -> str:
        """What was traced, in a line."""
        text = f"{self.traces} traces in {self.trace_seconds:.2f} s"
        if self._forgotten:
            text += f", {self._forgotten} of them forgotten: at most {_MOST_TRACES} are kept, the latest used"
        undone = {u for f in self._cache.values() if isinstance(f, Functions) for u in f.undone}
        text += "".join(f"; rewrite undone: {reason}" for reason in sorted(undone))
        native = [f.native for f in self._cache.values() if isinstance(f, Functions) and f.native is not None]
        text += "".join(f"; {words}" for words in sorted({one.describe() for one in native} - {""}))
        made = [one.seconds for one in native if one.program is not None]
        text += f" ({len(made)} native programs, made in {sum(made):.2f} s)" if made else ""
        gradients = self.gradients.report()
        text += f"; {gradients}" if gradients else ""
        reasons = {f.unbatched for f in self._cache.values() if isinstance(f, Functions) and f.unbatched}
        return text + "".join(f"; right-hand sides one by one, since vmap failed: {reason}" for reason in reasons)

    @property
    def seconds_of_a_trace(self) -> float:
        """What a trace took on average; infinite before the first."""
        return self.trace_seconds / self.traces if self.traces else math.inf

    def known(self, problem: Problem) -> Functions | None:
        """The functions of a problem that has been traced here."""
        functions = self._cache.get(problem.signature)
        return functions if isinstance(functions, Functions) and functions.surroundings.same() else None

    def _trace(self, problem: Problem) -> Functions | Refused:
        start = time.perf_counter()
        with recorded_modules() as modules, random_state_kept(problem.weights[0].device):
            traced = trace(problem)
            parts = partition(traced)
            functions = self._functions(parts, Surroundings(problem, modules, traced.root.meta[KEPT]))
        self.traces += 1
        self.trace_seconds += time.perf_counter() - start
        return functions

    def _linearization(self, functions: Functions, problem: Problem, tensors: Sequence[Tensor]) -> Linearization:
        """Of functions that are trusted; without trust in them afterwards, it is eager's."""
        layout = Layout.of(problem.weights)
        return self.linearization(functions, layout, problem.name, functions.at(problem, tensors))

    def _functions(self, parts: Partition, surroundings: Surroundings) -> Functions:
        functions = Functions(parts, surroundings)
        functions.run_natively()
        return functions
