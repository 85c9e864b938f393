"""What programs need of the extension: slots for tensors, and operations in the form that it reads."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from hvp_engine.differentiation.native.builder import CPU, Kind, Slot
from hvp_engine.differentiation.native.operations import Operation, UnsupportedError, Words
from hvp_engine.errors import BackendError

try:
    from hvp_engine.ops.cpp import _C, find_blas

    PROBLEM: str = find_blas()
except ImportError as error:
    PROBLEM = str(error)


def check(dtypes: Iterable[torch.dtype]) -> torch.dtype:
    """The one dtype that programs may compute in; :class:`UnsupportedError` where there is none."""
    if PROBLEM:
        raise UnsupportedError(PROBLEM)
    found = set(dtypes)
    if len(found) != 1 or not found <= {torch.float32, torch.float64}:
        raise UnsupportedError(f"tensors of {', '.join(sorted(map(str, found))) or 'no dtype'}")
    return found.pop()


class Slots:
    """What the tensors of programs look like, and the programs on them.

    Attributes:
        new: a function for each slot that makes a tensor for it.
    """

    def __init__(self, slots: Sequence[Slot], dtype: torch.dtype):
        self._expected = [(slot.shape, torch.int64 if slot.kind is Kind.INDEX else dtype) for slot in slots]
        self.new = [
            partial(torch.empty_strided, shape, slot.strides, dtype=dtype, device=CPU)
            for slot, (shape, dtype) in zip(slots, self._expected, strict=True)
        ]
        kinds = [(int(slot.kind), slot.shape, slot.strides) for slot in slots]
        self._extension = _C.Slots(dtype == torch.float64, kinds)

    def memory(self) -> Any:
        """The extension's memory, with nothing in its slots."""
        return _C.Memory(self._extension)

    def program(self, operations: Iterable[Operation], workspace: int, parameters: int = 0) -> Any:
        """The extension's program; `workspace` is the slot of that, `parameters` the columns of the table of a run."""
        words = Words()
        for operation in operations:
            operation.write(words, workspace)
        return _C.Program(self._extension, parameters, words.constants, words.words)

    def put(self, memory: Any, first: int, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Into the slots from `first` on; a tensor of other strides is copied. Returns what is in the slots."""
        placed = list(tensors)
        done = 0
        while done < len(placed):
            bad = memory.put(first + done, placed[done:] if done else placed)
            if bad < 0:
                break
            done += bad
            placed[done] = self._laid_out(first + done, placed[done])
        return placed

    def _laid_out(self, slot: int, tensor: Tensor) -> Tensor:
        """A copy of a tensor with the strides that its slot expects."""
        shape, dtype = self._expected[slot]
        if tensor.shape != shape or tensor.dtype != dtype or tensor.device.type != "cpu":
            raise BackendError(
                f"native program: expected a tensor of shape {tuple(shape)} and {dtype} on the CPU; got "
                f"{tuple(tensor.shape)}, {tensor.dtype} on {tensor.device}: this is a fault of hvp_engine: please "
                "report it"
            )
        return self.new[slot]().copy_(tensor.detach())
