"""Chebyshev iteration: the Neumann series, accelerated by bounds on the eigenvalues."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from hvp_engine import ops
from hvp_engine._support.arguments import as_number, check_count, check_not_negative, replace_fields
from hvp_engine._support.flat_vector import FlatVector, Layout
from hvp_engine.differentiation.linear_map import Accumulation, Mixing
from hvp_engine.solvers.base import Solver
from hvp_engine.solvers.iteration import Iteration, Outcome, RightHandSide, scalar
from hvp_engine.solvers.neumann import outcome_of
from hvp_engine.solvers.preconditioning import MNorm, Preconditioner, check_preconditioner, precondition
from hvp_engine.solvers.spectrum import GROWTH, HEADROOM, SpectralEstimate

Form = Literal["chebyshev", "heavy_ball"]
Coefficients = list[tuple[float, float]]
"""(alpha, beta) of each term: d <- beta d + alpha r; x <- x + d."""

_RESOLVED, _BLURRED, _MANY = 1000.0, 10.0, 100
"""Terms resolve an eigenvalue if they divide its residual by _RESOLVED, and blur it if only by _BLURRED. Beyond _MANY
terms _RESOLVED grows with the square of their number, so that more terms always bring the solution closer."""


@dataclass(frozen=True)
class Chebyshev(Solver):
    """Chebyshev iteration for a symmetric positive definite operator.

    x_0 = 0, d = alpha_0 v; then, `iterations` times, r <- r - A d, d <- beta d + alpha r, x <- x + d: one product and
    no inner product each, so x is a fixed polynomial of A applied to v, as with :class:`Neumann`: i products and i + 1
    terms. If all eigenvalues lie in [a, b] and k = b / a,

        ||v - A x|| <= ||v|| / T_{i+1}((k + 1) / (k - 1)) <= 2 ((sqrt(k) - 1) / (sqrt(k) + 1))^(i+1) ||v||,

    and likewise for the error of x: sqrt(k) products where the Neumann series takes k. The residual of an eigenvalue
    between 0 and a decreases more slowly; that of one above a + b is amplified.

    Arguments:
        iterations: number of products with A, >= 0.
        bounds: (a, b), a lower and an upper bound of the eigenvalues of A + damping I (of M (A + damping I)); or
            "auto", from a Lanczos estimate (8 products cold, 3 to refresh): b with 5 % to spare; a if the estimate
            is certain of it, else as small a bound as `iterations` products can exploit.
        form: "chebyshev" as above, best if `iterations` and both bounds are known; "heavy_ball" uses b alone, with
            coefficients that do not depend on `iterations` either: at an eigenvalue lambda the residual is at most
            1.35 / (1 + (i + 1)^2 lambda / b) of v's. It is the nu-method with nu = 1.
        damping: added to the diagonal of A, >= 0.
        preconditioner: v -> M v on the list of the weights' leaves, symmetric positive definite, near A^-1.

    If the estimate sees negative curvature that the polynomial would amplify more than tenfold, the Neumann series runs
    instead, with a step that stays below that. The status is NEGATIVE_CURVATURE either way.

    Cost: `iterations` products; three flat vectors of weights, four with a preconditioner.

    Errors: `TypeError` or `ValueError` naming the argument, at construction; :class:`DivergenceError` in a solve whose
    given upper bound is too low.

    Source: Golub and Varga, Chebyshev Semi-Iterative Methods, Numerische Mathematik 1961; Saad, Iterative Methods for
    Sparse Linear Systems, 2nd edition, SIAM 2003, algorithm 12.1. The nu-method: Hanke, Accelerated Landweber
    Iterations for the Solution of Ill-Posed Equations, Numerische Mathematik 1991.

    >>> import torch, hvp_engine as hvp
    >>> A = torch.diag(torch.tensor([1.0, 2.0, 10.0]))
    >>> hvp.solve(lambda v: A @ v, torch.ones(3), hvp.Chebyshev(30, bounds=(1.0, 10.0))).value
    tensor([1.0000, 0.5000, 0.1000])
    """

    iterations: int
    bounds: tuple[float, float] | Literal["auto"] = "auto"
    form: Form = "chebyshev"
    damping: float = 0.0
    preconditioner: Preconditioner | None = None

    def __post_init__(self) -> None:
        iterations = check_count(self.iterations, "iterations", least=0)
        if self.form not in ("chebyshev", "heavy_ball"):
            raise ValueError(f"form: expected 'chebyshev' or 'heavy_ball'; got {self.form!r}")
        if self.bounds != "auto":
            replace_fields(self, bounds=_check_bounds(self.bounds, self.form))
        replace_fields(self, iterations=iterations, damping=check_not_negative(self.damping, "damping"))
        check_preconditioner(self.preconditioner)

    @property
    def estimates_spectrum(self) -> bool:
        return self.bounds == "auto"

    @property
    def makes_products(self) -> bool:
        return self.iterations > 0

    def allocate(self, layout: Layout) -> Iteration:
        return _Chebyshev(self, layout) if self.preconditioner is None else _Preconditioned(self, layout)

    def coefficients_for(self, estimate: SpectralEstimate | None) -> tuple[tuple[float, float], Coefficients]:
        """The bounds, and the coefficients of all terms."""
        if self.bounds != "auto":
            return self.bounds, self._polynomial(*self.bounds)
        assert estimate is not None
        damping = self.damping if self.preconditioner is None else 0.0
        lower, upper = bounds_of(estimate, damping, self.iterations + 1)
        coefficients = self._polynomial(lower, upper)
        if estimate.indefinite(damping) and amplification(coefficients, estimate.smallest + damping) > GROWTH:
            lower = upper = 1 / estimate.safe_alpha(damping, self.iterations + 1)
            coefficients = chebyshev_coefficients(lower, upper, self.iterations + 1)
        return (lower, upper), coefficients

    def _polynomial(self, lower: float, upper: float) -> Coefficients:
        if self.form == "heavy_ball":
            return heavy_ball_coefficients(upper, self.iterations + 1)
        return chebyshev_coefficients(lower, upper, self.iterations + 1)


def bounds_of(estimate: SpectralEstimate, damping: float, terms: int) -> tuple[float, float]:
    """The interval assumed to hold the damped eigenvalues, for a polynomial of `terms` terms."""
    upper = HEADROOM * estimate.bound(damping)
    if upper <= 0:
        return 1.0, 1.0  # A = 0
    sure = estimate.smallest - estimate.smallest_margin + damping
    # A Ritz value overestimates the smallest eigenvalue, and a lower bound that is too low costs less than one that is
    # too high: hence half of it. Eigenvalues far below the reach of so many terms stay outside of the interval.
    likely = max(estimate.smallest, 0.0) / 2 + damping
    divisors = _RESOLVED * max(1.0, terms / _MANY) ** 2, _BLURRED
    # m terms divide residuals on [a, b] by D = cosh(2 m sqrt(a / b)), nearly, so they reach a = b (acosh(D) / 2 m)^2:
    # 20 terms divide by D = 1000 down to a = b (7.6 / 40)^2 = 0.036 b.
    resolved, blurred = (upper * min(1.0, (math.acosh(divisor) / (2 * terms)) ** 2) for divisor in divisors)
    return min(upper, max(sure, min(max(likely, blurred), resolved))), upper


def chebyshev_coefficients(lower: float, upper: float, terms: int) -> Coefficients:
    """The coefficients of the polynomial that is smallest on [lower, upper]; for lower = upper, of the Neumann series.

    On [1, 3] (center 2, squared radius 1): (1/2, 0); then alpha = 1 / (2 - 1/4) = 4/7, beta = 2 * 4/7 - 1 = 1/7; ...
    """
    center, squared_radius = (upper + lower) / 2, ((upper - lower) / 2) ** 2
    alpha = 2 / center
    coefficients = [(1 / center, 0.0)]
    for _ in range(terms - 1):
        alpha = 1 / (center - squared_radius * alpha / 4)
        coefficients.append((alpha, center * alpha - 1))
    return coefficients


def heavy_ball_coefficients(upper: float, terms: int) -> Coefficients:
    """The coefficients of the nu-method with nu = 1, for eigenvalues in [0, upper]."""
    coefficients = [(6 / (5 * upper), 0.0)]
    for k in range(2, terms + 1):
        beta = (k - 1) * (2 * k - 3) * (2 * k + 1) / ((k + 1) * (2 * k + 3) * (2 * k - 1))
        coefficients.append((4 * (2 * k + 1) * k / ((k + 1) * (2 * k + 3)) / upper, beta))
    return coefficients


def amplification(coefficients: Coefficients, eigenvalue: float) -> float:
    """The factor by which all terms multiply the residual of an eigenvector, in absolute value."""
    residual, direction = 1.0, 0.0
    for alpha, beta in coefficients:
        direction = beta * direction + alpha * residual
        residual -= eigenvalue * direction
        if abs(residual) > 1e100:
            return math.inf
    return abs(residual)


def _check_bounds(bounds: tuple[float, float], form: Form) -> tuple[float, float]:
    if not isinstance(bounds, (tuple, list)) or len(bounds) != 2:
        raise TypeError(f"bounds: expected 'auto' or a pair (lower, upper); got {bounds!r}")
    try:
        lower, upper = (as_number(bound) for bound in bounds)
    except TypeError:
        raise TypeError(f"bounds: expected two numbers; got {bounds!r}") from None
    least = lower > 0 or (form == "heavy_ball" and lower == 0)
    if not (math.isfinite(upper) and least and upper > 0 and lower <= upper):
        raise ValueError(
            f"bounds: expected finite 0 < lower <= upper; got {tuple(bounds)}: if you know only the largest eigenvalue "
            "use form='heavy_ball', which takes (0, upper)"
        )
    return lower, upper


class _Chebyshev(Iteration):
    """State: x, the direction d, which is its last term, and r = v - A x of the x before that term."""

    def __init__(self, solver: Chebyshev, layout: Layout):
        self.limit, self.steps = solver.iterations, 0
        self.bounds: tuple[float, float] = (math.nan, math.nan)
        self._solver = solver
        self._b = RightHandSide(layout)
        self._residual = self._b.vector
        self.value, self.direction = FlatVector(layout), FlatVector(layout)
        self._table = torch.zeros(self.limit + 1, 2, dtype=torch.float64, device=layout.device)
        self._current = torch.zeros(2, dtype=torch.float64, device=layout.device)
        self._alpha, self._beta = self._current.unbind()
        self._factors: list[tuple[float, float]] = []
        self._partials = layout.empty_partials()
        self._bind(layout)

    def _bind(self, layout: Layout) -> None:
        states = (self.value.data, self._residual.data, self.direction.data)
        scalars, damping = (self._alpha, self._beta), self._solver.damping
        self._update = ops.bind("chebyshev_step", states, layout, scalars, damping, self._partials)

    @property
    def accumulation(self) -> Accumulation | None:
        turned = Mixing(self.direction, self._residual, self._factors)
        return Accumulation(self.direction, self._residual, 1.0, (turned, Mixing(self.value, self.direction)))

    def adapt(self, estimate: SpectralEstimate | None) -> None:
        self.bounds, coefficients = self._solver.coefficients_for(estimate)
        self._table.copy_(torch.tensor(coefficients, dtype=torch.float64, device="cpu"))
        self._factors = [(beta, alpha) for alpha, beta in coefficients[1:]]

    def start(self, v: Sequence[Tensor]) -> None:
        self.steps = 0
        self._b.load(v)
        torch.mul(self._residual.data, self._table[0, 0], out=self.direction.data)
        self._begin()

    def _begin(self) -> None:
        self.direction.refresh()
        self.value.assign(self.direction)

    def step(self, product: Sequence[Tensor]) -> None:
        self.steps += 1
        self._current.copy_(self._table[self.steps])
        self._update(product)
        self.direction.refresh()

    def finish(self) -> Tensor:
        return torch.cat([self._b.sums(), self.value.layout.total(self._partials.sum(0))])

    def read(self, figures: Sequence[float]) -> Outcome:
        return outcome_of(figures, self.steps, self.value.data.dtype)


class _Preconditioned(_Chebyshev):
    """With a preconditioner, the direction is built from z = M r instead of r."""

    def _bind(self, layout: Layout) -> None:
        assert self._solver.preconditioner is not None
        self._preconditioner, self._image = self._solver.preconditioner, FlatVector(layout)
        self._m_norm = MNorm(self._residual, self._image)
        one, minus = scalar(1.0, layout.device), scalar(-1.0, layout.device)
        self._subtract = ops.bind("scale_accumulate", (self._residual.data,), layout, (minus, one), 0.0, self._partials)
        flat = Layout.of([self._image.data])
        scales = (self._alpha, self._beta)
        self._mix = ops.bind("scale_accumulate", (self.direction.data,), flat, scales, 0.0, flat.empty_partials())

    @property
    def accumulation(self) -> Accumulation | None:
        return None

    def start(self, v: Sequence[Tensor]) -> None:
        self.steps = 0
        self._b.load(v)
        precondition(self._preconditioner, self._residual, self._image)
        self._m_norm.start()
        torch.mul(self._image.data, self._table[0, 0], out=self.direction.data)
        self._begin()

    def step(self, product: Sequence[Tensor]) -> None:
        self.steps += 1
        self._current.copy_(self._table[self.steps])
        if self._solver.damping:
            self._residual.data.sub_(self.direction.data, alpha=self._solver.damping)
        self._subtract(product)
        precondition(self._preconditioner, self._residual, self._image)
        self._mix([self._image.data])
        self.value.data.add_(self.direction.data)
        self.direction.refresh()

    def finish(self) -> Tensor:
        return torch.cat([self._b.sums(), self._m_norm.sums(self._partials, self.value)])
