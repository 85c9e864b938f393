"""The random numbers of a process: torch on the CPU and one device, Python's, numpy's; kept, put back, seeded."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy
import torch
from torch import Tensor


@dataclass(frozen=True)
class RandomState:
    """The state of every global generator at one moment; `cuda` is None off the GPU."""

    cpu: Tensor
    cuda: Tensor | None
    python: tuple[Any, ...]
    numpy: dict[str, Any]

    @classmethod
    def now(cls, device: torch.device) -> RandomState:
        cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
        return cls(torch.get_rng_state(), cuda, random.getstate(), dict(numpy.random.get_state(legacy=False)))

    def restore(self, device: torch.device) -> None:
        """Put everything back; a CUDA state only where `device` is a GPU."""
        torch.set_rng_state(self.cpu)
        if self.cuda is not None and device.type == "cuda":
            torch.cuda.set_rng_state(self.cuda, device)
        random.setstate(self.python)
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
    """Whatever is drawn or seeded inside, the state afterwards is the one before: what follows draws the same."""
    before = RandomState.now(device)
    try:
        yield
    finally:
        before.restore(device)
