"""The direct solve: the matrix is built by one product for each weight and factorized, or its few factors are found."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hvp_engine._support.arguments import check_count, check_not_negative, replace_fields
from hvp_engine._support.flat_vector import STATE_DTYPES, FlatVector, Layout
from hvp_engine.solvers.base import LinearSystem, Prepared, Result, Solver
from hvp_engine.solvers.batched import fill, stacked_tangents
from hvp_engine.solvers.diagonal_plus_low_rank import DiagonalPlusLowRank
from hvp_engine.solvers.iteration import FinishedIteration, Outcome
from hvp_engine.solvers.solution import Status


@dataclass(frozen=True)
class Exact(Solver):
    """A direct solve with the dense matrix A + damping I.

    The matrix is made symmetric, (A + A^T) / 2. A positive definite one is solved by Cholesky factorization, any other
    by its eigendecomposition. Eigenvalues below 10 n eps of the largest count as zero and are left out: x is then the
    least-squares solution of smallest norm, and the status is SINGULAR.

    Where every weight has a decay > 0 that the loss's graph shows, and what is left of A has a low rank, as in a linear
    model with few examples, a basis of its range replaces the matrix, for at least 256 weights in float64.

    Arguments:
        dtype: what the matrix is stored and factorized in, torch.float32 or torch.float64; None is the dtype in which
            the other solvers work. (Products are always made in the weights' own dtype.)
        max_size: refuse more weights than that: memory grows as n^2, time as n^3.
        damping: added to the diagonal, >= 0.

    Cost: n products for n weights, shared by all right-hand sides; 3 n^2 numbers of memory and n^3 / 3 operations
    (4 n^2 and about 10 n^3 unless positive definite). With a decay and a rest of rank r <= n / 5: about 2 r products,
    r n numbers and 8 r^2 n operations; `max_size` does not apply.

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
        max_size = check_count(self.max_size, "max_size", what="the number of weights")
        replace_fields(self, max_size=max_size, damping=check_not_negative(self.damping, "damping"))

    def prepare(self, system: LinearSystem) -> Prepared:
        found = DiagonalPlusLowRank(system.operator, self.damping)
        return LowRankSolve(self, system, found) if found.inverse is not None else DenseSolve(self, system, found)

    def columns(self, layout: Layout) -> Columns:
        """Buffers for the matrix; `ValueError` for more weights than `max_size`."""
        dtype = layout.state_dtype if self.dtype is None else self.dtype
        size = layout.numel
        if size > self.max_size:
            raise ValueError(
                f"Exact: expected at most max_size={self.max_size} weights; got {size}, whose matrix takes "
                f"{size * size * dtype.itemsize / 1e9:.3g} GB: use hvp.ConjugateGradient, or raise max_size"
            )
        return Columns(layout, dtype)


class Columns:
    """An operator's matrix, built by products with unit vectors.

    Rows and columns are the weights' elements, tensor after tensor, each in row-major order.
    """

    def __init__(self, layout: Layout, dtype: torch.dtype):
        layout.refuse_parts("a dense matrix")
        self.limit, self.steps = layout.numel, 0
        self.direction = FlatVector(layout)
        self.places = layout.places()
        self._places = self.places.tolist()
        self._work = FlatVector(layout)
        self._rows = torch.zeros(self.limit, self.limit, dtype=dtype, device=layout.device)
        self._point(1.0)

    @property
    def matrix(self) -> Tensor:
        """The products as columns."""
        return self._rows.T

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
        rows = torch.cat([product.flatten(1) if product.dim() > 1 else product[:, None] for product in products], 1)
        self._point(0.0)
        self._rows[self.steps : self.steps + len(rows)] = rows
        self.steps += len(rows)
        self._point(1.0)

    def _point(self, value: float) -> None:
        """Write `value` where the unit vector of this step is 1."""
        if self.steps < self.limit:
            self.direction.data[self._places[self.steps]] = value
            self.direction.refresh()


@dataclass
class DenseSolution(FinishedIteration):
    """The solution for one right-hand side, from the factorization."""

    value: FlatVector
    direction: FlatVector
    steps: int


class LowRankSolve(Prepared):
    """The factors of a diagonal plus a matrix of low rank."""

    def __init__(self, solver: Exact, system: LinearSystem, factors: DiagonalPlusLowRank):
        super().__init__(solver, system)
        self._factors, self._counted = factors, 0

    def run(self, vs: Sequence[Sequence[Tensor]], names: Sequence[str]) -> Iterator[Result]:
        factors, layout = self._factors, self.operator.layout
        assert factors.inverse is not None
        for v, name in zip(vs, names, strict=True):
            vector, value, places = FlatVector.of(layout, v), FlatVector(layout), layout.places()
            b = vector.data[places]
            finite_v = bool(torch.isfinite(b).all())
            residual = math.inf
            if finite_v:
                value.data[places], residual = factors.inverse(b)
            steps, self._counted = factors.products - self._counted, factors.products
            finite = math.isfinite(residual)
            outcome = Outcome(residual, "returned", Status.CONVERGED if finite else Status.DIVERGED, finite, finite_v)
            yield self.conclude(name, DenseSolution(value, vector, steps), outcome, steps)


class DenseSolve(Prepared):
    """The matrix, made by n products, and its factorization, after factors that were `sought` in vain."""

    def __init__(self, solver: Exact, system: LinearSystem, sought: DiagonalPlusLowRank):
        super().__init__(solver, system)
        layout = self.operator.layout
        self._columns = solver.columns(layout)
        fill(self._columns, self.operator)
        self._steps = self._columns.steps + sought.products  # they count for the first right-hand side
        matrix = self._columns.matrix
        self._matrix = (matrix + matrix.T) / 2
        self._matrix.diagonal().add_(solver.damping)
        self._inverse: Callable[[Tensor], Tensor] | None = None
        if bool(torch.isfinite(matrix).all()):
            self._inverse, self._deficient = _factorize(self._matrix)

    def run(self, vs: Sequence[Sequence[Tensor]], names: Sequence[str]) -> Iterator[Result]:
        for v, name in zip(vs, names, strict=True):
            solution, outcome = self._solution(v)
            yield self.conclude(name, solution, outcome, solution.steps)
            self._steps = 0

    def _solution(self, v: Sequence[Tensor]) -> tuple[DenseSolution, Outcome]:
        vector = FlatVector.of(self.operator.layout, v)
        solution = DenseSolution(FlatVector(self.operator.layout), vector, self._steps)
        b = vector.data[self._columns.places].to(self._matrix.dtype)
        finite_v = bool(torch.isfinite(b).all())
        if not finite_v or self._inverse is None:
            return solution, Outcome(math.inf, "returned", Status.DIVERGED, False, finite_v)
        x = self._inverse(b)
        norm = torch.linalg.vector_norm(b)
        residual = float(torch.linalg.vector_norm(b - self._matrix @ x) / torch.where(norm > 0, norm, 1.0))
        x = x.to(solution.value.data.dtype)  # maybe a narrower one
        solution.value.data[self._columns.places] = x
        if not bool(torch.isfinite(x).all()):
            residual = math.inf
        exact = not self._deficient and residual <= math.sqrt(torch.finfo(self._matrix.dtype).eps)
        status = Status.CONVERGED if exact else Status.SINGULAR
        return solution, Outcome(residual, "returned", status, math.isfinite(residual), True)


def _factorize(matrix: Tensor) -> tuple[Callable[[Tensor], Tensor], int]:
    """A function b -> x that solves with a symmetric matrix (a singular one: least squares of smallest norm), and how
    many of its eigenvalues are zero."""
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
    """Roughly the smallest eigenvalue, by inverse iteration: Cholesky's pivots can hide that a matrix is singular."""
    generator = torch.Generator().manual_seed(0)
    vector = torch.randn(len(matrix), generator=generator, dtype=matrix.dtype, device="cpu").to(matrix.device)
    growth = 1.0
    for _ in range(3):
        vector = vector / torch.linalg.vector_norm(vector)
        vector = solve(vector)
        growth = float(torch.linalg.vector_norm(vector))
    return 1 / growth if growth < math.inf else 0.0
