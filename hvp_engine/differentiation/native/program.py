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
from hvp_engine._support.torch_compat import loaded_library
from hvp_engine.differentiation.linear_map import Accumulation, Terms
from hvp_engine.differentiation.native import differentiable, elementwise, linear_algebra, shaping
from hvp_engine.differentiation.native.batch_space import Combination, Factor, number, one_for_each_output
from hvp_engine.differentiation.native.builder import CPU, Builder, Operand
from hvp_engine.differentiation.native.conversion import Conversion
from hvp_engine.differentiation.native.memory_plan import plan
from hvp_engine.differentiation.native.operations import Code, Operation, UnsupportedError, Words
from hvp_engine.differentiation.native.places import Place
from hvp_engine.differentiation.native.updates import FIRST_FACTOR, Mixing, Summands, product, update
from hvp_engine.differentiation.trace.partial_evaluation import Partition
from hvp_engine.errors import BackendError

try:
    from hvp_engine.ops.cpp import _C

    _C.find_blas(loaded_library("torch_cpu"))
    _PROBLEM: str = _C.blas_problem()
except ImportError as error:
    _PROBLEM = str(error)

_HANDLERS = (differentiable, elementwise, linear_algebra, shaping)
"""The modules whose handlers are in the table once they are imported."""

_MOST_DIAGONALS = 3
"""Known factors of a weight's own tangent that an update reads one by one."""

_GROUPS = 3
"""Vectors that an update may touch: the direction, and two others."""


@dataclass(frozen=True)
class Update:
    """The program of one term, the vectors that belong into its groups of slots, and which of them it changes."""

    program: Any
    vectors: list[FlatVector]
    target: int
    mixings: tuple[Mixing, ...]

    @property
    def changed(self) -> set[int]:
        return {self.target, *(mixing.target for mixing in self.mixings)}


class NativeProgram:
    """What the extension runs for one partition.

    Arguments:
        parts: of which the accumulating part is converted.
        residuals: of the primal part, at any point; others must be like them.
        factors: weights whose parts of vectors are kept in the space of the batch; such a program makes no products.

    Errors: :class:`UnsupportedError` says why there is no such program.
    """

    def __init__(self, parts: Partition, residuals: Sequence[Tensor], factors: Sequence[Factor] = ()):
        if _PROBLEM:
            raise UnsupportedError(_PROBLEM)
        part = parts.accumulating
        weights = [node for node in part.module.graph.nodes if node.op == "placeholder"][len(part.residuals) :]
        dtypes = {node.meta["val"].dtype for node in weights}
        if len(dtypes) != 1 or not dtypes <= {torch.float32, torch.float64}:
            raise UnsupportedError(f"weights of {', '.join(sorted(map(str, dtypes))) or 'no dtype'}")
        (dtype,) = dtypes
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
        self._body = list(builder.operations)
        kept = [place for one in self.weights for place in (*one.diagonals, *chain(*one.products))]
        kept += [one.rest for one in self.weights if one.rest is not None]
        self.workspace = builder.slot((plan(self._body, kept),), (1,))
        self.dtype, self.derived = dtype, tuple(builder.derived)
        kinds = [(int(slot.kind), slot.shape, slot.strides) for slot in builder.slots]
        self.slots = _C.Slots(dtype == torch.float64, kinds)
        self._programs: dict[Any, Any] = {}
        self._lock = threading.Lock()
        self.product = self._assembled([] if factors else product(builder, self.weights, dense[1]), 0)
        self.parts = parts

    def _in_batch_space(self, places: Sequence[Place], states: Sequence[Place]) -> list[Place]:
        """A vector's places, with U in place of a factored weight's, and with G at the end."""
        held = list(places)
        for i, factor in enumerate(self.factors):
            held[factor.weight] = states[2 * i]
        return [*held, *states[1::2]]

    def _factor(self, index: int, factor: Factor) -> None:
        """Replace a weight's summands by those of U, and append those of G."""
        dense, (product, coefficients) = self.weights[factor.weight], self.states[0][2 * index : 2 * index + 2]
        ((left, rows),) = dense.products
        decays = tuple(one_for_each_output(decay, factor) for decay in dense.diagonals)
        gram = self._builder.derive((factor.sizes[0],) * 2, lambda x: x @ x.t(), [rows])
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
            known = [i for i, other in enumerate(vectors) if other is vector]
            if not known:
                vectors.append(vector)
            return known[0] if known else len(vectors) - 1

        target = group(accumulation.target)
        mixings = tuple(
            Mixing(group(one.target), group(one.source), one.factors is None) for one in accumulation.mixings
        )
        key = (target, damped, mixings)
        with self._lock:
            if key not in self._programs:
                operations = update(self._builder, self.weights, self._groups, target, damped, mixings)
                self._programs[key] = self._assembled(operations, FIRST_FACTOR + 2 * len(mixings))
        return Update(self._programs[key], vectors, target, mixings)

    def laid_out(self, index: int, tensor: Tensor) -> Tensor:
        """A copy of a tensor with the strides that its slot expects."""
        slot = self._builder.slots[index]
        if tensor.shape != slot.shape or tensor.dtype != self.dtype or tensor.device.type != "cpu":
            raise BackendError(
                f"native program: expected a tensor of shape {tuple(slot.shape)} and {self.dtype} on the CPU; got "
                f"{tuple(tensor.shape)}, {tensor.dtype} on {tensor.device}: this is a fault of hvp_engine: please "
                "report it"
            )
        return torch.empty_strided(slot.shape, slot.strides, dtype=tensor.dtype, device=CPU).copy_(tensor.detach())

    def _assembled(self, tail: Sequence[Operation], parameters: int) -> Any:
        words = Words()
        assert self.workspace.region.slot is not None
        for operation in chain(self._body, tail):
            operation.write(words, self.workspace.region.slot)
        return _C.Program(self.slots, parameters, words.constants, words.words)


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
        factors = [known[index] for index in diagonals]
        if len(factors) > _MOST_DIAGONALS:
            factors = [builder.derive(tangent.sizes, _total_of(tangent.sizes), factors)]
        factors = [factor.expanded(tangent.sizes) for factor in factors]
        read = tuple(builder.readable(factor, tangent) for factor in factors)  # here, while slots can be added
        found.append(Summands(tangent, read, products, None if rest is None else builder.stored(rest)))
    return found


def _total_of(sizes: tuple[int, ...]) -> Callable[..., Tensor]:
    """The sum of tensors that broadcast to `sizes`."""
    return lambda *tensors: sum(tensors, torch.zeros(sizes, dtype=tensors[0].dtype, device=CPU))


class BoundProgram:
    """A program with known tensors, ready to multiply and to solve, by one thread at a time."""

    def __init__(self, program: NativeProgram, residuals: Sequence[Tensor]):
        self._program = program
        self._lock = threading.Lock()
        self._memory = _C.Memory(program.slots)
        known = [residuals[index] for index in program.residuals]
        tensors: dict[int, Tensor] = dict(enumerate(self._put(0, known)))
        with torch.no_grad():
            for one in program.derived:
                result = one.compute(*(tensors[source] for source in one.sources))
                tensors[one.slot] = result.contiguous()
                self._put(one.slot, [tensors[one.slot]])
        workspace = program.workspace
        assert workspace.region.slot is not None
        self._put(workspace.region.slot, [torch.empty(workspace.sizes, dtype=program.dtype, device=CPU)])
        self._rows = [tensors[place.region.slot] for place in program.inputs if place.region.slot is not None]
        self._decays = [
            number([residuals[index] for index in program.parts.diagonals[f.weight]], (f.sizes[1], rows.shape[1]))
            for f, rows in zip(program.factors, self._rows, strict=True)
        ]
        self._states = [
            [torch.empty_strided(place.sizes, place.strides, dtype=program.dtype, device=CPU) for place in places]
            for places in program.states
        ]
        for places, states in zip(program.states, self._states, strict=True):
            for place, state in zip(places, states, strict=True):
                self._put(place.region.slot or 0, [state])

    def product(self, tangents: Sequence[Tensor], layout: Layout) -> list[Tensor]:
        """H t, in new memory."""
        program = self._program
        results = [
            torch.empty_strided(shape, stride, dtype=program.dtype, device=CPU)
            for shape, stride in zip(layout.shapes, layout.strides, strict=True)
        ]
        with self._lock:
            self._put(program.firsts[0], tangents)
            results = self._put(program.firsts[1], results)
            program.product.run(self._memory, [[]])
            self._forget()
        return results

    def terms(self, accumulation: Accumulation, damping: float) -> Terms:
        """All terms of a solve but the last, whose norms are asked for."""
        update = self._program.update(accumulation, damping != 0.0)
        scale, in_place = accumulation.scale, accumulation.target is accumulation.direction
        first = [-scale, (1.0 if in_place else 0.0) - scale * damping]

        def run(steps: range) -> None:
            table = [[*first, *chain(*(one.factors_at(step) for one in accumulation.mixings))] for step in steps]
            with self._lock:
                placed = [
                    self._put(start, vector.views)
                    for start, vector in zip(self._program.firsts, update.vectors, strict=False)
                ]
                combinations = self._combinations(placed)
                update.program.run(self._memory, table)
                for combination in combinations:
                    pairs = [(mixing.target, mixing.source) for mixing in update.mixings]
                    combination.follow(accumulation, update.target, pairs, damping, steps)
                    combination.form(update.changed)
                for k in update.changed:
                    for view, tensor in zip(update.vectors[k].views, placed[k], strict=True):
                        if tensor is not view:  # it was laid out anew
                            view.copy_(tensor)
                self._forget()

        return run

    def _combinations(self, placed: Sequence[Sequence[Tensor]]) -> list[Combination]:
        """The factored weights' parts of the vectors at the beginning of a solve."""
        return [
            Combination(
                self._decays[i],
                [tensors[factor.weight] for tensors in placed],
                self._rows[i],
                [(states[2 * i], states[2 * i + 1]) for states in self._states],
            )
            for i, factor in enumerate(self._program.factors)
        ]

    def _put(self, first: int, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Into the slots from `first` on; a tensor of other strides is copied. Returns what is in the slots."""
        placed = list(tensors)
        done = 0
        while done < len(placed):
            bad = self._memory.put(first + done, placed[done:])
            if bad < 0:
                break
            done += bad
            placed[done] = self._program.laid_out(first + done, placed[done])
        return placed

    def _forget(self) -> None:
        """Hold no vector longer than it is needed."""
        for first in self._program.firsts:
            self._memory.clear(first, self._program.count)
