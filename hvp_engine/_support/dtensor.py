"""DTensors: taken apart into the shard that this process holds, and put together again for the caller.

How shards are exchanged between processes is in :mod:`hvp_engine.distributed.sharding`.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


def is_sharded(leaf: Any) -> bool:
    """Whether it is a DTensor, a class that is not imported unless somebody else has done so."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(leaf, module.DTensor)


def local_part(tensor: Any) -> Tensor:
    """This process's shard of a DTensor; differentiable."""
    return tensor.to_local()


@dataclass(frozen=True)
class Shard:
    """How a tensor is sharded: cut along `dim` as `torch.chunk` does it, one chunk for each process of a 1-d mesh.

    `shape` and `stride` are those of the whole tensor. For example, 5 rows over 3 processes are chunks of 2, 2 and 1.
    """

    mesh: DeviceMesh
    dim: int
    shape: torch.Size
    stride: tuple[int, ...]

    @classmethod
    def of(cls, tensor: Any, name: str) -> Shard:
        """How a DTensor is sharded.

        Errors: `ValueError` for one that is not sharded over exactly one mesh dimension.
        """
        placements = tensor.placements
        if len(placements) != 1 or not placements[0].is_shard():
            raise ValueError(
                f"{name}: expected a DTensor with the placement Shard on a mesh of one dimension; got {placements}: "
                "use torch.distributed.tensor.distribute_tensor(tensor, mesh, [Shard(0)]), with a tensor of no "
                "dimension reshaped to (1,)"
            )
        return cls(tensor.device_mesh, placements[0].dim % len(tensor.shape), tensor.shape, tensor.stride())

    def wrap(self, part: Tensor) -> Tensor:
        """The DTensor of which this process holds `part`; differentiable."""
        from torch.distributed import tensor

        return tensor.DTensor.from_local(
            part, self.mesh, [tensor.Shard(self.dim)], shape=self.shape, stride=self.stride
        )

    @property
    def chunk(self) -> int:
        """The length of a shard along `dim`; the last ones may be shorter, or empty."""
        return max(1, -(-self.shape[self.dim] // self.mesh.size()))

    @property
    def largest(self) -> int:
        """Elements of the largest shard, the first."""
        return self.chunk * self.shape[: self.dim].numel() * self.shape[self.dim + 1 :].numel()

    def pieces(self, buffer: Tensor, step: int, offset: int, whole: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Pairs of corresponding views of `buffer`, where the shard of process k begins at k * step + offset, and of
        `whole`.

        At most two pairs, however many processes there are: all shards of full length as one view, and the shorter one.
        """
        before, length, after = self.shape[: self.dim].numel(), self.shape[self.dim], self.shape[self.dim + 1 :].numel()
        rows, chunk = whole.reshape(before, length, after), self.chunk
        full = length // chunk
        if full:
            strides = (step, chunk * after, after, 1)
            parts = buffer.as_strided((full, before, chunk, after), strides, buffer.storage_offset() + offset)
            yield parts, rows[:, : full * chunk].unflatten(1, (full, chunk)).transpose(0, 1)
        rest = length - full * chunk
        if rest:
            start = buffer.storage_offset() + full * step + offset
            yield buffer.as_strided((before, rest, after), (rest * after, after, 1), start), rows[:, full * chunk :]
