"""Leaving the caller's state as it was: random numbers and module buffers inside our own calls.

Everything random inside one call (dropout, noise) is drawn from a forked generator: one draw for all terms of a
solve, another for the next call. Modules made pure by :func:`functional` work on copies of their
buffers while :func:`isolated` is active, so that BatchNorm's running statistics do not move.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar

import torch

from hvp_engine._support.random_state import random_state_kept, seed_everything

_active: ContextVar[bool] = ContextVar("hvp_engine_isolated", default=False)
_modules: ContextVar[list[torch.nn.Module] | None] = ContextVar("hvp_engine_modules", default=None)


def is_isolated() -> bool:
    """Whether the code runs inside one of our own calls."""
    return _active.get()


def record_module(module: torch.nn.Module) -> None:
    """Note that a loss called `module`, for whoever is recording."""
    modules = _modules.get()
    if modules is not None:
        modules.append(module)


@contextlib.contextmanager
def recorded_modules() -> Iterator[list[torch.nn.Module]]:
    """The modules that functional calls inside the block use."""
    modules: list[torch.nn.Module] = []
    token = _modules.set(modules)
    try:
        yield modules
    finally:
        _modules.reset(token)


@contextlib.contextmanager
def isolated(seed: int, device: torch.device) -> Iterator[None]:
    """Fork the random states (torch's on the CPU and `device`, Python's, numpy's), seed them, keep buffers untouched;
    one thread at a time.

    Cost: as :func:`hvp_engine._support.random_state.random_state_kept`.
    """
    token = _active.set(True)
    try:
        with random_state_kept(device), torch.enable_grad():
            seed_everything(seed, device)
            yield
    finally:
        _active.reset(token)


class Draws:
    """A counter of calls that gives each call its own seed, reproducibly.

    Seeds follow from torch's initial seed at construction and the number of calls so far; nothing is taken from
    the caller's generator. `count` is all there is to save and restore.
    """

    def __init__(self) -> None:
        self.base = torch.initial_seed()
        self.count = 0

    def next_seed(self) -> int:
        self.count += 1
        return (self.base * 6364136223846793005 + self.count * 1442695040888963407) % (1 << 63)

    def state_dict(self) -> dict[str, int]:
        return {"base": self.base, "count": self.count}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.base, self.count = state["base"], state["count"]
