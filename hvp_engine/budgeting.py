"""Solves within a budget: an estimate if it is affordable, the solver that it calls for, and MINRES if that fails."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from torch import Tensor

from hvp_engine.engines import Engine
from hvp_engine.linearization import LinearMap
from hvp_engine.solution import Solution, Status
from hvp_engine.solvers.base import Solver
from hvp_engine.solvers.budget import Budget
from hvp_engine.spectrum import Spectrum

Vector = Sequence[Tensor]
Result = tuple[list[Tensor], Solution]
SolveAll = Callable[[LinearMap, Sequence[Vector], Solver, Engine, Spectrum, Sequence[str]], Iterator[Result]]


def within(
    budget: Budget,
    solve_all: SolveAll,
    operator: LinearMap,
    vs: Sequence[Vector],
    engine: Engine,
    spectrum: Spectrum,
    names: Sequence[str],
) -> Iterator[Result]:
    """The results for each right-hand side, which has the budget to itself; they share the estimate and the choice."""
    layout, estimate = operator.layout, None
    if budget.wants_estimate(layout, spectrum.cost(layout)):
        estimate = spectrum.refresh(operator)
    usable = estimate if estimate is not None and estimate.finite else None
    spent = 0 if estimate is None else estimate.hvps
    plan, first = budget.plan(usable, layout, spent), spent
    results = solve_all(operator, vs, plan.solver, engine, spectrum, names)
    for (value, solution), v, name in zip(results, vs, names, strict=True):
        hvps, explanation = first + solution.hvps, plan.explanation
        other = None
        if solution.status is Status.NEGATIVE_CURVATURE:
            other = budget.after_negative_curvature(plan, spent + solution.hvps)
        if other is not None:
            [(value, solution)] = solve_all(operator, [v], other.solver, engine, spectrum, [name])
            hvps, explanation = hvps + solution.hvps, other.explanation
        explanation = "; ".join(part for part in (explanation, solution.explanation) if part)
        lambda_max = None if usable is None else usable.largest
        yield value, replace(solution, hvps=hvps, lambda_max=lambda_max, explanation=explanation)
        first = 0
