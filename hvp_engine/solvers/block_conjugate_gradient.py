"""Conjugate gradients for many right-hand sides that search all of their Krylov spaces together."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from hvp_engine._support.flat_vector import FlatVector, Layout
from hvp_engine.solvers.base import IterativeSolve, KrylovSolver, LinearSystem, Result, Vector
from hvp_engine.solvers.batched import multiply, stacked_views
from hvp_engine.solvers.iteration import REFRESH_EVERY, FinishedIteration, Outcome, Tolerance, tolerance_of
from hvp_engine.solvers.preconditioning import precondition
from hvp_engine.solvers.solution import Status

_MOST_COLUMNS = 128
"""A block has at most this many columns: the small matrices of every step have that many rows."""

_MOST_ELEMENTS = 1 << 25
"""A block has at most this many elements. About seven of its size exist at once, in float32 1 GB."""

_PIECE = 1 << 16
"""Elements of each row that are converted to float64 at once."""

_DEPENDENT = {torch.float32: 1e-4, torch.float64: 1e-7}
"""A direction of which the others leave no more than this share counts as a combination of them. It is not lost: what
is left of it grows, relative to the residual, until it counts. Eigenvalues of a Gram matrix are the squares of these
shares, and float64 resolves no smaller ones than 1e-14."""


_STAGNANT = 50
"""Steps without a smaller residual after which a block is given up, as it is after four steps for each unknown: nearly
dependent right-hand sides may leave directions that are mostly rounding."""


class BlockConjugateGradientSolve(IterativeSolve):
    """Conjugate gradients, in blocks if there are several right-hand sides.

    What a block cannot finish is solved column by column, which then says what is wrong: negative curvature, NaN, a
    preconditioner that is not positive definite.
    """

    solver: KrylovSolver

    def run(self, vs: Sequence[Vector], names: Sequence[str]) -> Iterator[Result]:
        layout = self.operator.layout
        most = max(1, min(_MOST_COLUMNS, _MOST_ELEMENTS // max(1, layout.size)))
        whole = layout.whole is None and not layout.low_precision
        if most == 1 or len(vs) == 1 or not whole or not self.solver.makes_products:
            yield from super().run(vs, names)
            return
        count = -(-len(vs) // most)  # blocks of nearly the same size, so none of a single column: 130 are 65 + 65
        bounds = [len(vs) * index // count for index in range(count + 1)]
        for start, end in pairwise(bounds):
            yield from self._solve_together(vs[start:end], names[start:end])

    def _solve_together(self, vs: Sequence[Vector], names: Sequence[str]) -> Iterator[Result]:
        block = _Block(self.solver, self.system, vs)
        block.solve()
        left = sorted(block.left)
        alone = super().run([vs[column] for column in left], [names[column] for column in left])
        for column, name in enumerate(names):
            hvps = block.hvps[column]
            if column in block.left:
                value, solution = next(alone)
                yield value, replace(solution, hvps=solution.hvps + hvps)
            else:
                yield self.conclude(name, block.finished(column), block.outcome(column), hvps)


@dataclass
class _Column(FinishedIteration):
    """The solution for one right-hand side."""

    value: FlatVector
    direction: FlatVector
    steps: int


@dataclass(frozen=True)
class _Directions:
    """Search directions p = M s as rows, their images q = A p, and the inverse of the matrix of all p . q."""

    p: Tensor
    s: Tensor
    q: Tensor
    inverse: Tensor


class _Block:
    """x and r = b - A x, one row for each column, of right-hand sides that are scaled to norm 1.

    Directions are orthonormal in the M^-1-norm (without a preconditioner M, the 2-norm), whose inner products
    p . M^-1 p' = p . s' need no M^-1. So their matrix of p . A p' has the condition number of M A, and not that of A.

    `r` has rows for the `active` columns only, which have not converged. Columns in `left` cannot be solved here.
    """

    def __init__(self, solver: KrylovSolver, system: LinearSystem, vs: Sequence[Vector]):
        self._solver, self._operator, self._vs = solver, system.operator, vs
        self._layout: Layout = system.operator.layout
        self._tolerance = Tolerance(tolerance_of(solver.tol, self._layout), solver.atol)
        self.steps, self.hvps = [0] * len(vs), [0] * len(vs)
        self.left: set[int] = set()
        self._active = list(range(len(vs)))
        self._r = self._loaded(self._active)
        norms = self._r.double().norm(dim=1)
        self._norms = norms.tolist()
        self._scales = torch.where(norms > 0, norms, 1.0).to(self._r.dtype)[:, None]
        self._r.div_(self._scales)
        self._x = torch.zeros_like(self._r)
        self._residuals = list(self._norms)  # of scaled columns soon; NaN and Inf stay

    def solve(self) -> None:
        """Step until each column is solved, or left, or at the limit."""
        self._deflate()
        directions, best, reached = None, math.inf, 0
        for count in range(1, self._solver.iterations + 1):
            if not self._active:
                return
            largest = max(self._residuals[column] for column in self._active)
            if largest < best:
                best, reached = largest, count
            if count > min(reached + _STAGNANT, 4 * self._layout.numel):
                self.left.update(self._active)
                return
            if count % (REFRESH_EVERY + 1) == 0:
                self._refresh()
            else:
                directions = self._following(directions)
                if directions is None:
                    self.left.update(self._active)
                    return
                shares = _inner(self._r, directions.p) @ directions.inverse
                self._x.index_add_(0, self._index(), shares.to(self._x.dtype) @ directions.p)
                self._r.addmm_(shares.to(self._r.dtype), directions.q, alpha=-1)
            self._deflate()

    def finished(self, column: int) -> _Column:
        row = self._x[column].mul_(self._scales[column])
        value = FlatVector(self._layout, row)
        return _Column(value, value, self.steps[column])

    def outcome(self, column: int) -> Outcome:
        residual = self._residuals[column]
        status = Status.CONVERGED if self._converged(column) else Status.ITERATION_LIMIT
        return Outcome(residual, "returned" if self.steps[column] else "none", status)

    def _following(self, last: _Directions | None) -> _Directions | None:
        """Directions for the residuals, conjugate to the last ones, through which they are to all before; None if there
        are none of positive curvature, or M is not positive definite."""
        z, s = self._preconditioned(), self._r
        if last is not None:
            mix = (-_inner(z, last.q) @ last.inverse).to(z.dtype)
            s = torch.addmm(s, mix, last.s)
            z = s if self._solver.preconditioner is None else torch.addmm(z, mix, last.p)
        # Orthonormal combinations by the eigenvectors of the Gram matrix of rows scaled to norm 1. In float64 it shows
        # how far float32 rows are from being dependent; a QR factorization in float32 would not do so any better.
        gram = _inner(z, s)
        norms = gram.diagonal()
        if not bool((norms > 0).all()):
            return None
        scales = norms.rsqrt()
        squares, vectors = torch.linalg.eigh((gram + gram.T) / 2 * scales * scales[:, None])
        independent = squares > _DEPENDENT[z.dtype] ** 2
        combine = ((vectors * scales[:, None])[:, independent] * squares[independent].rsqrt()).T.to(z.dtype)
        p = combine @ z
        s = p if self._solver.preconditioner is None else combine @ s
        q = self._multiplied(p)
        curvature = _inner(p, q)
        factor, failed = torch.linalg.cholesky_ex((curvature + curvature.T) / 2)
        pivots = factor.diagonal().square()
        if failed or not bool(pivots.min() > torch.finfo(z.dtype).eps * pivots.max()):  # of NaN, too
            return None
        return _Directions(p, s, q, torch.cholesky_inverse(factor))

    def _deflate(self) -> None:
        """Update the residual norms; columns that have converged keep their x, and r loses their rows."""
        norms = self._r.double().norm(dim=1).tolist()
        largest = 1 / torch.finfo(self._r.dtype).eps
        for column, norm in zip(self._active, norms, strict=True):
            self._residuals[column] = norm
            if not norm <= largest:  # or NaN
                self.left.add(column)
        going = [c not in self.left and not self._converged(c) for c in self._active]
        if not all(going):
            self._r = self._r[torch.tensor(going, device=self._r.device)]
            self._active = [column for column, goes in zip(self._active, going, strict=True) if goes]

    def _converged(self, column: int) -> bool:
        return self._tolerance.reached(self._residuals[column], self._norms[column] ** 2)

    def _refresh(self) -> None:
        """r <- b - A x, from which rounding has let it drift."""
        index = self._index()
        product = self._multiplied(self._x[index])
        self._r = self._loaded(self._active).div_(self._scales[index]).sub_(product)

    def _multiplied(self, rows: Tensor) -> Tensor:
        """(A + damping I) times each of `rows`, counted as products of the first active columns."""
        for place, column in enumerate(self._active):
            self.steps[column] += 1
            self.hvps[column] += place < len(rows)
        products = torch.zeros_like(rows)
        multiply(self._operator, rows, products)
        return products.add_(rows, alpha=self._solver.damping) if self._solver.damping else products

    def _preconditioned(self) -> Tensor:
        if self._solver.preconditioner is None:
            return self._r
        images = torch.zeros_like(self._r)
        for row, image in zip(self._r, images, strict=True):
            target = FlatVector(self._layout, image)
            precondition(self._solver.preconditioner, FlatVector(self._layout, row), target)
        return images

    def _loaded(self, columns: Sequence[int]) -> Tensor:
        """The right-hand sides as rows."""
        rows = torch.zeros(len(columns), self._layout.size, dtype=self._layout.state_dtype, device=self._layout.device)
        parts = zip(*(self._vs[column] for column in columns), strict=True)
        for view, part in zip(stacked_views(self._layout, rows), parts, strict=True):
            view.copy_(torch.stack(list(part)).detach())
        return rows

    def _index(self) -> Tensor:
        return torch.tensor(self._active, device=self._x.device)


def _inner(left: Tensor, right: Tensor) -> Tensor:
    """The inner products of rows, in float64."""
    total = torch.zeros(len(left), len(right), dtype=torch.float64, device=left.device)
    for a, b in zip(left.split(_PIECE, 1), right.split(_PIECE, 1), strict=True):
        total.addmm_(a.double(), b.double().T)
    return total
