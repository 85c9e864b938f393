"""Lists of tensors that are sharded over processes or replicated in each: gathering them, and summing into them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from hvp_engine._support.dtensor import Shard
from hvp_engine._support.flat_vector import Layout, offsets_of
from hvp_engine._support.torch_compat import all_gather_single, reduce_scatter_single
from hvp_engine.distributed.collectives import NOTHING, Processes, Summands

T = TypeVar("T")


@dataclass(frozen=True)
class ShardedVector:
    """A vector of `numel` elements of which each process holds a shard."""

    processes: Processes
    numel: int

    @property
    def rank(self) -> int:
        return self.processes.rank

    def total(self, sums: Tensor) -> Tensor:
        """The sums over the vector, by one small all-reduce."""
        total = sums.clone()
        dist.all_reduce(total, group=self.processes.group)
        return total


class ShardedList:
    """A list of tensors, some of them sharded over processes, the others replicated.

    Arguments:
        tensors: what this process holds: its shards, and the replicated tensors.
        shards: for each tensor how it is sharded, or None; None instead of a list if all are replicated.
        device: where messages are made if there is no tensor.
    """

    def __init__(
        self,
        processes: Processes,
        tensors: Sequence[Tensor],
        shards: Sequence[Shard | None] | None,
        device: torch.device | None = None,
    ):
        self._processes = processes
        self._shards: Sequence[Shard | None] = [None] * len(tensors) if shards is None else shards
        self._sharded = [index for index, shard in enumerate(self._shards) if shard is not None]
        self._replicated = [index for index, shard in enumerate(self._shards) if shard is None]
        self.layout = Layout.of(tensors) if tensors else replace(NOTHING, device=device or NOTHING.device)
        self._replicated_layout = Layout.of(self.replicated(tensors))
        known = [shard for shard in self._shards if shard is not None]
        for shard in known:
            if (ranks := dist.get_process_group_ranks(shard.mesh.get_group())) != processes.ranks:
                raise ValueError(
                    f"weights, hyper: expected DTensors on a mesh of the processes {processes.ranks} of the losses; "
                    f"got {ranks}: give hvp.DataParallel the group of the mesh"
                )
        *self._offsets, self._step = offsets_of([shard.largest for shard in known])

    @property
    def vector_layout(self) -> Layout:
        """The layout of a vector like this list; norms and inner products are those of the whole vector."""
        if not self._sharded:
            return self.layout
        if self._replicated:
            raise ValueError(
                "weights: expected all of them as shards, or none; got both: use torch.distributed.tensor."
                "distribute_tensor(weight, mesh, [Shard(0)]) for the others too"
            )
        numel = sum(shard.shape.numel() for shard in self._shards if shard is not None)
        return replace(self.layout, whole=ShardedVector(self._processes, numel))

    def replicated(self, tensors: Sequence[T]) -> list[T]:
        """The tensors of a list like this one that are replicated."""
        return [tensors[index] for index in self._replicated]

    def gathered(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Whole tensors from a list like this one, by one all-gather of the shards."""
        found = [tensor.detach() for tensor in tensors]
        if not self._sharded:
            return found
        dtypes = {tensors[index].dtype for index in self._sharded}
        dtype = dtypes.pop() if len(dtypes) == 1 else self.layout.state_dtype
        mine = torch.zeros(self._step, dtype=dtype, device=self.layout.device)
        for offset, index in zip(self._offsets, self._sharded, strict=True):
            mine[offset : offset + found[index].numel()].view(found[index].shape).copy_(found[index])
        buffer = mine.new_empty(self._processes.count * self._step)
        all_gather_single(buffer, mine, group=self._processes.group)
        self._processes.count_message(mine.nbytes)
        for offset, index in zip(self._offsets, self._sharded, strict=True):
            shard = self._shards[index]
            assert shard is not None
            found[index] = torch.empty(shard.shape, dtype=tensors[index].dtype, device=buffer.device)
            for part, place in shard.pieces(buffer, self._step, offset, found[index]):
                place.copy_(part)
        return found

    def norm(self, tensors: Sequence[Tensor | None]) -> Tensor:
        """The norm of a list like this one over all processes, a 0-dim float64 tensor; None counts as zero."""
        zero = torch.zeros((), dtype=torch.float64, device=self.layout.device)
        squares = [zero if t is None else torch.linalg.vector_norm(t).double().square() for t in tensors]
        parts = sum((squares[index] for index in self._sharded), zero)
        if self._sharded:
            dist.all_reduce(parts, group=self._processes.group)
        return sum(self.replicated(squares), parts).sqrt()

    def sum(self, figures: int, compute: Callable[[Tensor], Summands]) -> tuple[list[Tensor], Tensor]:
        """Whole tensors summed over all processes, each sum sharded or replicated as in this list, and sums of numbers;
        see :meth:`Processes.sum`.

        Shards and numbers take one reduce-scatter, replicated tensors one all-reduce.
        """
        if not self._sharded:
            return self._processes.sum(self.layout, figures, compute)
        count, step = self._processes.count, self._step + figures + 1
        buffer = torch.zeros(count * step, dtype=self.layout.state_dtype, device=self.layout.device)
        numbers = torch.empty(figures + 1, dtype=buffer.dtype, device=buffer.device)
        summands: Summands = [], 0.0
        with self._processes.carrying(numbers) as given:
            summands = compute(given)
            for offset, index in zip(self._offsets, self._sharded, strict=True):
                self._scatter(buffer, step, offset, index, *summands)
        buffer.view(count, step)[:, self._step :] = numbers  # every process receives all numbers
        mine = buffer.new_empty(step)
        reduce_scatter_single(mine, buffer, group=self._processes.group)
        self._processes.count_message(mine.nbytes)
        self._processes.check(mine)
        sums = {
            index: mine[offset : offset + shape.numel()].view(shape)
            for offset, index in zip(self._offsets, self._sharded, strict=True)
            for shape in [self.layout.shapes[index]]
        }
        if self._replicated:
            found, factor = summands
            wholes, _ = self._processes.sum(self._replicated_layout, 0, lambda _: (self.replicated(found), factor))
            sums |= dict(zip(self._replicated, wholes, strict=True))
        return [sums[index] for index in range(len(self._shards))], mine[self._step : -1]

    def _scatter(
        self, buffer: Tensor, step: int, offset: int, index: int, found: Sequence[Tensor | None], factor: float
    ) -> None:
        shard, whole = self._shards[index], found[index]
        assert shard is not None
        if whole is not None:
            for part, place in shard.pieces(buffer, step, offset, whole.detach()):
                torch.mul(place, factor, out=part) if place.dtype == part.dtype else part.copy_(place).mul_(factor)
