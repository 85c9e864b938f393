"""Conjugate gradients that stop on the device, without a synchronization per step: the host asks only now and then."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from hvp_engine import ops
from hvp_engine._support.flat_vector import FlatVector, Layout
from hvp_engine.ops.backend import Bound
from hvp_engine.solvers.base import KrylovSolver, LinearSystem, Prepared
from hvp_engine.solvers.block_conjugate_gradient import BlockConjugateGradientSolve
from hvp_engine.solvers.iteration import (
    REFRESH_EVERY,
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

_MEANINGLESS = 0.1
"""A solution is no better than none if rounding it leaves a residual of this share of the right-hand side."""

_USUAL = 0.1
"""The gap between the updated residual and b - A x is rarely more than this share of eps ||A|| ||x||."""

_CONTRADICTION = 4.0
"""Conjugate gradients begin anew if a recomputed residual has more than this many times the updated one's square."""


@dataclass(frozen=True)
class ConjugateGradient(KrylovSolver):
    """Conjugate gradients for a symmetric positive definite operator.

    Of all x in the span of b, A b, A^2 b, ... (M b, M A M b, ... with a preconditioner) that `iterations` products
    reach, it finds the one with the smallest error in the A-norm: at least as good as any Neumann sum of as many
    products, and, up to rounding, exact after n products in n dimensions. Each product reduces the error at least by
    the factor (sqrt(k) - 1) / (sqrt(k) + 1), where k is the condition number of A (of M A).

    Arguments:
        iterations: number of products with A, >= 0; one in 51 recomputes the residual.
        tol: stop when ||v - A x|| <= max(tol ||v||, atol); with 0 for both, at rounding alone; None is eps^(2/3) of
            the dtype that is solved in: 2.4e-5 in float32, 3.7e-11 in float64.
        damping: added to the diagonal of A, >= 0.
        preconditioner: v -> M v on the list of the weights' leaves, symmetric positive definite, near A^-1; for
            example a :class:`DiagonalPreconditioner`.
        atol: the absolute tolerance of the residual in the 2-norm, >= 0, without the preconditioner and in the units of
            v; `atol=1e-5, tol=0.0` is an absolute tolerance alone.

    Several right-hand sides (`solve(..., batched=True)`, `influence_matrix`, `response_jacobian`) are solved in blocks:
    each searches the Krylov spaces of all. While all are there, each comes at least as close as it would alone with as
    many `iterations`, as a rule much closer. Tolerances and statuses stay those of each right-hand side: one that has
    reached its tolerance leaves the block, whose rest then goes on with less to share. Linearly dependent ones share
    their products. Where a block finds negative curvature, its right-hand sides are solved one by one. Blocks have at
    most 128 columns, and so few that their vectors take about 1 GB in float32; weights that are sharded or in 16 bits
    have none.

    A search direction of negative curvature reveals an operator that is not positive definite. The iterate reached
    before it is then returned, with the status NEGATIVE_CURVATURE. If the operator is singular to working precision,
    the iterate may grow along its null space until nothing but rounding is left of it: the status is then SINGULAR.

    Cost: up to `iterations` products, and one that measures the residual where rounding may have spoiled the updated
    one (if it has, the status is STAGNATED); three flat vectors of weights, one more with a preconditioner, and one
    more for more than 50 products. The tolerance is checked every 5 products, so up to 4 may follow after it is
    reached; they do not change x. In a block: about seven flat vectors for each right-hand side, three passes of matrix
    products between them for each product, and a check after each.

    Errors: `TypeError` or `ValueError` naming the argument, at construction; `ValueError` in a solve with a
    preconditioner that is not positive definite, :class:`DivergenceError` if the residual grows beyond 1 / eps, as for
    a singular operator.

    Source: Hestenes and Stiefel, Methods of Conjugate Gradients for Solving Linear Systems, Journal of Research of
    the National Bureau of Standards 1952; Shewchuk, An Introduction to the Conjugate Gradient Method Without the
    Agonizing Pain, Carnegie Mellon 1994, appendix B3 (with preconditioning and recomputed residual). Blocks: O'Leary,
    The Block Conjugate Gradient Algorithm and Related Methods, Linear Algebra and its Applications 1980; Ji and Li, A
    Breakdown-Free Block Conjugate Gradient Method, BIT Numerical Mathematics 2017.

    >>> import torch, hvp_engine as hvp
    >>> A = torch.tensor([[2.0, 0.5], [0.5, 1.0]])
    >>> solution = hvp.solve(lambda v: A @ v, torch.tensor([5.0, 3.0]), hvp.ConjugateGradient(2))
    >>> solution.value, solution.status.name
    (tensor([2., 2.]), 'CONVERGED')
    """

    def allocate(self, layout: Layout) -> Iteration:
        return _ConjugateGradient(self, layout)

    def prepare(self, system: LinearSystem) -> Prepared:
        return BlockConjugateGradientSolve(self, system)


class _ConjugateGradient(Iteration):
    """State: x, r = b - A x, z = M r, the direction d, and rho = r . z, which is set to 0 to stop."""

    def __init__(self, solver: ConjugateGradient, layout: Layout):
        self.limit, self.steps = solver.iterations, 0
        self._preconditioner, self._damping = solver.preconditioner, solver.damping
        self._tolerance = Tolerance(tolerance_of(solver.tol, layout), solver.atol)
        # The product A x rounds x to 16 bits, which would make b - A x less accurate than the updated residual.
        self._refreshes = self.limit > REFRESH_EVERY and not layout.low_precision
        self._initial = RightHandSide(layout)
        self._residual = self._initial.vector
        self._b = FlatVector(layout) if self._refreshes else None
        self._image = self._residual if self._preconditioner is None else FlatVector(layout)
        self.value = FlatVector(layout)
        self.direction = self._search = FlatVector(layout)

        self._scalars = ops.Scalars(ops.CG, layout.device)
        self._recurrence = ops.bind_recurrence("cg_recurrence", self._scalars.data)
        self._rho, self._beta = self._scalars["rho"], self._scalars["beta"]
        self.going = self._rho
        self._partials = layout.empty_partials()
        one, minus = scalar(1.0, layout.device), scalar(-1.0, layout.device)
        states = (self.value.data, self._residual.data, self._search.data)
        sums = self._scalars.first(3)  # ||r||^2, the curvature and whether something is not finite
        if layout.whole is None:
            update = ops.bind("cg_step", states, layout, (self._rho,), self._damping, self._partials)
            self._advance = partial(_fused_step, update, self._partials, sums)
        else:
            vectors = self.value, self._residual, self._search, FlatVector(layout)
            self._advance = partial(_sharded_step, *vectors, self._rho, self._damping, sums)
        self._subtract = ops.bind("scale_accumulate", (states[1],), layout, (minus, one), 0.0, self._partials)
        flat = Layout.of([self._image.data])
        self._mix = ops.bind("scale_accumulate", (states[2],), flat, (one, self._beta), 0.0, flat.empty_partials())

    def start(self, v: Sequence[Tensor]) -> None:
        self.steps = 0
        self.direction = self._search
        self._initial.load(v)
        if self._b is not None:
            self._b.data.copy_(self._residual.data)
        self.value.data.zero_()
        self._squared_b, _, self._bad_b = self._initial.sums().unbind()
        self._scalars.data.zero_()  # rho too, so that the first beta is 0, and the old direction plays no part
        self._scalars["squared"].copy_(self._squared_b)
        self._scalars["enough"].copy_(self._tolerance.squared(self._squared_b))
        self._scalars["preconditioned"].fill_(self._preconditioner is not None)
        self._turn()

    def step(self, product: Sequence[Tensor]) -> None:
        self.steps += 1
        if self.direction is self.value:
            self._refresh(product)
        else:
            self._advance(product)
            if self._refreshes and self.steps % REFRESH_EVERY == 0:
                self.direction = self.value  # the next product is A x
                return
        self._turn()

    def _refresh(self, product: Sequence[Tensor]) -> None:
        """r <- b - (A x + damping x), with A x given."""
        assert self._b is not None
        torch.sub(self._b.data, self.value.data, alpha=self._damping, out=self._residual.data)
        self._subtract(product)
        _, squared, bad = self.value.layout.total(self._partials.sum(0)).unbind()
        # Where the updated residual had become meaningless, beta and the old direction are, too: begin anew.
        self._rho.mul_(squared <= _CONTRADICTION * self._scalars["squared"])
        self._scalars["squared"].copy_(squared)
        self._scalars["nonfinite"].add_(bad)  # to that of the step before, which was not looked at
        self.direction = self._search

    def _turn(self) -> None:
        """z <- M r; d <- z + beta d; rho <- r . z, or 0 once the tolerance is reached or d had negative curvature."""
        if self._preconditioner is not None:
            precondition(self._preconditioner, self._residual, self._image)
            metric = torch.dot(self._residual.data.double(), self._image.data.double())
            self._scalars["metric"].copy_(self.value.layout.total(metric))
        self._recurrence()
        self._mix([self._image.data])
        self._search.refresh()

    @property
    def phase(self) -> Hashable:
        return self.steps % REFRESH_EVERY if self._refreshes else 0

    def seek(self, steps: int) -> None:
        self.steps = steps
        refreshing = self._refreshes and steps > 0 and steps % REFRESH_EVERY == 0
        self.direction = self.value if refreshing else self._search

    def finish(self) -> Tensor:
        s = self._scalars
        bad = (s["bad"] > 0) | ~self.value.all_finite()
        extent = s["size"] * self.value.norm()  # about ||A|| ||x||
        return torch.stack(
            [self._squared_b, self._bad_b, s["squared"], s["negative"], bad.double(), s["bad_metric"], extent.double()]
        )

    def read(self, figures: Sequence[float]) -> Outcome:
        squared_b, bad_b, squared, negative, bad, bad_metric, extent = figures
        residual = krylov_residual(squared_b, bad_b, squared, bad, bad_metric)
        epsilon = torch.finfo(self.value.data.dtype).eps
        # What rounding x alone leaves of b - A x. The updated residual does not know of it: for a singular A it may
        # become as small as for any other, while x grows to 1 / eps along the null space.
        rounding = epsilon * extent / math.sqrt(squared_b) if squared_b and self._preconditioner is None else 0.0
        singular = rounding > _MEANINGLESS
        self._gap, self._squared = (0.0 if singular else rounding), squared_b
        residual = max(residual, rounding) if singular else residual
        if self._tolerance.reached(residual, squared_b):
            status = Status.CONVERGED
        elif negative:
            status = Status.NEGATIVE_CURVATURE
        else:
            status = Status.SINGULAR if singular else Status.ITERATION_LIMIT
        # The residual of a positive definite system may grow on the way, by up to the square root of its condition
        # number; one with a condition number above 1 / eps^2 is singular in this arithmetic.
        residual_of = "returned" if self.steps else "none"
        return Outcome(residual, residual_of, status, math.isfinite(residual), bad_b == 0, growth_limit=1 / epsilon)

    def doubtful(self, outcome: Outcome) -> bool:
        return self.steps > 0 and _USUAL * self._gap > max(outcome.residual_norm, self._tolerance.relative)

    def measured(self, outcome: Outcome, residual_norm: float) -> Outcome:
        enough = self._tolerance.reached(residual_norm, self._squared)
        return measured_outcome(outcome, residual_norm, enough, 4 * self._gap)


def _fused_step(update: Bound, partials: Tensor, sums: Tensor, product: Sequence[Tensor]) -> None:
    """The fused op, and the sums over its partials."""
    update(product)
    torch.sum(partials, 0, out=sums)


def _sharded_step(
    x: FlatVector,
    r: FlatVector,
    d: FlatVector,
    image: FlatVector,
    rho: Tensor,
    damping: float,
    sums: Tensor,
    product: Sequence[Tensor],
) -> None:
    """The step on sharded vectors: a sum over processes comes between its two passes, so one op cannot do both."""
    image.copy_(product)
    image.data.add_(d.data, alpha=damping)
    curvature = d.dot(image).double()
    step = torch.where(curvature > 0, rho / curvature, 0.0).to(image.data.dtype)
    x.data.addcmul_(d.data, step)
    r.data.addcmul_(image.data, step, value=-1)
    torch.stack([r.norm().double().square(), curvature, (~r.all_finite()).double()], out=sums)
