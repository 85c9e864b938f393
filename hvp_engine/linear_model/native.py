"""The functions of :mod:`hvp_engine.linear_model.reference` in C++: import it where the backend "cpp" runs."""

from __future__ import annotations

from typing import TypedDict

import torch
from torch import Tensor

from hvp_engine.linear_model.reference import Factors
from hvp_engine.ops.cpp import _C
from hvp_engine.solvers.lanczos import Tridiagonalization


def linear_model_direct(
    v: Tensor, p: Tensor, factors: Factors, alpha: float, damping: float, iterations: int, horner: bool
) -> Tensor:
    return _linear_model(v, p, factors, alpha, damping, iterations, horner, gram=None)


def linear_model_dual(
    v: Tensor, p: Tensor, factors: Factors, alpha: float, damping: float, iterations: int, horner: bool
) -> Tensor:
    return _linear_model(v, p, factors, alpha, damping, iterations, horner, gram=factors.gram)


def _linear_model(
    v: Tensor,
    p: Tensor,
    factors: Factors,
    alpha: float,
    damping: float,
    iterations: int,
    horner: bool,
    gram: Tensor | None,
) -> Tensor:
    figures = torch.empty(len(v), 6, dtype=torch.float64, device="cpu")
    _C.linear_model_neumann(
        v=v,
        p=p,
        figures=figures,
        gram=gram,
        alpha=alpha,
        damping=damping,
        iterations=iterations,
        horner=horner,
        **_parts(factors),
    )
    return figures


def linear_model_chebyshev(
    residual: Tensor, direction: Tensor, x: Tensor, factors: Factors, coefficients: Tensor, damping: float
) -> Tensor:
    figures = torch.zeros(len(x), 6, dtype=torch.float64, device="cpu")
    _C.linear_model_chebyshev(
        residual=residual,
        direction=direction,
        x=x,
        figures=figures,
        coefficients=coefficients,
        damping=damping,
        **_parts(factors),
    )
    return figures


def linear_model_lanczos(start: Tensor, factors: Factors, steps: int) -> Tridiagonalization:
    basis = start.new_empty(steps, len(start))
    basis[0] = start
    figures = torch.empty(2, steps, dtype=torch.float64, device="cpu")
    _C.linear_model_lanczos(basis=basis, figures=figures, **_parts(factors))
    return Tridiagonalization(basis, *figures)


class _Parts(TypedDict):
    inputs: Tensor
    curvature: Tensor
    probabilities: Tensor | None
    decay: Tensor
    bias: int


def _parts(factors: Factors) -> _Parts:
    """The arguments that describe a linear model to the extension."""
    return {
        "inputs": factors.wide_inputs,
        "curvature": factors.curvature,
        "probabilities": factors.probabilities,
        "decay": factors.decay,
        "bias": factors.layout.offsets[1] if factors.biased else -1,
    }
