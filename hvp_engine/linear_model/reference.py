"""The Hessian of a linear model by its small factors, and all terms of its Neumann series, in plain torch.

The Hessian is H V = G(V X^T) X + decay * V: X are the inputs (samples, features), V is (outputs, features) like the
weights, and G(U) = C * (U - sum over outputs of (Q * U)) is the loss's own Hessian in the outputs, sample by sample,
with C and Q like the transposed outputs. A bias is the weight of one more input that is always 1.

:func:`linear_model_direct`, :func:`linear_model_dual`, :func:`linear_model_chebyshev` and :func:`linear_model_lanczos`
are the executable specification of the C++ kernels of the same names. In the first two, each row of `v` and `p` is one
right-hand side's flat vector (see :mod:`hvp_engine._support.flat_vector`). On entry `v` holds the right-hand sides. On
return `p` holds alpha times the sums and `v` the residuals of the sums without their last terms; the Horner form leaves
`v` as it was. Each returns one row of figures per right-hand side, as :class:`hvp_engine.Neumann`'s iterations do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from hvp_engine._support.flat_vector import FlatVector, Layout, padded
from hvp_engine.solvers.lanczos import LanczosBasis, Tridiagonalization


@dataclass(frozen=True)
class Factors:
    """The factors of H, of one dtype (except the inputs) and on one device; never changed.

    Attributes:
        layout: of the weights, row-major: (outputs, features) or (features,), then the bias if there is one.
        inputs: X, (samples, features), its rows contiguous; of a dtype no wider than the others'.
        curvature: C, (outputs, samples padded with zeros).
        probabilities: Q, like C; None if the outputs are not coupled.
        decay: one flat vector, zero in the gaps.
        uniform: whether all weights have the same decay (the bias may have another).
    """

    layout: Layout
    inputs: Tensor
    curvature: Tensor
    probabilities: Tensor | None
    decay: Tensor
    uniform: bool

    @property
    def outputs(self) -> int:
        return len(self.curvature)

    @property
    def biased(self) -> bool:
        return len(self.layout.shapes) == 2

    @cached_property
    def wide_inputs(self) -> Tensor:
        """The inputs in the dtype of everything else: themselves, or a copy."""
        return self.inputs.to(self.curvature.dtype)

    @cached_property
    def gram(self) -> Tensor:
        """X X^T, (samples, samples padded with zeros)."""
        samples = len(self.inputs)
        gram = self.curvature.new_zeros(samples, padded(samples))
        torch.mm(self.wide_inputs, self.wide_inputs.T, out=gram[:, :samples])
        return gram

    def split(self, state: Tensor) -> tuple[Tensor, Tensor | None]:
        """Views of the rows of `state`: weights (rows, outputs, features), bias (rows, outputs, 1) or None."""
        weights = state[:, : self.layout.numels[0]].view(len(state), self.outputs, -1)
        if not self.biased:
            return weights, None
        return weights, state[:, self.layout.offsets[1] :][:, : self.outputs, None]

    def curve(self, u: Tensor) -> Tensor:
        """G(u), for (..., outputs, samples)."""
        samples = u.shape[-1]
        if self.probabilities is not None:
            u = u - (self.probabilities[:, :samples] * u).sum(-2, keepdim=True)
        return self.curvature[:, :samples] * u

    def product(self, weights: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        """H without decay times (..., outputs, features) and (..., outputs, 1)."""
        outputs = weights @ self.wide_inputs.T
        curved = self.curve(outputs if bias is None else outputs + bias)
        return curved @ self.wide_inputs, curved.sum(-1, keepdim=True)


def linear_model_direct(
    v: Tensor, p: Tensor, factors: Factors, alpha: float, damping: float, iterations: int, horner: bool
) -> Tensor:
    """Each term by two products with the inputs."""
    start, residual = v.clone(), v
    shift = factors.decay + damping
    p.copy_(v)
    for _ in range(iterations):
        direction = p if horner else v
        product = shift * direction
        for part, data in zip(factors.split(product), factors.product(*factors.split(direction)), strict=True):
            if part is not None:
                part += data
        residual = (start if horner else v) - alpha * product
        if not horner:
            v.copy_(residual)
        p += residual
    return _finish(start, residual, p, alpha)


def linear_model_dual(
    v: Tensor, p: Tensor, factors: Factors, alpha: float, damping: float, iterations: int, horner: bool
) -> Tensor:
    """Each term by one product with the inputs' Gram matrix; all weights must have the same decay.

    Apart from its bias, every vector is c v + S X, with S of the outputs' shape; a term changes only c, S and the bias.
    Without decay, the first is v - alpha G(v X^T) X: c = 1, S = -alpha G(v X^T); the next needs S X X^T, not S X.
    """
    start, residual = v.clone(), v
    samples = len(factors.inputs)
    gram, shift = factors.gram[:, :samples], factors.decay[0] + damping
    bias_shift = factors.split(factors.decay[None] + damping)[1]
    weights, bias = factors.split(start)
    initial = weights @ factors.wide_inputs.T
    term = Combination(1.0, torch.zeros_like(initial), bias)
    total = term
    for _ in range(iterations):
        at = total if horner else term
        outputs = at.c * initial + at.s @ gram
        curved = factors.curve(outputs if at.bias is None else outputs + at.bias)
        keep = 0.0 if horner else 1.0
        changed_bias = None
        if bias is not None and at.bias is not None and bias_shift is not None:
            product = curved.sum(-1, keepdim=True) + bias_shift * at.bias
            changed_bias = (bias if horner else at.bias) - alpha * product
        c = (1.0 if horner else at.c) - alpha * shift.double() * at.c  # in float64: rounding errors of powers add up
        term = Combination(c, keep * at.s - alpha * (curved + shift * at.s), changed_bias)
        total = total + term
    total.expand(factors, start, p)
    if iterations:
        residual = torch.zeros_like(v)
        term.expand(factors, start, residual)
        if not horner:
            v.copy_(residual)
    return _finish(start, residual, p, alpha)


def linear_model_chebyshev(
    residual: Tensor, direction: Tensor, x: Tensor, factors: Factors, coefficients: Tensor, damping: float
) -> Tensor:
    """r <- r - A d; d <- beta d + alpha r; x <- x + d for each (alpha, beta) in `coefficients` (terms, 2), but for the
    first, which sets d = x = alpha r.

    On entry `residual` holds the right-hand sides, on return the residuals of x without its last term.
    """
    start = residual.clone()
    torch.mul(residual, coefficients[0, 0].to(residual.dtype), out=direction)
    x.copy_(direction)
    for alpha, beta in coefficients[1:].to(residual.dtype):
        residual -= _images(factors, direction) + damping * direction
        direction.mul_(beta).addcmul_(residual, alpha)
        x += direction
    return _figures(start, residual, x)


def linear_model_lanczos(start: Tensor, factors: Factors, steps: int) -> Tridiagonalization:
    """`steps` of Lanczos from the flat vector `start`, but at most one per weight."""
    layout = factors.layout

    def product(tangents: Sequence[Tensor]) -> Sequence[Tensor]:
        return layout.views(_images(factors, FlatVector.of(layout, tangents).data[None])[0])

    basis = LanczosBasis(product, FlatVector(layout, start), steps)
    basis.extend(steps)
    return basis.tridiagonalization


@dataclass(frozen=True)
class Combination:
    """c v + S X, with its bias apart."""

    c: float | Tensor
    s: Tensor
    bias: Tensor | None

    def __add__(self, other: Combination) -> Combination:
        bias = None if self.bias is None or other.bias is None else self.bias + other.bias
        return Combination(self.c + other.c, self.s + other.s, bias)

    def expand(self, factors: Factors, v: Tensor, out: Tensor) -> None:
        """Write the combination into the flat vectors `out`."""
        torch.mul(v, self.c, out=out)
        weights, bias = factors.split(out)
        weights += self.s @ factors.wide_inputs
        if bias is not None and self.bias is not None:
            bias.copy_(self.bias)


def _finish(start: Tensor, residual: Tensor, p: Tensor, alpha: float) -> Tensor:
    """The figures; scales the sums."""
    figures = _figures(start, residual, p)
    p *= alpha
    return figures


def _figures(start: Tensor, residual: Tensor, p: Tensor) -> Tensor:
    """The figures (rows, 6) that `outcome_of` reads."""
    bad = (~torch.isfinite(residual) | ~torch.isfinite(p)).any(1).double()
    squares = [x.double().square().sum(1) for x in (start, residual, p)]
    bad_start = (~torch.isfinite(start)).any(1).double()
    return torch.stack([squares[0], torch.zeros_like(bad), bad_start, *squares[1:], bad], dim=1)


def _images(factors: Factors, state: Tensor) -> Tensor:
    """H, including the decay, times the flat vectors in the rows of `state`."""
    images = factors.decay * state
    for part, data in zip(factors.split(images), factors.product(*factors.split(state)), strict=True):
        if part is not None:
            part += data
    return images
