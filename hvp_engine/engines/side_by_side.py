"""Several right-hand sides: their solves advance side by side, with one batched product for a term of all of them.

Solvers whose products do not depend on the right-hand side (:class:`Exact`, :class:`Nystrom`) make them once for all,
in blocks.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from hvp_engine.differentiation.problem import LinearMap
from hvp_engine.engines.base import Engine
from hvp_engine.engines.eager import begin
from hvp_engine.operators.batched import MOST, fill, pays, products
from hvp_engine.solvers.base import FinishedIteration, Iteration, Solver
from hvp_engine.solvers.dense import Exact
from hvp_engine.solvers.nystrom import Nystrom
from hvp_engine.solvers.spectrum import SpectralEstimate


def run_side_by_side(
    engine: Engine,
    operator: LinearMap,
    vs: Sequence[Sequence[Tensor]],
    solver: Solver,
    estimate: SpectralEstimate | None,
) -> Iterable[FinishedIteration]:
    """The finished iterations for the right-hand sides `vs`, in order."""
    if isinstance(solver, Exact):
        return _with_one_matrix(operator, vs, solver)
    if isinstance(solver, Nystrom) and (len(vs) > 1 or pays(operator, min(MOST, solver.rank))):
        return _with_one_sketch(operator, vs, solver)
    if not pays(operator, len(vs)):
        return (engine.run(operator, v, solver, estimate) for v in vs)
    return _in_groups(operator, vs, solver, estimate)


def _with_one_matrix(operator: LinearMap, vs: Sequence[Sequence[Tensor]], solver: Exact) -> Iterator[FinishedIteration]:
    first = solver.allocate(operator.layout)
    first.start(vs[0])
    fill(first, operator)
    yield first
    yield from (first.sharing(v) for v in vs[1:])


def _with_one_sketch(
    operator: LinearMap, vs: Sequence[Sequence[Tensor]], solver: Nystrom
) -> Iterator[FinishedIteration]:
    first = solver.allocate(operator.layout)
    first.start(vs[0])
    fill(first.sketch, operator)
    first.invert()
    for iteration in (first, *(first.sharing(v) for v in vs[1:])):
        for _ in range(iteration.own_products):
            iteration.step(operator.product(iteration.direction.tangents))
        yield iteration


def _in_groups(
    operator: LinearMap, vs: Sequence[Sequence[Tensor]], solver: Solver, estimate: SpectralEstimate | None
) -> Iterator[Iteration]:
    for start in range(0, len(vs), MOST):
        group = [begin(operator, v, solver, estimate) for v in vs[start : start + MOST]]
        while active := [one for one in group if one.steps < one.limit and not one.finished()]:
            stacked = [torch.stack(parts) for parts in zip(*(one.direction.tangents for one in active), strict=True)]
            images = products(operator, stacked)
            for index, one in enumerate(active):
                one.step([image[index] for image in images])
        yield from group
