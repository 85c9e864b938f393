"""Tensors of which each process holds a shard (DTensor): taken apart, and put together again for the caller."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


def is_sharded(leaf: Any) -> bool:
    """Whether it is a DTensor (which is not imported where nobody else has)."""
    return hasattr(leaf, "device_mesh") and hasattr(leaf, "placements")


def local_part(tensor: Any) -> Tensor:
    """This process's part of a DTensor; differentiable."""
    return tensor.to_local()


@dataclass(frozen=True)
class Shard:
    """Of which tensor a process holds a part: its shape, cut along `dim` as `torch.chunk` does over a 1-d mesh."""

    mesh: DeviceMesh
    dim: int
    shape: torch.Size
    stride: tuple[int, ...]

    @classmethod
    def of(cls, tensor: Any, name: str) -> Shard:
        """What a DTensor is a shard of.

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
        """This process's part as a DTensor; differentiable."""
        from torch.distributed import tensor

        return tensor.DTensor.from_local(
            part, self.mesh, [tensor.Shard(self.dim)], shape=self.shape, stride=self.stride
        )

    @property
    def chunk(self) -> int:
        """How far a part reaches along `dim`; the last ones may be shorter, or empty."""
        return max(1, -(-self.shape[self.dim] // self.mesh.size()))

    @property
    def most(self) -> int:
        """Elements of the largest part, the first."""
        return self.chunk * self.shape[: self.dim].numel() * self.shape[self.dim + 1 :].numel()

    def pieces(self, buffer: Tensor, step: int, offset: int, whole: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Views of `buffer` and of `whole` that correspond: the part of process k is at k * step + offset.

        At most two pairs, however many processes there are: all parts of full length at once, and a shorter one.
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
