"""Where the elements of a tensor are: a region of memory, and strides in it. Views are arithmetic on strides."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod


@dataclass(eq=False)
class Region:
    """A piece of memory: a slot, which is a tensor from outside, or `numel` elements of the workspace.

    Attributes:
        slot: the number of the tensor, or None for the workspace.
        offset: the first element in the workspace, which the memory plan sets.
        known: whether it has the same numbers in all terms.
        tangent: whether it is part of the vector that is multiplied.
    """

    numel: int
    slot: int | None = None
    offset: int = -1
    known: bool = False
    tangent: bool = False


@dataclass(frozen=True)
class Place:
    """A strided view of a region; `offset` counts from the region's first element."""

    region: Region
    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int = 0

    @property
    def numel(self) -> int:
        return prod(self.sizes)

    def is_row_major(self) -> bool:
        """Whether it is laid out as a contiguous tensor."""
        steps = zip(self.sizes, self.strides, row_major(self.sizes), strict=True)
        return all(size == 1 or here == dense for size, here, dense in steps)

    def with_dims(self, order: Sequence[int]) -> Place:
        """With dimensions in another order."""
        sizes, strides = (tuple(values[d] for d in order) for values in (self.sizes, self.strides))
        return Place(self.region, sizes, strides, self.offset)

    def transposed(self, first: int, second: int) -> Place:
        order = list(range(len(self.sizes)))
        order[first], order[second] = order[second], order[first]
        return self.with_dims(order)

    def expanded(self, sizes: Sequence[int]) -> Place:
        """Broadcast to `sizes`: (3, 1) of strides (1, 1) becomes (2, 3, 4) of strides (0, 1, 0)."""
        new = len(sizes) - len(self.sizes)
        strides = [0] * new + [
            0 if here == 1 and there != 1 else stride
            for here, there, stride in zip(self.sizes, sizes[new:], self.strides, strict=True)
        ]
        return Place(self.region, tuple(sizes), tuple(strides), self.offset)

    def narrowed(self, dim: int, start: int, size: int, step: int = 1) -> Place:
        """`size` indices along `dim`, from `start` on."""
        sizes, strides = list(self.sizes), list(self.strides)
        offset = self.offset + start * strides[dim]
        sizes[dim], strides[dim] = size, strides[dim] * step
        return Place(self.region, tuple(sizes), tuple(strides), offset)

    def without(self, dim: int) -> Place:
        return Place(
            self.region,
            self.sizes[:dim] + self.sizes[dim + 1 :],
            self.strides[:dim] + self.strides[dim + 1 :],
            self.offset,
        )

    def with_new(self, dim: int) -> Place:
        return Place(
            self.region,
            (*self.sizes[:dim], 1, *self.sizes[dim:]),
            (*self.strides[:dim], 0, *self.strides[dim:]),
            self.offset,
        )

    def reshaped(self, sizes: Sequence[int]) -> Place | None:
        """With other sizes of the same product; None if no strides walk the elements in the same order."""
        if prod(sizes) == 0:
            return Place(self.region, tuple(sizes), (0,) * len(sizes), self.offset)
        runs: list[list[int]] = []  # (size, stride) of dimensions that one stride can walk, from the innermost
        for size, stride in zip(reversed(self.sizes), reversed(self.strides), strict=True):
            if size == 1:
                continue
            if runs and stride == runs[-1][0] * runs[-1][1]:
                runs[-1][0] *= size
            else:
                runs.append([size, stride])
        strides: list[int] = []
        remaining, stride = 1, 0
        for size in reversed(sizes):
            if size == 1:
                strides.append(0)
                continue
            if remaining == 1:
                remaining, stride = runs.pop(0)
            if remaining % size:
                return None
            strides.append(stride)
            remaining //= size
            stride *= size
        return Place(self.region, tuple(sizes), tuple(reversed(strides)), self.offset)


def row_major(sizes: Sequence[int]) -> tuple[int, ...]:
    """Strides of a contiguous tensor."""
    return in_order(sizes, range(len(sizes)))


def in_order(sizes: Sequence[int], order: Sequence[int]) -> tuple[int, ...]:
    """Strides of a dense tensor whose dimensions are nested as `order` says, the outermost first."""
    strides, numel = [0] * len(sizes), 1
    for d in reversed(order):
        strides[d] = numel
        numel *= sizes[d]
    return tuple(strides)


def nesting(place: Place) -> list[int]:
    """The dimensions from the outermost to the innermost in memory."""
    return sorted(range(len(place.sizes)), key=lambda d: (place.sizes[d] != 1, -place.strides[d]))
