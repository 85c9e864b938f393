"""The Nystrom approximation of a Hessian, and its inverse by Woodbury's identity."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from hvp_engine._support.arguments import check_count, check_not_negative, check_or_auto, check_positive, replace_fields
from hvp_engine._support.flat_vector import FlatVector
from hvp_engine.differentiation.linear_map import LinearMap
from hvp_engine.solvers.base import LinearSystem, Prepared, Result, Solver
from hvp_engine.solvers.batched import fill
from hvp_engine.solvers.iteration import FinishedIteration, Outcome, RightHandSide
from hvp_engine.solvers.low_rank import Kind, Sketch, check_kind
from hvp_engine.solvers.solution import Status


@dataclass(frozen=True)
class Nystrom(Solver):
    """x = (A_k + (rho + damping) I)^-1 v, with A_k = Y (T^T Y)^+ Y^T, Y = A T, for `rank` test vectors T.

    With A_k = U L U^T, orthonormal U and s = rho + damping, x = U (L + s)^-1 U^T v + r / s, where r = v - U U^T v is
    the part of v that the test vectors missed: Woodbury's identity without its differences of large terms. It inverts
    the eigenvalues that stand out and replaces all others by rho. A fixed rho that is much smaller than those that
    matter for v makes r / s, and so x, too large by their ratio. rho = "auto" replaces them by the Rayleigh quotient of
    A at r: s = r . A r / r . r + damping for r, and s = damping in the first term. Of all multiples of r that is the
    closest to A^-1 r in the A-norm. If many eigenvalues are large, x is a rough answer, as the residual shows; refine
    it by conjugate gradients with a :class:`NystromPreconditioner`.

    Arguments:
        rank: number of test vectors, >= 1, at most the number of weights.
        rho: > 0, the value assumed for the rest of the spectrum (the paper's default is 0.01), or "auto".
        damping: added to the diagonal of A, >= 0.
        sketch: "gaussian" test vectors; or "columns", as in the paper: T are unit vectors, Y columns of A.
            A few columns say little about a matrix whose rows are alike in size, so random vectors are the default.
        seed: of the test vectors; the same ones in every solve.

    Negative eigenvalues of T^T Y are dropped, and the status is NEGATIVE_CURVATURE. With rho = "auto", r is dropped too
    if A has no positive curvature along it; if A is zero there, x is the least-squares solution of smallest norm.

    Cost: `rank` products, one for the residual, and one for rho = "auto". The first do not depend on v or on each
    other: several right-hand sides share them, and traced operators make up to 32 of them at a time where that pays off
    (up to 16,384 weights on a CPU). Memory: 3 `rank` flat vectors of weights, `rank` times what other solvers need.

    Errors: `TypeError` or `ValueError` naming the argument, at construction.

    Source: Hataya and Yamada, Nystrom Method for Accurate and Scalable Implicit Differentiation, AISTATS 2023, equation
    6; numerics: Frangella, Tropp and Udell, Randomized Nystrom Preconditioning, SIAM Journal on Matrix Analysis and
    Applications 2023.

    >>> import torch, hvp_engine as hvp
    >>> A = torch.diag(torch.tensor([4.0, 2.0, 0.0, 0.0]))
    >>> hvp.solve(lambda v: A @ v, torch.tensor([1.0, 1.0, 0.0, 0.0]), hvp.Nystrom(3)).value
    tensor([0.2500, 0.5000, 0.0000, 0.0000])
    """

    rank: int
    rho: float | Literal["auto"] = "auto"
    damping: float = 0.0
    sketch: Kind = "gaussian"
    seed: int = 0

    def __post_init__(self) -> None:
        rank = check_count(self.rank, "rank", what="the number of test vectors")
        rho = check_or_auto(check_positive, self.rho, "rho")
        replace_fields(self, rank=rank, rho=rho, damping=check_not_negative(self.damping, "damping"))
        check_kind(self.sketch)

    def prepare(self, system: LinearSystem) -> NystromSolve:
        return NystromSolve(self, system)


class NystromSolve(Prepared):
    """The sketch and its low-rank form; each right-hand side takes one more product for its residual, and one for an
    automatic rho."""

    solver: Nystrom

    def __init__(self, solver: Nystrom, system: LinearSystem):
        super().__init__(solver, system)
        sketch = Sketch(self.operator.layout, solver.rank, solver.sketch, solver.seed)
        fill(sketch, self.operator)
        self._steps = sketch.steps  # counted for the first right-hand side
        self._low_rank = sketch.low_rank()

    def run(self, vs: Sequence[Sequence[Tensor]], names: Sequence[str]) -> Iterator[Result]:
        for v, name in zip(vs, names, strict=True):
            iteration = _NystromIteration(self.solver, self.operator, self._steps)
            iteration.solve(v, *self._low_rank)
            yield self.conclude(name, iteration, iteration.outcome(), iteration.steps)
            self._steps = 0


class _NystromIteration(FinishedIteration):
    """x for one right-hand side, from the low-rank form, and its residual."""

    def __init__(self, solver: Nystrom, operator: LinearMap, steps: int):
        self._rho, self._damping, self._operator, self.steps = solver.rho, solver.damping, operator, steps
        layout = operator.layout
        self._b, self._residual = RightHandSide(layout), FlatVector(layout)
        self.value = self.direction = FlatVector(layout)
        self._singular = torch.zeros((), dtype=torch.bool, device=layout.device)

    def solve(self, v: Sequence[Tensor], basis: Tensor, values: Tensor, negative: Tensor) -> None:
        self._b.load(v)
        self._negative = negative
        b, rest = self._b.vector.data, self._residual.data
        coordinates = basis @ b
        rest.copy_(b)
        rest.addmv_(basis.T, coordinates, alpha=-1)
        rest.addmv_(basis.T, basis @ rest, alpha=-1)  # again: rounding errors along U would be divided by the shift
        if isinstance(self._rho, float | int):
            shift = self._rho + self._damping
            torch.div(rest, shift, out=self.value.data)
            self.value.data.addmv_(basis.T, coordinates / (values + shift))
        else:
            torch.mv(basis.T, coordinates * _inverse(values, self._damping, _negligible(values)), out=self.value.data)
            self._residual.refresh()
            self._add_rest(self._product(self._residual), values)
        self.value.refresh()
        self._residual.copy_(self._product(self.value))
        self._residual.data.add_(self.value.data, alpha=self._damping).sub_(self._b.vector.data)

    def _product(self, vector: FlatVector) -> Sequence[Tensor]:
        self.steps += 1
        return self._operator.product(vector.tangents)

    def _add_rest(self, product: Sequence[Tensor], values: Tensor) -> None:
        """Add the multiple of r, the rest of v, that is closest to A^-1 r in the A-norm; `product` is A r."""
        rest, image = self._residual, FlatVector.of(self._operator.layout, product)
        squared = rest.dot(rest)
        curvature = torch.where(squared > 0, rest.dot(image) / squared, 0.0)
        least = _negligible(values)
        self._negative = self._negative | (curvature < -least)
        self._singular = (curvature + self._damping <= least) & (squared > 0)
        self.value.data.add_(rest.data * _inverse(curvature, self._damping, least))

    def finish(self) -> Tensor:
        squared_b, _, bad_b = self._b.sums().unbind()
        squared = torch.linalg.vector_norm(self._residual.data).double().square()
        return torch.stack([squared_b, bad_b, squared, self._negative.double(), self._singular.double()])

    def read(self, figures: Sequence[float]) -> Outcome:
        squared_b, bad_b, squared, negative, singular = figures
        finite = math.isfinite(squared) and not bad_b
        residual = (math.sqrt(squared / squared_b) if squared_b else 0.0) if finite else math.inf
        if residual <= math.sqrt(torch.finfo(self.value.data.dtype).eps):
            status = Status.CONVERGED
        elif negative:
            status = Status.NEGATIVE_CURVATURE
        elif singular:
            status = Status.SINGULAR
        else:
            status = Status.DIVERGED if residual > 1 else Status.ITERATION_LIMIT
        return Outcome(residual, "returned", status, finite, bad_b == 0, growth_limit=math.inf)


def _negligible(values: Tensor) -> Tensor:
    """Eigenvalues below this are rounding errors."""
    return 10 * len(values) * torch.finfo(values.dtype).eps * values.max()


def _inverse(values: Tensor, damping: float, negligible: Tensor) -> Tensor:
    """1 / (values + damping), or 0 where that is not positive beyond rounding."""
    shifted = values + damping
    return torch.where(shifted > negligible, 1 / shifted, 0.0)
