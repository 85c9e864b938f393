"""A solve's products and updates on a linearization made before, beside one gradient (`units` products each)."""

from __future__ import annotations

import pytest

from bench.conftest import DEVICE, Show, require
from bench.methods import LIST_LOOPS, OURS, own_engines
from bench.problems import names_for
from bench.suite import suite_of


@pytest.mark.parametrize("problem", names_for(DEVICE))
@pytest.mark.parametrize("method", ["gradient", *LIST_LOOPS, *(f"{OURS} {name}" for name in own_engines())])
def test_hvp(show: Show, method: str, problem: str) -> None:
    own = suite_of(problem, DEVICE)
    require(own.inverse_hvps, method)
    show(own.hvp(), method)
