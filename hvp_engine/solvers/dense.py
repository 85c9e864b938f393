"""The dense solve: the matrix built by one product for each weight, and factorized."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hvp_engine._support.arguments import check_count, check_not_negative
from hvp_engine._support.flat_vector import STATE_DTYPES, FlatVector, Layout
from hvp_engine.operators.batched import stacked_tangents
from hvp_engine.solvers.base import Outcome, RightHandSide
from hvp_engine.solvers.solution import Status
from hvp_engine.solvers.spectrum import SpectralEstimate


@dataclass(frozen=True)
class Exact:
    """A + damping I as a matrix, and its exact solve.

    The matrix is made symmetric by averaging it with its transpose. Positive definite ones are solved by Cholesky;
    others, indefinite ones included, by their eigenvalues. Eigenvalues that are zero to 10 n eps of the largest are
    left out: x is then the least-squares solution of smallest norm, and the status is SINGULAR.

    Arguments:
        dtype: what the matrix is stored and factorized in, torch.float32 or torch.float64; None is the dtype that the
            weights are solved in. (Products are made in the weights' own dtype in any case.)
        max_size: refuse more weights than that: memory grows as n^2, time as n^3.
        damping: added to the diagonal, >= 0.

    Cost: n products for n weights, whatever v is and however many there are; 3 n^2 numbers of memory (4 n^2 unless
    positive definite), n^3 / 3 operations (about 10 n^3).

    Errors: `TypeError` or `ValueError` naming the argument, at construction; `ValueError` in a solve with more than
    `max_size` weights.

    >>> import torch, hvp_engine as hvp
    >>> A = torch.tensor([[2.0, 1.0], [1.0, -1.0]])
    >>> hvp.solve(lambda v: A @ v, torch.tensor([4.0, -1.0]), hvp.Exact()).value
    tensor([1.0000, 2.0000])
    """

    dtype: torch.dtype | None = None
    max_size: int = 10_000
    damping: float = 0.0

    def __post_init__(self) -> None:
        if self.dtype is not None and self.dtype not in STATE_DTYPES:
            raise ValueError(f"dtype: expected torch.float32, torch.float64 or None; got {self.dtype}")
        check_count(self.max_size, "max_size", what="the number of weights")
        check_not_negative(self.damping, "damping")

    @property
    def estimates_spectrum(self) -> bool:
        return False

    def allocate(self, layout: Layout) -> ExactIteration:
        dtype = layout.state_dtype if self.dtype is None else self.dtype
        size = layout.numel
        if size > self.max_size:
            raise ValueError(
                f"Exact: expected at most max_size={self.max_size} weights; got {size}, whose matrix takes "
                f"{size * size * dtype.itemsize / 1e9:.3g} GB: use hvp.ConjugateGradient, or raise max_size"
            )
        return ExactIteration(layout, dtype, self.damping)


class Columns:
    """An operator's matrix, one product with a unit vector after another.

    Rows and columns are the weights' elements, tensor after tensor, each in row-major order.
    """

    accumulation = None

    def __init__(self, layout: Layout, dtype: torch.dtype):
        layout.refuse_parts("a dense matrix")
        self.limit, self.steps = layout.numel, 0
        self.direction = FlatVector(layout)
        index = torch.arange(layout.size, device="cpu")
        places = torch.cat([index[:0], *(view.reshape(-1) for view in layout.views(index))])
        self.places = places.to(layout.device)
        self._places = places.tolist()
        self._work = FlatVector(layout)
        self._rows = torch.zeros(self.limit, self.limit, dtype=dtype, device=layout.device)
        self.restart()

    @property
    def matrix(self) -> Tensor:
        """The products as columns."""
        return self._rows.T

    def restart(self) -> None:
        """Begin, or begin anew."""
        self.steps = 0
        self.direction.data.zero_()
        self._point(1.0)

    def step(self, product: Sequence[Tensor]) -> None:
        self._work.copy_(product)
        self._rows[self.steps] = self._work.data[self.places]
        self._point(0.0)
        self.steps += 1
        self._point(1.0)

    def block(self, count: int) -> list[Tensor]:
        """The next `count` unit vectors, stacked along a first dimension of each weight's tensor."""
        layout = self.direction.layout
        units = torch.zeros(count, layout.size, device=self.places.device)
        units[torch.arange(count, device=units.device), self.places[self.steps : self.steps + count]] = 1.0
        return stacked_tangents(layout, units)

    def step_block(self, products: Sequence[Tensor]) -> None:
        """Advance by the products with :meth:`block`."""
        rows = torch.cat([product.flatten(1) if product.dim() > 1 else product[:, None] for product in products], 1)
        self._point(0.0)
        self._rows[self.steps : self.steps + len(rows)] = rows
        self.steps += len(rows)
        self._point(1.0)

    def finished(self) -> bool:
        return False

    def _point(self, value: float) -> None:
        """Put `value` where the unit vector of this step has its one."""
        if self.steps < self.limit:
            self.direction.data[self._places[self.steps]] = value
            self.direction.refresh()


class ExactIteration(Columns):
    """The matrix, then its factorization, made at the first :meth:`finish` and kept until a new start."""

    def __init__(self, layout: Layout, dtype: torch.dtype, damping: float):
        super().__init__(layout, dtype)
        self._damping = damping
        self._b = RightHandSide(layout)
        self.value = FlatVector(layout)

    def adapt(self, estimate: SpectralEstimate | None) -> None:
        pass

    def start(self, v: Sequence[Tensor]) -> None:
        self.restart()
        self._inverse: tuple[Callable[[Tensor], Tensor], int] | None = None
        self._b.load(v)

    def sharing(self, v: Sequence[Tensor]) -> ExactIteration:
        """The same matrix and factorization, when all its products have been made, with another right-hand side."""
        other = copy.copy(self)
        other._b, other.value = RightHandSide(self.value.layout), FlatVector(self.value.layout)
        other._b.load(v)
        other.steps = 0
        return other

    def finish(self) -> Tensor:
        """Unlike other solvers' this waits for the device, which a factorization does in any case."""
        _, _, bad_v = self._b.sums().unbind()
        b = self._b.vector.data[self.places].to(self._rows.dtype)
        bad = bad_v + (~torch.isfinite(self._rows).all()).double()
        if bad > 0:
            return torch.stack([bad.new_tensor(math.inf), bad.new_zeros(()), bad, bad_v])
        if self._inverse is None:
            matrix = (self._rows + self._rows.T) / 2
            matrix.diagonal().add_(self._damping)
            self._inverse = _factorize(matrix)
        inverse, deficient = self._inverse
        x = inverse(b)
        norm = torch.linalg.vector_norm(b)
        product = (self._rows @ x + self._rows.T @ x) / 2 + self._damping * x
        residual = torch.linalg.vector_norm(b - product) / torch.where(norm > 0, norm, 1.0)
        self.value.data[self.places] = x.to(self.value.data.dtype)
        return torch.stack([residual.double(), bad.new_tensor(float(deficient)), bad, bad_v])

    def read(self, figures: Sequence[float]) -> Outcome:
        residual, deficient, bad, bad_v = figures
        exact = not deficient and residual <= math.sqrt(torch.finfo(self._rows.dtype).eps)
        status = Status.CONVERGED if exact else Status.SINGULAR
        return Outcome(residual, "returned", status, not bad and math.isfinite(residual), not bad_v)


def _factorize(matrix: Tensor) -> tuple[Callable[[Tensor], Tensor], int]:
    """The inverse of a symmetric matrix as a function, of smallest norm; and how many eigenvalues are zero."""
    factor, info = torch.linalg.cholesky_ex(matrix)
    threshold = 10 * len(matrix) * torch.finfo(matrix.dtype).eps

    def solve(b: Tensor) -> Tensor:
        return torch.cholesky_solve(b[:, None], factor)[:, 0]

    if len(matrix) and not int(info) and _smallest(solve, matrix) > threshold * float(torch.linalg.matrix_norm(matrix)):
        return solve, 0
    values, vectors = torch.linalg.eigh(matrix)
    size = values.abs()
    zero = size <= threshold * (size.max() if len(size) else 0.0)
    inverse = torch.where(zero, 0.0, 1 / torch.where(zero, 1.0, values))
    return lambda b: vectors @ (inverse * (vectors.T @ b)), int(zero.sum())


def _smallest(solve: Callable[[Tensor], Tensor], matrix: Tensor) -> float:
    """The smallest eigenvalue, nearly, by inverse iteration: pivots can hide that a matrix is singular."""
    generator = torch.Generator().manual_seed(0)
    vector = torch.randn(len(matrix), generator=generator, dtype=matrix.dtype, device="cpu").to(matrix.device)
    growth = 1.0
    for _ in range(3):
        vector = vector / torch.linalg.vector_norm(vector)
        vector = solve(vector)
        growth = float(torch.linalg.vector_norm(vector))
    return 1 / growth if growth < math.inf else 0.0
