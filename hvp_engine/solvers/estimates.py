"""The spectral estimates that one solve asks for: of its operator as its solver sees it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from hvp_engine._support.flat_vector import FlatVector, Layout
from hvp_engine.differentiation.problem import LinearMap
from hvp_engine.solvers.base import Solver
from hvp_engine.solvers.preconditioners import Preconditioner
from hvp_engine.solvers.spectrum import SpectralEstimate, Spectrum


class Estimates:
    """Spectral estimates for one solve: of A, or with a preconditioner M of M (A + damping I)."""

    def __init__(self, operator: LinearMap, solver: Solver, spectrum: Spectrum):
        self._operator, self._spectrum = operator, spectrum
        self._seen: LinearMap | None = None
        self._preconditioner: Preconditioner | None = getattr(solver, "preconditioner", None)
        self.preconditioned = self._preconditioner is not None
        self._inside = solver.damping if self.preconditioned else 0.0
        self.damping = solver.damping - self._inside
        """What the estimates do not contain yet."""

    def refresh(self) -> SpectralEstimate:
        return self._spectrum.refresh(self._map, self._preconditioner)

    def restart(self, start: FlatVector | None = None) -> SpectralEstimate:
        """A cold estimate, from a random start unless one is given."""
        start = self._spectrum.random(self._operator.layout) if start is None else start
        return self._spectrum.restart(self._map, start, self._preconditioner)

    @property
    def _map(self) -> LinearMap:
        if self._seen is None:  # of a map that changes, one draw serves all products of the estimates
            held = self._operator.hold() if hasattr(self._operator, "hold") else self._operator
            self._seen = Shifted(held, self._inside) if self._inside else held
        return self._seen


@dataclass(frozen=True)
class Shifted:
    """A + damping I."""

    operator: LinearMap
    damping: float

    @property
    def layout(self) -> Layout:
        return self.operator.layout

    def product(self, tangents: Sequence[Tensor]) -> Sequence[Tensor]:
        products = self.operator.product(tangents)
        return [p + self.damping * t for p, t in zip(products, tangents, strict=True)]
