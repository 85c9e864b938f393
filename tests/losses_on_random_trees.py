"""The parts of a call with random trees: losses with closed forms, arguments with flaws, solvers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from fused_op_oracles import F64
from hypothesis import strategies as st
from problems_with_known_answers import DTYPE, matrix_with, randn
from random_trees import CONTAINERS, SILENT, TOLERANCES, Sample, flawed, joined, like, samples
from torch import Tensor

import hvp_engine as hvp

ALPHA, TERMS = 0.25, 6
Found = tuple[Any, Tensor]
"""A tree of what was found, and the closed form, flat and in float64."""


@dataclass(frozen=True)
class Losses:
    """L_T = w^T A w / 2 + bend sum(w^4) / 12 - w^T B h and L_V = w . (w / 2 + c) + d . h, of the joined trees.

    The Hessian is A + bend diag(w^2), the mixed derivative -B.
    """

    a: Tensor
    b: Tensor
    c: Tensor
    d: Tensor
    bend: float

    @classmethod
    def of(cls, weights: int, hyper: int, seed: int, bend: float) -> Losses:
        a = matrix_with(torch.linspace(0.7, 2.0, weights, dtype=DTYPE), seed) if weights else torch.zeros(0, 0)
        b, c, d = randn(weights, hyper, seed=seed + 1), randn(weights, seed=seed + 2), randn(hyper, seed=seed + 3)
        return cls(a.to(DTYPE), b, c, d, bend)

    def train(self, weights: Any, hyper: Any, batch: Any = None) -> Tensor:
        w, h = joined(weights), joined(hyper)
        return self.alone(weights) - w @ self.b.to(w) @ h.to(w)

    def alone(self, weights: Any, factor: Any = 1.0) -> Tensor:
        """The part with curvature, times a number."""
        w = joined(weights)
        return factor * (w @ self.a.to(w) @ w / 2 + self.bend * w.pow(4).sum() / 12)

    def val(self, weights: Any, hyper: Any, batch: Any = None) -> Tensor:
        w, h = joined(weights), joined(hyper)
        return w @ (w / 2 + self.c.to(w)) + (self.d.to(h) @ h).to(w)

    def hessian(self, w: Tensor) -> Tensor:
        return self.a + self.bend * torch.diag(w.square())

    def gradient(self, w: Tensor, h: Tensor) -> Tensor:
        return self.a @ w + self.bend * w.pow(3) / 3 - self.b @ h

    def inverse(self, w: Tensor, damping: float = 0.0) -> Tensor:
        """Of the Hessian; NaN where there is none."""
        matrix = self.hessian(w) + damping * torch.eye(len(w), dtype=DTYPE)
        if not bool(torch.isfinite(matrix).all()):
            return torch.full_like(matrix, torch.nan)
        return torch.linalg.inv(matrix)

    def hypergradient(self, w: Tensor, h: Tensor, damping: float = 0.0, active: Tensor | None = None) -> Tensor:
        """d + B^T H^-1 (w + c), of the weights in `active` alone."""
        active = torch.ones_like(w, dtype=torch.bool) if active is None else active
        matrix = (self.hessian(w) + damping * torch.eye(len(w), dtype=DTYPE))[active][:, active]
        if not bool(torch.isfinite(matrix).all()):
            return torch.full_like(h, torch.nan)
        return self.d + self.b[active].T @ torch.linalg.solve(matrix, (w + self.c)[active])


@dataclass
class World:
    """Trees for one call, the argument `where` perhaps with a flaw.

    A call says `trivial` where no derivative depends on anything, and `propagates` where numbers that are not finite
    are taken, and come out where mathematics has them come out.
    """

    draw: Callable[[Any], Any]
    containers: list[str]
    takes: dict[str, list[str]]
    dtypes: set[torch.dtype] = field(default_factory=set)
    flaw: str | None = None
    where: str = ""
    trivial: bool = False
    propagates: bool = False

    def __post_init__(self) -> None:
        if self.takes and self.draw(st.integers(0, 3)) == 0:
            self.where = self.draw(st.sampled_from(sorted(self.takes)))
            self._planned = self.draw(st.sampled_from(self.takes[self.where]))

    def argument(self, name: str, sample: Sample) -> Sample:
        """`sample` as the argument `name`, with the flaw if that is where it is to be, and if it can have it."""
        self.dtypes |= sample.dtypes
        if self.where != name:
            return sample
        if self._planned == "wider" and F64 in self.sample("weights").dtypes:
            return sample  # then nothing is too wide
        changed = flawed(sample, self.draw(st.integers(0, len(sample.leaves) - 1)), self._planned)
        if changed is not None:
            self.flaw = self._planned
        return sample if changed is None else changed

    @property
    def computable(self) -> bool:
        """Whether a loss can be computed with the arguments as they are."""
        return self.flaw is None or self.flaw in SILENT or self.where not in ("weights", "hyper")

    def sample(self, name: str) -> Sample:
        """A tree without flaws, drawn once."""
        return getattr(self, f"_{name}")

    def shaped(self, sample: Sample) -> None:
        """Let the weights be `sample`, for a call that takes none of other shapes."""
        self.__dict__["_weights"] = sample

    @cached_property
    def _weights(self) -> Sample:
        return self.draw(samples(self.containers))

    @cached_property
    def _hyper(self) -> Sample:
        return self.draw(samples(self.containers, 2))

    @cached_property
    def weights(self) -> Sample:
        return self.argument("weights", self._weights)

    @cached_property
    def hyper(self) -> Sample:
        return self.argument("hyper", self._hyper)

    @cached_property
    def v(self) -> Sample:
        return self.argument("v", self.draw(like(self._weights)))

    @cached_property
    def losses(self) -> Losses:
        w, h = self._weights.numbers, self._hyper.numbers
        return Losses.of(len(w), len(h), self.draw(st.integers(0, 10**6)), self.draw(st.sampled_from([0.0, 1.0])))

    @property
    def tolerance(self) -> float:
        return max(TOLERANCES[dtype] for dtype in self.dtypes)

    @cached_property
    def engine(self) -> str:
        return self.draw(st.sampled_from(["eager", "eager", "linearized", "auto"]))

    @cached_property
    def damping(self) -> float:
        return self.draw(st.sampled_from([0.0, 0.0, 0.5]))

    @cached_property
    def solver(self) -> Any:
        """One that solves well conditioned systems."""
        return self.draw(st.sampled_from(SOLVERS))(self.damping)


SOLVERS: list[Callable[[float], Any]] = [
    lambda damping: hvp.ConjugateGradient(60, damping=damping),
    lambda damping: hvp.MINRES(60, damping=damping),
    lambda damping: hvp.Exact(damping=damping),
    lambda damping: hvp.Neumann(120, damping=damping),
    lambda damping: hvp.Chebyshev(50, damping=damping),
    lambda damping: hvp.Budget(error=1e-7, damping=damping),
    lambda damping: hvp.Budget(hvps=80, damping=damping),
]


@dataclass(frozen=True)
class Subject:
    """A call, the arguments in which it may find flaws and which, and the containers that it takes.

    `called` has the names by which messages call arguments, where they are others; `share` is that of examples, beside
    1 for others.
    """

    call: Callable[[World], Found]
    takes: dict[str, list[str]]
    containers: list[str] = field(default_factory=lambda: list(CONTAINERS))
    called: dict[str, str] = field(default_factory=dict)
    share: float = 1.0
