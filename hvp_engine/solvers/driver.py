"""From an operator, a right-hand side and a solver to a solution: estimate, run, judge, and help on failure."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor

from hvp_engine._support.flat_vector import FlatVector, Layout
from hvp_engine._support.pytree import Structure, check_like, flatten
from hvp_engine.differentiation.problem import LinearMap
from hvp_engine.engines import BatchEngine, Engine
from hvp_engine.engines.eager import EagerEngine
from hvp_engine.engines.side_by_side import run_side_by_side
from hvp_engine.solvers import Exact, Nystrom
from hvp_engine.solvers.base import FinishedIteration, Outcome, Solver, check_solver
from hvp_engine.solvers.budget import Budget
from hvp_engine.solvers.budgeting import within
from hvp_engine.solvers.estimates import Estimates
from hvp_engine.solvers.failures import any_bad, divergence, overflow, refusal, underflow
from hvp_engine.solvers.right_hand_sides import WarmStart, guesses, relaxed, unstacked
from hvp_engine.solvers.solution import Solution, Status
from hvp_engine.solvers.spectrum import GROWTH, SpectralEstimate, Spectrum


class CallableOperator:
    """Any callable v -> A v on trees, as a linear map on lists."""

    def __init__(self, function: Callable[[Any], Any], like: Sequence[Tensor], structure: Structure):
        self.layout = Layout.of(like)
        self._function = function
        self._structure = structure
        self._like = [torch.empty_like(t, device="meta") for t in like]

    def product(self, tangents: Sequence[Tensor]) -> Sequence[Tensor]:
        result, structure = flatten(self._function(self._structure.rebuild(tangents)), "operator(v)")
        if structure != self._structure:
            raise ValueError(f"operator(v): expected the container of v, {self._structure.spec}; got {structure.spec}")
        for index, (tensor, like) in enumerate(zip(result, self._like, strict=True)):
            if tensor.shape != like.shape:
                raise ValueError(
                    f"operator(v)[{index}]: expected shape {tuple(like.shape)} as v; got {tuple(tensor.shape)}"
                )
        return [
            t.detach() if t.dtype == dtype else t.detach().to(dtype)
            for t, dtype in zip(result, self.layout.dtypes, strict=True)
        ]


def solve_flat(
    operator: LinearMap,
    v: Sequence[Tensor],
    solver: Solver,
    engine: Engine,
    spectrum: Spectrum,
    name: str = "v",
    x0: Sequence[Tensor] | None = None,
) -> tuple[list[Tensor], Solution]:
    """The value as views like the weights, and the solution without its value filled in; `name` is v's in messages."""
    [result] = solve_all(operator, [v], solver, engine, spectrum, [name], None if x0 is None else [x0])
    return result


def solve_all(
    operator: LinearMap,
    vs: Sequence[Sequence[Tensor]],
    solver: Solver,
    engine: Engine,
    spectrum: Spectrum,
    names: Sequence[str],
    x0s: Sequence[Sequence[Tensor]] | None = None,
) -> Iterator[tuple[list[Tensor], Solution]]:
    """What :func:`solve_flat` returns, for each right-hand side in turn; they share one estimate, whose products
    count for the first."""
    if isinstance(solver, Budget):
        yield from within(solver, solve_all, operator, vs, engine, spectrum, names, x0s)
        return
    if x0s is not None:
        yield from _from_guesses(operator, vs, solver, engine, spectrum, names, x0s)
        return
    estimates = Estimates(operator, solver, spectrum)
    estimate = estimates.refresh() if solver.estimates_spectrum else None
    if estimate is not None and not estimate.finite:
        bad = (name for name, v in zip(names, vs, strict=True) if any_bad(v))
        raise refusal(operator, next(bad, None))
    narrow = torch.float16 in operator.layout.dtypes and operator.layout.numel > 0
    if narrow and estimate is not None and estimate.bound(estimates.damping) == 0:
        raise underflow(operator, estimate.hvps)
    hvps = estimate.hvps if estimate else 0
    if hasattr(engine, "run_batch"):  # isinstance of a protocol takes 20 us
        iterations = cast(BatchEngine, engine).run_batch(operator, vs, solver, estimate)
    elif len(vs) > 1 or isinstance(solver, (Exact, Nystrom)):
        iterations = run_side_by_side(engine, operator, vs, solver, estimate)
    else:
        iterations = (engine.run(operator, v, solver, estimate) for v in vs)
    for iteration, v, name in zip(iterations, vs, names, strict=True):
        yield _judged(operator, v, solver, engine, estimates, estimate, iteration, hvps, name)
        hvps = 0


def _from_guesses(
    operator: LinearMap,
    vs: Sequence[Sequence[Tensor]],
    solver: Solver,
    engine: Engine,
    spectrum: Spectrum,
    names: Sequence[str],
    x0s: Sequence[Sequence[Tensor]],
) -> Iterator[tuple[list[Tensor], Solution]]:
    """x0 + A^-1 (v - A x0) for each, all to the tolerance of the one that is farthest."""
    starts = [WarmStart(operator, v, x0, solver.damping) for v, x0 in zip(vs, x0s, strict=True)]
    rest = relaxed(solver, operator.layout, max(start.share for start in starts))
    if rest is None:
        yield from (start.unchanged() for start in starts)
        return
    residuals = [start.residual for start in starts]
    for start, result in zip(starts, solve_all(operator, residuals, rest, engine, spectrum, names), strict=True):
        yield start.complete(*result)


def _judged(
    operator: LinearMap,
    v: Sequence[Tensor],
    solver: Solver,
    engine: Engine,
    estimates: Estimates,
    estimate: SpectralEstimate | None,
    iteration: FinishedIteration,
    hvps: int,
    name: str,
) -> tuple[list[Tensor], Solution]:
    """The result of a finished iteration, tried once more where the estimate was too low."""
    outcome = _read(iteration)
    hvps += iteration.steps
    if estimate is not None and outcome.grown > 1 and iteration.steps:
        # A positive definite operator cannot grow the residual under a safe alpha: either the estimate was stale,
        # or there is negative curvature. The residual that grew points at what was missed.
        fresh = estimates.restart(_start_after(iteration, operator.layout))
        hvps += fresh.hvps
        if fresh.finite:
            risen = fresh.bound() > 1.05 * estimate.bound()
            estimate = estimate.joined(fresh)
            if risen or (estimate.indefinite(estimates.damping) and outcome.grown > GROWTH):
                iteration = engine.run(operator, v, solver, estimate)
                outcome = _read(iteration)
                hvps += iteration.steps
    if outcome.failed:
        if not outcome.finite_v:
            raise refusal(operator, name)
        raise divergence(operator, outcome, iteration, solver, estimates)
    status = outcome.status
    if estimate is not None and estimate.indefinite(estimates.damping):
        status = Status.NEGATIVE_CURVATURE
    solution = Solution(
        value=None,
        iterations=iteration.steps,
        hvps=hvps,
        residual_norm=outcome.residual_norm,
        residual_of=outcome.residual_of,
        status=status,
        alpha=getattr(iteration, "alpha", None),
        lambda_max=estimate.largest if estimate else None,
        damping=solver.damping,
        explanation=getattr(iteration, "explanation", ""),
    )
    value = _in_dtypes(iteration.value)
    if torch.float16 in operator.layout.dtypes and any_bad(value):
        raise overflow(operator, iteration.value)
    return value, solution


def _read(iteration: FinishedIteration) -> Outcome:
    return iteration.read(iteration.finish().tolist())  # the one wait for the device


def _in_dtypes(value: FlatVector) -> list[Tensor]:
    dtypes = value.layout.dtypes
    return [view if view.dtype == dtype else view.to(dtype) for view, dtype in zip(value.views, dtypes, strict=True)]


def _start_after(iteration: FinishedIteration, layout: Layout) -> FlatVector:
    """A start vector for an estimate: what grew in a failed iteration if that is finite, else random."""
    data = iteration.direction.data
    norm = iteration.direction.norm()
    if torch.isfinite(norm) and norm > 0:
        return FlatVector(layout, data / norm)
    return Spectrum().random(layout)


def solve(operator: Any, v: Any, solver: Solver, *, batched: bool = False, x0: Any = None) -> Solution:
    """Solve (A + damping I) x = v.

    Arguments:
        operator: a :class:`HessianOperator` or another operator of this package, or any callable v -> A v that is
            linear and symmetric and returns the container and shapes it is given.
        v: a tensor or any tree of tensors, finite, of the operator's shapes.
        solver: how, for example `Neumann(20)`, `Identity()`.
        batched: every leaf of v has one more dimension, the first and of one length: several right-hand sides. They
            are solved with one spectral estimate: in one call by a linear model; with one dense matrix by `Exact`
            and one sketch by `Nystrom`;
            with batched products where they are traced and it pays (up to 16,384 weights on a CPU); else one by one.
        x0: a first guess like v, for example the solution of a similar system. What is solved for is the rest,
            x = x0 + A^-1 (v - A x0), by one more product: a series continues where the guess stands, and a tolerance
            is still relative to v. None is zero.

    Returns a :class:`Solution`; its value is in the container of v. Of several right-hand sides, it has the values
    stacked, the products of all, and the worst residual norm with its status.

    Cost: the solver's; see there.

    Errors: `TypeError`/`ValueError` naming the argument for a v that does not fit or is not finite;
    :class:`DivergenceError` for a solve that went to infinity.

    >>> import torch, hvp_engine as hvp
    >>> A = torch.tensor([[2.0, 0.5], [0.5, 1.0]])
    >>> solution = hvp.solve(lambda v: A @ v, torch.ones(2), hvp.Neumann(60))
    >>> torch.allclose(A @ solution.value, torch.ones(2), atol=1e-4)
    True
    """
    ours = hasattr(operator, "product") and hasattr(operator, "layout")
    leaves, structure = flatten(v, "v", sharded=ours and not batched)
    check_solver(solver)
    engine: Engine = getattr(operator, "engine", None) or EagerEngine()
    spectrum = getattr(operator, "spectrum", None) or Spectrum()
    vs = unstacked(leaves, "v") if batched else [[leaf.detach() for leaf in leaves]]
    names = [f"v[{index}]" for index in range(len(vs))] if batched else ["v"]
    if ours:
        linear: LinearMap = getattr(operator, "linearization", operator)
        check_like(vs[0], linear.layout, names[0], "weights")
    elif callable(operator):
        linear = CallableOperator(operator, vs[0], structure)
    else:
        raise TypeError(f"operator: expected an operator or a callable v -> A v; got {type(operator).__name__}")
    if getattr(linear, "changes", False) and getattr(solver, "needs_fixed_operator", True):
        raise ValueError(
            "solver: expected one for an operator that is another at every product, such as hvp.Neumann(100); got "
            f"{type(solver).__name__}, which needs a fixed one: use hvp.HessianOperator(hvp.Averaged(loss), weights, "
            "batches)"
        )
    x0s = None if x0 is None else guesses(x0, structure, vs, linear.layout, batched)
    results = list(solve_all(linear, vs, solver, engine, spectrum, names, x0s))
    if not batched:
        [(value, solution)] = results
        return replace(solution, value=structure.rebuild(value))
    stacked = [torch.stack(parts) for parts in zip(*(value for value, _ in results), strict=True)]
    return replace(worst_of([solution for _, solution in results]), value=structure.rebuild(stacked))


def worst_of(solutions: Sequence[Solution]) -> Solution:
    """Several solves as one: products of all, and the worst residual norm with its status; no value."""
    return replace(
        max(solutions, key=lambda solution: solution.residual_norm),
        value=None,
        iterations=max(solution.iterations for solution in solutions),
        hvps=sum(solution.hvps for solution in solutions),
    )
