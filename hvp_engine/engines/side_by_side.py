"""Several right-hand sides: their solves advance side by side, with one batched product for a term of all of them.

Small problems spend their time between operations rather than in them, so that a product with 32 vectors costs
little more than one with a single vector. Large ones gain nothing and run one after the other, with less memory.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from hvp_engine.engines.base import Engine
from hvp_engine.engines.eager import begin
from hvp_engine.engines.linearized import TracedLinearization
from hvp_engine.linearization import LinearMap
from hvp_engine.solvers.base import FinishedIteration, Iteration, Solver
from hvp_engine.solvers.exact import Columns, Exact
from hvp_engine.spectrum import SpectralEstimate

MOST = 32
"""Vectors in one product: more cost memory and gain nothing (measured on a CPU)."""

_LEAST = 8
"""Vectors from which a batched product is faster than single ones (measured: with 4, not for every network)."""

_LARGEST = 1 << 14
"""Weights up to which it is faster, on a CPU (measured: at 80,000 it is not any more)."""


def run_side_by_side(
    engine: Engine,
    operator: LinearMap,
    vs: Sequence[Sequence[Tensor]],
    solver: Solver,
    estimate: SpectralEstimate | None,
) -> Iterable[FinishedIteration]:
    """The finished iterations for the right-hand sides `vs`, in order; a dense matrix is made once for all of them."""
    if isinstance(solver, Exact):
        return _with_one_matrix(operator, vs, solver)
    if not pays(operator, len(vs)):
        return (engine.run(operator, v, solver, estimate) for v in vs)
    return _in_groups(operator, vs, solver, estimate)


def pays(operator: LinearMap, count: int) -> bool:
    """Whether one product with `count` vectors is possible, and faster than `count` products."""
    if not isinstance(operator, TracedLinearization) or count < _LEAST:
        return False
    small = operator.layout.size <= _LARGEST or operator.layout.device.type != "cpu"
    return small and not operator.functions.unbatched


def fill(columns: Columns, operator: LinearMap) -> None:
    """Make all products with unit vectors."""
    while columns.steps < columns.limit:
        count = min(MOST, columns.limit - columns.steps)
        if pays(operator, count):
            columns.step_block(_products(operator, columns.block(count)))
        else:
            columns.step(operator.product(columns.direction.tangents))


def _with_one_matrix(operator: LinearMap, vs: Sequence[Sequence[Tensor]], solver: Exact) -> Iterator[FinishedIteration]:
    first = solver.allocate(operator.layout)
    first.start(vs[0])
    fill(first, operator)
    yield first
    yield from (first.sharing(v) for v in vs[1:])


def _in_groups(
    operator: LinearMap, vs: Sequence[Sequence[Tensor]], solver: Solver, estimate: SpectralEstimate | None
) -> Iterator[Iteration]:
    for start in range(0, len(vs), MOST):
        group = [begin(operator, v, solver, estimate) for v in vs[start : start + MOST]]
        while active := [one for one in group if one.steps < one.limit and not one.finished()]:
            stacked = [torch.stack(parts) for parts in zip(*(one.direction.tangents for one in active), strict=True)]
            products = _products(operator, stacked)
            for index, one in enumerate(active):
                one.step([product[index] for product in products])
        yield from group


def _products(operator: LinearMap, stacked: Sequence[Tensor]) -> Sequence[Tensor]:
    """A times the vectors stacked in `stacked`: at once, or one by one where that turns out to be impossible."""
    assert isinstance(operator, TracedLinearization)
    functions = operator.functions
    if not functions.unbatched and len(stacked[0]) >= _LEAST:
        try:
            return operator.products(stacked)
        except Exception as error:  # an operation without a rule for vmap, of whatever library; the report says so
            functions.unbatched = f"{type(error).__name__}: {error}".splitlines()[0]
    singles = [operator.product([part[index] for part in stacked]) for index in range(len(stacked[0]))]
    return [torch.stack(list(parts)) for parts in zip(*singles, strict=True)]
