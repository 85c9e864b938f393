"""The operations of a native program, and how they are written for the extension (csrc/program.h)."""

from __future__ import annotations

import enum
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, ClassVar

from torch import Tensor

from hvp_engine.differentiation.native.places import Place, Region

MOST_EXTENTS = 6
MOST_INPUTS = 12
MOST_REGISTERS = 32


class UnsupportedError(Exception):
    """Why a program cannot run natively.

    Attributes:
        target: the operator that has no handler, or not for such arguments; None where it is nothing of the kind.
    """

    target: Any = None


class Code(enum.IntEnum):
    """What an instruction of an elementwise operation computes, in the order of `Code` in csrc/program.h."""

    MULTIPLY = 0
    ADD = 1
    SUBTRACT = 2
    DIVIDE = 3
    MULTIPLY_ADD = 4
    SCALE = 5
    SHIFT = 6
    FILL = 7
    SELECT = 8
    SELECT_ABOVE = 9
    TANH_GRADIENT = 10
    SIGMOID_GRADIENT = 11
    EXPONENTIAL = 12
    LOGARITHM = 13
    SQUARE_ROOT = 14
    TANH = 15
    SIGMOID = 16
    AFFINE = 17


WITH_CONSTANT = (Code.SCALE, Code.SHIFT, Code.FILL, Code.SELECT_ABOVE, Code.AFFINE)

Constant = float | int
"""A float is a number; an int is a column of the table of a run."""


class Words:
    """The program as the extension reads it: integers, and the constants that they refer to."""

    def __init__(self) -> None:
        self.words: list[int] = []
        self.constants: list[float] = []
        self._known: dict[float, int] = {}

    def constant(self, value: Constant) -> int:
        if isinstance(value, int):
            return value
        key = self._known.get(value)
        if key is None:
            self.constants.append(value)
            key = self._known[value] = -len(self.constants)
        return key

    def place(self, place: Place, strides: Sequence[int], workspace: int) -> None:
        region = place.region
        slot, offset = (workspace, region.offset) if region.slot is None else (region.slot, 0)
        assert offset >= 0, "a region without a place in the workspace"
        self.words += [slot, offset + place.offset, *strides]


class Operation:
    """What a program does in one step; most have one `result`."""

    result: Place

    @property
    def reads(self) -> tuple[Place, ...]:
        raise NotImplementedError

    @property
    def writes(self) -> tuple[Place, ...]:
        return (self.result,)

    def write(self, words: Words, workspace: int) -> None:
        """Append itself to the program; `workspace` is the slot of places without one of their own."""
        raise NotImplementedError


@dataclass(frozen=True)
class Instruction:
    """`to <- code(operands)`; registers are numbered from the inputs on."""

    code: Code
    to: int
    operands: tuple[int, ...]
    constant: Constant = 0.0
    second: Constant = 0.0


@dataclass(frozen=True)
class Elementwise(Operation):
    """Instructions on each element: all places have the same sizes."""

    inputs: tuple[Place, ...]
    instructions: tuple[Instruction, ...]
    outputs: tuple[tuple[int, Place], ...]

    @property
    def reads(self) -> tuple[Place, ...]:
        return self.inputs

    @property
    def writes(self) -> tuple[Place, ...]:
        return tuple(place for _, place in self.outputs)

    def write(self, words: Words, workspace: int) -> None:
        places = [*self.inputs, *self.writes]
        first = self.writes[0]
        sizes, strides = merged(first.sizes, [place.strides for place in places], first.strides)
        if len(sizes) > MOST_EXTENTS:
            raise UnsupportedError(f"an operation on {len(sizes)} dimensions that cannot be merged")
        words.words += [0, len(sizes), *sizes, len(self.inputs)]
        for place, steps in zip(self.inputs, strides, strict=False):
            words.place(place, steps, workspace)
        words.words.append(len(self.instructions))
        for one in self.instructions:
            words.words += [one.code, one.to, *one.operands]
            if one.code in WITH_CONSTANT:
                words.words.append(words.constant(one.constant))
            if one.code is Code.AFFINE:
                words.words.append(words.constant(one.second))
        words.words.append(len(self.outputs))
        for (source, place), steps in zip(self.outputs, strides[len(self.inputs) :], strict=True):
            words.words.append(source)
            words.place(place, steps, workspace)


def merged(
    sizes: Sequence[int], strides: Sequence[Sequence[int]], leading: Sequence[int]
) -> tuple[list[int], list[list[int]]]:
    """Few dimensions for several places of the same sizes: sorted by the `leading` strides, without those of size 1,
    and with neighbours merged where one stride walks both in all places.

    Sizes (2, 3) with strides (3, 1) and (3, 1) become (6,) with (1,) and (1,); with (3, 1) and (1, 2) they stay.
    """
    dims = sorted((d for d in range(len(sizes)) if sizes[d] != 1), key=lambda d: -leading[d])
    new_sizes: list[int] = []
    new_strides: list[list[int]] = [[] for _ in strides]
    for d in dims:
        size = sizes[d]
        if new_sizes and all(new[-1] == old[d] * size for new, old in zip(new_strides, strides, strict=True)):
            new_sizes[-1] *= size
            for new, old in zip(new_strides, strides, strict=True):
                new[-1] = old[d]
        else:
            new_sizes.append(size)
            for new, old in zip(new_strides, strides, strict=True):
                new.append(old[d])
    return new_sizes, new_strides


@dataclass(frozen=True)
class MatrixProduct(Operation):
    """result <- alpha a b + beta result, for matrices or as many as the first dimension has of them."""

    result: Place
    a: Place
    b: Place
    alpha: Constant = 1.0
    beta: Constant = 0.0

    @property
    def reads(self) -> tuple[Place, ...]:
        return (self.a, self.b) if self.beta == 0.0 else (self.a, self.b, self.result)

    def write(self, words: Words, workspace: int) -> None:
        result, a, b = self.result, self.a, self.b
        if len(result.sizes) == 2:
            result, a, b = (place.with_new(0) for place in (result, a, b))
        if not by_columns(result):  # the transposed product, whose result is by columns
            result, a, b = (place.transposed(1, 2) for place in (result, b, a))
        batch, m, n = result.sizes
        k = a.sizes[2]
        words.words += [1, batch, m, n, k, not by_columns(a), not by_columns(b)]
        operands = [place if by_columns(place) else place.transposed(1, 2) for place in (a, b, result)]
        leading = [_leading(place) for place in operands]
        words.words += [*leading, words.constant(self.alpha), words.constant(self.beta)]
        for place, distance in zip(operands, leading, strict=True):
            words.place(place, (place.strides[0] if batch > 1 else 0, distance, 1), workspace)


def by_columns(place: Place) -> bool:
    """Whether BLAS can read the matrices as column-major ones."""
    *_, rows, columns = place.sizes
    *_, down, right = place.strides
    return (down == 1 or rows == 1) and (columns == 1 or right >= max(rows, 1))


def for_blas(place: Place) -> bool:
    """Whether BLAS can read the matrices, transposed or not."""
    return by_columns(place) or by_columns(place.transposed(-2 % len(place.sizes), -1 % len(place.sizes)))


def _leading(place: Place) -> int:
    *_, rows, columns = place.sizes
    return max(place.strides[-1], 1) if columns > 1 else max(rows, 1)


@dataclass(frozen=True)
class Sum(Operation):
    """The sum over `dims` of `source`, times `factor` if there is one, or the largest numbers; `result` has those
    dimensions with size 1."""

    source: Place
    result: Place
    dims: frozenset[int]
    largest: bool = False
    factor: Place | None = None

    @property
    def reads(self) -> tuple[Place, ...]:
        return (self.source,) if self.factor is None else (self.source, self.factor)

    def write(self, words: Words, workspace: int) -> None:
        source = self.source
        sized = [d for d in range(len(source.sizes)) if source.sizes[d] != 1]
        kept = sorted((d for d in sized if d not in self.dims), key=lambda d: -source.strides[d])
        gone = sorted((d for d in sized if d in self.dims), key=lambda d: -source.strides[d])
        inner = bool(kept) and (not gone or source.strides[kept[-1]] <= source.strides[gone[-1]])
        last = kept.pop() if inner else None
        places = [*self.reads, self.result]
        sizes, strides = _runs(source.sizes, [place.strides for place in places], kept)
        lines, steps = _runs(source.sizes, [*[place.strides for place in self.reads], (0,) * len(source.sizes)], gone)
        if not lines:
            lines, steps = [prod(source.sizes[d] for d in self.dims)], [[0]] * len(places)
        all_sizes = [*sizes, *lines, 1 if last is None else source.sizes[last]]
        if len(all_sizes) > MOST_EXTENTS:
            raise UnsupportedError(f"a sum over a tensor of {len(all_sizes)} dimensions that cannot be merged")
        words.words += [2, self.largest, self.factor is not None, len(all_sizes), len(sizes), *all_sizes]
        for place, kept_strides, gone_strides in zip(places, strides, steps, strict=True):
            words.place(place, [*kept_strides, *gone_strides, 0 if last is None else place.strides[last]], workspace)


def _runs(
    sizes: Sequence[int], strides: Sequence[Sequence[int]], dims: Sequence[int]
) -> tuple[list[int], list[list[int]]]:
    """:func:`merged` for some of the dimensions."""
    return merged([sizes[d] for d in dims], [[s[d] for d in dims] for s in strides], [strides[0][d] for d in dims])


@dataclass(frozen=True)
class Lookup(Operation):
    """result[i, j, k] <- source[i, index[j], k], or with `scatter` result[i, index[j], k] += source[i, j, k]. An index
    equal to `skipped` gives zeros, or adds nothing. The table that is chosen from may have a fourth dimension, of which
    each j has its own part: result[i, j, k] <- source[i, index[j], k, j]."""

    index: Place
    source: Place
    result: Place
    scatter: bool = False
    skipped: int | None = None

    @property
    def reads(self) -> tuple[Place, ...]:
        return (self.index, self.source, *([self.result] if self.scatter else []))

    def write(self, words: Words, workspace: int) -> None:
        chosen, table = (self.source, self.result) if self.scatter else (self.result, self.source)
        words.words += [3, self.scatter, *chosen.sizes, table.sizes[1]]
        words.words.append(_NONE if self.skipped is None else self.skipped)
        for place in (self.index, self.source, self.result):
            alike = place is not table or len(place.sizes) == 4
            words.place(place, place.strides if alike else (*place.strides, 0), workspace)


_NONE = -(1 << 63)


def regions(places: Sequence[Place]) -> list[Region]:
    """The regions of the workspace among `places`."""
    return [place.region for place in places if place.region.slot is None]


@dataclass(frozen=True)
class Call:
    """PyTorch computes the tensors of `slots` from those of `reads`."""

    slots: tuple[int, ...]
    compute: Callable[..., Any]
    reads: tuple[Place, ...]

    writes: ClassVar[tuple[Place, ...]] = ()


@dataclass(frozen=True)
class Derived:
    """A tensor that is computed once from known ones: `slot` <- compute(*sources)."""

    slot: int
    compute: Callable[..., Tensor]
    sources: tuple[int, ...]
