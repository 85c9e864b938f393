"""The Lanczos estimate of the largest eigenvalue, cold and warm."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import pytest
import torch
from problems_with_known_answers import DTYPE, matrix_with, randn, spd_problems
from torch import Tensor

from hvp_engine._support.flat_vector import FlatVector, Layout
from hvp_engine.differentiation.linear_map import LinearMap
from hvp_engine.solvers.spectrum import COLD_STEPS, REFRESH_STEPS, SpectralEstimate, Spectrum, lanczos


class Operator(LinearMap):
    """A matrix on a list of one tensor, counting its products."""

    def __init__(self, matrix: Tensor):
        self.matrix, self.calls = matrix, 0
        self.layout = Layout.of([torch.zeros(len(matrix), dtype=matrix.dtype)])

    def product(self, tangents: Sequence[Tensor]) -> list[Tensor]:
        self.calls += 1
        return [self.matrix @ tangents[0]]


class Map(LinearMap):
    """A product on lists of tensors."""

    def __init__(self, layout: Layout, function: Callable[[Sequence[Tensor]], Sequence[Tensor]]):
        self.layout, self._function = layout, function

    def product(self, tangents: Sequence[Tensor]) -> Sequence[Tensor]:
        return self._function(tangents)


def start(operator: Operator, seed: int = 0) -> FlatVector:
    vector = randn(len(operator.matrix), seed=seed).to(operator.matrix.dtype)
    return FlatVector.of(operator.layout, [vector / vector.norm()])


def test_full_length_run_is_exact() -> None:
    operator = Operator(matrix_with([-3.0, 0.5, 1.0, 2.0, 7.0], seed=1))
    estimate, vector = lanczos(operator, start(operator), 5)
    assert estimate.largest == pytest.approx(7.0, rel=1e-12)
    assert estimate.smallest == pytest.approx(-3.0, rel=1e-12)
    assert estimate.margin < 1e-9 and estimate.indefinite() and not estimate.indefinite(3.1)
    assert estimate.smallest_margin < 1e-9
    both = vector.views[0]  # the sum of the eigenvectors of 7 and -3
    image = operator.matrix @ both
    torch.testing.assert_close(operator.matrix @ (image + 3.0 * both), 7.0 * (image + 3.0 * both), rtol=1e-9, atol=1e-9)
    assert float((image + 3.0 * both).norm()) == pytest.approx(10.0)
    assert float((image - 7.0 * both).norm()) == pytest.approx(10.0)


def test_largest_is_by_magnitude() -> None:
    operator = Operator(matrix_with([-9.0, 0.5, 1.0, 2.0], seed=2))
    estimate, _ = lanczos(operator, start(operator), 4)
    assert estimate.largest == pytest.approx(9.0, rel=1e-12)


def test_steps_are_capped_by_the_size() -> None:
    operator = Operator(matrix_with([1.0, 2.0], seed=3))
    estimate, _ = lanczos(operator, start(operator), 8)
    assert operator.calls == estimate.hvps == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_breakdown_on_few_distinct_eigenvalues(dtype: torch.dtype) -> None:
    """Of a multiple of I the first residual is rounding alone; dividing by it must not invent eigenvalues."""
    operator = Operator(2.5 * torch.eye(30, dtype=dtype))
    estimate, _ = lanczos(operator, start(operator), 8)
    assert estimate.largest == pytest.approx(2.5, rel=1e-5)
    assert estimate.smallest == pytest.approx(2.5, rel=1e-5) and estimate.margin < 1e-5


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_breakdown_near_a_multiple_of_the_identity(dtype: torch.dtype, seed: int) -> None:
    diagonal = torch.full((8,), 1e6, dtype=dtype)
    diagonal[0] += 2
    operator = Operator(torch.diag(diagonal))
    estimate, _ = lanczos(operator, start(operator, seed), 8)
    assert estimate.largest == pytest.approx(1e6, rel=1e-5)
    assert estimate.smallest > -1.0 and estimate.margin < 10.0


def test_zero_operator() -> None:
    operator = Operator(torch.zeros(4, 4, dtype=DTYPE))
    estimate = Spectrum().refresh(operator)
    assert (estimate.largest, estimate.smallest, estimate.margin) == (0.0, 0.0, 0.0)
    assert estimate.safe_alpha() == 1.0


def test_margin_bounds_the_distance_to_an_eigenvalue() -> None:
    for matrix, _ in spd_problems(20):
        operator = Operator(matrix)
        values = torch.linalg.eigvalsh(matrix)
        for steps in (1, 2, 4):
            estimate, _ = lanczos(operator, start(operator), steps)
            distance = float((values - estimate.largest).abs().min())
            assert distance <= estimate.margin + 1e-9 * float(values[-1])
            assert estimate.largest <= float(values[-1]) * (1 + 1e-9)


def test_cold_estimate_is_safe_where_two_products_are_not() -> None:
    diagonal = torch.rand(100_000, generator=torch.Generator().manual_seed(0), dtype=DTYPE)
    diagonal[0] = 15.0
    layout = Layout.of([diagonal])
    for seed in range(10):
        vector = FlatVector.of(layout, [randn(100_000, seed=seed)])
        operator = Map(layout, lambda t: [diagonal * t[0]])
        short, cold = (lanczos(operator, vector, steps)[0] for steps in (2, COLD_STEPS))
        assert short.bound() < 15 / 2, "two products miss an outlier among many eigenvalues by more than half"
        assert cold.bound() > 0.99 * 15


def test_first_call_is_cold_and_later_ones_are_short() -> None:
    operator, spectrum = Operator(matrix_with([0.1 * i for i in range(1, 41)], seed=5)), Spectrum()
    assert spectrum.refresh(operator).hvps == COLD_STEPS == operator.calls
    assert spectrum.refresh(operator).hvps == REFRESH_STEPS == operator.calls - COLD_STEPS
    assert spectrum.estimate is not None and spectrum.estimate.hvps == REFRESH_STEPS


def test_refresh_improves_the_estimate() -> None:
    operator, spectrum = Operator(matrix_with(torch.linspace(0.1, 1.0, 300), seed=6)), Spectrum()
    first = spectrum.refresh(operator).largest
    for _ in range(10):
        last = spectrum.refresh(operator).largest
    assert abs(last - 1.0) < abs(first - 1.0) or first == pytest.approx(1.0, abs=0.01)
    assert last == pytest.approx(1.0, abs=0.02)


def test_refresh_keeps_the_smallest_in_sight() -> None:
    """Three products from the largest eigenvector alone would put the smallest value at more than ten times as much."""
    values = torch.linspace(0.01, 1.0, 300, dtype=DTYPE)
    operator, spectrum = Operator(matrix_with(values, seed=13)), Spectrum()
    estimates = [spectrum.refresh(operator) for _ in range(10)]
    assert all(0.01 <= estimate.smallest < 0.05 for estimate in estimates)
    assert all(estimate.largest > 0.97 for estimate in estimates)


def test_refresh_sees_growth_in_the_same_and_in_a_new_direction() -> None:
    values = torch.linspace(0.1, 1.0, 40, dtype=DTYPE)
    basis, _ = torch.linalg.qr(randn(40, 40, seed=7))
    for grown in (39, 5):
        spectrum = Spectrum()
        before = Operator(basis @ torch.diag(values) @ basis.T)
        spectrum.refresh(before)
        risen = values.clone()
        risen[grown] = 13.0
        after = Operator(basis @ torch.diag(risen) @ basis.T)
        estimate = spectrum.refresh(after)
        if grown == 39:
            assert estimate.bound() > 13.0 / 1.05
        else:  # three products from the old vector only begin to see it: growth in the solve triggers a restart
            assert estimate.bound() > 1.0


def test_refreshes_find_growth_beside_an_invariant_subspace() -> None:
    """A start in it alone would never leave it: the products of a diagonal matrix are exactly zero elsewhere."""
    values = torch.linspace(0.1, 1.0, 40, dtype=DTYPE)
    before, spectrum = Operator(torch.diag(values)), Spectrum()
    ends = torch.zeros(40, dtype=DTYPE)
    ends[[0, 39]] = 1.0
    spectrum.restart(before, FlatVector.of(before.layout, [ends]))
    values[5] = 3.0
    after = Operator(torch.diag(values))
    assert max(spectrum.refresh(after).largest for _ in range(3)) == pytest.approx(3.0, rel=0.01)


def test_another_layout_starts_cold() -> None:
    spectrum = Spectrum()
    for size in (10, 12):
        operator = Operator(matrix_with(torch.linspace(1, 2, size), seed=8))
        assert spectrum.refresh(operator).hvps == COLD_STEPS


def test_non_finite_product_is_reported_and_not_kept() -> None:
    spectrum = Spectrum()
    good = Operator(matrix_with([1.0, 2.0, 3.0], seed=9))
    kept = spectrum.refresh(good)
    estimate = spectrum.refresh(Operator(good.matrix * math.nan))
    assert not estimate.finite
    assert spectrum.estimate == kept
    assert spectrum.vector is not None and bool(torch.isfinite(spectrum.vector.data).all())


def test_product_that_returns_its_tangents() -> None:
    layout = Layout.of([torch.zeros(2, dtype=DTYPE)] * 2)
    estimate = Spectrum().refresh(Map(layout, lambda t: [t[1], t[0]]))
    assert (estimate.largest, estimate.smallest) == (pytest.approx(1.0), pytest.approx(-1.0))
    assert estimate.hvps == 4


def test_the_callers_generator_is_not_touched() -> None:
    operator = Operator(matrix_with([1.0, 2.0, 3.0], seed=10))
    before = torch.get_rng_state()
    Spectrum().refresh(operator)
    assert torch.equal(torch.get_rng_state(), before)


def test_two_runs_are_the_same() -> None:
    operator = Operator(matrix_with(torch.linspace(1, 9, 30), seed=11))
    runs = []
    for _ in range(2):
        spectrum = Spectrum()
        runs.append([spectrum.refresh(operator) for _ in range(3)])
    assert runs[0] == runs[1]


def test_state_dict_continues_with_the_same_numbers() -> None:
    operator = Operator(matrix_with(torch.linspace(1, 9, 30), seed=12))
    spectrum, other = Spectrum(), Spectrum()
    spectrum.refresh(operator)
    other.load_state_dict(spectrum.state_dict())
    assert other.refresh(operator) == spectrum.refresh(operator)


@pytest.mark.parametrize(
    ("estimate", "damping", "alpha"),
    [
        (SpectralEstimate(4.0, 1.0, 1.0, 8), 0.0, 1 / 5),
        (SpectralEstimate(4.0, 1.0, 1.0, 8), 5.0, 1 / 10),
        (SpectralEstimate(0.0, 0.0, 0.0, 8), 0.0, 1.0),
    ],
)
def test_safe_alpha(estimate: SpectralEstimate, damping: float, alpha: float) -> None:
    assert estimate.safe_alpha(damping) == pytest.approx(alpha)


def test_low_precision_tangents() -> None:
    """Weights in bfloat16: the products come back rounded, and the estimate is still good to a few percent."""
    layout = Layout.of([torch.zeros(50, dtype=torch.bfloat16)])
    diagonal = torch.linspace(0.1, 4.0, 50, dtype=torch.bfloat16)
    diagonal[7] = 30.0
    estimate = Spectrum().refresh(Map(layout, lambda t: [diagonal * t[0]]))
    assert estimate.largest == pytest.approx(30.0, rel=0.03)
