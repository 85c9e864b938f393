"""Recorded products of many models: the plain ones in every call, by one program, under every solver."""

from __future__ import annotations

import warnings

import pytest
import recorded_functions  # noqa: F401  its models join the list
import torch
from recorded_checks import assert_same, calls, gradient_of, level, reason
from recorded_models import LEVELS, MODELS
from torch import Tensor

import hvp_engine as hvp
from hvp_engine.differentiation.double_backward import Tape
from hvp_engine.differentiation.recorded.library import Library
from hvp_engine.differentiation.recorded.owned import OwnedLinearization
from hvp_engine.engines import EagerEngine
from hvp_engine.solvers import Solver
from hvp_engine.solvers.base import LinearSystem
from hvp_engine.solvers.spectrum import Spectrum

pytestmark = [pytest.mark.usefixtures("float64_by_default"), pytest.mark.filterwarnings("error:.*a recorded product")]


@pytest.mark.parametrize("name", MODELS)
def test_products(name: str) -> None:
    weights, loss = MODELS[name]()
    library = Library()
    made = calls(loss, weights, library=library)
    assert [level(tape) for tape in made] == [LEVELS.get(name, 1)] * 3, reason(made[-1])
    assert library.built == (0 if LEVELS.get(name) == 3 else 1), "all calls run one program"


SOLVERS: dict[str, Solver] = {
    "Neumann": hvp.Neumann(4, 0.01),
    "Neumann, Horner's form": hvp.Neumann(4, 0.01, form="horner"),
    "Neumann, damped": hvp.Neumann(3, 0.01, damping=0.1),
    "Neumann, automatic": hvp.Neumann(3, damping=0.1),
    "conjugate gradients": hvp.ConjugateGradient(3, damping=5.0),
    "MINRES": hvp.MINRES(3, damping=0.1),
    "Chebyshev": hvp.Chebyshev(3, damping=5.0),
    "exact": hvp.Exact(damping=1.0),
    "identity": hvp.Identity(),
}
SOLVED = ("perceptron", "channels last", "0-dim weights", "bilinear", "checkpointed", "weights without use")


def solved(tape: Tape, vector: list[Tensor], solver: Solver) -> list[Tensor]:
    value, _ = LinearSystem(tape, EagerEngine(), Spectrum()).solve([v.clone() for v in vector], solver)
    return list(value)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("name", SOLVED)
def test_solvers(name: str, solver: str) -> None:
    warnings.filterwarnings("ignore", message="(?!.*a recorded product)")  # of solvers: Hessians are not definite
    weights, loss = MODELS[name]()
    if solver == "exact" and sum(w.numel() for w in weights) > 300:
        weights = weights[-1:]
    library = Library()
    for _ in range(3):
        gradient = gradient_of(loss(), weights)
        vector = [torch.randn_like(w) for w in weights]
        tape = OwnedLinearization(gradient, weights, name="loss", library=library)
        tape.product(vector)  # written down: from here on by the program
        found = solved(tape, vector, SOLVERS[solver])
        assert level(tape) == LEVELS.get(name, 1)
        true = solved(Tape(gradient, weights, name="loss"), vector, SOLVERS[solver])
        assert_same(found, true, 1e-8)


@pytest.mark.parametrize("name", ["perceptron", "LeNet", "LSTM", "transformer", "checkpointed"])
def test_mixed_products(name: str) -> None:
    """With one decay for each weight, with one that no loss uses, and one that is frozen."""
    weights, plain_loss = MODELS[name]()
    decays = [torch.full_like(w, -2.0).requires_grad_() for w in weights]
    unused, frozen = torch.ones(3, requires_grad=True), torch.tensor(-1.0)

    def loss() -> Tensor:
        pairs = zip(decays, weights, strict=True)
        return plain_loss() + frozen.exp() * sum((d.exp() * w.square()).sum() for d, w in pairs)

    library = Library()
    made = calls(loss, weights, [unused, *decays, frozen], library=library)
    assert [level(tape) for tape in made] == [LEVELS.get(name, 1)] * 3, reason(made[-1])
    assert library.built == 1
