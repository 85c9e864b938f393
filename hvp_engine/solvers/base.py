"""How every solve runs: a solver prepares for an operator once, then solves for each right-hand side.

    prepared = solver.prepare(LinearSystem(operator, engine, spectrum))
    for value, solution in prepared.solve_all(vs, names): ...

A new solver is one file: its :meth:`Solver.allocate` returns an :class:`Iteration` if it works term by term, otherwise
its `prepare` returns a :class:`Prepared` of its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar, Protocol, TypeVar

import torch
from torch import Tensor

from hvp_engine._support.arguments import check_count, check_not_negative, replace_fields, shown
from hvp_engine._support.flat_vector import FlatVector, Layout
from hvp_engine.differentiation.linear_map import LinearMap
from hvp_engine.solvers.failures import any_bad, divergence, overflow, refusal, underflow
from hvp_engine.solvers.iteration import FinishedIteration, Iteration, Outcome, tolerance_of
from hvp_engine.solvers.preconditioning import Preconditioner, check_preconditioner
from hvp_engine.solvers.right_hand_sides import WarmStart
from hvp_engine.solvers.solution import Solution, Status
from hvp_engine.solvers.spare_iterations import released
from hvp_engine.solvers.spectrum import GROWTH, Estimates, SpectralEstimate, Spectrum

Vector = Sequence[Tensor]
Result = tuple[list[Tensor], Solution]
"""The value as tensors like the weights, and its :class:`Solution`, whose own `value` is still None."""

AnySolver = TypeVar("AnySolver", bound="Solver")


class Runner(Protocol):
    """What a solver needs of an engine."""

    def run(self, operator: LinearMap, v: Vector, solver: Any, estimate: SpectralEstimate | None) -> FinishedIteration:
        """The finished iteration of `solver` on `operator` for the right-hand side `v`."""

    def run_all(
        self, operator: LinearMap, vs: Sequence[Vector], solver: Any, estimate: SpectralEstimate | None
    ) -> Iterable[FinishedIteration]:
        """The finished iterations for the right-hand sides `vs`, in order."""


@dataclass(frozen=True)
class LinearSystem:
    """The left-hand side of A x = v: the map A, the engine that runs the terms, and the estimate of A's spectrum."""

    operator: LinearMap
    engine: Runner
    spectrum: Spectrum

    def solve(self, v: Vector, solver: Solver, name: str = "v", x0: Vector | None = None) -> Result:
        """The solution for one right-hand side, called `name` in messages, started at `x0` or at zero."""
        [result] = self.solve_all([v], solver, [name], None if x0 is None else [x0])
        return result

    def solve_all(
        self, vs: Sequence[Vector], solver: Solver, names: Sequence[str], x0s: Sequence[Vector] | None = None
    ) -> Iterator[Result]:
        """The solution for each right-hand side in turn; the first one's `hvps` include those of the preparation."""
        return solver.prepare(self).solve_all(vs, names, x0s)


class Solver:
    """A method of solving (A + damping I) x = v: a small frozen object that holds its settings.

    Attributes:
        damping: added to the diagonal of A, >= 0.
        preconditioner: v -> M v, or None.
        needs_symmetry: whether A has to be symmetric.
        needs_fixed_operator: whether A has to be the same at every product.
    """

    damping: float
    preconditioner: Preconditioner | None = None
    needs_symmetry: ClassVar[bool] = True
    needs_fixed_operator: ClassVar[bool] = True

    @property
    def quiet(self) -> bool:
        """Whether a solve runs none of the caller's code, and draws from no global generator."""
        return False

    @property
    def estimates_spectrum(self) -> bool:
        """Whether `Iteration.adapt` needs a spectral estimate."""
        return False

    @property
    def makes_products(self) -> bool:
        """Whether a solve multiplies by A at all."""
        return True

    def allocate(self, layout: Layout) -> Iteration:
        """The buffers of a term-by-term solve, with the ops bound to them; their addresses never change."""
        raise TypeError(f"{type(self).__name__} does not work term by term: use solver.prepare(system)")

    def prepare(self, system: LinearSystem) -> Prepared:
        """The state that all right-hand sides of `system` share."""
        return IterativeSolve(self, system)

    def without_estimate(self: AnySolver) -> AnySolver:
        """This solver for an operator that is not symmetric, whose spectrum Lanczos cannot estimate."""
        return self

    def relaxed(self: AnySolver, layout: Layout, share: float, norm: float) -> AnySolver | None:
        """This solver for the residual of a warm start, of norm `norm` = `share` * ||v||; None if that is small.

        Relative tolerances stay relative to ||v||: with share = 0.1, tol = 1e-3 becomes tol = 1e-2 of the residual.
        """
        return self


class Prepared:
    """A solver's state for one system."""

    def __init__(self, solver: Solver, system: LinearSystem):
        self.solver, self.system, self.operator = solver, system, system.operator

    @cached_property
    def estimates(self) -> Estimates:
        """Spectral estimates of the operator as the solver sees it."""
        return Estimates(self.operator, self.system.spectrum, self.solver.damping, self.solver.preconditioner)

    def run(self, vs: Sequence[Vector], names: Sequence[str]) -> Iterator[Result]:
        """The solution for each of `vs` in turn."""
        raise NotImplementedError

    def solve_all(
        self, vs: Sequence[Vector], names: Sequence[str], x0s: Sequence[Vector] | None = None
    ) -> Iterator[Result]:
        """The solution for each of `vs` in turn, warm-started if there are `x0s`.

        A warm start gives x0 + A^-1 (v - A x0). The largest of the residuals v - A x0 sets the tolerance for all.
        """
        if x0s is None:
            yield from self.run(vs, names)
            return
        starts = [WarmStart(self.operator, v, x0, self.solver.damping) for v, x0 in zip(vs, x0s, strict=True)]
        share, norm = max(start.share for start in starts), max(start.norm for start in starts)
        rest = self.solver.relaxed(self.operator.layout, share, norm)
        if rest is None:
            yield from (start.unchanged() for start in starts)
            return
        results = rest.prepare(self.system).run([start.residual for start in starts], names)
        for start, result in zip(starts, results, strict=True):
            yield start.complete(*result)

    def conclude(
        self,
        name: str,
        finished: FinishedIteration,
        outcome: Outcome,
        hvps: int,
        estimate: SpectralEstimate | None = None,
    ) -> Result:
        """The value and the solution after `hvps` products; raises the error that explains a failed solve."""
        operator = self.operator
        if outcome.failed:
            raise (
                divergence(operator, outcome, finished, self.solver, self.estimates)
                if outcome.finite_v
                else refusal(operator, name)
            )
        solution = finished.solution(outcome, hvps, self.solver.damping, estimate)
        if estimate is not None and estimate.indefinite(self.estimates.damping):
            solution = replace(solution, status=Status.NEGATIVE_CURVATURE)
        value = finished.value.in_dtypes()
        stretched = finished.alpha is not None and finished.alpha > 1  # the last factor of a finite sum
        if (stretched or torch.float16 in operator.layout.dtypes) and any_bad(value):
            raise overflow(operator, finished.value)
        return released(finished, value), solution


class IterativeSolve(Prepared):
    """The state of a term-by-term solver: one spectral estimate for all right-hand sides, if it needs one."""

    def run(self, vs: Sequence[Vector], names: Sequence[str]) -> Iterator[Result]:
        operator, solver = self.operator, self.solver
        estimate = self._estimate(vs, names)
        hvps = estimate.hvps if estimate else 0
        engine = self.system.engine
        if len(vs) == 1:
            iterations: Iterable[FinishedIteration] = (engine.run(operator, v, solver, estimate) for v in vs)
        else:
            iterations = engine.run_all(operator, vs, solver, estimate)
        for iteration, v, name in zip(iterations, vs, names, strict=True):
            yield self._checked(v, name, iteration, hvps, estimate)
            hvps = 0

    def _estimate(self, vs: Sequence[Vector], names: Sequence[str]) -> SpectralEstimate | None:
        if not self.solver.estimates_spectrum:
            return None
        estimate, layout = self.estimates.refresh(), self.operator.layout
        if not estimate.finite:
            raise refusal(self.operator, next((name for name, v in zip(names, vs, strict=True) if any_bad(v)), None))
        if torch.float16 in layout.dtypes and layout.numel > 0 and estimate.bound(self.estimates.damping) == 0:
            raise underflow(self.operator, estimate.hvps)
        return estimate

    def _checked(
        self,
        v: Vector,
        name: str,
        iteration: FinishedIteration,
        hvps: int,
        estimate: SpectralEstimate | None,
    ) -> Result:
        """The result of a finished iteration, which is run once more if the spectral estimate was too low."""
        outcome = iteration.outcome()
        hvps += iteration.steps
        if estimate is not None and outcome.grown > 1 and iteration.steps:
            # With a safe alpha the residual of a positive definite system cannot grow: either the estimate was stale,
            # or there is negative curvature. The residual that grew points along the missed eigenvector.
            fresh = self.estimates.restart(_start_after(iteration, self.operator.layout))
            hvps += fresh.hvps
            if fresh.finite:
                risen = fresh.bound() > 1.05 * estimate.bound()
                estimate = estimate.joined(fresh)
                if risen or (estimate.indefinite(self.estimates.damping) and outcome.grown > GROWTH):
                    iteration = self.system.engine.run(self.operator, v, self.solver, estimate)
                    outcome = iteration.outcome()
                    hvps += iteration.steps
        if isinstance(iteration, Iteration) and not outcome.failed and iteration.doubtful(outcome):
            outcome = iteration.measured(outcome, self._residual_norm(v, iteration.value))
            hvps += 1
        return self.conclude(name, iteration, outcome, hvps, estimate)

    def _residual_norm(self, v: Vector, value: FlatVector) -> float:
        """||v - (A + damping I) x|| / ||v||, by one product."""
        layout = self.operator.layout
        value.refresh()
        right, residual = FlatVector.of(layout, v), FlatVector.of(layout, self.operator.product(value.tangents))
        residual.data.add_(value.data, alpha=self.solver.damping).sub_(right.data)
        of_residual, of_v = torch.stack([vector.norm() for vector in (residual, right)]).double().tolist()
        return of_residual / of_v if of_v else 0.0


def _start_after(iteration: FinishedIteration, layout: Layout) -> FlatVector:
    """A start vector for a new estimate: the last direction of the failed iteration if it is finite, else random."""
    norm = iteration.direction.norm()
    if torch.isfinite(norm) and norm > 0:
        return FlatVector(layout, iteration.direction.data / norm)
    return Spectrum().random(layout)


def worst_of(solutions: Sequence[Solution]) -> Solution:
    """One solution for several: the products of all, and the largest residual norm with its status; no value."""
    return replace(
        max(solutions, key=lambda solution: solution.residual_norm),
        value=None,
        iterations=max(solution.iterations for solution in solutions),
        hvps=sum(solution.hvps for solution in solutions),
    )


def check_solver(solver: Any) -> None:
    if not isinstance(solver, Solver):
        raise TypeError(f"solver: expected a solver such as hvp.Neumann(20); got {shown(solver)}")


@dataclass(frozen=True)
class KrylovSolver(Solver):
    """The settings of conjugate gradients and MINRES, which need no spectral estimate."""

    iterations: int
    tol: float | None = None
    damping: float = 0.0
    preconditioner: Preconditioner | None = None
    atol: float = 0.0

    def __post_init__(self) -> None:
        tol = None if self.tol is None else check_not_negative(self.tol, "tol")
        replace_fields(
            self,
            iterations=check_count(self.iterations, "iterations", least=0),
            tol=tol,
            damping=check_not_negative(self.damping, "damping"),
            atol=check_not_negative(self.atol, "atol"),
        )
        check_preconditioner(self.preconditioner)

    @property
    def makes_products(self) -> bool:
        return self.iterations > 0

    def relaxed(self: AnyKrylovSolver, layout: Layout, share: float, norm: float) -> AnyKrylovSolver | None:
        tol = tolerance_of(self.tol, layout)
        return None if share <= tol or norm <= self.atol else replace(self, tol=tol / share)


AnyKrylovSolver = TypeVar("AnyKrylovSolver", bound=KrylovSolver)
