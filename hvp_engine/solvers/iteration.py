"""A solve in progress: the start, step and finish functions that an engine runs.

A solver's `allocate` gives an :class:`Iteration`, whose state lives in flat buffers that never move. An engine calls
`iteration.adapt(estimate)` and `iteration.start(v)`, alternates `product(iteration.direction)` and
`iteration.step(product)` at most `iteration.limit` times, then calls `iteration.finish()`; it may do so again for
another v, which overwrites `value`.

`start`, `step` and `finish` never wait for the device. Whatever differs between two solves, coefficients included, they
read from device memory, so they can be captured once and replayed. `adapt` sets the coefficients, outside of a capture.
`finished` may wait for the device. An engine that captures the loop does so in pieces that end where `next_look` says,
and calls it between them; steps that begin at the same `phase` are the same to it, and captured once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from hvp_engine import ops
from hvp_engine._support.flat_vector import FlatVector, Layout
from hvp_engine.differentiation.linear_map import Accumulation
from hvp_engine.solvers.solution import Solution, Status
from hvp_engine.solvers.spectrum import SpectralEstimate

GROWTH_LIMIT = 1e4
"""A residual of more than this many times the right-hand side raises an error instead of setting a status."""

CHECK_EVERY = 5
"""The host asks the device once per this many products whether a solve has to go on."""

REFRESH_EVERY = 50
"""After this many updates conjugate gradients recompute b - A x, from which rounding lets their residual drift."""


@dataclass(frozen=True)
class Outcome:
    """The status and the norms of a finished iteration, on the host.

    `growth` is the last residual's M-norm divided by the first one's, for an iteration that contracts in the M-norm;
    None for one that contracts in the 2-norm, the norm of `residual_norm`.
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
        """How many times larger the residual has become, in the norm in which the iteration contracts."""
        return self.residual_norm if self.growth is None else self.growth

    @property
    def failed(self) -> bool:
        """Whether the value must not be used: not finite, or grown beyond the limit."""
        return not self.finite or self.grown > self.growth_limit


class FinishedIteration:
    """A solve that has made its steps.

    Attributes:
        value: the solution, complete after :meth:`finish`.
        direction: the vector that the last product multiplied, or the next one will.
        steps: products made.
        alpha, bounds: the step, or the interval of the spectrum, that was used; None for solvers without one.
        explanation: what an automatic setting chose, and why; empty otherwise.
        taken_back: takes the buffers back after the solve, whose value is then copied; None if nobody wants them.
    """

    value: FlatVector
    direction: FlatVector
    steps: int = 0
    alpha: float | None = None
    bounds: tuple[float, float] | None = None
    explanation: str = ""
    taken_back: Callable[[Any], None] | None = None

    def finish(self) -> Tensor:
        """Complete `value`; return float64 figures, still on the device, for :meth:`read`."""
        raise NotImplementedError

    def read(self, figures: Sequence[float]) -> Outcome:
        """The outcome, from the figures of :meth:`finish`, now on the host."""
        raise NotImplementedError

    def unscaled(self) -> Outcome | None:
        """The outcome of a solve on the CPU with `value` as it is, which still has to be multiplied by `alpha`; None if
        there is more to finish."""
        return None

    def outcome(self) -> Outcome:
        """Finish, and read the figures: here every solve waits for the device."""
        return self.read(self.finish().tolist())

    def solution(
        self, outcome: Outcome, hvps: int, damping: float, estimate: SpectralEstimate | None = None
    ) -> Solution:
        """The solution, still without its value, of a solve that went well."""
        return Solution(
            value=None,
            iterations=self.steps,
            hvps=hvps,
            residual_norm=outcome.residual_norm,
            residual_of=outcome.residual_of,
            status=outcome.status,
            alpha=self.alpha,
            lambda_max=estimate.largest if estimate else None,
            damping=damping,
            explanation=self.explanation,
        )


class Iteration(FinishedIteration):
    """One solve in progress, for at most `limit` products.

    Attributes:
        going: a number on the device that is positive as long as the solve has to go on; None if it makes all products.
    """

    limit: int
    going: Tensor | None = None

    @property
    def accumulation(self) -> Accumulation | None:
        """The step as an :class:`Accumulation`; None if it is not linear in the product."""
        return None

    def adapt(self, estimate: SpectralEstimate | None) -> None:
        """Set the coefficients that depend on the spectrum, from the host."""

    def start(self, v: Sequence[Tensor]) -> None:
        """Begin a solve with the right-hand side `v`."""
        raise NotImplementedError

    def step(self, product: Sequence[Tensor]) -> None:
        """Advance by one product with A, taken at `direction`."""
        raise NotImplementedError

    def doubtful(self, outcome: Outcome) -> bool:
        """Whether rounding may have parted the residual of `outcome`, which was updated, from b - A x."""
        return False

    def measured(self, outcome: Outcome, residual_norm: float) -> Outcome:
        """The outcome with the residual norm of b - A x itself."""
        return outcome

    def finished(self) -> bool:
        """Whether to stop before the limit."""
        # After products 1, 6, ..., 51, ...: right after the first one and each one that recomputed a residual, too.
        return self.going is not None and self.steps % CHECK_EVERY == 1 and not float(self.going) > 0

    def next_look(self) -> int:
        """After how many products :meth:`finished` may next be true."""
        return self.limit if self.going is None else self.steps + CHECK_EVERY - (self.steps - 1) % CHECK_EVERY

    @property
    def phase(self) -> Hashable:
        """What the host knows of a solve that decides what its next steps launch."""
        return self.steps

    def seek(self, steps: int) -> None:
        """Let the host know what it would after so many steps, which the device has made, or will have made by then."""
        self.steps = steps


def tolerance_of(tol: float | None, layout: Layout) -> float:
    """The relative residual to stop at: `tol` (by default eps^(2/3)), but at least eps."""
    epsilon = torch.finfo(layout.state_dtype).eps
    return max(epsilon, epsilon ** (2 / 3) if tol is None else tol)


@dataclass(frozen=True)
class Tolerance:
    """Where a residual is small enough: ||r|| <= max(relative ||b||, absolute)."""

    relative: float
    absolute: float

    def squared(self, squared_b: Tensor) -> Tensor:
        """The squared bound, on the device, from ||b||^2."""
        return (self.relative**2 * squared_b).clamp_min(self.absolute**2)

    def reached(self, residual: float, squared_b: float) -> bool:
        """Whether a residual, relative to ||b||, is within the bound."""
        return residual <= self.relative or residual * math.sqrt(squared_b) <= self.absolute


def measured_outcome(outcome: Outcome, residual: float, enough: bool, reachable: float) -> Outcome:
    """The outcome of a Krylov method with the norm of b - A x in place of that of the updated residual, which rounding
    may have parted from it. `enough`: whether it is within the tolerance; `reachable`: what rounding lets hope for."""
    status, sound = outcome.status, enough or residual <= max(2 * outcome.residual_norm, reachable)
    if status in (Status.CONVERGED, Status.ITERATION_LIMIT) and not sound:
        status = Status.STAGNATED
    finite = math.isfinite(residual)
    return replace(outcome, residual_norm=residual, status=status, finite=finite, growth_limit=math.inf)


def krylov_residual(squared_b: float, bad_b: float, squared: float, bad: float, bad_metric: float) -> float:
    """||r|| / ||b||, infinite if anything is not finite; `ValueError` for a preconditioner not positive definite."""
    if bad_metric and not bad_b:
        raise ValueError(
            "preconditioner: expected a symmetric positive definite M; got r . M r <= 0, or not finite, for a "
            "residual r: check the signs of its diagonal"
        )
    if bad or bad_b or not math.isfinite(squared):
        return math.inf
    return math.sqrt(squared / squared_b) if squared_b else 0.0


def scalar(value: float, device: torch.device) -> Tensor:
    """A 0-dim float64 tensor, the form in which ops take coefficients."""
    return torch.full((), value, dtype=torch.float64, device=device)


class RightHandSide:
    """A flat vector for right-hand sides; loading one also computes the partial sums of its squared norm."""

    def __init__(self, layout: Layout, partials: Tensor | None = None):
        self.vector = FlatVector.unset(layout)
        self.partials = layout.empty_partials() if partials is None else partials
        one, zero = scalar(1.0, layout.device), scalar(0.0, layout.device)
        self._load = ops.bind("scale_accumulate", (self.vector.data,), layout, (one, zero), 0.0, self.partials)

    def load(self, tensors: Sequence[Tensor]) -> None:
        """Overwrite the vector with `tensors`."""
        self._load(tensors)
        self.vector.refresh()

    def sums(self) -> Tensor:
        """The totals of the partials: ||b||^2, an unused one, and a count that is zero if all of b is finite."""
        return self.vector.layout.total(self.partials.sum(0))
