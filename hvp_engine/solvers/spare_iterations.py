"""Iterations of small problems, kept for the next solve: to allocate and bind one takes 70 us, as long as two products.

A solve that has ended hands over a copy of its value and leaves its buffers to the next one with the same settings and
layout. A few are kept, of at most :data:`_LARGEST` elements, so they hold a few megabytes at most.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Hashable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from hvp_engine._support.flat_vector import Layout
from hvp_engine.ops import backend
from hvp_engine.solvers.iteration import FinishedIteration, Iteration

_LARGEST = 1 << 14
_MOST = 8

_spare: OrderedDict[Hashable, list[Iteration]] = OrderedDict()
_lock = threading.Lock()


def allocated(solver: Any, layout: Layout) -> Iteration:
    """An iteration of `solver`, allocated now or left by an earlier solve."""
    if layout.size > _LARGEST or layout.whole is not None or solver.preconditioner is not None:
        return solver.allocate(layout)
    key = solver, layout, backend.CHOICE.get(), torch.get_num_threads()
    try:
        with _lock:
            kept = _spare.get(key)
            iteration = kept.pop() if kept else None
    except TypeError:  # a solver of somebody else's that has no hash
        return solver.allocate(layout)
    if iteration is None:
        iteration = solver.allocate(layout)
        iteration.taken_back = partial(_keep, key)
    return iteration


def _keep(key: Hashable, iteration: Iteration) -> None:
    with _lock:
        kept = _spare.setdefault(key, [])
        _spare.move_to_end(key)
        if len(kept) < _MOST:
            kept.append(iteration)
        if len(_spare) > _MOST:
            _spare.popitem(last=False)


def released(iteration: FinishedIteration, value: list[Tensor]) -> list[Tensor]:
    """`value`, which may be views of the iteration's buffers; copies of them if somebody takes those back."""
    if iteration.taken_back is None:
        return value
    value = [part.clone() for part in value]
    iteration.taken_back(iteration)
    return value
