"""What a solve returns: value, status, diagnostics."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Any


class Status(enum.Enum):
    """How a solve ended; the value is the message."""

    CONVERGED = "converged: the relative residual is below the tolerance, or as small as rounding the value allows"
    ITERATION_LIMIT = "iteration limit: the result is truncated, as in the paper; more iterations bring it closer"
    DIVERGED = (
        "diverged: the residual is larger than the right-hand side; use a smaller alpha, or damping if the "
        "Hessian is indefinite"
    )
    NEGATIVE_CURVATURE = (
        "negative curvature: the operator is not positive definite, so the series has no limit; use damping or "
        "a Gauss-Newton operator"
    )
    STAGNATED = (
        "stagnated: rounding keeps the residual above the tolerance, and more iterations do not bring it closer; use a "
        "wider dtype, a preconditioner, damping, or a larger tolerance"
    )
    SINGULAR = (
        "singular to working precision: the value is the least-squares solution of smallest norm, except of "
        "conjugate gradients, whose value is made of rounding; use damping, or a wider dtype if the operator should "
        "have an inverse"
    )


@dataclass(frozen=True)
class Solution:
    """Result of a solve of A x = v.

    Attributes:
        value: x, in the container of v.
        iterations: terms or steps that the solver made.
        hvps: all products with A, including those of the spectral estimate. Those that a preconditioner was made from,
            maybe for many solves, are its own `hvps`.
        residual_norm: ||v - A x'|| / ||v||, damping included, for the iterate x' that `residual_of` names.
        residual_of: "previous" (the iterate before the returned one: free), "returned", or "none" (no product was
            made, so the residual is that of x = 0).
        status: a :class:`Status`; its value is the message. Whether a series with a preconditioner M diverged is judged
            in the M-norm, sqrt(r . M r), in which it contracts: its residual_norm may exceed 1 on the way.
        alpha: the step that was used, None for solvers without one.
        lambda_max: the largest |eigenvalue| seen by the estimate, None if none was made.
        damping: what was added to the diagonal of A.
        explanation: what an automatic setting chose, and why; empty otherwise.
    """

    value: Any
    iterations: int
    hvps: int
    residual_norm: float
    residual_of: str
    status: Status
    alpha: float | None = None
    lambda_max: float | None = None
    damping: float = 0.0
    explanation: str = ""

    def of(self, value: Any) -> Solution:
        """With another value; `dataclasses.replace` takes five times as long."""
        copy = object.__new__(Solution)
        vars(copy).update(vars(self), value=value)
        return copy

    @property
    def converged(self) -> bool:
        return self.status is Status.CONVERGED
