"""A partition evaluated at one point: the residuals are held, and products run the tangent part alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property

import torch
from torch import Tensor, fx

from hvp_engine._support.flat_vector import Layout
from hvp_engine._support.torch_compat import below_autograd
from hvp_engine._support.torch_compat_traces import function_of, has_internal_overlap
from hvp_engine.differentiation.closing import Closing
from hvp_engine.differentiation.linear_map import Accumulation, Linearization, Terms
from hvp_engine.differentiation.native.closing import closing_graph
from hvp_engine.differentiation.native.graph_program import GraphProgram
from hvp_engine.differentiation.native.partition_programs import BoundPrograms, PartitionPrograms, PartOnce
from hvp_engine.differentiation.trace.fused_update import AccumulatingTerms, accumulating_pays
from hvp_engine.differentiation.trace.partial_evaluation import Partition
from hvp_engine.differentiation.trace.rewriting import placeholders

Function = Callable[..., Sequence[Tensor]]


class PartitionFunctions:
    """The callables of a partition. Subclasses compile them.

    Attributes:
        native: programs of the extension, which then make products and terms, where there are any.
        unbatched: why right-hand sides go one by one, once that has turned out.
    """

    def __init__(self, parts: Partition):
        self.partition = parts
        self.unbatched = ""
        self.native: PartitionPrograms | None = None
        self._closing: list[GraphProgram | None] = []

    @cached_property
    def primal(self) -> Function:
        return function_of(self.partition.primal)

    @cached_property
    def tangent(self) -> Function:
        return function_of(self.partition.tangent.in_place)

    @cached_property
    def mixed(self) -> Function:
        return function_of(self.partition.mixed.in_place)

    @cached_property
    def accumulating(self) -> Function:
        return function_of(self.partition.accumulating.in_place)

    def run_natively(self) -> None:
        """Have the extension run what it can."""
        parts = self.partition
        self.native = PartitionPrograms(parts)
        self.primal = PartOnce(self.native, parts.primal, parts.primal)
        self.mixed = PartOnce(self.native, parts.mixed.module, parts.mixed.in_place)

    def closing(self, gradient: Sequence[Tensor]) -> GraphProgram | None:
        """The program of what follows a solve, for gradients like this one; None if there is none."""
        if self.native is None:
            return None
        if not self._closing:
            self._closing.append(self.native.timed(lambda: self._closing_program(gradient))[0])
        return self._closing[0]

    def _closing_program(self, gradient: Sequence[Tensor]) -> GraphProgram:
        return GraphProgram(closing_graph(self.partition.mixed, gradient), self.partition.dtypes)


class PartitionedLinearization(Linearization):
    """Products by the tangent part of a partition, on `residuals` that its primal part gave."""

    def __init__(self, functions: PartitionFunctions, layout: Layout, name: str, residuals: Sequence[Tensor]):
        self.layout = layout
        self.name = name
        self.functions = functions
        self._complete = all(functions.partition.tangent.outputs)
        parts = functions.partition
        self._residuals = residuals
        self._tangent_residuals = [residuals[index] for index in parts.tangent.residuals]
        self._mixed_residuals = [residuals[index] for index in parts.mixed.residuals]

    def product(self, tangents: Sequence[Tensor]) -> Sequence[Tensor]:
        """H t."""
        if self.native is not None:
            return self.native.product(tangents, self.layout)
        with below_autograd():
            products = self.functions.tangent(*self._laid_out, *tangents)
        return products if self._complete else self._filled(products, tangents)

    @cached_property
    def _laid_out(self) -> Sequence[Tensor]:
        return self._as_traced(self.functions.partition.tangent.module, self._tangent_residuals)

    def _as_traced(self, module: fx.GraphModule, residuals: Sequence[Tensor]) -> Sequence[Tensor]:
        """The residuals with the strides of the trace, which views rely on: native programs choose their own."""
        if self.functions.native is None:  # nor may a recorded product read copies that its replays do not make
            return residuals
        inputs = placeholders(module.graph)
        return [_like(node.meta["val"], known) for node, known in zip(inputs, residuals, strict=False)]

    @cached_property
    def native(self) -> BoundPrograms | None:
        """The programs of products and terms on the residuals, if there are any."""
        native = self.functions.native
        return None if native is None else native.bind(self._residuals)

    @property
    def by_extension(self) -> bool:
        """Whether products and terms are made by native programs."""
        return self.native is not None

    def _filled(self, products: Sequence[Tensor], tangents: Sequence[Tensor]) -> list[Tensor]:
        found = iter(products)
        present = self.functions.partition.tangent.outputs
        return [next(found) if there else torch.zeros_like(t) for there, t in zip(present, tangents, strict=True)]

    @property
    def batches(self) -> bool:
        return self.native is None and not self.functions.unbatched  # a native program launches nothing

    def products(self, stacked: Sequence[Tensor]) -> Sequence[Tensor]:
        """H t for several t, by vmap; one by one where it has no rule for some operation, which the report names."""
        try:
            return self._at_once(stacked)
        except Exception as error:  # of whatever library an operation comes from
            self.functions.unbatched = f"{type(error).__name__}: {error}".splitlines()[0]
            return super().products(stacked)

    def _at_once(self, stacked: Sequence[Tensor]) -> Sequence[Tensor]:
        known = self._laid_out
        with torch.no_grad():
            batched = torch.func.vmap(
                self.functions.partition.tangent.module.forward, (None,) * len(known) + (0,) * len(stacked)
            )
            return self._filled(batched(*known, *stacked), stacked)

    def decays(self) -> list[Tensor] | None:
        parts = self.functions.partition.diagonals
        if not all(parts):
            return None
        known = [[self._residuals[index].to(self.layout.state_dtype) for index in part] for part in parts]
        return [
            sum(part, torch.zeros_like(part[0])).expand(s) for part, s in zip(known, self.layout.shapes, strict=True)
        ]

    def mixed(self, tangents: Sequence[Tensor]) -> list[Tensor | None]:
        """(df/dlambda)^T t."""
        with below_autograd():
            found = iter(self.functions.mixed(*self._mixed_residuals, *tangents))
        return [next(found) if there else None for there in self.functions.partition.mixed.outputs]

    @cached_property
    def closed_by(self) -> Callable[..., Sequence[Tensor | None]] | None:
        """The program of :meth:`closing`, if there is one; its results are the caller's."""
        return self.functions.closing(self.gradient)

    def closing(self, x: Sequence[Tensor]) -> Closing:
        if self.closed_by is None:
            return super().closing(x)
        with below_autograd():
            *found, change, square = self.closed_by(*self._mixed_residuals, *x, *self.gradient)
        assert change is not None and square is not None
        present = iter(found)
        indirect = [next(present) if there else None for there in self.functions.partition.mixed.outputs]
        return Closing(indirect, x, self.gradient, self.layout, (change, square))

    def accumulating_terms(self, accumulation: Accumulation, damping: float) -> Terms | None:
        if self.native is not None:
            return self.native.terms(accumulation, damping)
        parts = self.functions.partition
        if not parts.accumulates or self.layout.low_precision or not accumulating_pays(self.layout):
            return None
        residuals = self._as_traced(
            parts.accumulating.module, [self._residuals[index] for index in parts.accumulating.residuals]
        )
        return AccumulatingTerms(
            lambda tangents: self.functions.accumulating(*residuals, *tangents),
            parts.terms,
            [[self._residuals[index] for index in diagonals] for diagonals in parts.diagonals],
            accumulation,
            damping,
        )


def _like(traced: Tensor, known: Tensor) -> Tensor:
    """`known` in the layout that it had in the trace."""
    if known.layout is not torch.strided or known.stride() == traced.stride() or has_internal_overlap(traced):
        return known
    return torch.empty_strided(known.shape, traced.stride(), dtype=known.dtype, device=known.device).copy_(known)
