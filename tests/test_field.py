"""Models of other packages, on each engine, against plain double backward in float64 with the same random numbers.

`make field` installs the packages; a model whose package is missing is no test here.
"""

from __future__ import annotations

import pytest
from field_models import MODELS
from field_problems import Problem, difference

import hvp_engine as hvp
from hvp_engine.engines import create

pytestmark = [
    pytest.mark.field,
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.filterwarnings("error:.*is replaced by"),
]

ITERATIONS, ALPHA = 3, 0.02

ASKS = {
    *("BERT", "BERT, evaluation mode", "BERT, eager attention", "BERT, gradient checkpointing", "BERT, bfloat16"),
    *("GPT-2, tied weights", "Llama", "Mixtral", "Mixtral, loop over experts", "T5", "BERT with LoRA"),
    *("Llama with LoRA", "GCN", "GAT"),
}
"""Models whose Python asks a tensor, its mask mostly: `linearized` refuses them by name."""


@pytest.mark.parametrize("name", [name for name, model in MODELS.items() if model.installed])
def test_hypergradient(name: str) -> None:
    problem = Problem(MODELS[name], ITERATIONS, ALPHA)
    truth = problem.truth()
    engines = ["eager", "recorded", "auto"]
    if name in ASKS:
        with pytest.raises(hvp.TraceError, match="Python asks|hooks|control flow"):
            problem.found(create("linearized"))
    else:
        engines.append("linearized")
    differences = {engine: difference(problem.found(create(engine)), truth) for engine in engines}
    assert all(value < MODELS[name].tolerance for value in differences.values()), differences
