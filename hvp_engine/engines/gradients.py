"""Gradients of losses: by a traced program where there is one that agrees with autograd, else by autograd."""

from __future__ import annotations

import math
import time
import warnings
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor, fx

from hvp_engine._support.flat_vector import detached, norm_of
from hvp_engine._support.isolation import recorded_modules
from hvp_engine._support.random_state import RandomState, random_state_kept
from hvp_engine._support.torch_compat import below_autograd
from hvp_engine.differentiation.gradient import Gradient, by_autograd
from hvp_engine.differentiation.native.graph_program import GraphProgram
from hvp_engine.differentiation.problem import Problem, is_constant
from hvp_engine.differentiation.self_check import Schedule, difference_of_products, is_rounding
from hvp_engine.differentiation.trace.partial_evaluation import floating_dtypes
from hvp_engine.differentiation.trace.tracing import trace_gradient
from hvp_engine.differentiation.trace.value_watch import KEPT
from hvp_engine.engines.choice import describe
from hvp_engine.engines.surroundings import Surroundings

_MOST = 64
"""Losses and shapes that are remembered, the latest used."""

_TRIALS = 3


class Program(Protocol):
    """What gives a loss and its derivatives, None where there is no path."""

    random: bool

    def __call__(self, *inputs: Tensor) -> Sequence[Tensor | None]: ...


@dataclass
class Known:
    """What is known of one loss and shape.

    Attributes:
        spent, fastest: seconds of its gradients by autograd, in all and at least.
        program: None before it is made, and where `reason` says why there is none.
        surroundings: what the loss read when it was traced.
    """

    spent: float = 0.0
    fastest: float = math.inf
    program: Program | None = None
    reason: str = ""
    description: str = ""
    surroundings: Surroundings | None = None
    schedule: Schedule = field(default_factory=Schedule)

    def is_settled(self) -> bool:
        """Whether the next gradient is made by the program, unchecked."""
        return self.program is not None and self.surroundings is not None and self.surroundings.settled(self.schedule)


def native_program(graph: fx.GraphModule, inputs: Sequence[Tensor]) -> Program:
    """A program of the extension."""
    return GraphProgram(graph, floating_dtypes(graph.graph))


class Gradients:
    """The gradients of losses.

    A program, like a linearization, is compared with autograd at first and more and more rarely.

    Arguments:
        make: makes a program of a traced gradient and tensors like its inputs.
        by: what runs the programs, in words.
        missing: why there are none on a device, or None.
        most: losses and shapes that are remembered, the latest used.
    """

    def __init__(
        self,
        make: Callable[[fx.GraphModule, Sequence[Tensor]], Program] = native_program,
        by: str = "the extension",
        missing: Callable[[torch.device], str | None] = lambda device: None if device.type == "cpu" else "no CPU",
        most: int = _MOST,
    ) -> None:
        self._make, self._by, self._missing, self._most = make, by, missing, most
        self._known: OrderedDict[Hashable, Known] = OrderedDict()
        self._remembered: dict[str, bool] = {}

    def __call__(self, problem: Problem, patience: float = 0.0) -> Gradient:
        """The gradient of the problem's loss at its point.

        Arguments:
            patience: seconds that autograd must have taken before a loss is traced. With any, the program is then used
                if it is faster; without, it is.
        """
        tensors, others, _ = problem.split
        if self._missing(problem.weights[0].device) is not None or not all(map(is_constant, others)):
            return by_autograd(problem)
        key = problem.signature, torch.get_num_threads()
        known = self._known.get(key)
        if known is None and self._remembered:
            by_program = self._remembered.get(describe(problem, tensors, others))
            patience = 0.0 if by_program else patience
            known = self._known[key] = Known(reason="as before the checkpoint" if by_program is False else "")
        if known is None or (known.surroundings is not None and not known.reason and known.surroundings.outdated()):
            known = self._known[key] = Known()
            if len(self._known) > self._most:
                self._known.popitem(last=False)
        self._known.move_to_end(key)
        if known.program is None and not known.reason and known.spent >= patience:
            self._trace(problem, known)
            known.description = describe(problem, tensors, others)
        if known.program is None:
            return _timed(problem, known)
        assert known.surroundings is not None
        if changed := known.surroundings.changed():
            _give_up(known, problem, f"it reads {changed}, which has changed since it was traced")
            return _timed(problem, known)
        if not known.schedule.due_alone():
            return _by_program(known.program, problem, tensors)
        device = problem.weights[0].device
        before = RandomState.now(device)

        def eagers(nudged: bool = False) -> Gradient:
            with before.again(device):
                return _timed(problem.nudged() if nudged else problem, known)

        expected, found = eagers(), _by_program(known.program, problem, tensors)
        wrong = gradients_disagree(found, expected, problem, eagers)
        if patience and not wrong and known.schedule.calls == 1:
            with random_state_kept(device):
                known.reason = self._slower(known, problem, tensors)
        if wrong:
            _give_up(known, problem, wrong)
        if known.reason:
            known.program = None
            return expected
        return found

    def settled(self, problem: Problem) -> Known | None:
        """What will make the problem's next gradient by its program, unchecked; None if nothing will."""
        known = self._known.get((problem.signature, torch.get_num_threads()))
        return known if known is not None and known.is_settled() else None

    def counted(self, problem: Problem) -> None:
        """A gradient is made without being asked for here, which counts towards the next check."""
        self._known[problem.signature, torch.get_num_threads()].schedule.due()

    def state_dict(self) -> dict[str, bool]:
        """Which gradients are made by programs, of those that are settled, by what the problems look like."""
        settled = (known for known in self._known.values() if known.description)
        return self._remembered | {known.description: known.program is not None for known in settled}

    def load_state_dict(self, state: dict[str, bool]) -> None:
        """Choose the same again."""
        self._remembered = dict(state)
        self._known.clear()

    def report(self) -> str:
        """How many gradients are programs, and why others are not; empty before the first."""
        made = sum(known.program is not None for known in self._known.values())
        reasons = sorted({known.reason for known in self._known.values() if known.reason})
        text = [f"{made} gradients by {self._by}"] if made else []
        return "; ".join([*text, *(f"gradients by autograd: {reason}" for reason in reasons)])

    def _trace(self, problem: Problem, known: Known) -> None:
        try:
            with recorded_modules() as modules, random_state_kept(problem.weights[0].device):
                graph = trace_gradient(problem)
                inputs = [*detached(problem.weights), *detached(problem.hyperparameters), *problem.split[0]]
            known.surroundings = Surroundings(problem, modules, graph.meta[KEPT])
            known.program = self._make(graph, inputs)
        except Exception as error:  # the loss may still work, which autograd then shows
            known.reason = f"{type(error).__name__}: {error}".splitlines()[0]

    def _slower(self, known: Known, problem: Problem, tensors: Sequence[Tensor]) -> str:
        assert known.program is not None
        best = math.inf
        for _ in range(_TRIALS):
            start = time.perf_counter()
            _by_program(known.program, problem, tensors)
            best = min(best, time.perf_counter() - start)
        return "" if best < known.fastest else "it is faster"


def _give_up(known: Known, problem: Problem, reason: str) -> None:
    known.program, known.reason = None, reason
    warnings.warn(
        f"the traced gradient of {problem.name} is replaced by autograd's: {reason}; a loss must be a function of its "
        "arguments: pass what changes between calls in the batch or the hyperparameters",
        stacklevel=5,
    )


def _timed(problem: Problem, known: Known) -> Gradient:
    start = time.perf_counter()
    found = by_autograd(problem)
    took = time.perf_counter() - start
    known.spent, known.fastest = known.spent + took, min(known.fastest, took)
    return found


def _by_program(program: Program, problem: Problem, tensors: Sequence[Tensor]) -> Gradient:
    with below_autograd():
        loss, *found = program(*detached(problem.weights), *detached(problem.hyperparameters), *detached(tensors))
    count = len(problem.weights)
    assert loss is not None
    weights = [torch.zeros_like(w) if g is None else g for g, w in zip(found, problem.weights, strict=False)]
    return Gradient(loss.reshape(()) if loss.dim() else loss, weights, found[count:])


def gradients_disagree(
    found: Gradient, expected: Gradient, problem: Problem, again: Callable[[bool], Gradient] | None = None
) -> str:
    """What differs, in words; gradients relative to what a gradient of such a loss is like, if that is more. `again`
    makes the gradient once more, for :func:`~hvp_engine.differentiation.self_check.is_rounding`."""
    dtypes = {tensor.dtype for tensor in (*problem.weights, *problem.hyperparameters)}
    if difference_of_products([found.loss], [expected.loss], dtypes):
        return "the loss differs"
    scale = expected.loss.abs().double() / norm_of(detached(problem.weights)).clamp_min(0.01)
    for name in ("weights", "hyperparameters"):
        ours, theirs = getattr(found, name), getattr(expected, name)
        there = any(tensor is not None for tensor in theirs)
        reference = [scale.to(found.loss.dtype)] if there else []
        if not difference_of_products([*ours, *reference], [*theirs, *reference], dtypes):
            continue

        def once_more(nudged: bool, name: str = name) -> list[Tensor | None]:
            assert again is not None
            made: list[Tensor | None] = getattr(again(nudged), name)
            return made

        if again is None or not is_rounding(ours, theirs, once_more):
            return f"the derivative by the {name} differs"
    return ""
