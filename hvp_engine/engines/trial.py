"""How long each engine takes for one problem, measured alternately."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from hvp_engine.differentiation.linear_map import Linearization
from hvp_engine.differentiation.problem import Problem
from hvp_engine.differentiation.self_check import probe
from hvp_engine.engines.base import Engine
from hvp_engine.solvers.neumann import Neumann

SHORT, LONG = 3, 6
"""Terms of the trial solves: a term is what the long one takes beyond the short one, so that what a solve sets up, some
milliseconds on a GPU, is not counted."""

_SETUP_SHOWS = 0.01
"""Where all short solves take more seconds than this, they alone are timed, and their set-up counts with the terms."""

_TRIAL_SECONDS, _LONG = 0.3, 3.0
_FEWEST_TRIALS, _MOST_TRIALS = 3, 50
"""After a round to warm up, trials go on for the fewest rounds, and until one of the others is reached. What takes long
is tried once: a moment's noise is a small part of it, and a trial must not cost more than it can save."""

Contenders = Sequence[tuple[Engine, Linearization]]


def seconds_per_term(contenders: Contenders) -> list[float]:
    """Seconds of a term by each engine on its linearization: the fastest of short solves, in turns.

    In turns and often, so that a busy moment of the machine does not decide.
    """
    started = time.perf_counter()
    tangents = probe(contenders[0][1].layout)
    warming_up = [seconds_of_solve(*contender, tangents, SHORT) for contender in contenders]
    lengths = [SHORT] if min(warming_up) > _SETUP_SHOWS else [SHORT, LONG]
    best = [[math.inf] * len(lengths) for _ in contenders]
    for trial in range(1, _MOST_TRIALS + 1):
        for contender, fastest in zip(contenders, best, strict=True):
            for index, terms in enumerate(lengths):
                fastest[index] = min(fastest[index], seconds_of_solve(*contender, tangents, terms))
        if time.perf_counter() - started > (_TRIAL_SECONDS if trial >= _FEWEST_TRIALS else _LONG):
            break
    if lengths == [SHORT]:
        return [short / SHORT for (short,) in best]
    return [max(long - short, 0.0) / (LONG - SHORT) for short, long in best]


def seconds_around(engine: Engine, problem: Problem, term: float, terms: int = SHORT) -> float:
    """Seconds that a solve takes beside its terms: to linearize the problem, to begin and end, and for what comes
    after it, the mixed product. It is tried with so many terms, of so many seconds each; with none there is no solve.

    A linearization of an earlier trial must be gone: an engine whose linearizations own buffers would make others.
    """
    fastest, began, clock = math.inf, time.perf_counter(), _clock(problem.weights[0].device)
    for _ in range(_FEWEST_TRIALS):
        start = clock()
        linearization = engine.linearize(problem)
        linearized = clock() - start
        tangents = probe(linearization.layout)
        solved = seconds_of_solve(engine, linearization, tangents, terms) - terms * term if terms else 0.0
        start = clock()
        if problem.hyperparameters:
            linearization.mixed(tangents)
        fastest = min(fastest, linearized + solved + clock() - start)
        del linearization
        if time.perf_counter() - began > _TRIAL_SECONDS:
            break
    return max(0.0, fastest)


def _clock(device: torch.device) -> Callable[[], float]:
    """What trials are timed by: on one thread of a CPU what that has worked, whoever else is busy there."""
    return time.thread_time if device.type == "cpu" and torch.get_num_threads() == 1 else time.perf_counter


def seconds_of_solve(engine: Engine, linearization: Linearization, tangents: Sequence[Tensor], terms: int) -> float:
    """Seconds of a solve of so many terms, until the device has made them."""
    device = linearization.layout.device
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    clock = _clock(device)
    start = clock()
    engine.run(linearization, tangents, Neumann(terms, alpha=1e-9), None)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return clock() - start
