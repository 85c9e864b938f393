"""Whole hypergradients by every method, and unrolling of as many steps."""

from __future__ import annotations

import pytest

from bench import methods, peers, suite
from bench.conftest import DEVICE, Show, require
from bench.problems import names_for
from bench.suite import suite_of

ENGINES = {name: engine for name, engine in methods.own_engines().items() if name in suite.HYPERGRADIENT_ENGINES}
IMPLICIT = [*methods.own_hypergradients(ENGINES), *peers.hypergradients()]
UNROLLED = ["unrolling", *peers.unrolled()]


@pytest.mark.parametrize("problem", [name for name in suite.HYPERGRADIENT_PROBLEMS if name in names_for(DEVICE)])
@pytest.mark.parametrize("method", IMPLICIT + UNROLLED)
def test_hypergradient(show: Show, method: str, problem: str) -> None:
    own = suite_of(problem, DEVICE)
    require(own.unrolled if method in UNROLLED else own.hypergradients, method)
    show(own.hypergradient(), method)


@pytest.mark.parametrize("length", suite.UNROLLED_LENGTHS)
@pytest.mark.parametrize("method", ["hvp_engine eager", "hvp_engine auto", "unrolling"])
def test_against_unrolling(show: Show, method: str, length: int) -> None:
    show(suite_of(suite.UNROLLED_PROBLEM, DEVICE).unrolling(length), method)
