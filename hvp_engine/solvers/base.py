"""What a solver is: start, step and finish bodies that an engine runs.

A solver is a small frozen object that describes a method. Its `allocate` gives an :class:`Iteration`, whose state
lives in flat buffers that never move. An engine calls `iteration.adapt(estimate)` and `iteration.start(v)`,
alternates `product(iteration.direction)` and `iteration.step(product)` at most `iteration.limit` times, then calls
`iteration.finish()`; and may do so again for another v, which overwrites `value`.

`start`, `step` and `finish` do not wait for the device (except in :class:`Exact`) and read from it whatever differs
between two solves, coefficients included: so they can be captured once and replayed. `adapt` sets those coefficients
and runs outside of a capture. `finished` may wait, and is not called by an engine that captures the loop.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from hvp_engine import ops
from hvp_engine._support.arguments import check_count, check_not_negative
from hvp_engine._support.flat_vector import FlatVector, Layout
from hvp_engine.solvers.preconditioners import Preconditioner, check_preconditioner
from hvp_engine.solvers.solution import Status
from hvp_engine.solvers.spectrum import SpectralEstimate

GROWTH_LIMIT = 1e4
"""A residual this many times the right-hand side is an error rather than a status."""


@dataclass(frozen=True)
class Outcome:
    """What the norms of a finished iteration say, on the host.

    `growth` is the last residual's norm by the first one's where the iteration contracts in another norm than the
    2-norm of `residual_norm`, None where it is the same.
    """

    residual_norm: float
    residual_of: str
    status: Status
    finite: bool = True
    finite_v: bool = True
    growth_limit: float = GROWTH_LIMIT
    growth: float | None = None

    @property
    def grown(self) -> float:
        """How many times larger the residual has become, in the norm that says whether the iteration converges."""
        return self.residual_norm if self.growth is None else self.growth

    @property
    def failed(self) -> bool:
        """Whether the value must not be used: not finite, or grown beyond the limit."""
        return not self.finite or self.grown > self.growth_limit


@dataclass(frozen=True)
class Accumulation:
    """A step that is linear in the product: target <- target - scale (A direction + damping direction); complete().

    An engine that can subtract a product without forming it takes this instead of `Iteration.step`; the norms of
    such a step are not computed, so the last step is an ordinary one.
    """

    target: FlatVector
    scale: float
    complete: Callable[[], object]


class FinishedIteration(Protocol):
    """A solve that has made its steps."""

    @property
    def value(self) -> FlatVector: ...

    @property
    def direction(self) -> FlatVector: ...

    @property
    def steps(self) -> int: ...

    def finish(self) -> Tensor:
        """Complete `value`; return the float64 figures on the device that :meth:`read` understands."""

    def read(self, figures: Sequence[float]) -> Outcome:
        """The outcome, from the figures of :meth:`finish` on the host."""


class Iteration(FinishedIteration, Protocol):
    """One solve in progress; `accumulation` is None where the step is not linear in the product."""

    limit: int
    steps: int

    @property
    def accumulation(self) -> Accumulation | None: ...

    def adapt(self, estimate: SpectralEstimate | None) -> None:
        """Set the coefficients that depend on the spectrum, from the host."""

    def start(self, v: Sequence[Tensor]) -> None:
        """Begin, or begin anew, with the right-hand side `v`."""

    def step(self, product: Sequence[Tensor]) -> None:
        """Advance by one product with A, taken at `direction`."""

    def finished(self) -> bool:
        """Whether to stop before the limit; may wait for the device."""


class Solver(Protocol):
    """A method of solving (A + damping I) x = v, for a symmetric and fixed A.

    Class attributes `needs_symmetry = False` and `needs_fixed_operator = False` say that more is allowed: any A, and
    another A at every product.
    """

    @property
    def damping(self) -> float: ...

    @property
    def estimates_spectrum(self) -> bool:
        """Whether `adapt` needs a spectral estimate."""

    def allocate(self, layout: Layout) -> Iteration:
        """Room for a solve, with the ops bound to it; nothing in it moves from then on."""


def check_solver(solver: Any) -> None:
    if isinstance(solver, type) or not (hasattr(solver, "damping") and (hasattr(solver, "allocate") or _plans(solver))):
        raise TypeError(f"solver: expected a solver such as hvp.Neumann(20); got {type(solver).__name__}")


def _plans(solver: Any) -> bool:
    """Whether it is a budget, which chooses a solver."""
    return hasattr(solver, "plan")


def tolerance_of(tol: float | None, layout: Layout) -> float:
    """The relative residual to stop at: `tol`, by default eps^(2/3), and in no case below rounding."""
    epsilon = torch.finfo(layout.state_dtype).eps
    return max(epsilon, epsilon ** (2 / 3) if tol is None else tol)


@dataclass(frozen=True)
class KrylovSolver:
    """The settings of conjugate gradients and MINRES, which need no estimate."""

    iterations: int
    tol: float | None = None
    damping: float = 0.0
    preconditioner: Preconditioner | None = None

    def __post_init__(self) -> None:
        check_count(self.iterations, "iterations", least=0)
        if self.tol is not None:
            check_not_negative(self.tol, "tol")
        check_not_negative(self.damping, "damping")
        check_preconditioner(self.preconditioner)

    @property
    def estimates_spectrum(self) -> bool:
        return False


def krylov_residual(squared_b: float, bad_b: float, squared: float, bad: float, bad_metric: float) -> float:
    """||r|| / ||b||, infinite where something is not finite; `ValueError` for a preconditioner that is no metric."""
    if bad_metric and not bad_b:
        raise ValueError(
            "preconditioner: expected a symmetric positive definite M; got r . M r <= 0, or not finite, for a "
            "residual r: look at the signs of its diagonal"
        )
    if bad or bad_b or not math.isfinite(squared):
        return math.inf
    return math.sqrt(squared / squared_b) if squared_b else 0.0


def scalar(value: float, device: torch.device) -> Tensor:
    """A 0-dim float64 tensor, as the ops take their coefficients."""
    return torch.full((), value, dtype=torch.float64, device=device)


class RightHandSide:
    """A flat vector that right-hand sides are loaded into, and the partials of its squared norm, in one pass."""

    def __init__(self, layout: Layout):
        self.vector = FlatVector(layout)
        self.partials = layout.empty_partials()
        one, zero = scalar(1.0, layout.device), scalar(0.0, layout.device)
        self._load = ops.bind("scale_accumulate", (self.vector.data,), layout, (one, zero), 0.0, self.partials)

    def load(self, tensors: Sequence[Tensor]) -> None:
        """Overwrite the vector with `tensors`."""
        self._load(tensors)
        self.vector.refresh()

    def sums(self) -> Tensor:
        """Squared norm, another, and how much is not finite, of the vector loaded."""
        return self.vector.layout.total(self.partials.sum(0))
