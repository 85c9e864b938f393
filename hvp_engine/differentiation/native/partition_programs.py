"""The native programs of a partition: for products and short solves, and in the space of the batch for long ones."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any, TypeVar

import torch
from torch import Tensor, fx

from hvp_engine._support.flat_vector import Layout
from hvp_engine._support.torch_compat_traces import function_of
from hvp_engine.differentiation.linear_map import Accumulation, Terms
from hvp_engine.differentiation.native.batch_space import Factor, factors, fewest_terms
from hvp_engine.differentiation.native.decompositions import decomposed
from hvp_engine.differentiation.native.graph_program import GraphProgram
from hvp_engine.differentiation.native.operations import UnsupportedError
from hvp_engine.differentiation.native.program import BoundProgram, NativeProgram, Rehearsed
from hvp_engine.differentiation.self_check import Schedule, difference_of_products
from hvp_engine.differentiation.trace.partial_evaluation import Partition
from hvp_engine.differentiation.trace.rewriting import Attempts

Made = TypeVar("Made")

_MOST_DECOMPOSED = 32
"""Kinds of operators that are decomposed, one after another, before a program is given up."""


class PartitionPrograms:
    """Makes the programs of a partition when they are first asked for.

    Attributes:
        program: for products and terms; None before, and where `reason` says why there is none.
        factored: with factored weights, for many terms; None where no weight qualifies.
        schedule: of solves by that one, when to compare it with the other.
        seconds: that making them took.
    """

    def __init__(self, parts: Partition):
        self._parts = parts
        self.program: NativeProgram | None = None
        self.factored: NativeProgram | None = None
        self.schedule = Schedule()
        self.reason = ""
        self.seconds = 0.0
        self._factors: list[Factor] | None = None

    def __getstate__(self) -> Partition:
        """A copy makes programs of its own."""
        return self._parts

    def __setstate__(self, parts: Partition) -> None:
        self.__init__(parts)  # type: ignore[misc]  # as a new one

    def bind(self, residuals: Sequence[Tensor]) -> BoundPrograms | None:
        """The programs on the residuals of the partition's primal part; None if there are none."""
        return None if self.for_products(residuals) is None else BoundPrograms(self, residuals)

    def for_products(self, residuals: Sequence[Tensor]) -> NativeProgram | None:
        """The program without factored weights."""
        if self.program is None and not self.reason:
            self.program, self.reason = self._made(residuals, [])
        return self.program

    def fewest_terms(self, residuals: Sequence[Tensor], grams_exist: bool) -> float:
        """Terms from which the program with factored weights is faster; infinite where there is none."""
        if self._factors is None:
            self._factors = factors(self._parts, residuals)
        return fewest_terms(self._factors, grams_exist) if self._factors else math.inf

    def in_batch_space(self, residuals: Sequence[Tensor]) -> NativeProgram | None:
        """The program with factored weights."""
        if self.factored is None and self._factors:
            self.factored, reason = self._made(residuals, self._factors)
            self._factors = [] if reason else self._factors
        return self.factored

    def give_up_factored(self) -> None:
        """From now on all terms are made without factored weights."""
        self.factored, self._factors = None, []

    def rehearsed(
        self, residuals: Sequence[Tensor], accumulation: Accumulation, damping: float, steps: range
    ) -> Rehearsed | None:
        """See :meth:`BoundProgram.rehearsed`; None as well where another program is faster for so many terms."""
        program = self.for_products(residuals)
        if program is None or len(steps) >= self.fewest_terms(residuals, grams_exist=False):
            return None
        return program.bind(residuals).rehearsed(accumulation, damping, steps)

    def _made(self, residuals: Sequence[Tensor], found: Sequence[Factor]) -> tuple[NativeProgram | None, str]:
        """A program, or why there is none."""

        def make() -> NativeProgram:
            for _ in range(_MOST_DECOMPOSED):
                try:
                    return NativeProgram(self._parts, residuals, found)
                except UnsupportedError as error:
                    simpler = decomposed(self._parts, error.target)
                    if simpler is None:
                        raise
                    self._parts, self._factors = simpler, None
            raise UnsupportedError("too many operators")

        return self.timed(make)

    def timed(self, make: Callable[[], Made]) -> tuple[Made | None, str]:
        """What `make` makes, or why it cannot."""
        start = time.perf_counter()
        try:
            return make(), ""
        except UnsupportedError as error:
            return None, f"since the extension lacks: {error}"
        except Exception as error:  # our own fault, which the operators of PyTorch make good
            Attempts().record(self._made, error)
            return None, f"since making a native program failed: {type(error).__name__}: {error}"
        finally:
            self.seconds += time.perf_counter() - start

    @property
    def dtypes(self) -> frozenset[torch.dtype]:
        """Of all numbers."""
        return self._parts.dtypes

    def describe(self) -> str:
        """What there is, or why there is nothing; empty before the first use."""
        if self.reason:
            return f"by PyTorch's operators, {self.reason}"
        if self.program is None:
            return ""
        text = "products and terms by the extension"
        if self.factored is not None:
            text += f", {len(self.factored.factors)} of {self.factored.count} weights in the space of the batch"
        return text


class PartOnce:
    """A part of a partition that runs once at each point, a function of known tensors, detached and without grad mode:
    by a program that the first call makes, else by `otherwise`."""

    def __init__(self, programs: PartitionPrograms, graph: fx.GraphModule, otherwise: fx.GraphModule):
        self._parts = programs, graph, otherwise
        self._run: Callable[..., Sequence[Any]] | None = None

    def __getstate__(self) -> tuple[Any, ...]:
        """A copy makes a program of its own."""
        return self._parts

    def __setstate__(self, parts: tuple[Any, ...]) -> None:
        self.__init__(*parts)  # type: ignore[misc]  # as a new one

    def __call__(self, *known: Tensor) -> Sequence[Any]:
        if self._run is None:
            programs, graph, otherwise = self._parts
            self._run = programs.timed(lambda: GraphProgram(graph, programs.dtypes))[0] or function_of(otherwise)
        return self._run(*known)

    @property
    def program(self) -> GraphProgram | None:
        """The program, once it is made; None before, and where there is none."""
        return self._run if isinstance(self._run, GraphProgram) else None


class BoundPrograms:
    """The programs of a partition at one point."""

    def __init__(self, programs: PartitionPrograms, residuals: Sequence[Tensor]):
        self._programs, self._residuals = programs, residuals

    def __getstate__(self) -> tuple[PartitionPrograms, Sequence[Tensor]]:
        """A copy is bound anew."""
        return self._programs, self._residuals

    def __setstate__(self, state: tuple[PartitionPrograms, Sequence[Tensor]]) -> None:
        self._programs, self._residuals = state

    def move(self, residuals: Sequence[Tensor]) -> None:
        """To another point."""
        self._residuals = residuals
        for bound in self._made():
            bound.move(residuals)

    def let_go(self) -> None:
        """Hold no residuals until the next :meth:`move`."""
        self._residuals = ()
        for bound in self._made():
            bound.let_go()

    def _made(self) -> list[BoundProgram]:
        made = vars(self).get("_bound"), vars(self).get("_factored")
        return [bound for bound in made if bound is not None]

    def product(self, tangents: Sequence[Tensor], layout: Layout) -> Sequence[Tensor]:
        """H t, in new memory."""
        return self._bound.product(tangents, layout)

    def terms(self, accumulation: Accumulation, damping: float) -> Terms:
        """Terms by the program that is the faster one for so many."""

        def run(steps: range) -> None:
            fewest = self._programs.fewest_terms(self._residuals, grams_exist="_factored" in vars(self))
            factored = self._factored if len(steps) >= fewest else None
            if factored is not None and self._programs.schedule.due():
                self._compared(factored, accumulation, damping, steps)
            else:
                (self._bound if factored is None else factored).terms(accumulation, damping)(steps)

        return run

    def _compared(self, factored: BoundProgram, accumulation: Accumulation, damping: float, steps: range) -> None:
        """Terms by both programs, with the numbers of the one without factored weights; where the other's are not the
        same, it is given up."""
        plain = self._programs.for_products(self._residuals)
        assert plain is not None  # as when it was bound
        vectors = plain.update(accumulation, damping != 0.0).vectors
        before = [vector.data.clone() for vector in vectors]
        factored.terms(accumulation, damping)(steps)
        found = [vector.data.clone() for vector in vectors]
        for vector, data in zip(vectors, before, strict=True):
            vector.data.copy_(data)
        self._bound.terms(accumulation, damping)(steps)
        differs = difference_of_products(found, [vector.data for vector in vectors], self._programs.dtypes)
        if differs is not None:
            self._programs.give_up_factored()
            vars(self).pop("_factored")
            warnings.warn(
                f"terms in the space of the batch do not agree with those of plain products: {differs}, as it should "
                "not, whatever the loss; plain products make all terms from now on",
                stacklevel=2,
            )

    @cached_property
    def _bound(self) -> BoundProgram:
        program = self._programs.for_products(self._residuals)
        assert program is not None  # as when it was bound
        return program.bind(self._residuals)

    @cached_property
    def _factored(self) -> BoundProgram | None:
        program = self._programs.in_batch_space(self._residuals)
        return None if program is None else program.bind(self._residuals)
