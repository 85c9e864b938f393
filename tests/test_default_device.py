"""Calls go by the device of the weights, whatever torch's default device is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from problems_with_known_answers import DTYPE, randn

import hvp_engine as hvp

W, V, X, DECAY = randn(4, seed=1), randn(4, seed=2), randn(6, 4, seed=3), torch.zeros((), dtype=DTYPE)
SOLVERS = (
    hvp.Neumann(20, 0.1),
    hvp.Neumann(20),
    hvp.Chebyshev(20),
    hvp.ConjugateGradient(20),
    hvp.MINRES(20),
    hvp.Nystrom(3, rho=0.1),
    hvp.Exact(),
    hvp.Identity(),
    hvp.Budget(hvps=20),
)


def loss(w: torch.Tensor, decay: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return (x @ w).square().mean() + decay.exp() * w.square().sum()


def hypergradient(engine: str, solver: Any) -> torch.Tensor:
    estimate = hvp.Hypergradient(loss, lambda w, h, x: (x @ w - 1).square().mean(), solver, engine)
    return estimate(W, DECAY, X, X).grads


def linear_model(engine: str) -> hvp.LinearModelOperator:
    return hvp.LinearModelOperator(X, W, loss="logistic", decay=0.5, engine=engine)


CALLS: dict[str, Callable[[Any], torch.Tensor]] = {
    "callable": lambda solver: hvp.solve(lambda v: 2 * v, V, solver).value,
    "eager": lambda solver: hypergradient("eager", solver),
    "linearized": lambda solver: hypergradient("linearized", solver),
    "linear model": lambda solver: linear_model("linearized").solve(V, solver).value,
}


@pytest.mark.filterwarnings("ignore:the weights are far from a minimum")
@pytest.mark.parametrize("solver", SOLVERS, ids=lambda solver: type(solver).__name__)
@pytest.mark.parametrize("call", CALLS)
def test_another_default_device(call: str, solver: Any) -> None:
    expected = CALLS[call](solver)
    with torch.device("meta"):  # a tensor made there by mistake has no values
        found = CALLS[call](solver)
    assert torch.equal(found, expected)


def test_an_automatic_choice_with_another_default_device() -> None:
    """Which engine is fastest is measured each time, so that the two may round differently."""
    expected = linear_model("auto").solve(V, hvp.Neumann(20, 0.1)).value
    with torch.device("meta"):
        found = linear_model("auto").solve(V, hvp.Neumann(20, 0.1)).value
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("function", [hvp.extreme_eigenvalues, hvp.spectral_density])
def test_eigenvalues_with_another_default_device(function: Callable[..., Any]) -> None:
    operator = hvp.HessianOperator(lambda w: loss(w, DECAY, X), W)
    with torch.device("meta"):
        function(operator)
