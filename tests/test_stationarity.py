"""The warning far from a minimum, where the implicit function theorem does not apply."""

from __future__ import annotations

import warnings

import pytest
from tuning_problem_with_known_optimum import DATA, TARGET, distance, shrink, zeros

import hvp_engine as hvp


def test_weights_far_from_a_minimum_are_warned_about_once() -> None:
    """Newton's step moves w by -(w - w*), so L_V = |w - t|^2 / 2 changes by (w - t).(w* - w) to first order."""
    w, h = zeros(3), zeros(3)
    hypergradient = hvp.Hypergradient(shrink, distance, hvp.Neumann(80), engine="eager")
    with pytest.warns(UserWarning, match=r"far from a minimum.*is 3.74, .* 1.57, by about -3.15;.*longer"):
        result = hypergradient(w, h, DATA, TARGET)
    expected = float((w - TARGET) @ (DATA / 2 - w))
    assert float(result.unfinished) == pytest.approx(expected, rel=1e-6)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(8):
            hypergradient(w, h, DATA, TARGET)


def test_no_warning_near_a_minimum_or_without_a_solve() -> None:
    h = zeros(3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        hvp.Hypergradient(shrink, distance, hvp.Neumann(80))(0.45 * DATA, h, DATA, TARGET)
        hvp.Hypergradient(shrink, distance, hvp.Identity())(zeros(3), h, DATA, TARGET)


def test_the_warning_can_come_later() -> None:
    h = zeros(3)
    hypergradient = hvp.Hypergradient(shrink, distance, hvp.Neumann(80), engine="eager")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        hypergradient(0.5 * DATA, h, DATA, TARGET)
    with pytest.warns(UserWarning, match="far from a minimum"):
        hypergradient(zeros(3), h, DATA, TARGET)
