"""The global random generators (torch's on the CPU and one device, Python's, numpy's): saving, restoring, seeding."""

from __future__ import annotations

import contextlib
import ctypes
import os
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy
import torch
from numpy.random import mtrand
from torch import Tensor

from hvp_engine._support.torch_compat import in_backward_pass
from hvp_engine._support.turns import Turns


def one_thread() -> contextlib.AbstractContextManager[Any]:
    """A turn for changing, for a while, what belongs to the whole process: the global generators, and the weights of a
    module during a functional call. Threads that do so run alone.

    Inside a backward pass it keeps nobody out: on a GPU that pass runs in a thread of its own, and a forward pass
    repeated there (checkpointing) would wait for the very thread that waits for it.
    """
    return contextlib.nullcontext() if in_backward_pass() else TURNS.alone()


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

    @contextlib.contextmanager
    def again(self, device: torch.device) -> Iterator[None]:
        """Inside the block the numbers of that moment are drawn once more; after it the generators are as before it."""
        with random_state_kept(device):
            self.restore(device)
            yield

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values only, so that a file holding it can be loaded without running code."""
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


def kept_torch_state() -> Callable[[], None]:
    """A function that puts torch's generators back to what they are now. Cost: 3 us on a CPU."""
    cpu = torch.get_rng_state()
    cuda = torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None

    def restore() -> None:
        torch.set_rng_state(cpu)
        if cuda is not None:
            torch.cuda.set_rng_state(cuda)

    return restore


def seed_everything(seed: int, device: torch.device) -> None:
    """Seed the generators that :class:`RandomState` holds, and no others."""
    torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed every GPU
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(seed)
    random.seed(seed)
    numpy.random.seed(seed % (1 << 32))


@contextlib.contextmanager
def random_state_kept(device: torch.device) -> Iterator[None]:
    """Restore the state of every generator after the block, whatever was drawn or seeded inside.

    One thread at a time; others wait.

    Cost: 20 us on a CPU, and 70 us more where numpy's generator has been used since the last time.
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
"""The C struct behind a `numpy.random.MT19937`: 624 words and the position among them."""

_spares: list[numpy.random.MT19937] = []
_known_without_normal: dict[int, bytes] = {}
"""The last memory of a bit generator, by its address, that was seen with no normal number waiting."""


@contextlib.contextmanager
def _numpy_state_kept() -> Iterator[None]:
    """Inside the block numpy draws from a copy of its bit generator.

    The plain way, `get_state` and `set_state`, takes 67 us; everything else that an isolated call saves takes 26 us, a
    product of a small model 80 us. Copying the generator's memory takes 3 us. It is not the whole state: numpy draws
    normal numbers in pairs and keeps the second, which only `get_state` shows. So the state is read once, and again
    whenever the generator has moved since.
    """
    generator = mtrand.get_bit_generator()
    known = memory = None
    if isinstance(generator, numpy.random.MT19937):
        address = generator.ctypes.state_address
        memory, known = ctypes.string_at(address, _MT19937_BYTES), _known_without_normal.get(address)
    if memory is None or memory != known:
        state = numpy.random.get_state(legacy=False)
        try:
            yield
        finally:
            numpy.random.set_state(state)
        if memory is not None and not state["has_gauss"]:
            _known_without_normal[address] = memory
        return
    spare = _spares.pop() if _spares else numpy.random.MT19937(0)
    ctypes.memmove(spare.ctypes.state_address, memory, _MT19937_BYTES)
    mtrand.set_bit_generator(spare)
    try:
        yield
    finally:
        mtrand.set_bit_generator(generator)
        _spares.append(spare)


def global_generators() -> tuple[Any, ...] | None:
    """The states of torch's generator for the CPU, of Python's and numpy's, to be compared; None where that is slow."""
    generator = mtrand.get_bit_generator()
    if not isinstance(generator, numpy.random.MT19937):
        return None
    memory = ctypes.string_at(generator.ctypes.state_address, _MT19937_BYTES)
    return torch.get_rng_state().numpy().tobytes(), random.getstate(), memory


def _put_back(state: tuple[Any, ...]) -> None:
    torch.set_rng_state(torch.frombuffer(bytearray(state[0]), dtype=torch.uint8))
    random.setstate(state[1])
    generator = mtrand.get_bit_generator()
    if not isinstance(generator, numpy.random.MT19937):  # a smaller one, put in meanwhile, whose memory ends before
        generator = numpy.random.MT19937(0)
        mtrand.set_bit_generator(generator)
    ctypes.memmove(generator.ctypes.state_address, state[2], _MT19937_BYTES)


TURNS = Turns(global_generators, _put_back)
"""The turns of this process's threads."""


def _other_turns() -> None:
    """New ones for a forked process, in which the threads of the old ones do not exist."""
    TURNS.__init__(global_generators, _put_back)  # type: ignore[misc]  # as a new one


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_other_turns)
