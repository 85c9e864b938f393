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


@pytest.mark.parametrize("name", [name for name, model in MODELS.items() if model.installed])
def test_hypergradient(name: str) -> None:
    problem = Problem(MODELS[name], ITERATIONS, ALPHA)
    truth = problem.truth()
    differences = {engine: difference(problem.found(create(engine)), truth) for engine in ("eager", "recorded", "auto")}
    assert all(value < MODELS[name].tolerance for value in differences.values()), differences
