"""Timing on a machine that is not quiet: methods take turns, so that whatever disturbs one disturbs all."""

from __future__ import annotations

import contextlib
import gc
import random
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch

_SHORTEST = 2e-3
"""Seconds below which a sample repeats the call."""

_FEWEST, _SLOW, _FEWEST_OF_SLOW = 3, 2.0, 2
"""Samples that even a slow method gets, and how many if one takes so many seconds."""


@dataclass(frozen=True)
class Work:
    """What one sample runs: `call` does `units` of what is measured, and returns its seconds if `self_timed`.

    It is timed on any number of threads, or on so many `threads` only.
    """

    call: Callable[[], object]
    units: int = 1
    self_timed: bool = False
    threads: int | None = None


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    """Run torch, and our kernels with it, on `count` threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def interleave(works: Mapping[str, Work], device: torch.device, seconds: float, rounds: int) -> dict[str, list[float]]:
    """Seconds for each unit of each work; every round runs every work once, in a random order.

    On one thread of a CPU they are the process's own, which others on the machine lengthen little.

    Arguments:
        works: what to time, by name.
        device: waited for at the end of each sample.
        seconds: in all; a work that has used its share, and has its few samples, sits out the rest.
        rounds: at most so many samples of each.
    """
    clock = time.process_time if device.type == "cpu" and torch.get_num_threads() == 1 else time.perf_counter
    works = {name: work for name, work in works.items() if work.threads in (None, torch.get_num_threads())}
    repeats = {name: _repeats(work, device) for name, work in works.items()}
    samples: dict[str, list[float]] = {name: [] for name in works}
    spent = dict.fromkeys(works, 0.0)
    order, shuffle = list(works), random.Random(0).shuffle
    share = seconds / max(1, len(works))

    def enough(name: str) -> bool:
        count = len(samples[name])
        return spent[name] >= share and count >= (_FEWEST_OF_SLOW if spent[name] > _SLOW * count else _FEWEST)

    for _ in range(rounds):
        shuffle(order)
        for name in order:
            if not enough(name):
                start = time.perf_counter()
                samples[name].append(_sample(works[name], repeats[name], device, clock))
                spent[name] += time.perf_counter() - start
    return samples


def _sample(work: Work, repeats: int, device: torch.device, clock: Callable[[], float] = time.perf_counter) -> float:
    gc.disable()
    try:
        start = clock()
        results = [work.call() for _ in range(repeats)] if work.self_timed else []
        if not work.self_timed:
            for _ in range(repeats):
                work.call()
        synchronize(device)
        elapsed = sum(results) if work.self_timed else clock() - start  # type: ignore[arg-type]
    finally:
        gc.enable()
    return elapsed / (repeats * work.units)


def _repeats(work: Work, device: torch.device) -> int:
    """Calls for a sample that a clock can measure, after two first ones; self-timed ones add up anyway.

    Two, since `auto` chooses anew for a number of threads: at the first call among what is there, at the next it tries
    what has been compiled.
    """
    _sample(work, 1, device)
    first = work.units * _sample(work, 1, device)
    if work.self_timed or first > 10 * _SHORTEST:
        return 1
    return max(1, min(1000, round(_SHORTEST / max(1e-9, work.units * _sample(work, 1, device)))))


def synchronize(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
