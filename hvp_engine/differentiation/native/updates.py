"""How a program ends: with the sum of a product's summands, or with a solver's update by that sum."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

from hvp_engine.differentiation.linear_map import Accumulation
from hvp_engine.differentiation.native.builder import Builder
from hvp_engine.differentiation.native.expressions import Operand
from hvp_engine.differentiation.native.operations import Code, Operation
from hvp_engine.differentiation.native.places import Place

SCALE, DAMPED, FIRST_FACTOR = 0, 1, 2
"""Columns of the table of a run: minus the scale; what a term without curvature multiplies by; the mixes' factors."""


@dataclass(frozen=True)
class Summands:
    """One weight's product: the diagonals times its own tangent, the matrix products, and the rest."""

    tangent: Place
    diagonals: tuple[Place, ...]
    products: tuple[tuple[Place, Place], ...]
    rest: Place | None


@dataclass(frozen=True)
class Mixing:
    """target <- own target + factor source, or target + source where it is plain; each is a group of places."""

    target: int
    source: int
    plain: bool


def _diagonal(builder: Builder, summands: Summands) -> Operand | None:
    total: Operand | None = None
    for known in summands.diagonals:
        total = known if total is None else builder.combined(Code.ADD, [total, known], summands.tangent.sizes)
    return total


def product(builder: Builder, weights: Sequence[Summands], results: Sequence[Place]) -> list[Operation]:
    """results <- the sum of the summands."""
    operations: list[Operation] = []
    builder.operations = operations
    for summands, result in zip(weights, results, strict=True):
        sizes = result.sizes
        diagonal, total = _diagonal(builder, summands), summands.rest
        value: Operand | None = total
        if diagonal is not None and total is not None:
            value = builder.combined(Code.MULTIPLY_ADD, [diagonal, summands.tangent, total], sizes)
        elif diagonal is not None:
            value = builder.combined(Code.MULTIPLY, [diagonal, summands.tangent], sizes)
        elif not summands.products and value is None:
            value = builder.filled(sizes, 0.0)
        if value is not None:
            builder.chain([(value, result)])
        beta = 0.0 if value is None else 1.0
        for left, right in summands.products:
            builder.accumulate(result, left, right, 1.0, beta)
            beta = 1.0
    return operations


def update(
    builder: Builder,
    weights: Sequence[Summands],
    groups: Sequence[Sequence[Place]],
    target: int,
    damped: bool,
    mixings: Sequence[Mixing],
) -> list[Operation]:
    """target <- target - scale (A + damping) direction; then the mixings. Group 0 is the direction."""
    operations: list[Operation] = []
    builder.operations = operations
    for j, summands in enumerate(weights):
        place = groups[target][j]
        later, added = list(mixings), []
        # A sum with a vector that stays as it is can come before the matrix products, in the same pass.
        while later and later[0].plain and later[0].target == target:
            added.append(groups[later.pop(0).source][j])
        value = _advanced(builder, summands, place, damped, added)
        stores: list[tuple[Operand, Place]] = []
        if summands.products:
            if not isinstance(value, Place):
                builder.chain([(value, place)])
            for left, right in summands.products:
                builder.accumulate(place, left, right, SCALE, 1.0)
        else:
            stores.append((value, place))
        for k, mixing in enumerate(later, start=len(mixings) - len(later)):
            onto, source = groups[mixing.target][j], groups[mixing.source][j]
            stores.append((_mixed(builder, mixing, FIRST_FACTOR + 2 * k, onto, source), onto))
        for group in _independent(stores):
            builder.chain(group)
    return operations


def _advanced(builder: Builder, summands: Summands, place: Place, damped: bool, added: Sequence[Place]) -> Operand:
    """The target without its matrix products, and what is `added` to it."""
    sizes, combined = place.sizes, builder.combined
    diagonal, in_place = _diagonal(builder, summands), place == summands.tangent
    others: list[Operand] = [*([] if in_place else [place]), *added]
    value: Operand | None = place if in_place else None
    if diagonal is not None:
        factor = combined(Code.AFFINE, [diagonal], sizes, SCALE, DAMPED)
        operands = [summands.tangent, factor, *others[:1]]
        value = combined(Code.MULTIPLY_ADD if others else Code.MULTIPLY, operands, sizes)
        others = others[1:]
    elif damped:
        value = combined(Code.SCALE, [summands.tangent], sizes, DAMPED)
    if summands.rest is not None:
        others.append(combined(Code.SCALE, [summands.rest], sizes, SCALE))
    for other in others:
        value = other if value is None else combined(Code.ADD, [value, other], sizes)
    assert value is not None
    return value


def _mixed(builder: Builder, mixing: Mixing, column: int, onto: Place, source: Place) -> Operand:
    if mixing.plain:
        return builder.combined(Code.ADD, [onto, source], onto.sizes)
    own = builder.combined(Code.SCALE, [onto], onto.sizes, column)
    return builder.combined(Code.ADD, [own, builder.combined(Code.SCALE, [source], onto.sizes, column + 1)], onto.sizes)


def _independent(stores: Sequence[tuple[Operand, Place]]) -> list[list[tuple[Operand, Place]]]:
    """Stores that one operation can make: each place once. A place stored in itself is left out."""
    passes: list[list[tuple[Operand, Place]]] = [[]]
    for value, place in stores:
        if value == place:
            continue
        if any(place == other for _, other in passes[-1]):
            passes.append([])
        passes[-1].append((value, place))
    return [one for one in passes if one]


def table_of(accumulation: Accumulation, damping: float, steps: range) -> list[list[float]]:
    """The table of a run: what each step computes with."""
    scale, in_place = accumulation.scale, accumulation.target is accumulation.direction
    first = [-scale, (1.0 if in_place else 0.0) - scale * damping]
    if all(one.factors is None for one in accumulation.mixings):
        return [[*first, *[1.0] * (2 * len(accumulation.mixings))]] * len(steps)
    return [[*first, *chain(*(one.factors_at(step) for one in accumulation.mixings))] for step in steps]
