"""MINRES: the smallest residual, for symmetric operators that need not be definite."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hvp_engine import ops
from hvp_engine._support.flat_vector import FlatVector, Layout
from hvp_engine.solvers.base import KrylovSolver
from hvp_engine.solvers.iteration import (
    Iteration,
    Outcome,
    RightHandSide,
    Tolerance,
    krylov_residual,
    measured_outcome,
    scalar,
    tolerance_of,
)
from hvp_engine.solvers.preconditioning import precondition
from hvp_engine.solvers.solution import Status

_FLAT = {torch.float32: 6e-5, torch.float64: 1e-8}
"""If ||A r|| / (||A|| ||r||) is below this, r counts as in the null space: rounding lets the ratio fall no further."""

_STRAY = 0.01
"""The last step, along the presumed null space, may change the residual by at most this share of it."""


_USUAL = 0.02
"""The gap between the updated residual and b - A x is rarely more than this share of eps (||A|| ||x|| / ||b||)^2."""


@dataclass(frozen=True)
class MINRES(KrylovSolver):
    """The minimal residual method for a symmetric operator, definite or not.

    Of all x in the span of b, A b, A^2 b, ... that `iterations` products reach, it finds the one with the smallest
    ||b - A x||, so the residual never grows, whatever the signs of the eigenvalues. For a positive definite operator it
    needs about as many products as conjugate gradients; for eigenvalues in [-b, -a] and [a, b] about b / a. If a
    singular system has no solution, the result is the least-squares solution of smallest norm, and the status SINGULAR.

    This applies the exact inverse of an indefinite Hessian, which at a saddle does not describe the response of a
    minimum. For a hypergradient near a minimum, `damping` larger than the negative curvature may be what you want.

    Arguments:
        iterations: number of products with A, >= 0.
        tol: stop when ||v - A x|| <= max(tol ||v||, atol); with 0 for both, at rounding alone; None is eps^(2/3) of
            the dtype that is solved in, 2.4e-5 in float32 and 3.7e-11 in float64, or, if rounding stops it earlier,
            eps^(1/2).
        damping: added to the diagonal of A, >= 0.
        preconditioner: v -> M v on the list of the weights' leaves, symmetric positive definite, near |A|^-1. It
            then minimizes the residual in the M-norm, and a least-squares solution is the one of smallest M^-1-norm.
        atol: the absolute tolerance of the residual in the 2-norm, >= 0, without the preconditioner and in the units of
            v; `atol=1e-5, tol=0.0` is an absolute tolerance alone.

    Cost: up to `iterations` products, and one that measures the residual where the operator is so badly conditioned
    that rounding may have spoiled the updated one (if it has, the status is STAGNATED); six flat vectors of weights,
    seven with a preconditioner. The tolerance is checked every 5 products, so up to 4 may follow after it is reached;
    they do not change x.

    Errors: `TypeError` or `ValueError` naming the argument, at construction; `ValueError` in a solve with a
    preconditioner that is not positive definite.

    Source: Paige and Saunders, Solution of Sparse Indefinite Systems of Linear Equations, SIAM Journal on Numerical
    Analysis 1975; stopping on singular systems and the residual vector: Choi, Paige and Saunders, MINRES-QLP: A Krylov
    Subspace Method for Indefinite or Singular Symmetric Systems, SIAM Journal on Scientific Computing 2011; the last
    step to the smallest norm: Liu, Milzarek and Roosta, Obtaining Pseudo-inverse Solutions With MINRES, arXiv 2023.

    >>> import torch, hvp_engine as hvp
    >>> A = torch.tensor([[1.0, 2.0], [2.0, 1.0]])                  # eigenvalues 3 and -1
    >>> solution = hvp.solve(lambda v: A @ v, torch.tensor([3.0, 0.0]), hvp.MINRES(2))
    >>> solution.value, solution.status.name
    (tensor([-1.0000,  2.0000]), 'CONVERGED')
    """

    def allocate(self, layout: Layout) -> Iteration:
        return _MINRES(self, layout)


class _MINRES(Iteration):
    """State: Lanczos vectors u, z = M u, and reflections (c, s) that make their tridiagonal matrix triangular."""

    def __init__(self, solver: MINRES, layout: Layout):
        self.limit, self.steps = solver.iterations, 0
        self._preconditioner, self._damping = solver.preconditioner, solver.damping
        self._epsilon = torch.finfo(layout.state_dtype).eps
        self._tolerance = Tolerance(tolerance_of(solver.tol, layout), solver.atol)
        stagnation = self._tolerance.relative if solver.tol is not None else math.sqrt(self._epsilon)
        self._stagnation_tolerance = Tolerance(stagnation, solver.atol)
        self._b = RightHandSide(layout)
        self._residual = self._b.vector
        self.value = FlatVector(layout)
        self._basis = FlatVector(layout), FlatVector(layout)
        self._searches = FlatVector(layout), FlatVector(layout)
        self._image = None if self._preconditioner is None else FlatVector(layout)
        self.direction = self._basis[0] if self._image is None else self._image
        vectors = [self._residual, self.value, *self._basis, *self._searches]
        self._vectors = vectors if self._image is None else [*vectors, self._image]
        self._partials = layout.empty_partials()
        self._scalars = s = ops.Scalars(ops.MINRES, layout.device)
        self.going = s["moving"]
        one = scalar(1.0, layout.device)
        self._recurrences = [
            ops.bind("scale_accumulate", (u.data,), layout, (one, s["minus_beta"]), 0.0, self._partials)
            for u in self._basis
        ]
        self._lanczos, self._reflection, self._update, self._assess = (
            ops.bind_recurrence(f"minres_{name}", s.data) for name in ("lanczos", "reflection", "update", "residual")
        )

    def start(self, v: Sequence[Tensor]) -> None:
        self.steps = 0
        for vector in self._vectors:  # including the gaps, which the ops do not write
            vector.data.zero_()
        self._b.load(v)
        self._squared_b, _, self._bad_b = self._b.sums().unbind()
        s = self._scalars
        s.data.zero_()
        s["epsilon"].fill_(self._epsilon)
        s["flat"].fill_(_FLAT[self.value.data.dtype])
        s["preconditioned"].fill_(self._preconditioner is not None)
        s["enough"].copy_(self._tolerance.squared(self._squared_b))
        self._basis[0].data.copy_(self._residual.data)
        self._normalize(0)  # by the reflection of a step, of which only beta counts here
        moving = (self._squared_b > 0) & (self._squared_b > self._tolerance.absolute**2)
        s["bad_metric"].add_(moving & ~(s["beta"] > 0))
        s["phi_bar"].copy_(s["beta"])
        for name in ("sine", "delta_bar", "epsilon_k", "size", "beta", "minus_beta"):
            s[name].zero_()
        s["cosine"].fill_(-1.0)
        s["slope"].fill_(math.inf)  # of the iterate accepted as a least-squares solution
        s["squared"].copy_(self._squared_b)
        s["lowest"].copy_(self._squared_b)
        s["moving"].copy_(moving)

    def step(self, product: Sequence[Tensor]) -> None:
        s, layout = self._scalars, self.value.layout
        now, other = self.steps % 2, 1 - self.steps % 2
        self.steps += 1
        u, following = self._basis[now], self._basis[other]
        image = self.direction
        self._recurrences[other](product)  # following <- A z - beta (the one before u)
        s["nonfinite"].copy_(layout.total(self._partials[:, 2].sum()))
        if self._damping:
            following.data.add_(image.data, alpha=self._damping)
        s["alpha"].copy_(following.dot(image))
        self._lanczos()
        following.data.addcmul_(u.data, s["minus_alpha"])

        # The search direction needs z before its buffer is overwritten; it is scaled further down.
        search, previous = self._searches[now], self._searches[other]
        search.data.mul_(s["minus_epsilon"]).addcmul_(previous.data, s["minus_delta"]).add_(image.data)
        self._normalize(other)
        search.data.mul_(s["inverse_gamma"])

        s["search_norm"].copy_(search.norm())
        s["value_norm"].copy_(self.value.norm())
        self._update()
        self.value.data.addcmul_(search.data, s["step"])
        self._residual.data.mul_(s["keep"]).addcmul_(following.data, s["minus_shift"])
        s["residual_norm"].copy_(self._residual.norm())
        self._assess()

    def _normalize(self, index: int) -> None:
        """u <- u / beta and z <- M u, with beta = sqrt(u . M u), or 0 if only rounding is left of u."""
        s, u = self._scalars, self._basis[index]
        if self._preconditioner is None:
            self.direction = u
            s["norm"].copy_(u.norm())
        else:
            assert self._image is not None
            precondition(self._preconditioner, u, self._image)
            s["norm"].copy_(u.dot(self._image))
            s["scale"].copy_(u.dot(u))
        self._reflection()
        for vector in {id(u): u, id(self.direction): self.direction}.values():
            vector.data.mul_(s["inverse"])
            vector.refresh()

    @property
    def phase(self) -> Hashable:
        return self.steps % 2

    def seek(self, steps: int) -> None:
        self.steps = steps
        if self._image is None:
            self.direction = self._basis[steps % 2]

    def finish(self) -> Tensor:
        # The component of x in the null space of a singular A is a multiple of (M times) the least-squares residual.
        image = self._residual
        if self._preconditioner is not None:
            image = self._basis[0]
            precondition(self._preconditioner, self._residual, image)
        norm = self._residual.dot(image)
        share = self._residual.dot(self.value) / norm
        s = self._scalars
        null = (s["least"] > 0) & (norm > 0) & (share.abs() * s["slope"] <= _STRAY)
        self.value.data.addcmul_(image.data, -torch.where(null, share, 0.0))
        bad = (s["bad"] > 0) | ~self.value.all_finite()
        extent = s["size"] * self.value.norm()  # about ||A|| ||x||
        figures = [self._squared_b, self._bad_b, s["squared"], s["least"], bad.double(), s["bad_metric"], extent]
        return torch.stack([figure.double() for figure in figures])

    def read(self, figures: Sequence[float]) -> Outcome:
        squared_b, bad_b, squared, least, bad, bad_metric, extent = figures
        # In a short recurrence for x, rounding enters b - A x with the square of the condition number, of which
        # ||A|| ||x|| / ||b|| shows what matters for b; the updated residual does not know of it.
        self._gap = self._epsilon * extent**2 / squared_b if squared_b and self._image is None else 0.0
        self._squared = squared_b
        # Where Paige and Saunders stop: at a residual below the tolerance in units of ||A|| ||x||.
        self._reachable = self._tolerance.relative * math.sqrt(self._gap / self._epsilon)
        if self._preconditioner is None:  # then the norm of the residual has under- or overflowed
            bad, bad_metric = max(bad, bad_metric), 0.0
        residual = krylov_residual(squared_b, bad_b, squared, bad, bad_metric)
        tolerance = self._stagnation_tolerance if least else self._tolerance
        if tolerance.reached(residual, squared_b):
            status = Status.CONVERGED
        else:
            status = Status.SINGULAR if least else Status.ITERATION_LIMIT
        return Outcome(residual, "returned" if self.steps else "none", status, math.isfinite(residual), bad_b == 0)

    def doubtful(self, outcome: Outcome) -> bool:
        least = max(outcome.residual_norm, self._stagnation_tolerance.relative)
        return self.steps > 0 and _USUAL * self._gap > least

    def measured(self, outcome: Outcome, residual_norm: float) -> Outcome:
        enough = self._stagnation_tolerance.reached(residual_norm, self._squared)
        return measured_outcome(outcome, residual_norm, enough, self._reachable)
