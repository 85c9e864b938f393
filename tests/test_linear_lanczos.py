"""The linear model's Lanczos run in one call, against the ordinary one on its dense Hessian in float64."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from linear_models_and_losses import DECAYS, LOSSES, Model, joined, likewise, model_of
from problems_with_known_answers import DTYPE, randn

import hvp_engine as hvp
from hvp_engine._support.flat_vector import FlatVector
from hvp_engine.solvers.lanczos import LanczosBasis, Tridiagonalization, tridiagonalize
from hvp_engine.solvers.spectrum import COLD_STEPS, REFRESH_STEPS


def started(model: Model, seed: int = 20) -> FlatVector:
    return FlatVector.of(model.operator.layout, [randn(w.numel(), seed=seed).view_as(w) for w in model.weights])


def fast(model: Model, steps: int) -> Tridiagonalization:
    return tridiagonalize(model.operator.linear_map, started(model), steps)


def ordinary(model: Model, steps: int) -> Tridiagonalization:
    """Product by product, with autograd's Hessian."""
    operator = hvp.HessianOperator(model.value, model.weights, engine="eager")
    basis = LanczosBasis(operator.product, started(model), steps)
    basis.extend(steps)
    return basis.tridiagonalization


def compare(one: Tridiagonalization, other: Tridiagonalization, tolerance: float) -> None:
    size = float(other.diagonal.abs().max())
    for ours, theirs in ((one.diagonal, other.diagonal), (one.off_diagonal, other.off_diagonal)):
        torch.testing.assert_close(ours.double(), theirs.double(), rtol=0, atol=tolerance * size)
    torch.testing.assert_close(one.basis.double(), other.basis.double(), rtol=0, atol=10 * tolerance)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("loss", LOSSES)
def test_steps_are_those_of_the_ordinary_run(loss: str, decay: str, bias: bool, backend: str) -> None:
    model = model_of(loss, decay=decay, bias=bias)
    compare(fast(model, 6), ordinary(model, 6), 1e-12)


# Below, at and above the widths of vectors, tiles, tasks and blocks.
@pytest.mark.parametrize("samples, features", [(1, 2), (7, 16), (13, 97), (97, 25), (200, 33), (5, 1400), (700, 60)])
@pytest.mark.parametrize("outputs", ["vector", 3, 10])
def test_sizes(samples: int, features: int, outputs: int | str) -> None:
    loss = "logistic" if outputs == "vector" else "softmax"
    model = model_of(loss, outputs, "per weight", samples=samples, features=features)
    compare(fast(model, 3), ordinary(model, 3), 1e-12)


def test_all_steps_find_all_eigenvalues(backend: str) -> None:
    model = model_of("softmax", decay="per weight")
    found = fast(model, 1000)
    values = torch.linalg.eigvalsh(model.hessian())
    assert len(found.basis) == len(values)
    pairs = found.ritz_pairs()
    assert pairs is not None
    torch.testing.assert_close(pairs.values, values, rtol=1e-10, atol=1e-12)
    gram = found.basis @ found.basis.T
    torch.testing.assert_close(gram, torch.eye(len(gram), dtype=DTYPE), rtol=0, atol=1e-12)


@pytest.mark.parametrize("threads", [1, 3])
def test_threads_and_float32(threads: int) -> None:
    wide = model_of("softmax", 10, "per weight", samples=300, features=400)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        narrow = fast(wide.to(torch.float32), COLD_STEPS)
    finally:
        torch.set_num_threads(before)
    assert narrow.basis.dtype == torch.float32
    truth = ordinary(wide, COLD_STEPS).ritz_pairs()
    pairs = narrow.ritz_pairs()
    assert truth is not None and pairs is not None
    torch.testing.assert_close(pairs.values[-1], truth.values[-1], rtol=1e-5, atol=0)
    gram = narrow.basis @ narrow.basis.T
    torch.testing.assert_close(gram, torch.eye(COLD_STEPS), rtol=0, atol=2e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_an_invariant_subspace_ends_it(dtype: torch.dtype, backend: str) -> None:
    """One sample: rank one and a decay. What is left after two steps is rounding, and must not become an eigenvalue."""
    model = replace(
        model_of("squared", "vector", "scalar", bias=False, samples=1, features=30), targets=randn(1, seed=1)
    )
    found = fast(model.to(dtype), COLD_STEPS)
    pairs = found.ritz_pairs()
    assert pairs is not None and len(pairs.values) == 2
    expected = [0.3, 0.3 + 2 * float(model.inputs.square().sum())]
    assert pairs.values.tolist() == pytest.approx(expected, rel=1e-5)
    assert not found.basis[2:].any()


def test_nothing_and_not_finite(backend: str) -> None:
    model = model_of("logistic", decay="none")
    nothing = replace(model, inputs=torch.zeros_like(model.inputs), weights=model.weights[:1], decay=model.decay[:1])
    pairs = fast(nothing, 4).ritz_pairs()
    assert pairs is not None and pairs.values.tolist() == [0.0]
    broken = replace(model, inputs=torch.full_like(model.inputs, math.nan))
    assert fast(broken, 4).ritz_pairs() is None


def solution_of(model: Model, scale: float, spectrum: hvp.LinearModelOperator | None, solver: object) -> hvp.Solution:
    operator = replace(model, inputs=scale * model.inputs).operator
    if spectrum is not None:
        operator.spectrum = spectrum.spectrum
    return operator.solve(vector(model), solver)  # type: ignore[arg-type]


def vector(model: Model) -> Any:
    return likewise(model, randn(sum(w.numel() for w in model.weights), seed=21))


@pytest.mark.parametrize("solver", [hvp.Neumann(60), hvp.Chebyshev(60), hvp.Chebyshev(60, form="heavy_ball")], ids=repr)
def test_a_stale_estimate_does_not_diverge(solver: object, backend: str) -> None:
    """lambda_max rises 13-fold between two calls."""
    model = model_of("squared", decay="per weight", samples=30)
    before = model.operator
    first = before.solve(vector(model), solver)  # type: ignore[arg-type]
    assert first.hvps == 60 + COLD_STEPS
    second = solution_of(model, math.sqrt(13.0), before, solver)
    assert second.hvps >= 60 + REFRESH_STEPS and second.residual_norm <= 1
    assert all(bool(torch.isfinite(leaf).all()) for leaf in second.value)


def test_estimate_is_the_ordinary_one(backend: str) -> None:
    model = model_of("softmax", 10, "per weight", samples=50, features=100)
    ours = model.operator.solve(vector(model), hvp.Neumann(20))
    theirs = hvp.HessianOperator(model.value, model.container, engine="eager").solve(vector(model), hvp.Neumann(20))
    assert ours.lambda_max == pytest.approx(theirs.lambda_max, rel=1e-12)
    assert ours.alpha == pytest.approx(theirs.alpha, rel=1e-12)
    torch.testing.assert_close(joined(ours.value), joined(theirs.value), rtol=1e-9, atol=1e-12)
