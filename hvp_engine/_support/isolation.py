"""Leaving the caller's random state and module buffers as they were.

Whatever is random inside a call (dropout, noise) is drawn from forked generators: the same numbers for all terms of a
solve, others in the next call. Modules wrapped by :func:`functional` work on copies of their buffers while
:func:`isolated` is active, so that BatchNorm's running statistics do not change.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextvars import ContextVar
from typing import Any, TypeVar

import torch
from torch import Tensor

from hvp_engine._support.random_state import TURNS, global_generators, random_state_kept, seed_everything

Result = TypeVar("Result")

_MOST_REFUSALS = 8
"""Calls that had to be run again alone after which an object's calls always are."""

_COPY = "_hvp_engine_copy"

_active: ContextVar[bool] = ContextVar("hvp_engine_isolated", default=False)
_modules: ContextVar[list[torch.nn.Module] | None] = ContextVar("hvp_engine_modules", default=None)


def is_isolated() -> bool:
    """Whether this code runs inside a call of the library."""
    return _active.get()


def copied(buffer: Tensor) -> Tensor:
    """A copy that belongs to the library, which may change it unseen."""
    copy = buffer.clone()
    setattr(copy, _COPY, True)
    return copy


def is_copy(tensor: Tensor) -> bool:
    """Whether :func:`copied` has made the tensor."""
    return hasattr(tensor, _COPY)


def record_module(module: torch.nn.Module) -> None:
    """Tell :func:`recorded_modules`, if it is active, that a loss has called `module`."""
    modules = _modules.get()
    if modules is not None:
        modules.append(module)


@contextlib.contextmanager
def recorded_modules() -> Iterator[list[torch.nn.Module]]:
    """A list that collects the modules used by functional calls inside the block."""
    modules: list[torch.nn.Module] = []
    token = _modules.set(modules)
    try:
        yield modules
    finally:
        _modules.reset(token)


@contextlib.contextmanager
def isolated(seed: int, device: torch.device) -> Iterator[None]:
    """Inside the block the global generators (torch's for the CPU and `device`, Python's, numpy's) are forked and
    seeded, and module buffers stay as they are; one thread at a time.

    Cost: 30 us on a CPU, and 70 us more if numpy's generator has been used since the last time.
    """
    token = _active.set(True)
    try:
        with random_state_kept(device), torch.enable_grad():
            seed_everything(seed, device)
            yield
    finally:
        _active.reset(token)


_quiet: weakref.WeakSet[Any] = weakref.WeakSet()
"""The code of functions that drew nothing when they were last looked at."""


class Company:
    """Whether the calls of one object run together with those of others: as long as its losses draw nothing.

    That is taken from other objects with losses of the same code, and found to be so again after each call.

    Arguments:
        losses: what may draw.
    """

    def __init__(self, *losses: Any):
        self._losses = losses
        self._refusals = 0

    @property
    def _codes(self) -> list[Any]:
        """Of a function its code; nothing for what cannot be looked up."""
        codes = [getattr(loss, "__code__", loss) for loss in self._losses]
        return [code if isinstance(code, Hashable) else None for code in codes]

    @property
    def _welcome(self) -> bool:
        return self._refusals < _MOST_REFUSALS and all(code in _quiet for code in self._codes)

    def run(
        self,
        seed: int,
        device: torch.device,
        work: Callable[[], Result],
        owners: Sequence[Any],
        repeatable: bool,
        undo: Callable[[], None],
    ) -> Result:
        """What `work` returns: alone and :func:`isolated`, or together with others if it drew nothing before.

        Arguments:
            owners: objects that no two calls may use at the same time.
            repeatable: whether `work` may be run twice; it is if it turns out to draw.
            undo: called between the two.
        """
        tried = not repeatable or device.type != "cpu" or is_isolated()
        while True:
            if self._welcome and not tried:
                tried, found = True, TURNS.attempt(lambda: _active_call(work), owners)
                if found:
                    return found[0]
                self._refusals += 1
                undo()
            with isolated(seed, device):
                if self._welcome and not tried:
                    continue  # another thread has found out meanwhile
                return self._watched(work)

    def _watched(self, work: Callable[[], Result]) -> Result:
        before = global_generators()
        result = work()
        if before is not None and global_generators() == before:
            with contextlib.suppress(TypeError):  # a loss of which there are no weak references
                _quiet.update(self._codes)
        else:
            for code in self._codes:
                if code in _quiet:
                    _quiet.remove(code)
        return result


def _active_call(work: Callable[[], Result]) -> Result:
    """Without generators of its own."""
    token = _active.set(True)
    try:
        with torch.enable_grad():
            return work()
    finally:
        _active.reset(token)


class Draws:
    """A seed for each call, reproducibly.

    Seeds follow from torch's initial seed at construction and the number of calls so far; nothing is drawn from the
    caller's generator.
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
