"""Solves within a budget: an estimate if it is affordable, the solver that it calls for, and MINRES if that fails."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from torch import Tensor

from hvp_engine.differentiation.problem import LinearMap
from hvp_engine.engines import Engine
from hvp_engine.solvers.base import Solver
from hvp_engine.solvers.budget import Budget
from hvp_engine.solvers.solution import Solution, Status
from hvp_engine.solvers.spectrum import Spectrum

Vector = Sequence[Tensor]
Result = tuple[list[Tensor], Solution]
Guesses = Sequence[Vector] | None
SolveAll = Callable[[LinearMap, Sequence[Vector], Solver, Engine, Spectrum, Sequence[str], Guesses], Iterator[Result]]


def within(
    budget: Budget,
    solve_all: SolveAll,
    operator: LinearMap,
    vs: Sequence[Vector],
    engine: Engine,
    spectrum: Spectrum,
    names: Sequence[str],
    x0s: Guesses,
) -> Iterator[Result]:
    """The results for each right-hand side, which has the budget to itself; they share the estimate and the choice."""
    layout, estimate = operator.layout, None
    if budget.wants_estimate(layout, spectrum.cost(layout)):
        estimate = spectrum.refresh(operator)
    usable = estimate if estimate is not None and estimate.finite else None
    spent = 0 if estimate is None else estimate.hvps
    first = spent
    plan = budget.plan(usable, layout, spent + (x0s is not None))
    results = solve_all(operator, vs, plan.solver, engine, spectrum, names, x0s)
    for index, (value, solution) in enumerate(results):
        hvps, current = solution.hvps, plan
        while solution.status is Status.NEGATIVE_CURVATURE:
            other = budget.after_negative_curvature(current, usable, spent + hvps)
            if other is None:
                break
            v, name = vs[index], names[index]
            [(value, solution)] = solve_all(operator, [v], other.solver, engine, spectrum, [name], None)
            hvps, current = hvps + solution.hvps, other
        explanation = "; ".join(part for part in (current.explanation, solution.explanation) if part)
        lambda_max = None if usable is None else usable.largest
        yield value, replace(solution, hvps=first + hvps, lambda_max=lambda_max, explanation=explanation)
        first = 0
