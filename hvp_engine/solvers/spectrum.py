"""Estimates of the extreme eigenvalues by short Lanczos runs, warm-started from call to call."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from hvp_engine._support.flat_vector import FlatVector, Layout
from hvp_engine.differentiation.linear_map import LinearMap
from hvp_engine.solvers.lanczos import random_unit_vector, tridiagonalize
from hvp_engine.solvers.preconditioning import Preconditioner

COLD_STEPS = 8
"""A first estimate takes this many products: two underestimate an outlier by more than half, five suffice."""

REFRESH_STEPS = 3
"""An estimate that starts from the last one's eigenvectors takes this many products."""

GROWTH = 10.0
"""A truncated series may let the residual grow to this multiple if the estimate has seen negative curvature."""

HEADROOM = 1.05
"""A polynomial's upper bound is the estimate times this, since eigenvalues beyond the bound are amplified."""

_FRESH_SHARE = 0.3
"""A refresh adds a random part of this norm to the old eigenvectors, so as to find a new largest one."""


@dataclass(frozen=True)
class SpectralEstimate:
    """Ritz values of a symmetric operator, without damping.

    Attributes:
        largest: largest Ritz value by magnitude (a lower bound of lambda_max of a positive definite operator).
        smallest: smallest Ritz value; below zero means the operator is indefinite.
        margin: residual norm of the Ritz pair; `largest + margin` bounds the eigenvalue it belongs to.
        hvps: products spent.
        smallest_margin: residual norm of the smallest Ritz pair.
    """

    largest: float
    smallest: float
    margin: float
    hvps: int
    smallest_margin: float = math.inf

    @property
    def finite(self) -> bool:
        return math.isfinite(self.largest)

    def indefinite(self, damping: float = 0.0) -> bool:
        """Whether the damped operator has shown negative curvature beyond rounding."""
        return self.smallest + damping < -1e-6 * self.largest

    def bound(self, damping: float = 0.0) -> float:
        """The value assumed to bound all |eigenvalues| of the damped operator."""
        return self.largest + self.margin + damping

    def joined(self, other: SpectralEstimate) -> SpectralEstimate:
        """This estimate merged with another one of the same operator."""
        top = max(self, other, key=SpectralEstimate.bound)
        bottom = min(self, other, key=lambda estimate: estimate.smallest)
        hvps = self.hvps + other.hvps
        return SpectralEstimate(top.largest, bottom.smallest, top.margin, hvps, bottom.smallest_margin)

    def safe_alpha(self, damping: float = 0.0, iterations: int = 0) -> float:
        """1 / bound: converges even if the estimate is too low by almost a half.

        Under negative curvature no alpha converges, and `iterations` products multiply the residual by up to
        (1 + alpha |smallest|)^iterations: alpha is then small enough to keep that below :data:`GROWTH`.
        """
        bound = self.bound(damping)
        alpha = 1.0 / bound if bound > 0 else 1.0
        if self.indefinite(damping) and iterations > 0:
            alpha = min(alpha, (GROWTH ** (1 / iterations) - 1) / -(self.smallest + damping))
        return alpha


def lanczos(
    operator: LinearMap, start: FlatVector, steps: int, preconditioner: Preconditioner | None = None
) -> tuple[SpectralEstimate, FlatVector]:
    """The estimate by `steps` of Lanczos, and the sum of the Ritz vectors of the largest and the smallest value.

    Cost: `steps` products, one wait for the device; memory as :class:`LanczosBasis`.
    """
    found = tridiagonalize(operator, start, steps, preconditioner)
    pairs, hvps = found.ritz_pairs(), len(found.basis)
    if pairs is None:
        return SpectralEstimate(math.nan, math.nan, math.nan, hvps), start
    values, bounds = pairs.values.tolist(), pairs.bounds.tolist()
    top = max(range(len(values)), key=lambda k: abs(values[k]))
    both = pairs.coordinates[:, sorted({0, top})].sum(1)
    estimate = SpectralEstimate(abs(values[top]), values[0], bounds[top], hvps, bounds[0])
    return estimate, FlatVector(start.layout, found.combine(both))


class Spectrum:
    """The spectral estimate of one operator or hypergradient, refreshed at every call from its last eigenvectors.

    Holds one flat vector, the sum of two eigenvectors: two steps from it find both. The caller's random state is not
    touched.
    """

    def __init__(self) -> None:
        self.estimate: SpectralEstimate | None = None
        self.vector: FlatVector | None = None
        self._loaded: Tensor | None = None  # from a checkpoint, until a call supplies the layout
        self._calls = 0

    def random(self, layout: Layout) -> FlatVector:
        """A random start vector that depends only on the number of calls so far."""
        return random_unit_vector(layout, self._calls)

    def refresh(self, operator: LinearMap, preconditioner: Preconditioner | None = None) -> SpectralEstimate:
        """A new estimate: 3 products from the last eigenvectors with a random part added, 8 on the first call."""
        self._calls += 1
        layout = operator.layout
        if self._loaded is not None and self._loaded.numel() == layout.size:
            self.vector = FlatVector(layout, self._loaded.to(layout.device, layout.state_dtype))
        self._loaded = None
        if self.vector is None or self.vector.layout != layout:
            return self.restart(operator, self.random(layout), preconditioner)
        start = self.random(layout)
        start.data.mul_(_FRESH_SHARE).add_(self.vector.data / self.vector.norm())
        return self._run(operator, start, REFRESH_STEPS, preconditioner)

    def cost(self, layout: Layout) -> int:
        """Products that the next :meth:`refresh` takes."""
        known = self._loaded is not None and self._loaded.numel() == layout.size
        warm = known or (self.vector is not None and self.vector.layout == layout)
        return min(REFRESH_STEPS if warm else COLD_STEPS, max(1, layout.numel))

    def restart(
        self, operator: LinearMap, start: FlatVector, preconditioner: Preconditioner | None = None
    ) -> SpectralEstimate:
        """A new estimate from `start`, with as many products as a first one."""
        return self._run(operator, start, COLD_STEPS, preconditioner)

    def _run(
        self, operator: LinearMap, start: FlatVector, steps: int, preconditioner: Preconditioner | None
    ) -> SpectralEstimate:
        estimate, vector = lanczos(operator, start, steps, preconditioner)
        if estimate.finite:
            self.estimate, self.vector = estimate, vector
        return estimate

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs to continue with the same numbers; its vector is never changed in place."""
        return {"calls": self._calls, "vector": self._loaded if self.vector is None else self.vector.data}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a saved state; its vector is used if it fits the next call's operator."""
        self._calls, self._loaded, self.vector = state["calls"], state["vector"], None


class Estimates:
    """The spectral estimates that one solve asks for: of A, or, with a preconditioner M, of M (A + damping I)."""

    def __init__(self, operator: LinearMap, spectrum: Spectrum, damping: float, preconditioner: Preconditioner | None):
        self._operator, self._spectrum, self._preconditioner = operator, spectrum, preconditioner
        self._map: LinearMap | None = None
        self.preconditioned = preconditioner is not None
        self._inside = damping if self.preconditioned else 0.0
        self.damping = damping - self._inside
        """The damping that is not part of the estimated operator."""

    def refresh(self) -> SpectralEstimate:
        return self._spectrum.refresh(self._estimated(), self._preconditioner)

    def restart(self, start: FlatVector | None = None) -> SpectralEstimate:
        """A cold estimate, from a random start unless one is given."""
        start = self._spectrum.random(self._operator.layout) if start is None else start
        return self._spectrum.restart(self._estimated(), start, self._preconditioner)

    def _estimated(self) -> LinearMap:
        if self._map is None:  # of a stochastic operator, one draw serves all products
            held = self._operator.hold()
            self._map = Shifted(held, self._inside) if self._inside else held
        return self._map


class Shifted(LinearMap):
    """A + shift I."""

    def __init__(self, operator: LinearMap, shift: float):
        self.layout, self._operator, self._shift = operator.layout, operator, shift

    def product(self, tangents: Sequence[Tensor]) -> Sequence[Tensor]:
        products = self._operator.product(tangents)
        return [p + self._shift * t for p, t in zip(products, tangents, strict=True)]
