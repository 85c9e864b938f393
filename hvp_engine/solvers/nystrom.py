"""The Nystrom approximation of a Hessian, and its inverse by Woodbury's identity."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hvp_engine.low_rank import Kind, Sketch, check_kind
from hvp_engine.solution import Status
from hvp_engine.solvers.base import Outcome, RightHandSide, check_damping, check_positive
from hvp_engine.spectrum import SpectralEstimate
from hvp_engine.vectors import FlatVector, Layout


@dataclass(frozen=True)
class Nystrom:
    """x = (A_k + (rho + damping) I)^-1 v, with A_k = Y (T^T Y)^+ Y^T, Y = A T: A as seen by `rank` test vectors T.

    With A_k = U L U^T in orthonormal U, x = (v - U U^T v) / s + U (L + s)^-1 U^T v, s = rho + damping: Woodbury's
    identity without its differences of large terms. It solves well in the eigenvalues that stand out and
    treats all others as rho: for a spectrum that falls off within `rank` eigenvalues x is as exact as rho is small
    beside them; for another one it is a rough answer however small rho is, and the residual says so.

    Arguments:
        rank: number of test vectors, >= 1, at most the number of weights.
        rho: > 0: what the rest of the spectrum is taken to be; the paper's default 0.01 fits eigenvalues of size 1.
        damping: added to the diagonal of A, >= 0.
        sketch: "gaussian" test vectors; or "columns", as in the paper: T are unit vectors, Y columns of A. A
            single column sees little of a matrix whose rows are alike in size, so random vectors are the default.
        seed: of the test vectors; the same ones in every solve.

    Negative curvature has no place in it: negative eigenvalues of T^T Y are left out, and the status says so.

    Cost: `rank` products and one for the residual. They depend neither on each other nor on v: they are made once for
    several right-hand sides, up to 32 at a time where they are traced and it pays (up to 16,384 weights on a CPU).
    3 `rank` flat vectors of weights, which is `rank` times as many as other solvers need.

    Errors: `TypeError` or `ValueError` naming the argument, at construction.

    Source: Hataya and Yamada 2023, equation 6; numerics: Frangella, Tropp and Udell 2023.

    >>> import torch, hvp_engine as hvp
    >>> A = torch.diag(torch.tensor([4.0, 2.0, 0.0, 0.0]))
    >>> hvp.solve(lambda v: A @ v, torch.tensor([1.0, 1.0, 0.0, 0.0]), hvp.Nystrom(3, rho=1e-4)).value
    tensor([0.2500, 0.5000, 0.0000, 0.0000])
    """

    rank: int
    rho: float = 0.01
    damping: float = 0.0
    sketch: Kind = "gaussian"
    seed: int = 0

    def __post_init__(self) -> None:
        if isinstance(self.rank, bool) or not isinstance(self.rank, int):
            raise TypeError(f"rank: expected an int; got {type(self.rank).__name__}")
        if self.rank < 1:
            raise ValueError(f"rank: expected a number of test vectors >= 1; got {self.rank}")
        check_positive(self.rho, "rho")
        check_damping(self.damping)
        check_kind(self.sketch)

    @property
    def estimates_spectrum(self) -> bool:
        return False

    def allocate(self, layout: Layout) -> NystromIteration:
        return NystromIteration(self, layout)


class NystromIteration:
    """The sketch first; then x, and the product at x."""

    accumulation = None

    def __init__(self, solver: Nystrom, layout: Layout):
        self.sketch = Sketch(layout, solver.rank, solver.sketch, solver.seed)
        self.limit, self.steps = self.sketch.limit + 1, 0
        self._shift, self._damping = solver.rho + solver.damping, solver.damping
        self._b = RightHandSide(layout)
        self.value, self._residual = FlatVector(layout), FlatVector(layout)
        self._negative = torch.zeros((), dtype=torch.bool, device=layout.device)
        self._layout = layout
        self._low_rank: tuple[Tensor, Tensor, Tensor] | None = None
        self._solved = False

    @property
    def direction(self) -> FlatVector:
        return self.value if self._solved else self.sketch.direction

    def adapt(self, estimate: SpectralEstimate | None) -> None:
        pass

    def start(self, v: Sequence[Tensor]) -> None:
        self.steps = 0
        self.sketch.restart()
        self._low_rank, self._solved = None, False
        self._b.load(v)

    def sharing(self, v: Sequence[Tensor]) -> NystromIteration:
        """The same sketch, when it is complete, with another right-hand side: only the residual's product is left."""
        other = copy.copy(self)
        other._b, other.value = RightHandSide(self._layout), FlatVector(self._layout)
        other._residual = FlatVector(self._layout)
        other._b.load(v)
        other.invert()
        other.steps = 0
        return other

    def step(self, product: Sequence[Tensor]) -> None:
        self.steps += 1
        if self._solved:
            self._residual.copy_(product)
            self._residual.data.add_(self.value.data, alpha=self._damping).sub_(self._b.vector.data)
            return
        self.sketch.step(product)
        if self.sketch.steps == self.sketch.limit:
            self.invert()

    def invert(self) -> None:
        """Compute x from the complete sketch; the next product is that for the residual."""
        self.steps, self._solved = self.sketch.limit, True
        if self._low_rank is None:
            self._low_rank = self.sketch.low_rank()
        basis, values, self._negative = self._low_rank
        b, rest = self._b.vector.data, self._residual.data
        coordinates = basis @ b
        rest.copy_(b)
        rest.addmv_(basis.T, coordinates, alpha=-1)
        rest.addmv_(basis.T, basis @ rest, alpha=-1)  # once more: rounding along U would be divided by the shift
        torch.div(rest, self._shift, out=self.value.data)
        self.value.data.addmv_(basis.T, coordinates / (values + self._shift))
        self.value.refresh()

    def finished(self) -> bool:
        return False

    def finish(self) -> Tensor:
        squared_b, _, bad_b = self._b.sums().unbind()
        squared = torch.linalg.vector_norm(self._residual.data).double().square()
        return torch.stack([squared_b, bad_b, squared, self._negative.double()])

    def read(self, figures: Sequence[float]) -> Outcome:
        squared_b, bad_b, squared, negative = figures
        finite = math.isfinite(squared) and not bad_b
        residual = (math.sqrt(squared / squared_b) if squared_b else 0.0) if finite else math.inf
        if residual <= math.sqrt(torch.finfo(self.value.data.dtype).eps):
            status = Status.CONVERGED
        elif negative:
            status = Status.NEGATIVE_CURVATURE
        else:
            status = Status.DIVERGED if residual > 1 else Status.ITERATION_LIMIT
        return Outcome(residual, "returned", status, finite, bad_b == 0, growth_limit=math.inf)
