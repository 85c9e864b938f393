"""Inverse-Hessian-vector products by every method, gradient included."""

from __future__ import annotations

import pytest

from bench import methods, peers
from bench.conftest import DEVICE, Show, require
from bench.problems import PROBLEMS, names_for
from bench.suite import suite_of

METHODS = [*methods.own_inverse_hvps(methods.own_engines()), *peers.inverse_hvps()]
LENGTHS = [(name, terms) for name in names_for(DEVICE) for terms in (PROBLEMS[name].terms, *PROBLEMS[name].sweep)]


@pytest.mark.parametrize(("problem", "terms"), LENGTHS)
@pytest.mark.parametrize("method", METHODS)
def test_inverse_hvp(show: Show, method: str, problem: str, terms: int) -> None:
    own = suite_of(problem, DEVICE)
    require(own.inverse_hvps, method)
    case = own.inverse_hvp(terms)
    if method not in case.works:
        pytest.skip("peers are timed at the problem's usual length")
    show(case, method)
