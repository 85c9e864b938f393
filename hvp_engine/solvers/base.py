"""What a solver is: init, step and finish bodies that an engine runs.

A solver is a small frozen object that describes a method. Its `init` gives an :class:`Iteration`, whose state
lives in flat buffers that never move; an engine alternates `product(iteration.direction)` and
`iteration.step(product)` at most `iteration.limit` times, then calls `iteration.finish()`. No body waits for the
device, except `finished()`, which an engine that captures the loop does not call.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from hvp_engine import ops
from hvp_engine.solution import Status
from hvp_engine.spectrum import SpectralEstimate
from hvp_engine.vectors import FlatVector, Layout

GROWTH_LIMIT = 1e4
"""A residual this many times the right-hand side is an error rather than a status."""


@dataclass(frozen=True)
class Outcome:
    """What the norms of a finished iteration say, on the host."""

    residual_norm: float
    residual_of: str
    status: Status
    finite: bool = True
    finite_v: bool = True
    growth_limit: float = GROWTH_LIMIT

    @property
    def failed(self) -> bool:
        """Whether the value must not be used: not finite, or grown beyond the limit."""
        return not self.finite or self.residual_norm > self.growth_limit


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

    def step(self, product: Sequence[Tensor]) -> None:
        """Advance by one product with A, taken at `direction`."""

    def finished(self) -> bool:
        """Whether to stop before the limit; may wait for the device."""


class Solver(Protocol):
    """A method of solving (A + damping I) x = v."""

    @property
    def damping(self) -> float: ...

    @property
    def estimates_spectrum(self) -> bool:
        """Whether `init` needs a spectral estimate."""

    def init(self, layout: Layout, v: Sequence[Tensor], estimate: SpectralEstimate | None) -> Iteration:
        """Begin a solve for the right-hand side `v`."""


def check_solver(solver: Any) -> None:
    if isinstance(solver, type) or not (hasattr(solver, "init") and hasattr(solver, "damping")):
        raise TypeError(f"solver: expected a solver such as hvp.Neumann(20); got {type(solver).__name__}")


def check_iterations(iterations: Any) -> None:
    if isinstance(iterations, bool) or not isinstance(iterations, int):
        raise TypeError(f"iterations: expected an int; got {type(iterations).__name__}")
    if iterations < 0:
        raise ValueError(f"iterations: expected a number of products >= 0; got {iterations}")


def check_positive(value: Any, name: str) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: expected a number; got {type(value).__name__}")
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"{name}: expected a finite number > 0; got {value}")


def check_damping(damping: Any) -> None:
    if isinstance(damping, bool) or not isinstance(damping, (int, float)):
        raise TypeError(f"damping: expected a number; got {type(damping).__name__}")
    if not (math.isfinite(damping) and damping >= 0):
        raise ValueError(f"damping: expected a finite number >= 0; got {damping}")


def scalar(value: float, device: torch.device) -> Tensor:
    """A 0-dim float64 tensor, as the ops take their coefficients."""
    return torch.full((), value, dtype=torch.float64, device=device)


def load(layout: Layout, tensors: Sequence[Tensor]) -> tuple[FlatVector, Tensor]:
    """A new flat vector holding `tensors`, and the partials of its squared norm, in one pass."""
    vector = FlatVector(layout)
    partials = layout.empty_partials()
    one, zero = scalar(1.0, layout.device), scalar(0.0, layout.device)
    incoming = replace(layout, dtypes=tuple(tensor.dtype for tensor in tensors))  # stored as the weights are
    ops.bind("scale_accumulate", (vector.data,), incoming, (one, zero), 0.0, partials)(tensors)
    vector.refresh()
    return vector, partials
