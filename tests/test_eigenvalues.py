"""Extreme eigenvalues and the density of eigenvalues, against dense spectra."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import pytest
import torch
from problems_with_known_answers import DTYPE, NETWORKS, dense_hessian, matrix_with, randn
from torch import Tensor

import hvp_engine as hvp


def mlp() -> tuple[hvp.HessianOperator, Tensor]:
    network = NETWORKS["mlp"]()
    net = hvp.functional(network.module)
    weights = dict(network.module.named_parameters())
    operator = hvp.HessianOperator(lambda w: network.loss_of(net(w, network.x)), weights)
    return operator, torch.linalg.eigvalsh(dense_hessian(network))


def gauss_newton() -> tuple[hvp.GaussNewtonOperator, Tensor]:
    x, y = randn(6, 3, seed=1), randn(6, 2, seed=2)
    weights = [randn(3, 4, seed=3), randn(4, 2, seed=4)]
    operator = hvp.GaussNewtonOperator(
        lambda w, x: torch.tanh(x @ w[0]) @ w[1], lambda o, y: (o - y).square().mean(), weights, x, y
    )
    return operator, torch.linalg.eigvalsh(operator.dense())


# Extreme eigenvalues


@pytest.mark.parametrize("problem", [mlp, gauss_newton])
def test_extremes_of_networks(problem: Any) -> None:
    operator, truth = problem()
    found = hvp.extreme_eigenvalues(operator, 2, tol=1e-10)
    assert found.converged
    assert found.largest == pytest.approx(truth.flip(0)[:2].tolist(), abs=1e-9)
    assert found.smallest[0] == pytest.approx(float(truth[0]), abs=1e-9)


def test_a_callable_on_a_tree() -> None:
    found = hvp.extreme_eigenvalues(
        lambda v: {"a": 3 * v["a"], "b": [-v["b"][0]]}, like={"a": torch.zeros(2, 2), "b": [torch.tensor(0.0)]}
    )
    assert (found.largest, found.smallest) == (pytest.approx((3.0,), rel=1e-6), pytest.approx((-1.0,), rel=1e-6))


@pytest.mark.parametrize("hvps", [5, 12, 25, 40])
def test_within_its_bound_there_is_an_eigenvalue(hvps: int) -> None:
    """However early it stops; and the bounds are worth something: they are not above the spectrum's width."""
    values = torch.cat([torch.linspace(-1, 1, 76, dtype=DTYPE), torch.tensor([-9.0, 4.0, 5.0, 20.0], dtype=DTYPE)])
    matrix = matrix_with(values, seed=1)
    found = hvp.extreme_eigenvalues(lambda v: matrix @ v, 3, tol=1e-12, max_hvps=hvps, like=matrix[0])
    assert found.hvps <= hvps
    pairs = [
        *zip(found.largest, found.largest_errors, strict=True),
        *zip(found.smallest, found.smallest_errors, strict=True),
    ]
    for value, bound in pairs:
        assert float((values - value).abs().min()) <= bound + 1e-12
        assert bound < 15
    if hvps >= 25:
        assert found.largest == pytest.approx((20.0, 5.0, 4.0), abs=1e-5)
        assert found.smallest[0] == pytest.approx(-9.0, abs=1e-8)


def test_it_stops_at_the_tolerance_and_says_when_it_did_not() -> None:
    matrix = matrix_with(torch.linspace(0.0, 1.0, 300, dtype=DTYPE), seed=2)
    loose, tight = (
        hvp.extreme_eigenvalues(lambda v: matrix @ v, tol=tol, max_hvps=300, like=matrix[0]) for tol in (1e-2, 1e-6)
    )
    assert loose.converged and tight.converged and loose.hvps < tight.hvps < 300
    assert max(tight.largest_errors + tight.smallest_errors) <= 1e-6
    assert abs(tight.largest[0] - 1) < 1e-9
    short = hvp.extreme_eigenvalues(lambda v: matrix @ v, max_hvps=4, like=matrix[0])
    assert not short.converged and short.hvps == 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_few_distinct_eigenvalues_are_exact(dtype: torch.dtype) -> None:
    found = hvp.extreme_eigenvalues(lambda v: torch.cat([2 * v[:10], -v[10:]]), 2, like=torch.zeros(30, dtype=dtype))
    assert found.converged and found.hvps == 5
    assert found.largest == pytest.approx((2.0, -1.0), rel=1e-5)


def test_the_same_seed_gives_the_same_numbers_and_draws_nothing_from_the_caller() -> None:
    matrix, state = matrix_with(torch.linspace(0, 1, 50, dtype=DTYPE), seed=3), torch.get_rng_state()
    runs = [hvp.extreme_eigenvalues(lambda v: matrix @ v, max_hvps=10, like=matrix[0], seed=s) for s in (1, 1, 2)]
    assert runs[0] == runs[1] != runs[2]
    assert torch.equal(state, torch.get_rng_state())


# Density


@pytest.mark.parametrize("problem", [mlp, gauss_newton])
def test_full_length_probes_give_the_exact_spectrum(problem: Any) -> None:
    """With as many steps as weights, nodes are the eigenvalues, and the mean over probes their multiplicities."""
    operator, truth = problem()
    density = hvp.spectral_density(operator, probes=100, steps=len(truth))
    seen = density.nodes[density.weights > 1e-6]
    assert float((seen[:, None] - truth).abs().min(1).values.max()) < 1e-6
    for power in (1, 2, 3):
        mean, error = density.mean(partial(torch.pow, exponent=power))
        assert abs(mean - float((truth**power).mean())) < 4 * error
        assert error < 0.2 * float((truth.abs() ** power).mean())
    assert density.size == len(truth) and density.hvps == 100 * len(truth)


def test_quadrature_is_exact_for_polynomials_of_one_probe() -> None:
    """sum tau g(theta) = v . g(A) v for degree < 2 steps, and not for higher degrees."""
    matrix = matrix_with(torch.linspace(-1, 2, 40, dtype=DTYPE), seed=4)
    seen: list[Tensor] = []

    def product(v: Tensor) -> Tensor:
        seen.append(v.clone())
        return matrix @ v

    density = hvp.spectral_density(product, probes=1, steps=6, like=matrix[0])
    start = seen[0]
    for degree in range(12):
        truth = float(start @ torch.linalg.matrix_power(matrix, degree) @ start)
        assert density.mean(partial(torch.pow, exponent=degree))[0] == pytest.approx(truth, rel=1e-10)
    truth = float(start @ torch.linalg.matrix_power(matrix, 12) @ start)
    assert density.mean(partial(torch.pow, exponent=12))[0] != pytest.approx(truth, rel=1e-10)


def test_density_against_the_dense_one() -> None:
    """A semicircle and two outliers: the cumulative distribution within 0.02, the integral 1."""
    noise = randn(400, 400, seed=5)
    values = torch.cat(
        [torch.linalg.eigvalsh((noise + noise.T) / math.sqrt(2 * 400)), torch.tensor([6.0, 6.0, -5.0], dtype=DTYPE)]
    )
    density = hvp.spectral_density(lambda v: values * v, probes=10, steps=60, like=values)
    points = torch.linspace(-6, 7, 4001, dtype=DTYPE)
    width = 0.05
    truth = torch.exp(-((points[:, None] - values) / width).square() / 2).mean(1) / (width * math.sqrt(2 * math.pi))
    step = points[1] - points[0]
    found = density(points, width)
    assert float(found.sum() * step) == pytest.approx(1.0, abs=1e-6)
    assert float(((found - truth).cumsum(0) * step).abs().max()) < 0.02
    outlier = found[(points > 5.5)].sum() * step
    assert float(outlier) == pytest.approx(2 / 403, rel=0.5)


def test_the_default_width_separates_bulk_and_outlier() -> None:
    """Between them the density is below what one eigenvalue in a hundred contributes."""
    values = torch.cat([torch.linspace(0, 1, 99), torch.tensor([10.0])])
    bulk, gap, outlier = hvp.spectral_density(lambda v: values * v, like=values)(
        torch.tensor([0.5, 5.0, 10.0])
    ).tolist()
    assert gap < 1e-6 < outlier < bulk


# Bad input


@pytest.mark.parametrize("function", [hvp.extreme_eigenvalues, hvp.spectral_density])
def test_bad_arguments_are_named(function: Any) -> None:
    with pytest.raises(TypeError, match=r"^operator: expected an operator or a callable"):
        function(torch.eye(3))
    with pytest.raises(TypeError, match=r"^like: expected a tensor or tree"):
        function(lambda v: v)
    with pytest.raises(ValueError, match=r"^(count|probes): expected an int >= 1; got 0"):
        function(lambda v: v, 0, like=torch.ones(3))
    with pytest.raises(hvp.NonFiniteError, match=r"^operator: expected finite products"):
        function(lambda v: v / 0 * 0, like=torch.ones(3))
    with pytest.raises(ValueError, match=r"^width: expected a finite number > 0"):
        hvp.spectral_density(lambda v: v, like=torch.ones(3))(torch.ones(1), width=0.0)
