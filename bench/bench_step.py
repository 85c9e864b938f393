"""The fused step against torch's additions, by size and number of tensors, and the update part of a solve."""

from __future__ import annotations

import pytest

from bench import steps, suite
from bench.conftest import DEVICE, Show
from bench.suite import Case, suite_of, tensor_count


@pytest.mark.parametrize("weights", steps.SIZES)
@pytest.mark.parametrize("tensors", steps.TENSORS)
@pytest.mark.parametrize("method", [name for name in steps.WORDS if name not in ("add_", "copy_")])
def test_step(show: Show, method: str, tensors: int, weights: int) -> None:
    works = steps.step_works(weights, tensors, DEVICE)
    show(Case("step", tensor_count(tensors), weights, works), method)


@pytest.mark.parametrize("method", ["neumann_step", "neumann_step_horner", "add_", "copy_"])
def test_bandwidth(show: Show, method: str) -> None:
    """At ten million weights; the words that each moves are in `bench.steps.WORDS`."""
    show(Case("bandwidth", tensor_count(1), 10_000_000, steps.step_works(10_000_000, 1, DEVICE)), method)


@pytest.mark.parametrize("problem", suite.UPDATE_PROBLEMS)
@pytest.mark.parametrize("method", ["list loop", "list loop, foreach", "hvp_engine step"])
def test_solve_around_the_update(show: Show, method: str, problem: str) -> None:
    """The solves whose update part `bench.run` times from inside; here they are seen whole."""
    show(suite_of(problem, DEVICE).update(), method)
