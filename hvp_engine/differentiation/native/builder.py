"""Emits operations: chains of elementwise ones as one, matrix products laid out for BLAS, sums, lookups."""

from __future__ import annotations

import enum
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import prod

import torch
from torch import Tensor

from hvp_engine.differentiation.native.expressions import Expression, Operand, length
from hvp_engine.differentiation.native.operations import (
    MOST_INPUTS,
    MOST_REGISTERS,
    WITH_CONSTANT,
    Code,
    Constant,
    Derived,
    Elementwise,
    Instruction,
    Lookup,
    MatrixProduct,
    Operation,
    Sum,
    for_blas,
)
from hvp_engine.differentiation.native.places import Place, Region, in_order, nesting, row_major

CPU = torch.device("cpu")
"""Where native programs run, whatever the default device is."""

_LONGEST_CHAIN = 12
"""Instructions of a chain before its result is stored."""

_FEW_COLUMNS = 16
"""A product of at most so many columns, and more rows, is made transposed: W x^T takes 15 us where x W^T takes 25, for
10 outputs of 784 inputs and 50 examples."""

_SMALL_COPY = 1 << 18
"""A known tensor of at most so many elements is copied once to be read in the order of what it is combined with."""


class Kind(enum.IntEnum):
    """What a tensor from outside holds: floating numbers of the program's dtype, indices of int64, or what only PyTorch
    reads."""

    NUMBERS = 0
    INDEX = 1
    OTHER = 2


@dataclass(frozen=True)
class Slot:
    """A tensor from outside."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    kind: Kind


@dataclass
class Builder:
    """Collects slots, what is derived once from known tensors, and operations; once it is `closed`, operations only."""

    dtype: torch.dtype
    slots: list[Slot] = field(default_factory=list)
    derived: list[Derived] = field(default_factory=list)
    operations: list[Operation] = field(default_factory=list)
    preparation: list[Operation] = field(default_factory=list)
    prepared: list[int] = field(default_factory=list)
    closed: bool = False
    _ordered: dict[tuple[Place, tuple[int, ...]], Place] = field(default_factory=dict)

    def slot(
        self,
        shape: Sequence[int],
        strides: Sequence[int],
        known: bool = False,
        tangent: bool = False,
        kind: Kind = Kind.NUMBERS,
    ) -> Place:
        """A new slot, as a place."""
        self.slots.append(Slot(tuple(shape), tuple(strides), kind))
        region = Region(prod(shape), len(self.slots) - 1, known=known, tangent=tangent)
        return Place(region, tuple(shape), tuple(strides))

    def given(self, tensor: Tensor) -> Place:
        """The slot of a known tensor like this one."""
        plain = tensor.dtype == self.dtype and tensor.device.type == "cpu"
        return self.slot(tensor.shape, tensor.stride(), True, kind=Kind.NUMBERS if plain else Kind.OTHER)

    def derive(
        self,
        sizes: Sequence[int],
        compute: Callable[..., Tensor],
        sources: Sequence[Place],
        kind: Kind = Kind.NUMBERS,
    ) -> Place:
        """A tensor of `sizes` that is computed once from the tensors in the slots of `sources`, whole."""
        place = self.slot(sizes, row_major(sizes), known=True, kind=kind)
        numbers = tuple(source.region.slot for source in sources)
        assert place.region.slot is not None and None not in numbers
        self.derived.append(Derived(place.region.slot, compute, numbers))  # type: ignore[arg-type]  # checked above
        return place

    def as_numbers(self, place: Place) -> Place:
        """A known tensor in the program's dtype, converted once if it has another."""
        slot = self.slots[place.region.slot or 0]
        plain = slot.kind is Kind.NUMBERS
        return place if plain else self.derive(slot.shape, lambda tensor: tensor.to(self.dtype), [place])

    def prepare(self, sizes: Sequence[int], write: Callable[[Place], object]) -> Place:
        """A tensor of `sizes` that `write` has computed once, before all terms."""
        place = self.slot(sizes, row_major(sizes), known=True)
        before, self.operations = self.operations, self.preparation
        try:
            write(place)
        finally:
            self.operations = before
        self.prepared.append(place.region.slot or 0)
        return place

    def workspace(self, sizes: Sequence[int], strides: Sequence[int] | None = None) -> Place:
        return Place(Region(prod(sizes)), tuple(sizes), row_major(sizes) if strides is None else tuple(strides))

    def stored(self, value: Operand, into: Place | None = None) -> Place:
        """The value in memory: where it is, or stored `into` a place, or in a new one."""
        if isinstance(value, Place):
            if into is None:
                return value
            self.operations.append(Elementwise((value,), (), ((0, into),)))
            return into
        leaves = value.leaves()
        place = self._place_for(value.sizes, leaves) if into is None else into
        self.chain([(value, place)])
        return place

    def copied(self, value: Place, strides: Sequence[int] | None = None) -> Place:
        """A dense copy."""
        return self.stored(value, self.workspace(value.sizes, strides))

    def chain(self, stores: Sequence[tuple[Operand, Place]]) -> None:
        """Stores several values by one operation; a value may be a place that an earlier one is stored in, or an
        expression with it, and then it is the stored value."""
        inputs: dict[Place, int] = {}
        places = [place for _, place in stores]
        for value, place in stores:
            for leaf in [value] if isinstance(value, Place) else value.leaves():
                read = self.readable(leaf.expanded(place.sizes), place)
                inputs.setdefault(read, len(inputs))
        instructions: list[Instruction] = []
        written: dict[Place, int] = {}

        def register(value: Operand, place: Place) -> int:
            if isinstance(value, Place):
                whole = value.expanded(place.sizes)
                return written[whole] if whole in written else inputs[self.readable(whole, place)]
            operands = tuple(register(operand, place) for operand in value.operands)
            to = len(inputs) + len(instructions)
            instructions.append(Instruction(value.code, to, operands, value.constant, value.second))
            return to

        outputs = []
        for value, place in stores:
            written[place] = register(value, place)
            outputs.append((written[place], place))
        assert len(inputs) <= MOST_INPUTS and len(inputs) + len(instructions) <= MOST_REGISTERS, places
        self.operations.append(Elementwise(tuple(inputs), tuple(instructions), tuple(outputs)))

    def combined(
        self,
        code: Code,
        operands: Sequence[Operand],
        sizes: Sequence[int],
        constant: Constant = 0.0,
        second: Constant = 0.0,
    ) -> Expression:
        """An expression, of which what is too long, or is broadcast, is stored first."""
        assert (constant == 0.0 or code in WITH_CONSTANT) and (second == 0.0 or code is Code.AFFINE)
        sizes = tuple(sizes)
        taken: list[Operand] = []
        for operand in operands:
            whole = isinstance(operand, Place) or operand.sizes == sizes
            taken.append(operand if whole else self.stored(operand))
        expression = Expression(code, tuple(taken), sizes, constant, second)
        while expression.length() > _LONGEST_CHAIN or len(expression.leaves()) > MOST_INPUTS - 2:
            longest = max(range(len(taken)), key=lambda i: length(taken[i]))
            taken[longest] = self.stored(taken[longest])
            expression = Expression(code, tuple(taken), sizes, constant, second)
        return expression

    def filled(self, sizes: Sequence[int], value: Constant) -> Expression:
        return Expression(Code.FILL, (), tuple(sizes), value)

    def product(self, a: Operand, b: Operand, onto: Operand | None = None, alpha: float = 1.0) -> Place:
        """alpha a b + onto; `onto` is a place that is free to be overwritten, or an expression, or None.

        Where both factors are transposed, so is the result: A^T B^T as (B A)^T. A term of an MLP whose layers are
        written as x @ w.T takes up to 1.4 times as long otherwise.
        """
        left, right = (self.blas_operand(self.stored(operand)) for operand in (a, b))
        sizes = (*left.sizes[:-1], right.sizes[-1])
        if isinstance(onto, Place) and onto.sizes == sizes and for_blas(onto) and 0 not in _needed(onto):
            result = onto
        else:
            few = sizes[-1] <= _FEW_COLUMNS and sizes[-2] > sizes[-1]
            flip = len(sizes) == 2 and (
                few or all(_upright(x) and not _upright(x.transposed(0, 1)) for x in (left, right))
            )
            result = self.workspace(sizes, in_order(sizes, (1, 0)) if flip else None)
            if onto is not None:
                self.stored(onto if isinstance(onto, Expression) else onto.expanded(sizes), result)
        self.accumulate(result, left, right, alpha, 0.0 if onto is None else 1.0)
        return result

    def accumulate(self, result: Place, a: Place, b: Place, alpha: Constant, beta: Constant) -> None:
        """result <- alpha a b + beta result, in place."""
        a, b = self.blas_operand(a), self.blas_operand(b)
        if for_blas(result):
            self.operations.append(MatrixProduct(result, a, b, alpha, beta))
            return
        dense = self.workspace(result.sizes)
        if beta != 0.0:
            self.stored(result, dense)
        self.operations.append(MatrixProduct(dense, a, b, alpha, beta))
        self.stored(dense, result)

    def summed(self, value: Operand, dims: Sequence[int], largest: bool = False) -> Place:
        """The sum, or the `largest` number, over `dims`, which stay with size 1."""
        factor = None
        if isinstance(value, Expression) and value.code is Code.MULTIPLY and not largest and value.sizes:
            both = [self.stored(operand).expanded(value.sizes) for operand in value.operands]
            source, factor = sorted(both, key=lambda place: 0 in _needed(place))
            factor = self.readable(factor, source)
        else:
            source = self.stored(value)
        if not source.sizes:
            return source
        gone = frozenset(d % len(source.sizes) for d in dims)
        sizes = tuple(1 if d in gone else size for d, size in enumerate(source.sizes))
        result = self.workspace(sizes, in_order(sizes, nesting(source)))
        self.operations.append(Sum(source, result, gone, largest, factor))
        return result

    def selected(self, source: Place, index: Place, skipped: int | None = None) -> Place:
        """source[i, index[j], k] for all i, j, k, or source[i, index[j], k, j]."""
        result = self.workspace((source.sizes[0], index.numel, source.sizes[2]))
        self.operations.append(Lookup(index, source, result, False, skipped))
        return result

    def scattered(
        self, source: Place, index: Place, rows: int, skipped: int | None = None, onto: Place | None = None
    ) -> Place:
        """The sums of source[i, j, k] with the same index[j], for each of `rows`."""
        outer, _, inner = source.sizes
        result = self.workspace((outer, rows, inner))
        self.stored(self.filled(result.sizes, 0.0) if onto is None else onto, result)
        self.scatter_into(result, source, index, skipped)
        return result

    def scatter_into(self, table: Place, source: Place, index: Place, skipped: int | None = None) -> None:
        """table[i, index[j], k] += source[i, j, k], or table[i, index[j], k, j]."""
        self.operations.append(Lookup(index, source, table, True, skipped))

    def blas_operand(self, place: Place) -> Place:
        """The place, or a copy with strides that BLAS takes, which is made once if the place is known."""
        if for_blas(place):
            return place
        return self._copied_once(place, range(len(place.sizes))) if self._can_prepare(place) else self.copied(place)

    def _place_for(self, sizes: tuple[int, ...], leaves: Sequence[Place]) -> Place:
        """A new place, nested as what changes from term to term, or else as any operand of that size."""
        whole = [leaf for leaf in leaves if leaf.sizes == sizes and 0 not in _needed(leaf)]
        for leaf in sorted(whole, key=lambda leaf: (leaf.region.known, leaf.region.tangent)):
            return self.workspace(sizes, in_order(sizes, nesting(leaf)))
        return self.workspace(sizes)

    def readable(self, leaf: Place, place: Place) -> Place:
        """A known operand, copied once if it is nested otherwise than `place`."""
        if not self._can_prepare(leaf) or leaf.numel > _SMALL_COPY or 0 in _needed(leaf):
            return leaf
        order = nesting(place)
        sizes = [leaf.sizes[d] for d in order if leaf.sizes[d] != 1]
        strides = [leaf.strides[d] for d in order if leaf.sizes[d] != 1]
        if not sizes or strides[-1] == 1 or list(strides) == sorted(strides, reverse=True):
            return leaf
        return self._copied_once(leaf, order)

    def _can_prepare(self, place: Place) -> bool:
        return place.region.known and not self.closed and self.operations is not self.preparation

    def _copied_once(self, place: Place, order: Sequence[int]) -> Place:
        """A copy that is made before all terms, nested in this order."""
        key = (place, tuple(order))
        if key not in self._ordered:
            nested = place.with_dims(order)
            copy = self.prepare(nested.sizes, lambda into: self.stored(nested, into))
            inverse = [order.index(d) for d in range(len(order))]
            self._ordered[key] = copy.with_dims(inverse)
        return self._ordered[key]


def _upright(place: Place) -> bool:
    """Whether the columns of a matrix are dense."""
    return place.strides[0] == 1 or place.sizes[0] == 1


def _needed(place: Place) -> list[int]:
    """The strides along dimensions of more than one element."""
    return [stride for size, stride in zip(place.sizes, place.strides, strict=True) if size > 1]
