"""Correctness first: every method is compared with a plain loop in float64 before it is timed."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor

from bench import methods
from bench.methods import Preparation, Run
from bench.problems import Problem, build
from hvp_engine.errors import BackendError

TOLERANCE, WIDEST = 1e-3, 5e-2
"""Relative error of a float32 result, by the global norm: twice that of a plain loop in float32 is allowed too, which
in a deep net with ReLU is large, but not more than the second."""

CHECK_TERMS = 3
"""Products of the solve that is checked: enough that every part of a method runs."""


@dataclass
class Verified:
    """The runs that passed, seconds that their first call took, and why the others did not.

    `broken` names those of our own that did not pass, except an engine that says that it cannot run here.
    """

    runs: dict[str, Run] = field(default_factory=dict)
    setup: dict[str, float] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    broken: list[str] = field(default_factory=list)

    def leave_out(self, name: str, reason: str, refused: bool = False) -> None:
        self.left_out[name] = reason
        if methods.is_ours(name) and not refused:
            self.broken.append(f"{name}: {reason}")


@dataclass(frozen=True)
class Kind:
    """A kind of result: its float64 reference, and what an error is relative to."""

    reference: Preparation
    scale: Callable[[Problem, Sequence[Tensor]], Tensor]


def _curvature_part(problem: Problem, x: Sequence[Tensor]) -> Tensor:
    """x without the part alpha (i + 1) v that any Hessian would give, so that a wrong product cannot hide."""
    known = problem.alpha * (CHECK_TERMS + 1)
    return _norm([a - known * b for a, b in zip(x, problem.vector, strict=True)])


def _whole(problem: Problem, x: Sequence[Tensor]) -> Tensor:
    return _norm(x)


KINDS = {
    "inverse_hvp": Kind(partial(methods.taped_inverse_hvp, methods.list_loop), _curvature_part),
    "hypergradient": Kind(partial(methods.taped_hypergradient, methods.list_loop), _whole),
    "unrolled": Kind(methods.unrolled, _whole),
}


def verify(kind: str, problem: Problem, candidates: Mapping[str, Preparation]) -> Verified:
    """Prepare the candidates for a kind of result on `problem`, and sort them by whether they get it right."""
    what = KINDS[kind]
    exact = build(problem.name, problem.device, torch.float64)

    def error_of(result: Sequence[Tensor], alpha: float) -> float:
        there = replace(exact, alpha=alpha)
        expected = what.reference(there)(CHECK_TERMS)
        difference = _norm([a.detach().double() - b for a, b in zip(result, expected, strict=True)])
        return float(difference / what.scale(there, expected))

    allowed = min(WIDEST, max(TOLERANCE, 2 * error_of(what.reference(problem)(CHECK_TERMS), problem.alpha)))
    verified = Verified()
    for name, prepare in candidates.items():
        start = time.perf_counter()
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                run = prepare(problem)
                result = run(CHECK_TERMS)
        except Exception as error:  # whatever a method raises is the reason that it is left out
            reason = f"{type(error).__name__}: {_one_line(error)}"
            verified.leave_out(name, reason, refused=isinstance(error, BackendError))
            continue
        elapsed = time.perf_counter() - start
        engine = name.removeprefix(f"{methods.OURS} ")
        replaced = [str(w.message) for w in caught if str(w.message).startswith(f"engine {engine!r} is replaced")]
        if replaced:  # what would be timed is the eager engine under another name
            verified.leave_out(name, replaced[0])
            continue
        difference = error_of(result, getattr(run, "alpha", problem.alpha))  # a run may choose its own
        if difference <= allowed:
            verified.runs[name], verified.setup[name] = run, elapsed
        else:
            verified.leave_out(name, f"wrong result: relative error {difference:.2g} (allowed: {allowed:.2g})")
    return verified


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


def _norm(tensors: Sequence[Tensor]) -> Tensor:
    return torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(t.double()) for t in tensors]))
