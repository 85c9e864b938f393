"""The random numbers of a process: torch on the CPU and one device, Python's, numpy's; kept, put back, seeded."""

from __future__ import annotations

import contextlib
import ctypes
import os
import random
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy
import torch
from numpy.random import mtrand
from torch import Tensor

from hvp_engine._support.torch_compat import in_backward_pass

_alone = threading.RLock()


def one_thread() -> contextlib.AbstractContextManager[Any]:
    """The lock under which whatever is the whole process's is changed for a while: the global generators, and the
    weights of a module that a functional call replaces. Threads that do so take turns.

    Inside a backward pass there is none: on a GPU that runs in a thread of its own, and what it computes again
    (checkpointing) would wait for the thread that waits for it.
    """
    return contextlib.nullcontext() if in_backward_pass() else _alone


def _another_lock() -> None:
    """In a forked process no thread is left that could release the one it had."""
    global _alone
    _alone = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_another_lock)


@dataclass(frozen=True)
class RandomState:
    """The state of every global generator at one moment; `cuda` is None off the GPU."""

    cpu: Tensor
    cuda: Tensor | None
    python: tuple[Any, ...]
    numpy: dict[str, Any]

    @classmethod
    def now(cls, device: torch.device) -> RandomState:
        return cls(*_torch_and_python(device), dict(numpy.random.get_state(legacy=False)))

    def restore(self, device: torch.device) -> None:
        """Put everything back; a CUDA state only where `device` is a GPU."""
        _set_torch_and_python(self.cpu, self.cuda, self.python, device)
        numpy.random.set_state(self.numpy)

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values only, so that a file of it can be loaded without running code."""
        inner = self.numpy["state"]
        key = torch.from_numpy(inner["key"].astype("int64"))
        return {
            "cpu": self.cpu,
            "cuda": self.cuda,
            "python": self.python,
            "numpy": {**self.numpy, "state": {"key": key, "pos": int(inner["pos"])}},
        }

    @classmethod
    def from_state_dict(cls, state: dict[str, Any]) -> RandomState:
        inner = state["numpy"]["state"]
        key = inner["key"].numpy().astype("uint32")
        return cls(
            state["cpu"], state["cuda"], state["python"], {**state["numpy"], "state": {"key": key, "pos": inner["pos"]}}
        )


def seed_everything(seed: int, device: torch.device) -> None:
    """Seed the generators that :class:`RandomState` holds, and no other."""
    torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed every GPU
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(seed)
    random.seed(seed)
    numpy.random.seed(seed % (1 << 32))


@contextlib.contextmanager
def random_state_kept(device: torch.device) -> Iterator[None]:
    """Whatever is drawn or seeded inside, the state afterwards is the one before: what follows draws the same.

    One thread at a time; others wait.

    Cost: 30 us on a CPU, and 0.1 ms more where numpy's generator has been used since the last time.
    """
    with one_thread():
        before = _torch_and_python(device)
        with _numpy_state_kept():
            try:
                yield
            finally:
                _set_torch_and_python(*before, device)


def _torch_and_python(device: torch.device) -> tuple[Tensor, Tensor | None, tuple[Any, ...]]:
    cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    return torch.get_rng_state(), cuda, random.getstate()


def _set_torch_and_python(cpu: Tensor, cuda: Tensor | None, python: tuple[Any, ...], device: torch.device) -> None:
    torch.set_rng_state(cpu)
    if cuda is not None and device.type == "cuda":
        torch.cuda.set_rng_state(cuda, device)
    random.setstate(python)


_MT19937_BYTES = 625 * 4
"""Of the C struct behind a `numpy.random.MT19937`: 624 words, and the position among them."""

_spares: list[numpy.random.MT19937] = []
_without_normal: dict[int, bytes] = {}
"""By address, the memory of a bit generator when it was last seen without a second normal number beside it."""


@contextlib.contextmanager
def _numpy_state_kept() -> Iterator[None]:
    """A copy of numpy's bit generator stands in for it during the block.

    To read and to set a state takes 80 us, as long as a product of a small model; a copy takes 2. But of two normal
    numbers numpy keeps the second where only reading the state shows it. None has come to a bit generator that has not
    moved since it was seen without one.
    """
    generator = mtrand.get_bit_generator()
    if not isinstance(generator, numpy.random.MT19937):
        with _numpy_state_read():
            yield
        return
    address = generator.ctypes.state_address
    memory = ctypes.string_at(address, _MT19937_BYTES)
    if _without_normal.get(address) != memory:
        with _numpy_state_read() as state:
            yield
        if not state["has_gauss"]:
            _without_normal[address] = memory
        return
    spare = _spares.pop() if _spares else numpy.random.MT19937(0)
    ctypes.memmove(spare.ctypes.state_address, address, _MT19937_BYTES)
    mtrand.set_bit_generator(spare)
    try:
        yield
    finally:
        mtrand.set_bit_generator(generator)
        _spares.append(spare)


@contextlib.contextmanager
def _numpy_state_read() -> Iterator[dict[str, Any]]:
    state = dict(numpy.random.get_state(legacy=False))
    try:
        yield state
    finally:
        numpy.random.set_state(state)
