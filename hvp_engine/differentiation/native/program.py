"""A partition's tangent program for the extension: products with H, and all terms of a solve in one call."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from hvp_engine._support.flat_vector import FlatVector, Layout
from hvp_engine.differentiation.linear_map import Accumulation, Terms
from hvp_engine.differentiation.native import handlers  # noqa: F401, without it there are none
from hvp_engine.differentiation.native.batch_space import Combination, Factor, number, one_for_each_output
from hvp_engine.differentiation.native.builder import CPU, Builder
from hvp_engine.differentiation.native.conversion import Conversion
from hvp_engine.differentiation.native.expressions import Operand
from hvp_engine.differentiation.native.extension import Slots, check
from hvp_engine.differentiation.native.memory_plan import plan
from hvp_engine.differentiation.native.operations import Code, Operation
from hvp_engine.differentiation.native.places import Place
from hvp_engine.differentiation.native.updates import FIRST_FACTOR, Mixing, Summands, product, table_of, update
from hvp_engine.differentiation.trace.partial_evaluation import Partition

_MOST_DIAGONALS = 3
"""Known factors of a weight's own tangent that an update reads one by one."""

_GROUPS, _RESULTS = 3, 2
"""Vectors that an update may touch: the direction, and two others; and in whose place a product is written."""


@dataclass
class Update:
    """The program of one term, the vectors that belong into its groups of slots, and which of them it changes."""

    program: Any
    vectors: list[FlatVector]
    target: int
    mixings: tuple[Mixing, ...]

    @property
    def changed(self) -> set[int]:
        return {self.target, *[mixing.target for mixing in self.mixings]}


class NativeProgram:
    """What the extension runs for one partition.

    Arguments:
        parts: of which the accumulating part is converted.
        residuals: of the primal part, at any point; others must be like them.
        factors: weights whose parts of vectors are kept in the space of the batch; such a program makes no products.

    Errors: :class:`UnsupportedError` says why there is no such program.
    """

    def __init__(self, parts: Partition, residuals: Sequence[Tensor], factors: Sequence[Factor] = ()):
        part = parts.accumulating
        weights = [node for node in part.module.graph.nodes if node.op == "placeholder"][len(part.residuals) :]
        dtype = check(node.meta["val"].dtype for node in weights)
        self._builder = builder = Builder(dtype)
        diagonals = sorted(set(chain(*parts.diagonals)) - set(part.residuals))
        self.residuals = (*part.residuals, *diagonals)
        known = [builder.given(residuals[index]) for index in self.residuals]
        self.factors, self.count = tuple(factors), len(weights)
        self.states = [[builder.slot(f.sizes, f.strides) for f in factors for _ in "UG"] for _ in range(_GROUPS)]
        given = {f.product: self.states[0][2 * i] for i, f in enumerate(factors)}
        converted = Conversion(part.module, known[: len(part.residuals)], builder, given)
        self.weights = _summands(parts, converted, dict(zip(self.residuals, known, strict=True)), builder)
        self.inputs = [converted.place(factor.inputs) for factor in factors]
        dense = [converted.tangents]
        dense += [[builder.slot(t.sizes, t.strides) for t in converted.tangents] for _ in range(_GROUPS - 1)]
        self.firsts = [group[0].region.slot or 0 for group in dense]
        self._groups = [self._in_batch_space(places, states) for places, states in zip(dense, self.states, strict=True)]
        for i, factor in enumerate(factors):
            self._factor(i, factor)
        self._body, builder.operations = builder.operations, []
        projections = [self._projection(index, dense[index]) for index in range(_GROUPS)]
        formations = [self._formation(index, dense[index]) for index in range(_GROUPS)]
        around = list(chain(*projections, *formations))
        kept = [place for one in self.weights for place in (*one.diagonals, *chain(*one.products))]
        kept += [one.rest for one in self.weights if one.rest is not None]
        self.workspace = builder.slot((plan([*builder.preparation, *around, *self._body], kept),), (1,))
        self.dtype, self.derived = dtype, tuple(builder.derived)
        self.slots, builder.closed = Slots(builder.slots, dtype), True
        assert self.workspace.region.slot is not None
        self.prepared = tuple(builder.prepared)
        own = [place.region.slot for place in (self.workspace, *chain(*self.states)) if place.region.slot is not None]
        self.scratch = (*own, *self.prepared)
        self.preparation = self.slots.program(builder.preparation, self.workspace.region.slot)
        self.projections, self.formations = (
            [self.slots.program(one, self.workspace.region.slot) for one in programs if one]
            for programs in (projections, formations)
        )
        self._programs: dict[Any, Any] = {}
        self._lock = threading.Lock()
        self.product = self._assembled([] if factors else product(builder, self.weights, dense[_RESULTS]), 0)
        self.parts = parts

    def _in_batch_space(self, places: Sequence[Place], states: Sequence[Place]) -> list[Place]:
        """A vector's places, with U in place of a factored weight's, and with G at the end."""
        held = list(places)
        for i, factor in enumerate(self.factors):
            held[factor.weight] = states[2 * i]
        return [*held, *states[1::2]]

    def _projection(self, group: int, vectors: Sequence[Place]) -> list[Operation]:
        """U <- x T^T and G <- 0 for one vector, and each factored weight."""
        build, states = self._builder, self.states[group]
        operations: list[Operation] = []
        build.operations = operations
        for i, (factor, rows) in enumerate(zip(self.factors, self.inputs, strict=True)):
            build.accumulate(states[2 * i], rows, vectors[factor.weight].transposed(0, 1), 1.0, 0.0)
            build.stored(build.filled(factor.sizes, 0.0), states[2 * i + 1])
        return operations

    def _formation(self, group: int, vectors: Sequence[Place]) -> list[Operation]:
        """T <- T + G^T x for one vector, and each factored weight."""
        build = self._builder
        operations: list[Operation] = []
        build.operations = operations
        for i, (factor, rows) in enumerate(zip(self.factors, self.inputs, strict=True)):
            coefficients = self.states[group][2 * i + 1].transposed(0, 1)
            build.accumulate(vectors[factor.weight], coefficients, rows, 1.0, 1.0)
        return operations

    def _factor(self, index: int, factor: Factor) -> None:
        """Replace a weight's summands by those of U, and append those of G."""
        dense, (product, coefficients) = self.weights[factor.weight], self.states[0][2 * index : 2 * index + 2]
        ((left, rows),) = dense.products
        decays = tuple(one_for_each_output(decay, factor) for decay in dense.diagonals)
        build, transposed = self._builder, rows.transposed(0, 1)
        gram = build.prepare((factor.sizes[0],) * 2, lambda into: build.accumulate(into, rows, transposed, 1.0, 0.0))
        change = left.transposed(0, 1)
        self.weights[factor.weight] = Summands(product, decays, ((gram, change),), None)
        self.weights.append(Summands(coefficients, decays, (), change))

    def bind(self, residuals: Sequence[Tensor]) -> BoundProgram:
        """On all residuals of the partition's primal part."""
        return BoundProgram(self, residuals)

    def update(self, accumulation: Accumulation, damped: bool) -> Update:
        """The program of one term."""
        vectors = [accumulation.direction]

        def group(vector: FlatVector) -> int:
            for i, other in enumerate(vectors):
                if other is vector:
                    return i
            vectors.append(vector)
            return len(vectors) - 1

        target = group(accumulation.target)
        mixings = tuple([(group(one.target), group(one.source), one.factors is None) for one in accumulation.mixings])
        key = (target, damped, mixings)
        with self._lock:
            if key not in self._programs:
                mixed = tuple(Mixing(*one) for one in mixings)
                operations = update(self._builder, self.weights, self._groups, target, damped, mixed)
                self._programs[key] = self._assembled(operations, FIRST_FACTOR + 2 * len(mixings)), mixed
            program, mixed = self._programs[key]
        return Update(program, vectors, target, mixed)

    def _assembled(self, tail: Sequence[Operation], parameters: int) -> Any:
        assert self.workspace.region.slot is not None
        return self.slots.program(chain(self._body, tail), self.workspace.region.slot, parameters)


def _summands(parts: Partition, converted: Conversion, known: dict[int, Place], builder: Builder) -> list[Summands]:
    """Each weight's product, from the outputs of the graph, with at most one summand that is no matrix product."""
    outputs = iter(converted.outputs)
    found = []
    for tangent, (pairs, others), diagonals in zip(converted.tangents, parts.terms, parts.diagonals, strict=True):
        # Copied here, if at all: what follows for each solver finds no room for copies.
        given = [builder.blas_operand(builder.stored(next(outputs))) for _ in range(2 * pairs)]
        products = tuple(zip(given[::2], given[1::2], strict=True))
        rest: Operand | None = None
        for other in [next(outputs) for _ in range(others)]:
            rest = other if rest is None else builder.combined(Code.ADD, [rest, other], tangent.sizes)
        factors = [builder.as_numbers(known[index]) for index in diagonals]
        if len(factors) > _MOST_DIAGONALS:
            factors = [builder.derive(tangent.sizes, _total_of(tangent.sizes), factors)]
        factors = [factor.expanded(tangent.sizes) for factor in factors]
        read = tuple(builder.readable(factor, tangent) for factor in factors)  # here, while slots can be added
        found.append(Summands(tangent, read, products, None if rest is None else builder.stored(rest)))
    return found


def _total_of(sizes: tuple[int, ...]) -> Callable[..., Tensor]:
    """The sum of tensors that broadcast to `sizes`."""
    return lambda *tensors: sum(tensors, torch.zeros(sizes, dtype=tensors[0].dtype, device=CPU))


Rehearsed = Callable[[Sequence[Tensor]], list[Tensor]]
"""Terms of a solve, and the product after them, on the residuals of a point, which are not held."""


class BoundProgram:
    """A program with known tensors, ready to multiply and to solve, by one thread at a time."""

    def __init__(self, program: NativeProgram, residuals: Sequence[Tensor]):
        self._program = program
        self._lock = threading.Lock()
        self._memory = program.slots.memory()
        for slot in program.scratch:
            self._memory.put(slot, [program.slots.new[slot]()])
        self.move(residuals)

    def move(self, residuals: Sequence[Tensor]) -> None:
        """To another point."""
        program = self._program
        known = self._put(0, [residuals[index] for index in program.residuals])
        if program.derived:
            self._derive(dict(enumerate(known)))
        if program.prepared:
            program.preparation.run(self._memory, [[]])
        self._decays = [
            number([residuals[index] for index in program.parts.diagonals[f.weight]], (f.sizes[1], rows.sizes[1]))
            for f, rows in zip(program.factors, program.inputs, strict=True)
        ]

    def let_go(self) -> None:
        """Hold no residuals until the next :meth:`move`."""
        self._memory.clear(0, len(self._program.residuals))

    def rehearsed(self, accumulation: Accumulation, damping: float, steps: range) -> Rehearsed | None:
        """These terms, and the product after them, which lies in the same memory every time; after this the program
        does nothing else. None if vectors have to be laid out anew, or are kept in the space of the batch."""
        program, memory = self._program, self._memory
        update = program.update(accumulation, damping != 0.0)
        results = [new() for new in program.slots.new[program.firsts[_RESULTS] :][: program.count]]
        placed = [*zip(program.firsts, [one.views for one in update.vectors], strict=False)]
        self.let_go()
        if program.factors or len(placed) > _RESULTS:
            return None
        if any(memory.put(*one) >= 0 for one in (*placed, (program.firsts[_RESULTS], results))):
            return None
        table = table_of(accumulation, damping, steps)

        def run(residuals: Sequence[Tensor]) -> list[Tensor]:
            with self._lock:
                try:
                    self.move(residuals)
                    update.program.run(memory, table)
                    program.product.run(memory, [[]])
                finally:
                    self.let_go()
            return results

        return run

    def _derive(self, known: dict[int, Tensor]) -> None:
        """Compute what follows from the tensors in the slots."""
        with torch.no_grad():
            for one in self._program.derived:
                result = one.compute(*(known[source] for source in one.sources))
                known[one.slot] = result.contiguous()
                self._put(one.slot, [known[one.slot]])

    def product(self, tangents: Sequence[Tensor], layout: Layout) -> Sequence[Tensor]:
        """H t, in new memory."""
        program = self._program
        results: Sequence[Tensor] = [
            torch.empty_strided(shape, stride, dtype=program.dtype, device=CPU)
            for shape, stride in zip(layout.shapes, layout.strides, strict=True)
        ]
        with self._lock:
            self._put(program.firsts[0], tangents)
            results = self._put(program.firsts[_RESULTS], results)
            program.product.run(self._memory, [[]])
            self._forget()
        return results

    def terms(self, accumulation: Accumulation, damping: float) -> Terms:
        """All terms of a solve but the last, whose norms are asked for."""
        update = self._program.update(accumulation, damping != 0.0)

        def run(steps: range) -> None:
            table = table_of(accumulation, damping, steps)
            with self._lock:
                placed = [
                    self._put(start, vector.views)
                    for start, vector in zip(self._program.firsts, update.vectors, strict=False)
                ]
                combinations, changed = self._combinations(placed), update.changed
                for projection in self._program.projections[: len(placed)]:
                    projection.run(self._memory, [[]])
                update.program.run(self._memory, table)
                for combination in combinations:
                    pairs = [(mixing.target, mixing.source) for mixing in update.mixings]
                    combination.follow(accumulation, update.target, pairs, damping, steps)
                    combination.form(changed)
                for k in changed if combinations else ():
                    self._program.formations[k].run(self._memory, [[]])
                for k in changed:
                    for view, tensor in zip(update.vectors[k].views, placed[k], strict=True):
                        if tensor is not view:  # it was laid out anew
                            view.copy_(tensor)
                self._forget()

        return run

    def _combinations(self, placed: Sequence[Sequence[Tensor]]) -> list[Combination]:
        """The factored weights' parts of the vectors at the beginning of a solve."""
        pairs = zip(self._decays, self._program.factors, strict=True)
        return [Combination(decay, [tensors[factor.weight] for tensors in placed]) for decay, factor in pairs]

    def _put(self, first: int, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        """Into the slots from `first` on; returns what is there, copies of those that are laid out otherwise."""
        fit = self._memory.put(first, tensors) < 0
        return tensors if fit else self._program.slots.put(self._memory, first, tensors)

    def _forget(self) -> None:
        """Hold no vector longer than it is needed."""
        for first in self._program.firsts:
            self._memory.clear(first, self._program.count)
