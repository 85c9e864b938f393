"""The Lanczos process: a growing orthonormal basis in which a symmetric operator is tridiagonal."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hvp_engine._support.flat_vector import FlatVector, Layout
from hvp_engine.differentiation.linear_map import LinearMap
from hvp_engine.solvers.preconditioning import Preconditioner, precondition

Product = Callable[[Sequence[Tensor]], Sequence[Tensor]]
"""A symmetric linear map on lists of tensors."""


def random_unit_vector(layout: Layout, seed: int) -> FlatVector:
    """A random direction; the caller's random state is not touched."""
    generator = layout.generator(seed)
    vector = FlatVector(layout)
    for view in vector.views:
        view.normal_(generator=generator)
    vector.data /= vector.norm().clamp_min(1e-30)
    return vector


@dataclass(frozen=True)
class RitzPairs:
    """Approximate eigenvalues from a Lanczos basis, on the host in float64.

    Attributes:
        values: Ritz values, ascending.
        coordinates: the Ritz vectors in the basis, as columns.
        bounds: residual norms ||A y - theta y||: within `bounds[k]` of `values[k]` there is an eigenvalue.
    """

    values: Tensor
    coordinates: Tensor
    bounds: Tensor


@dataclass(frozen=True)
class Tridiagonalization:
    """The result of Lanczos: Q^T A Q is tridiagonal, and the columns of Q are orthonormal (with M: M-orthonormal).

    Attributes:
        basis: Q^T, one flat vector in each row; zero after an invariant subspace.
        diagonal: (steps,).
        off_diagonal: (steps,); the last entry is the norm of the next, unnormalized vector.
    """

    basis: Tensor
    diagonal: Tensor
    off_diagonal: Tensor

    def ritz_pairs(self) -> RitzPairs | None:
        """The Ritz pairs, by one wait for the device; None if something is not finite."""
        figures = torch.stack([self.diagonal, self.off_diagonal]).double().cpu()
        if not torch.isfinite(figures).all():
            return None
        alphas, betas = figures
        # Rows after an invariant subspace are zero and give no Ritz values: of betas 2, 1, 0, 0 three rows count.
        found = int((betas > 0).cumprod(0).sum()) + 1
        alphas, betas = alphas[:found], betas[:found]
        tridiagonal = torch.diag(alphas) + torch.diag(betas[:-1], 1) + torch.diag(betas[:-1], -1)
        values, coordinates = torch.linalg.eigh(tridiagonal)
        return RitzPairs(values, coordinates, (betas[-1] * coordinates[-1]).abs())

    def combine(self, coordinates: Tensor) -> Tensor:
        """The flat vector with these coordinates in the basis."""
        return coordinates.to(self.basis) @ self.basis[: len(coordinates)]


def tridiagonalize(
    operator: LinearMap, start: FlatVector, steps: int, preconditioner: Preconditioner | None = None
) -> Tridiagonalization:
    """`steps` of Lanczos from `start`, but at most one per weight."""
    steps = min(steps, max(1, start.layout.numel))

    def extended(product: Product, start: FlatVector) -> Sequence[Tensor]:
        basis = LanczosBasis(product, start, steps, preconditioner)
        basis.extend(steps)
        found = basis.tridiagonalization
        return found.basis, found.diagonal, found.off_diagonal

    if preconditioner is not None:  # the caller's code
        return Tridiagonalization(*extended(operator.product, start))
    return Tridiagonalization(*operator.linear_map.at_once(("lanczos", steps), extended, start))


class LanczosBasis:
    """Lanczos with full reorthogonalization, step by step.

    With a preconditioner M, the Ritz values are those of M A, or, equally, of the symmetric M^(1/2) A M^(1/2).

    Arguments:
        product: the operator A.
        start: the first direction, of any nonzero length.
        capacity: most steps; capped by the number of weights.

    Memory: `capacity` + 2 flat vectors (2 `capacity` + 3 with a preconditioner).

    Source: Golub and Van Loan, Matrix Computations, 4th edition, Johns Hopkins University Press 2013, sections 10.1
    and 11.5.
    """

    def __init__(
        self, product: Product, start: FlatVector, capacity: int, preconditioner: Preconditioner | None = None
    ):
        layout = start.layout
        self.capacity = min(capacity, max(1, layout.numel))
        self.steps = 0
        self._product, self._preconditioner = product, preconditioner
        # Vectors u and their images M u, with u_i . M u_j = 1 if i = j else 0; without M they are the same.
        self._basis = torch.zeros(self.capacity, layout.size, dtype=layout.state_dtype, device=layout.device)
        self._images = self._basis if preconditioner is None else torch.zeros_like(self._basis)
        self._direction, self._work = FlatVector(layout), FlatVector(layout)  # two: a product may alias its tangent
        self._image = self._work if preconditioner is None else FlatVector(layout)
        self._diagonal: list[Tensor] = []
        self._off_diagonal: list[Tensor] = []
        self._work.data.copy_(start.data)
        self._divide(self._norm_of_work())

    def extend(self, steps: int) -> None:
        """`steps` more steps of one product each, up to the capacity, without waiting for the device."""
        work = self._work
        total = work.layout.total
        negligible = 100 * torch.finfo(work.data.dtype).eps
        for k in range(self.steps, min(self.steps + steps, self.capacity)):
            self._basis[k] = work.data
            if self._preconditioner is not None:
                self._images[k] = self._image.data
            self._direction.data.copy_(self._image.data)
            self._direction.refresh()
            work.copy_(self._product(self._direction.tangents))
            basis, images = self._basis[: k + 1], self._images[: k + 1]
            # Orthogonalize twice: after a single pass, float32 leaves rounding errors.
            coefficients = total(images @ work.data)
            work.data.addmv_(basis.T, coefficients, alpha=-1)
            work.data.addmv_(basis.T, total(images @ work.data), alpha=-1)
            norm = self._norm_of_work()
            # After an invariant subspace only rounding is left; as a direction it would duplicate an eigenvalue.
            norm = norm * (norm > negligible * torch.hypot(norm, torch.linalg.vector_norm(coefficients)))
            self._diagonal.append(coefficients[k])
            self._off_diagonal.append(norm)
            self._divide(norm)
            self.steps += 1

    @property
    def tridiagonalization(self) -> Tridiagonalization:
        """The result of all steps so far."""
        diagonal, off_diagonal = torch.stack(self._diagonal), torch.stack(self._off_diagonal)
        return Tridiagonalization(self._basis[: self.steps], diagonal, off_diagonal)

    def _norm_of_work(self) -> Tensor:
        if self._preconditioner is None:
            return self._work.norm()
        precondition(self._preconditioner, self._work, self._image)
        return self._work.dot(self._image).clamp_min(0).sqrt()

    def _divide(self, norm: Tensor) -> None:
        factor = torch.where(norm > 0, norm.reciprocal(), 0.0)
        for vector in [self._work] if self._image is self._work else [self._work, self._image]:
            vector.data.mul_(factor)
