"""A symmetric operator approximated by its action on a few test vectors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from hvp_engine._support.flat_vector import FlatVector, Layout
from hvp_engine.errors import NonFiniteError
from hvp_engine.solvers.batched import stacked_tangents, stacked_views

Kind = Literal["gaussian", "columns"]

LowRank = tuple[Tensor, Tensor, Tensor]
"""Eigenvectors U as rows, eigenvalues >= 0, and whether A has shown negative curvature."""


def check_kind(kind: str) -> None:
    if kind not in ("gaussian", "columns"):
        raise ValueError(f"sketch: expected 'gaussian' or 'columns'; got {kind!r}")


class Sketch:
    """Test vectors T and their images Y = A T, computed one by one or in blocks; from them the Nystrom
    approximation Y (T^T Y)^+ Y^T, which equals A on the span of T.

    Arguments:
        layout: of the weights.
        rank: number of test vectors, capped by the number of weights.
        kind: "gaussian" for random vectors, "columns" for distinct unit vectors, so that Y are columns of A.
        seed: of the test vectors.

    Memory: 2 `rank` flat vectors, twice that while :meth:`low_rank` runs.
    """

    def __init__(self, layout: Layout, rank: int, kind: Kind, seed: int):
        check_kind(kind)
        layout.refuse_parts("a low-rank approximation")
        size = layout.numel
        self.limit, self.steps = min(rank, max(1, size)), 0
        self.direction = FlatVector(layout)
        self._image = FlatVector(layout)
        self._tests = torch.zeros(self.limit, layout.size, dtype=layout.state_dtype, device=layout.device)
        self._images = torch.zeros_like(self._tests)
        generator = layout.generator(seed)
        if kind == "columns":
            chosen = torch.randperm(size, generator=generator, device=layout.device)[: self.limit]
            self._tests[torch.arange(len(chosen), device=layout.device), layout.places()[chosen]] = 1.0
        else:
            for row in self._tests:
                for view in layout.views(row):
                    view.normal_(generator=generator)
        self.restart()

    def restart(self) -> None:
        """Begin again with the same test vectors."""
        self.steps = 0
        self._point()

    def step(self, product: Sequence[Tensor]) -> None:
        self._image.copy_(product)
        self._images[self.steps].copy_(self._image.data)
        self.steps += 1
        self._point()

    def block(self, count: int) -> list[Tensor]:
        """The next `count` test vectors, stacked along a first dimension of each weight's tensor."""
        return stacked_tangents(self.direction.layout, self._tests[self.steps : self.steps + count])

    def step_block(self, products: Sequence[Tensor]) -> None:
        count = len(products[0])
        images = stacked_views(self.direction.layout, self._images[self.steps : self.steps + count])
        for image, product in zip(images, products, strict=True):
            image.copy_(product.detach())
        self.steps += count
        self._point()

    def low_rank(self) -> LowRank:
        """A ~ U^T diag(values) U, all on the device.

        In this orthonormal form (A + rho I)^-1 is accurate for any rho; Woodbury's formula as usually printed subtracts
        two terms of size 1 / rho. Eigenvalues of T^T Y within rounding of zero are dropped, and so are negative ones,
        which have no safe inverse; those are reported.
        """
        if not bool(torch.isfinite(self._images).all()):  # LAPACK would fail without saying why
            raise NonFiniteError("operator: expected finite products; got NaN or Inf: check the weights and the loss")
        epsilon = torch.finfo(self._images.dtype).eps
        core = (self._tests @ self._images.T).double()
        weights, vectors = torch.linalg.eigh((core + core.T) / 2)
        noise = 10 * self.limit * epsilon * weights.abs().max()
        scales = torch.where(weights > noise, 1 / weights.clamp_min(torch.finfo(torch.float64).tiny).sqrt(), 0.0)
        factor = (vectors * scales).T.to(self._images.dtype) @ self._images  # A ~ factor^T factor
        basis, triangle = torch.linalg.qr(factor.T)
        left, values, _ = torch.linalg.svd(triangle)
        return left.T @ basis.T, values.square(), (weights < -noise).any()

    def _point(self) -> None:
        if self.steps < self.limit:
            self.direction.data.copy_(self._tests[self.steps])
            self.direction.refresh()
