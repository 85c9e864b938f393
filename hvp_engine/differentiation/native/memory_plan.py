"""Places intermediate results in a small workspace: memory is reused once a result has been read for the last time."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from hvp_engine._support.flat_vector import padded
from hvp_engine.differentiation.native.operations import Elementwise, Operation, regions
from hvp_engine.differentiation.native.places import Place, Region


def plan(operations: Sequence[Operation], kept: Iterable[Place]) -> int:
    """Set the offsets of all regions of the workspace; return its size. `kept` are read after the operations."""
    first: dict[Region, int] = {}
    last: dict[Region, int] = {}
    for now, operation in enumerate(operations):
        for region in regions([*operation.reads, *operation.writes]):
            first.setdefault(region, now)
            last[region] = now
    for region in regions(list(kept)):
        first.setdefault(region, len(operations))
        last[region] = len(operations)
    shared = _overwritten(operations, first, last)
    free = _Free()
    offsets: dict[Region, int] = {}
    ending: dict[int, list[Region]] = {}
    for region, now in sorted(first.items(), key=lambda item: item[1]):
        for when in sorted(when for when in ending if when < now):
            for gone in ending.pop(when):
                free.give_back(offsets[gone], padded(gone.numel))
        if region in shared:
            continue
        offsets[region] = free.take(padded(region.numel))
        ending.setdefault(last[region], []).append(region)
    for region in first:
        region.offset = offsets[_root(region, shared)]
    return free.size


def _root(region: Region, shared: dict[Region, Region]) -> Region:
    while region in shared:
        region = shared[region]
    return region


def _overwritten(
    operations: Sequence[Operation], first: dict[Region, int], last: dict[Region, int]
) -> dict[Region, Region]:
    """For each region that an elementwise operation can write over an operand that nothing reads later: the operand's.

    `last` of that one is moved to where the result is last read.
    """
    shared: dict[Region, Region] = {}
    for now, operation in enumerate(operations):
        if not isinstance(operation, Elementwise) or len(operation.outputs) != 1:
            continue
        (result,) = operation.writes
        if result.region.slot is not None or first[result.region] != now:
            continue
        for operand in operation.inputs:
            region = operand.region
            if region.slot is not None or region is result.region:
                continue
            root = _root(region, shared)
            same = [
                other for other in operation.inputs if other.region.slot is None and _root(other.region, shared) is root
            ]
            if last[root] == now and region.numel == result.region.numel and all(_alike(o, result) for o in same):
                shared[result.region] = root
                last[root] = last[result.region]
                break
    return shared


def _alike(one: Place, other: Place) -> bool:
    return (one.sizes, one.strides, one.offset) == (other.sizes, other.strides, other.offset)


class _Free:
    """Gaps in the workspace: first fit, with neighbours joined."""

    def __init__(self) -> None:
        self.size = 0
        self._gaps: list[tuple[int, int]] = []  # (start, length), by start

    def take(self, length: int) -> int:
        for i, (start, room) in enumerate(self._gaps):
            if room >= length:
                self._gaps[i : i + 1] = [(start + length, room - length)] if room > length else []
                return start
        if self._gaps and sum(self._gaps[-1]) == self.size:  # the last gap can grow
            start, _ = self._gaps.pop()
        else:
            start = self.size
        self.size = start + length
        return start

    def give_back(self, start: int, length: int) -> None:
        if length == 0:
            return
        self._gaps.append((start, length))
        self._gaps.sort()
        joined: list[tuple[int, int]] = []
        for begin, room in self._gaps:
            if joined and sum(joined[-1]) == begin:
                joined[-1] = (joined[-1][0], joined[-1][1] + room)
            else:
                joined.append((begin, room))
        self._gaps = joined
