"""An iteration that is started again: the same buffers, and the same numbers as from a new one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

import hvp_engine as hvp
from hvp_engine._support.flat_vector import FlatVector, Layout
from hvp_engine.solvers import Iteration
from hvp_engine.solvers.spectrum import SpectralEstimate

WEIGHTS = [torch.zeros(3, 4), torch.zeros(5)]
SIZE = 17
DAMPING = 0.1
DIAGONAL = hvp.DiagonalPreconditioner([torch.full((3, 4), 1.5), torch.full((5,), 0.5)])
SOLVERS = {
    "identity": hvp.Identity(DAMPING),
    "accumulate": hvp.Neumann(6, form="accumulate", damping=DAMPING),
    "horner": hvp.Neumann(6, damping=DAMPING),
    "preconditioned": hvp.Neumann(6, form="accumulate", damping=DAMPING, preconditioner=DIAGONAL),
    "preconditioned horner": hvp.Neumann(6, damping=DAMPING, preconditioner=DIAGONAL),
    "conjugate gradient": hvp.ConjugateGradient(6, damping=DAMPING),
    "conjugate gradient with refreshed residual": hvp.ConjugateGradient(60, tol=0.0, damping=DAMPING),
    "chebyshev": hvp.Chebyshev(6, damping=DAMPING),
    "preconditioned chebyshev": hvp.Chebyshev(6, damping=DAMPING, preconditioner=DIAGONAL),
    "minres": hvp.MINRES(6, damping=DAMPING),
    "preconditioned minres": hvp.MINRES(7, damping=DAMPING, preconditioner=DIAGONAL),
}


def solve(iteration: Iteration, A: Tensor, v: Sequence[Tensor], estimate: SpectralEstimate) -> tuple[Tensor, Any]:
    layout = Layout.of(v)
    iteration.adapt(estimate)
    iteration.start(v)
    while iteration.steps < iteration.limit and not iteration.finished():
        direction = torch.cat([tangent.flatten() for tangent in iteration.direction.tangents]).double()
        product = (A @ direction).split(layout.numels)
        iteration.step([p.view(shape).to(v[0].dtype) for p, shape in zip(product, layout.shapes, strict=True)])
    outcome = iteration.read(iteration.finish().tolist())
    return iteration.value.data.clone(), (outcome, iteration.steps)


def addresses(iteration: Iteration) -> set[int]:
    vectors = [item for item in vars(iteration).values() if isinstance(item, FlatVector)]
    return {vector.data.data_ptr() for vector in vectors}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", SOLVERS)
def test_a_second_solve_in_the_same_buffers_is_as_from_new_ones(name: str, dtype: torch.dtype) -> None:
    generator = torch.Generator(torch.get_default_device()).manual_seed(1)

    def problem(scale: float) -> tuple[Tensor, list[Tensor], SpectralEstimate]:
        A = torch.randn(SIZE, SIZE, generator=generator, dtype=torch.float64)
        A = scale * (A @ A.T / SIZE + torch.eye(SIZE))
        v = [torch.randn(w.shape, generator=generator).to(dtype) for w in WEIGHTS]
        return A, v, SpectralEstimate(float(torch.linalg.eigvalsh(A)[-1]), scale, 0.0, 8)

    first, second = problem(1.0), problem(3.0)
    layout = Layout.of(first[1])
    reused = SOLVERS[name].allocate(layout)
    solve(reused, *first)
    places = addresses(reused)
    again, told = solve(reused, *second)
    expected, expected_told = solve(SOLVERS[name].allocate(layout), *second)
    assert torch.equal(again, expected)
    assert told == expected_told
    assert addresses(reused) == places


@pytest.mark.parametrize("name", SOLVERS)
def test_a_solve_after_one_that_was_not_finite(name: str) -> None:
    A, v = torch.eye(SIZE, dtype=torch.float64), [torch.ones_like(w) for w in WEIGHTS]
    estimate = SpectralEstimate(1.0, 1.0, 0.0, 8)
    reused = SOLVERS[name].allocate(Layout.of(v))
    solve(reused, A * torch.nan, v, estimate)
    again, told = solve(reused, A, v, estimate)
    expected, expected_told = solve(SOLVERS[name].allocate(Layout.of(v)), A, v, estimate)
    assert torch.equal(again, expected) and bool(torch.isfinite(again).all())
    assert told == expected_told
