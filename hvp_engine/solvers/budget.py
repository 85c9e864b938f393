"""A solver chosen for a given cost or accuracy."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch

from hvp_engine._support.arguments import check_count, check_not_negative, check_or_auto, check_positive, replace_fields
from hvp_engine._support.flat_vector import Layout
from hvp_engine.solvers.base import LinearSystem, Prepared, Result, Solver, Vector
from hvp_engine.solvers.conjugate_gradient import ConjugateGradient
from hvp_engine.solvers.dense import Exact
from hvp_engine.solvers.failures import refusal
from hvp_engine.solvers.minres import MINRES
from hvp_engine.solvers.preconditioners.diagonal import DiagonalPreconditioner, hutchinson_diagonal
from hvp_engine.solvers.settling import Settling
from hvp_engine.solvers.solution import Status
from hvp_engine.solvers.spectrum import SpectralEstimate

SMALL = 32
"""Up to this many weights, the dense matrix costs less than an estimate and a solve."""

_DENSE = 1000
"""Beyond this many weights, the dense matrix is never chosen."""

_SPREAD = 4.0
"""Decays precondition a solve if the largest is so many times the smallest."""

_REST = 0.1
"""What is added to them is this share of the mean eigenvalue of the rest of A: with nothing, with a tenth, and with all
of it, 112 products of a logistic regression became 72, 38 and 38, and 175 of another one 175, 140 and 140."""

_SHARE = 3
"""An estimate may take at most 1 / _SHARE of the products."""


@dataclass(frozen=True)
class Plan:
    """What a budget chose, and why."""

    solver: Solver
    explanation: str

    @property
    def method(self) -> Solver:
        """The solver itself, which may be watched."""
        return self.solver.method if isinstance(self.solver, Settling) else self.solver


@dataclass(frozen=True)
class Budget(Solver):
    """Choose a solver and its length from the spectrum, for a number of products, an error, or both.

    * At most 32 weights, or fewer weights than products expected of an iterative solver: :class:`Exact`.
    * A positive definite operator: :class:`ConjugateGradient`; where the loss gives each weight a decay, and these
      differ, with a :class:`DiagonalPreconditioner` of them, for one more product.
    * An indefinite, singular or unknown operator: :class:`MINRES`, which also takes over if conjugate gradients
      meet negative curvature that the estimate missed.

    Damping changes the system, so none is added unless you ask for it: `explanation` names the damping that would make
    the operator positive definite, and `damping="auto"` adds it. At a saddle the inverse Hessian does not describe the
    response of a minimum, however precisely it is solved.

    Arguments:
        error: > 0, to be reached both by the residual, ||v - A x|| <= error ||v||, and by the solution,
            ||x - A^-1 v|| <= error ||x||, as judged by how far x still moves. The status is CONVERGED only if the
            residual is below `error` and x moved by less over the last fifth of the products; otherwise `explanation`
            gives the figures. For an operator that is singular to working precision only the residual counts.
        hvps: most products, > 0, including those of the estimate (8 cold, 3 later), which is skipped if it would take
            more than a third of them. One more measures a residual that rounding may have spoiled.
        damping: added to the diagonal of A, >= 0; or "auto": none if the estimate sees no negative curvature, else
            twice its size, doubled whenever conjugate gradients still meet some. `error` is then that of the damped
            system. Without an estimate, none is added.

    `Solution.explanation` says what was chosen and why, `Solution.damping` what was added.

    Cost: that of the estimate and of the chosen solver.

    Errors: `TypeError` or `ValueError` naming the argument, at construction.

    >>> import torch, hvp_engine as hvp
    >>> d = torch.linspace(1.0, 100.0, 200, dtype=torch.float64)
    >>> solution = hvp.solve(lambda v: d * v, torch.ones_like(d), hvp.Budget(error=1e-6))
    >>> solution.converged, solution.residual_norm <= 1e-6
    (True, True)
    >>> print(solution.explanation)
    ConjugateGradient: eigenvalues between about ... and ..., all positive; ... products expected for error 1e-06
    """

    error: float | None = None
    hvps: int | None = None
    damping: float | Literal["auto"] = 0.0  # type: ignore[assignment]

    def __post_init__(self) -> None:
        if self.error is None and self.hvps is None:
            raise ValueError("error: expected an error, or hvps, or both; got neither")
        if self.error is not None:
            replace_fields(self, error=check_positive(self.error, "error"))
        if self.hvps is not None:
            replace_fields(self, hvps=check_count(self.hvps, "hvps", what="the number of products"))
        replace_fields(self, damping=check_or_auto(check_not_negative, self.damping, "damping"))

    def prepare(self, system: LinearSystem) -> BudgetSolve:
        return BudgetSolve(self, system)

    def wants_estimate(self, layout: Layout, cost: int) -> bool:
        """Whether to spend `cost` products on an estimate."""
        size = layout.numel
        small = size <= SMALL and (self.hvps is None or size <= self.hvps) and self.damping != "auto"
        return not small and (self.hvps is None or _SHARE * cost <= self.hvps)

    def plan(self, estimate: SpectralEstimate | None, layout: Layout, spent: int) -> Plan:
        """The choice, given an estimate of A and the products `spent` on it."""
        size = layout.numel
        left = math.inf if self.hvps is None else self.hvps - spent
        damping = self._damping_for(estimate)
        if estimate is None and size <= min(SMALL, left):
            return Plan(Exact(damping=damping), f"Exact: the matrix of {size} weights takes {size} products")
        if estimate is None:
            why = f"MINRES: {self.hvps} products are too few for an estimate, and it takes any signs"
            return Plan(self._until_error(MINRES, int(left), damping), why)
        epsilon = torch.finfo(layout.state_dtype).eps
        lowest, highest = estimate.smallest + damping, estimate.bound(damping)
        seen = f"eigenvalues between about {lowest:.3g} and {highest:.3g}"
        if damping > 0 and self.damping == "auto":
            seen += f" with damping={damping:.3g} against negative curvature"
        if abs(lowest) <= 10 * epsilon * highest:
            why = f"MINRES: {seen}, singular in this precision; it gives the least-squares solution of smallest norm"
            return Plan(MINRES(int(min(left, 2 * size + 100)), self.error, damping=damping), why)
        target = epsilon ** (2 / 3) if self.error is None else self.error
        definite, condition = lowest > 0, highest / abs(lowest)
        rate = math.sqrt(condition) if definite else condition
        expected = max(1, math.ceil(rate / 2 * math.log(2 / min(target, 1.0))))
        if definite:
            seen += ", all positive"
        else:
            hint = damping + abs(lowest) + estimate.smallest_margin
            seen += f", of both signs (damping={hint:.3g} would make them positive)"
        if size <= min(_DENSE, left) and (size <= SMALL or size < expected):
            why = f"Exact: {seen}; the matrix of {size} weights takes {size} products, a solver about {expected}"
            return Plan(Exact(damping=damping), why)
        # A Ritz value overestimates the smallest eigenvalue, so more may be needed; the solver stops by itself.
        limit = int(min(left, 10 * expected + 100))
        kind: type[MINRES | ConjugateGradient] = ConjugateGradient if definite else MINRES
        why = f"{kind.__name__}: {seen}; {expected} products expected for error {target:.3g}"
        return Plan(self._until_error(kind, limit, damping), why if limit >= expected else f"{why}, {limit} allowed")

    def after_negative_curvature(self, plan: Plan, estimate: SpectralEstimate | None, spent: int) -> Plan | None:
        """What to do after conjugate gradients met negative curvature; None if no products are left."""
        left = math.inf if self.hvps is None else self.hvps - spent
        method = plan.method
        if not isinstance(method, ConjugateGradient) or left < 1:
            return None
        missed = "the estimate had missed negative curvature"
        if self.damping == "auto" and estimate is not None:
            damping = max(2 * method.damping, estimate.smallest_margin)
            solver = self._until_error(ConjugateGradient, int(min(left, method.iterations)), damping)
            return Plan(solver, f"{plan.explanation}; then damping={damping:.3g}: {missed}")
        solver = self._until_error(MINRES, int(min(left, 4 * method.iterations)), method.damping)
        return Plan(solver, f"{plan.explanation}; then MINRES: {missed}")

    def _damping_for(self, estimate: SpectralEstimate | None) -> float:
        if self.damping != "auto":
            return float(self.damping)
        return -2 * estimate.smallest if estimate is not None and estimate.indefinite() else 0.0

    def _until_error(self, kind: type[MINRES | ConjugateGradient], iterations: int, damping: float) -> Solver:
        if self.error is None:
            return kind(iterations, damping=damping)
        return Settling(kind(iterations, tol=0.0, damping=damping), self.error)


class BudgetSolve(Prepared):
    """An estimate if affordable, the solver it calls for, and another solver if that one meets negative curvature.

    Every right-hand side has the whole budget; all share the estimate and the choice.
    """

    solver: Budget

    def __init__(self, budget: Budget, system: LinearSystem):
        super().__init__(budget, system)
        layout, spectrum, estimate = self.operator.layout, system.spectrum, None
        if budget.wants_estimate(layout, spectrum.cost(layout)):
            estimate = spectrum.refresh(self.operator)
            if not estimate.finite:
                raise refusal(self.operator, None)
        self._estimate = estimate if estimate is not None and estimate.finite else None
        self._spent = 0 if estimate is None else estimate.hvps

    def _preconditioned(self, plan: Plan) -> Plan:
        """Conjugate gradients with M = 1 / (decays + damping + a share of the mean eigenvalue of the rest of A), where
        the decays differ enough."""
        method, layout, decays = plan.method, self.operator.layout, self.operator.decays()
        if decays is None or not isinstance(method, ConjugateGradient) or method.iterations < 2 or layout.low_precision:
            return plan
        lowest, highest = min(float(d.min()) for d in decays), max(float(d.max()) for d in decays)
        if not 0 < _SPREAD * (lowest + method.damping) < highest + method.damping < math.inf:
            return plan
        self._spent += 1
        diagonal, _ = hutchinson_diagonal(self.operator, probes=1)
        rest = float(diagonal.data.double().sum() - sum(d.double().sum() for d in decays)) / layout.numel
        preconditioner = DiagonalPreconditioner(decays, method.damping + _REST * max(0.0, rest))
        method = replace(method, iterations=method.iterations - 1, preconditioner=preconditioner)
        solver = replace(plan.solver, method=method) if isinstance(plan.solver, Settling) else method
        return Plan(solver, f"{plan.explanation}, fewer with the decays as a preconditioner")

    def solve_all(
        self, vs: Sequence[Vector], names: Sequence[str], x0s: Sequence[Vector] | None = None
    ) -> Iterator[Result]:
        budget, system, estimate = self.solver, self.system, self._estimate
        plan = self._preconditioned(budget.plan(estimate, self.operator.layout, self._spent + (x0s is not None)))
        first = self._spent
        results = plan.solver.prepare(system).solve_all(vs, names, x0s)
        for (value, solution), v, name in zip(results, vs, names, strict=True):
            hvps, current = solution.hvps, plan
            while solution.status is Status.NEGATIVE_CURVATURE:
                other = budget.after_negative_curvature(current, estimate, self._spent + hvps)
                if other is None:
                    break
                value, solution = system.solve(v, other.solver, name)
                hvps, current = hvps + solution.hvps, other
            explanation = "; ".join(part for part in (current.explanation, solution.explanation) if part)
            lambda_max = None if estimate is None else estimate.largest
            yield value, replace(solution, hvps=first + hvps, lambda_max=lambda_max, explanation=explanation)
            first = 0
