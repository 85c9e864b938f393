"""Peak memory of a block of code, above what was in use when it began.

On a CUDA device this is the allocator's own count; what a CUDA graph computes is in a pool of its own, which only the
reserved memory shows. A CPU allocator keeps no count, so a dispatch mode looks at the
result of every operation and adds up the storages that are alive: views and aliases count once, tensors that autograd
saves for the backward pass are included, and a storage leaves the sum the moment it is freed.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from hvp_engine._support.torch_compat import DispatchMode, is_traceable_wrapper_subclass, pytree


class Meter:
    """What :func:`peak_memory` yields."""

    def __init__(self, read: Callable[[], int], read_reserved: Callable[[], int] | None = None):
        self._read = read
        self._read_reserved = read_reserved

    @property
    def peak_bytes(self) -> int:
        """Bytes above the level at entry, at the highest point of the block (so far, while it runs)."""
        return self._read()

    @property
    def reserved_bytes(self) -> int | None:
        """Bytes that torch holds of the device at the highest point of the block, those held at entry included: live
        tensors, what is cached, and the pools of CUDA graphs, which `peak_bytes` misses. None on a CPU."""
        return None if self._read_reserved is None else self._read_reserved()

    def _keep(self) -> None:
        """The figures of now for good."""
        peak, reserved = self.peak_bytes, self.reserved_bytes
        self._read = lambda: peak
        if reserved is not None:
            self._read_reserved = lambda: reserved


@contextlib.contextmanager
def peak_memory(device: torch.device | str = "cpu") -> Iterator[Meter]:
    """Measure the peak memory that tensors on `device` take inside the `with` block.

    Arguments:
        device: a CPU or CUDA device.

    Validity: on a CPU, tensors made by the calling thread (a backward pass on a CPU runs there too). Not seen:
    workspace that a kernel allocates and frees itself, memory that code compiled by torch.compile allocates
    without the dispatcher, `untyped_storage().resize_`, opaque mkldnn tensors, and what malloc loses to rounding
    and holes. A tensor that existed before lowers the level when it is freed, once an operation has used it
    inside the block. On a CUDA device the process's peak statistics are reset at entry, so blocks for the same
    device cannot be nested; the results of replayed CUDA graphs are in `reserved_bytes` alone.

    Cost: on a CPU some 25 microseconds for each operation (do not time the block); nothing on CUDA.

    Errors: `ValueError` for another device type.

    >>> with peak_memory("cpu") as meter:
    ...     total = torch.ones(1000).add(1.0).sum()
    >>> meter.peak_bytes  # two tensors of 4,000 bytes; the sum is made when the first of them is gone
    8000
    """
    device = torch.device(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        level = torch.cuda.memory_allocated(device)
        meter = Meter(
            lambda: torch.cuda.max_memory_allocated(device) - level, lambda: torch.cuda.max_memory_reserved(device)
        )
        try:
            yield meter
        finally:
            meter._keep()
    elif device.type == "cpu":
        with _LiveStorages() as storages:
            yield Meter(lambda: storages.peak)
    else:
        raise ValueError(f"device: expected a CPU or CUDA device; got {device}")


class _LiveStorages(DispatchMode):
    """Adds up the CPU storages that are alive, relative to the beginning of the block.

    The result of an operation is either in the storage of one of its arguments or new. So a storage that first appears
    as an argument existed before (it counts as zero until it is freed or resized), and one that first appears in a
    result has just been allocated.
    """

    def __init__(self) -> None:
        super().__init__()
        self._sizes: dict[int, tuple[weakref.ref[torch.UntypedStorage], int]] = {}
        self.level = 0
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        # lift_fresh is how torch.tensor(...) announces the tensor it has just made.
        if func is not torch.ops.aten.lift_fresh.default:
            for storage in _storages(pytree.tree_leaves((args, kwargs))):
                self._see(storage, new=False)
        result = func(*args, **kwargs)
        for storage in _storages(pytree.tree_leaves(result)):
            self._see(storage, new=True)
        self.peak = max(self.peak, self.level)
        return result

    def _see(self, storage: torch.UntypedStorage, new: bool) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._sizes:
            reference, before = self._sizes[key]
            if size == before:
                return
        else:
            # The storage's Python object lives exactly as long as the storage, so its end is the memory's end.
            reference, before = weakref.ref(storage, partial(self._freed, key)), 0 if new else size
        self._sizes[key] = reference, size
        self.level += size - before

    def _freed(self, key: int, _: object) -> None:
        self.level -= self._sizes.pop(key)[1]


def _storages(leaves: Iterable[object]) -> Iterator[torch.UntypedStorage]:
    """The CPU storages that hold the data of the tensors among `leaves`."""
    for leaf in leaves:
        if not isinstance(leaf, Tensor):
            continue
        if is_traceable_wrapper_subclass(leaf):
            yield from _storages(getattr(leaf, name) for name in leaf.__tensor_flatten__()[0])
        elif leaf.layout == torch.strided:
            storage = leaf.untyped_storage()
            if storage.device.type == "cpu":
                yield storage
        elif leaf.layout == torch.sparse_coo:
            yield from _storages((leaf._indices(), leaf._values()))
        elif leaf.layout in (torch.sparse_csr, torch.sparse_bsr):
            yield from _storages((leaf.crow_indices(), leaf.col_indices(), leaf.values()))
        elif leaf.layout in (torch.sparse_csc, torch.sparse_bsc):
            yield from _storages((leaf.ccol_indices(), leaf.row_indices(), leaf.values()))
