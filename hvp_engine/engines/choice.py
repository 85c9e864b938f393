"""What the automatic engine has chosen for a problem, why, and when to think again."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from hvp_engine.differentiation.problem import Problem, form_of
from hvp_engine.engines.base import Engine

_BUILDING_SECONDS = 2.0
"""Building may take so long, whatever it saves."""


@dataclass
class Choice:
    """What was chosen for one problem, and the evidence: seconds for each term, by engine; or, where solves have no
    terms, for each call.

    `terms` counts the terms run so far, `spent` the seconds they took, `around` those of everything else.
    `building` are the seconds among those spent that programs of graphs other than the first took to build.
    `program_tried` says that a recorded program was compared with eager, so that a trace comes next.
    `trace_seconds` is what a trace that was put off would take, `compile_seconds` what compiling would; None once that
    is settled.
    """

    engine: Engine
    reason: str
    seconds: dict[str, float] = field(default_factory=dict)
    setup_seconds: float = 0.0
    terms: int = 0
    spent: float = 0.0
    around: float = 0.0
    building: float = 0.0
    trace_seconds: float | None = None
    compile_seconds: float | None = None
    program_tried: bool = False
    unit: str = "term"

    def trace_is_due(self) -> bool:
        """Whether as much time as a trace takes has gone into what it could save: waiting longer saves nothing.

        The terms of a recorded program are those of a trace, so a trace saves only what is around them.
        """
        if self.trace_seconds is None:
            return False
        return self.around + (self._terms_took() if self.engine.name == "eager" else 0.0) > self.trace_seconds

    def credit(self, terms: int, seconds: float, building: float) -> None:
        """So many terms were run in so many seconds, of which building programs took some."""
        self.terms, self.spent, self.building = self.terms + terms, self.spent + seconds, self.building + building

    def builds_too_much(self) -> bool:
        """Whether most of the time goes into programs, as for graphs with sizes that values decide, of which few are
        like another. Writing products down and checking programs takes about as long again as building them."""
        return self.building > _BUILDING_SECONDS and 3 * self.building > self.spent

    def without_programs(self, eager: Engine) -> Choice:
        """What is chosen where building takes too much."""
        reason = f"each gradient's graph was another one, and building programs took {self.building:.2g} s"
        return Choice(eager, reason, self.seconds)

    @property
    def is_final(self) -> bool:
        """Whether nothing was put off."""
        return self.trace_seconds is None and self.compile_seconds is None

    def compiling_is_due(self) -> bool:
        """Whether as much time as compiling takes has gone into terms."""
        return self.compile_seconds is not None and self._terms_took() > self.compile_seconds

    def _terms_took(self) -> float:
        measured = self.terms * self.seconds.get(self.engine.name, 0.0)  # a GPU may still be busy when a run returns
        return max(self.spent, measured)

    def describe(self) -> str:
        timings = ", ".join(f"{name} {1e3 * seconds:.3g} ms" for name, seconds in self.seconds.items())
        text = f"{self.engine.name}: {self.reason}"
        if timings:
            text += f" (one {self.unit}: {timings})"
        if self.setup_seconds and self.engine.name in self.seconds:
            setup, gain = self.setup_seconds, self.seconds["eager"] - self.seconds[self.engine.name]
            if gain > 0:
                text += f"; set up in {setup:.2f} s, which {setup / gain:.0f} {self.unit}s repay"
        return text


def describe(problem: Problem, tensors: Sequence[Tensor], others: Sequence[Any]) -> str:
    """What a problem looks like, the same in every process."""
    leaves = [*problem.weights, *problem.hyperparameters, *tensors]
    shapes = [(tuple(leaf.shape), form_of(leaf), str(leaf.dtype), leaf.device.type) for leaf in leaves]
    constants = [other for other in others if isinstance(other, (bool, int, float, str))]
    return hashlib.sha256(repr((problem.name, shapes, constants, threads(problem))).encode()).hexdigest()


def threads(problem: Problem) -> int:
    """Threads that the problem's operations are spread over: on a CPU what is fastest depends on them."""
    return torch.get_num_threads() if problem.weights[0].device.type == "cpu" else 0
