"""How long engines take, measured in turns on one problem."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence

import torch

from hvp_engine.differentiation.linear_map import Linearization
from hvp_engine.differentiation.problem import Problem
from hvp_engine.differentiation.self_check import probe
from hvp_engine.engines.base import Engine
from hvp_engine.solvers.neumann import Neumann

_TERMS = 3
"""Terms of the trial solve that engines are compared on."""

_TRIAL_SECONDS = 0.3
_FEWEST_TRIALS, _MOST_TRIALS = 4, 50
"""Trials go on for the fewest rounds, the first one to warm up, and until one of the others is reached."""


def seconds_per_term(contenders: Sequence[tuple[Engine, Linearization]]) -> list[float]:
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


def seconds_around(engine: Engine, problem: Problem, term: float) -> float:
    """Seconds that a solve takes beside its terms: to linearize the problem, and to begin and end."""
    device = problem.weights[0].device
    start = time.perf_counter()
    linearization = engine.linearize(problem)
    engine.run(linearization, probe(linearization.layout), Neumann(_TERMS, alpha=1e-9), None)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return max(0.0, time.perf_counter() - start - _TERMS * term)
