"""How large the eigenvalues are: a short Lanczos run, kept warm between calls."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hvp_engine.preconditioning import Preconditioner, precondition
from hvp_engine.vectors import FlatVector, Layout

Product = Callable[[Sequence[Tensor]], Sequence[Tensor]]
"""A symmetric linear map on lists of tensors."""

COLD_STEPS = 8
"""Products of a first estimate: two miss an outlier eigenvalue by more than half, five suffice."""

REFRESH_STEPS = 3
"""Products of an estimate that starts from the last one's eigenvector."""

GROWTH = 10.0
"""What a truncated series may make of the residual where the estimate has seen negative curvature."""

_FRESH_SHARE = 0.3
"""Norm of the random part that a refresh adds to the old eigenvector, so that a new largest one is found."""


@dataclass(frozen=True)
class SpectralEstimate:
    """Ritz values of a symmetric operator, without damping.

    Attributes:
        largest: largest Ritz value by magnitude (a lower bound of lambda_max of a positive definite operator).
        smallest: smallest Ritz value; below zero means the operator is indefinite.
        margin: residual norm of the Ritz pair; `largest + margin` bounds the eigenvalue it belongs to.
        hvps: products spent.
    """

    largest: float
    smallest: float
    margin: float
    hvps: int

    @property
    def finite(self) -> bool:
        return math.isfinite(self.largest)

    @property
    def indefinite(self) -> bool:
        return self.smallest < -1e-6 * self.largest

    def bound(self, damping: float = 0.0) -> float:
        """What the largest |eigenvalue| of the damped operator is taken to be."""
        return self.largest + self.margin + damping

    def safe_alpha(self, damping: float = 0.0, iterations: int = 0) -> float:
        """1 / bound: converges even if the estimate is too low by almost one half.

        Under negative curvature no alpha converges, and `iterations` products multiply the residual by up to
        (1 + alpha |smallest|)^iterations: alpha is then small enough to keep that below :data:`GROWTH`.
        """
        bound = self.bound(damping)
        alpha = 1.0 / bound if bound > 0 else 1.0
        curvature = self.smallest + damping
        if self.indefinite and curvature < 0 and iterations > 0:
            alpha = min(alpha, (GROWTH ** (1 / iterations) - 1) / -curvature)
        return alpha


def lanczos(
    product: Product, start: FlatVector, steps: int, preconditioner: Preconditioner | None = None
) -> tuple[SpectralEstimate, FlatVector]:
    """Lanczos with full reorthogonalization from `start`: the estimate and the Ritz vector of the largest |value|.

    With a preconditioner M, the values are those of M A, that is of the symmetric M^(1/2) A M^(1/2).

    Cost: `steps` products, `steps` + 2 flat vectors (2 `steps` + 3 with a preconditioner), one wait for the device.

    Source: Golub and Van Loan, Matrix Computations, sections 10.1 and 11.5.
    """
    layout = start.layout
    steps = min(steps, max(1, sum(layout.numels)))
    # Vectors u and their images M u, with u_i . M u_j = 1 if i = j else 0; without M they are the same.
    basis = torch.zeros(steps, layout.size, dtype=layout.state_dtype, device=layout.device)
    images = basis if preconditioner is None else torch.zeros_like(basis)
    direction, work = FlatVector(layout), FlatVector(layout)  # two, since a product may alias its tangent
    image = work if preconditioner is None else FlatVector(layout)
    pair = [work] if preconditioner is None else [work, image]

    def norm_of_work() -> Tensor:
        if preconditioner is None:
            return torch.linalg.vector_norm(work.data)
        precondition(preconditioner, work, image)
        return torch.dot(work.data, image.data).clamp_min(0).sqrt()

    diagonal, off_diagonal = [], []
    negligible = 100 * torch.finfo(layout.state_dtype).eps
    work.data.copy_(start.data)
    norm = norm_of_work()
    for vector in pair:
        vector.data /= norm
    for k in range(steps):
        basis[k] = work.data
        images[k] = image.data
        direction.data.copy_(image.data)
        direction.refresh()
        work.copy_(product(direction.tangents))
        coefficients = images[: k + 1] @ work.data
        diagonal.append(coefficients[k])
        work.data -= coefficients @ basis[: k + 1]
        work.data -= (images[: k + 1] @ work.data) @ basis[: k + 1]  # once more: one pass leaves rounding in float32
        norm = norm_of_work()
        # What is left of an invariant subspace is rounding, not a direction: made one, it doubles an eigenvalue.
        norm = norm * (norm > negligible * torch.hypot(norm, torch.linalg.vector_norm(coefficients)))
        off_diagonal.append(norm)
        for vector in pair:
            vector.data.copy_(torch.where(norm > 0, vector.data / norm, 0.0))
    figures = torch.stack(diagonal + off_diagonal).double().cpu()  # the one wait
    if not torch.isfinite(figures).all():
        return SpectralEstimate(math.nan, math.nan, math.nan, steps), start
    alphas, betas = figures.split(steps)
    found = int((betas > 0).cumprod(0).sum()) + 1  # the rows after an invariant subspace are zero, no Ritz values
    alphas, betas = alphas[:found], betas[:found]
    tridiagonal = torch.diag(alphas) + torch.diag(betas[:-1], 1) + torch.diag(betas[:-1], -1)
    values, vectors = torch.linalg.eigh(tridiagonal)
    top = int(values.abs().argmax())
    margin = abs(float(betas[-1] * vectors[-1, top]))
    ritz = FlatVector(layout, vectors[:, top].to(basis) @ basis[: len(alphas)])
    return SpectralEstimate(abs(float(values[top])), float(values[0]), margin, steps), ritz


class Spectrum:
    """The spectral estimate of one operator or hypergradient, refreshed at every call from its last eigenvector.

    Holds one flat vector. Randomness comes from its own generator; the caller's is not touched.
    """

    def __init__(self) -> None:
        self.estimate: SpectralEstimate | None = None
        self.vector: FlatVector | None = None
        self._loaded: Tensor | None = None  # of a checkpoint, until a call brings the layout
        self._calls = 0

    def _random(self, layout: Layout) -> FlatVector:
        generator = torch.Generator(device=layout.device)
        generator.manual_seed(self._calls)
        vector = FlatVector(layout)
        for view in vector.views:
            view.normal_(generator=generator)
        vector.data /= torch.linalg.vector_norm(vector.data).clamp_min(1e-30)
        return vector

    def refresh(
        self, product: Product, layout: Layout, preconditioner: Preconditioner | None = None
    ) -> SpectralEstimate:
        """A new estimate: 3 products from the last eigenvector with a random part added, 8 on the first call."""
        self._calls += 1
        if self._loaded is not None and self._loaded.numel() == layout.size:
            self.vector = FlatVector(layout, self._loaded.to(layout.device, layout.state_dtype))
        self._loaded = None
        if self.vector is None or self.vector.layout != layout:
            return self.restart(product, self._random(layout), preconditioner)
        start = self._random(layout)
        start.data.mul_(_FRESH_SHARE).add_(self.vector.data / torch.linalg.vector_norm(self.vector.data))
        return self._run(product, start, REFRESH_STEPS, preconditioner)

    def restart(
        self, product: Product, start: FlatVector, preconditioner: Preconditioner | None = None
    ) -> SpectralEstimate:
        """A new estimate from `start` with as many products as a first one."""
        return self._run(product, start, COLD_STEPS, preconditioner)

    def _run(
        self, product: Product, start: FlatVector, steps: int, preconditioner: Preconditioner | None
    ) -> SpectralEstimate:
        estimate, vector = lanczos(product, start, steps, preconditioner)
        if estimate.finite:
            self.estimate, self.vector = estimate, vector
        return estimate

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs to continue with the same numbers; its vector is never changed in place."""
        return {"calls": self._calls, "vector": self._loaded if self.vector is None else self.vector.data}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a saved state; its vector is used if it fits the operator of the next call."""
        self._calls, self._loaded, self.vector = state["calls"], state["vector"], None
