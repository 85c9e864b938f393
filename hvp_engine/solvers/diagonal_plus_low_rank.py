"""A direct solve with few products: a known diagonal plus a matrix of low rank, as linear models with decay have.

Let H = D + L with D known, and let the r rows of Q be an orthonormal basis of the range of the symmetric L. Then L is
Q^T M Q with M = Q L Q^T, and (Woodbury)

    H^-1 v = D^-1 (v - Q^T (I + M Q D^-1 Q^T)^-1 M Q D^-1 v).

For a linear model L = J^T S J with the outputs' second derivatives S, so r <= examples * outputs. The range is found
without knowing J: by products with random vectors, until a block of them adds nothing. A later product would show what
was missed, so every solution is corrected by its residual.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from hvp_engine._support.flat_vector import FlatVector
from hvp_engine.differentiation.linear_map import LinearMap
from hvp_engine.solvers.batched import MOST, multiply

_FEWEST_WEIGHTS = 256
"""With fewer, n products are no burden."""

_LEAST_SAVING = 5
"""The search is given up at a rank of n / 5: by then it has made a fifth of the dense solve's products."""

_CORRECTIONS = 3
_SMALL = 1e-13
"""Residual, relative to v, below which a solution is not corrected further."""

_ACCEPTED = 1e-10
"""Residual with which the factorization is trusted; otherwise the dense solve decides."""


class DiagonalPlusLowRank:
    """The inverse of A + damping I, if A is such a matrix in float64.

    Attributes:
        products: made so far.
        inverse: a function v -> (x, the residual's norm relative to v), for vectors without gaps; None if A is no such
            matrix, or is nearly singular.
    """

    def __init__(self, operator: LinearMap, damping: float):
        self.products = 0
        self.inverse: Callable[[Tensor], tuple[Tensor, float]] | None = None
        self._operator, self._layout = operator, operator.layout
        large = self._layout.numel >= _FEWEST_WEIGHTS and self._layout.whole is None
        decays = operator.decays() if large else None
        if decays is None or set(self._layout.dtypes) != {torch.float64}:
            return
        self._places = self._layout.places()
        self._decay = FlatVector.of(self._layout, decays).data[self._places]
        self._diagonal = self._decay + damping
        basis = self._range() if bool((self._diagonal > 0).all()) else None
        if basis is not None:
            self.inverse = self._trusted(self._woodbury(basis))

    def _range(self) -> Tensor | None:
        """An orthonormal basis of the range of L, as rows; None where it is too large."""
        size = self._layout.numel
        generator, scale = self._layout.generator(0), 0.0
        basis = self._decay.new_empty(0, size)
        while len(basis) <= size // _LEAST_SAVING:
            probes = torch.randn(MOST, size, generator=generator, dtype=basis.dtype, device=basis.device)
            found = self._low_rank(probes)
            scale = max(scale, float(torch.linalg.matrix_norm(found)))
            for _ in range(2):  # once leaves what cancellation has left
                found = found - (found @ basis.T) @ basis
            _, values, rows = torch.linalg.svd(found, full_matrices=False)
            new = rows[values > 100 * torch.finfo(basis.dtype).eps * scale]
            basis = torch.cat([basis, new])
            if len(new) < MOST:
                return basis
        return None

    def _woodbury(self, basis: Tensor) -> Callable[[Tensor], Tensor]:
        middle = basis @ self._low_rank(basis).T
        middle = (middle + middle.T) / 2
        inside = torch.eye(len(basis), dtype=basis.dtype, device=basis.device)
        inside = inside + middle @ ((basis / self._diagonal) @ basis.T)
        factors, pivots, _ = torch.linalg.lu_factor_ex(inside)
        self._norm = float(self._diagonal.max() + torch.linalg.matrix_norm(middle))

        def inverse(v: Tensor) -> Tensor:
            inner = middle @ (basis @ (v / self._diagonal))
            return (v - basis.T @ torch.linalg.lu_solve(factors, pivots, inner[:, None])[:, 0]) / self._diagonal

        return inverse

    def _trusted(self, inverse: Callable[[Tensor], Tensor]) -> Callable[[Tensor], tuple[Tensor, float]] | None:
        """With corrections; None if a first solve shows that L was more, or that an eigenvalue is nearly zero."""

        def corrected(v: Tensor) -> tuple[Tensor, float]:
            norm = float(torch.linalg.vector_norm(v)) or 1.0
            x, rest, residual = torch.zeros_like(v), v, math.inf
            for _ in range(_CORRECTIONS):
                better = x + inverse(rest)
                left = v - self._product(better)
                found = float(torch.linalg.vector_norm(left)) / norm
                if not found < residual:
                    break
                x, rest, residual = better, left, found
                if residual <= _SMALL:
                    break
            return x, residual

        generator = self._layout.generator(1)
        x, residual = corrected(torch.empty_like(self._diagonal).normal_(generator=generator))
        threshold = 10 * self._layout.numel * torch.finfo(x.dtype).eps * self._norm
        largest = math.sqrt(self._layout.numel) / threshold
        return corrected if residual <= _ACCEPTED and float(torch.linalg.vector_norm(x)) < largest else None

    def _product(self, x: Tensor) -> Tensor:
        return self._low_rank(x[None])[0] + self._diagonal * x

    def _low_rank(self, vectors: Tensor) -> Tensor:
        """L times each of the rows."""
        rows = vectors.new_zeros(len(vectors), self._layout.size)
        rows[:, self._places] = vectors
        products = torch.zeros_like(rows)
        multiply(self._operator, rows, products)
        self.products += len(vectors)
        return products[:, self._places] - self._decay * vectors
