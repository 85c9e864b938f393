"""Models of other packages, on each engine, against plain double backward in float64 with the same random numbers.

`make field` installs the packages; a model whose package is missing is no test here.
"""

from __future__ import annotations

import pytest
from field_models import MODELS
from field_problems import Problem, difference

from hvp_engine.engines import create

pytestmark = [
    pytest.mark.field,
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.filterwarnings("error:.*is replaced by"),
]

ITERATIONS, ALPHA = 3, 0.02

CELLS = [(name, engine) for name in MODELS for engine in ("eager", "recorded", "auto") if MODELS[name].installed]


@pytest.mark.parametrize(("name", "engine"), CELLS)
def test_hypergradient(name: str, engine: str) -> None:
    problem = Problem(MODELS[name], ITERATIONS, ALPHA)
    assert difference(problem.found(create(engine)), problem.truth()) < MODELS[name].tolerance
