"""Hypergradients leave nothing behind that only the garbage collector could free."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import hvp_engine as hvp

pytestmark = pytest.mark.filterwarnings("ignore:the weights are far from a minimum", "ignore::FutureWarning")
WEIGHTS = [torch.linspace(-1, 1, 12).reshape(3, 4), torch.linspace(0, 1, 4)]
HYPER = torch.tensor(-1.0)


def train(w: list[Tensor], h: Tensor, batch: Tensor) -> Tensor:
    return (torch.tanh(batch @ w[0]) - w[1]).square().mean() + h.exp() * w[0].square().sum()


def val(w: list[Tensor], h: Tensor, batch: Tensor) -> Tensor:
    return (torch.tanh(batch @ w[0]) - w[1] + 0.1).square().mean()


def tape(solver: Any) -> Callable[[], object]:
    def run() -> object:
        w, h = [part.clone().requires_grad_() for part in WEIGHTS], HYPER.clone().requires_grad_()
        batch = torch.ones(5, 3)
        return hvp.hypergradient(train(w, h, batch), val(w, h, batch), w, h, solver)

    return run


def functional(solver: Any, engine: str) -> Callable[[], object]:
    hypergradient = hvp.Hypergradient(train, val, solver, engine)
    return lambda: hypergradient(WEIGHTS, HYPER, torch.ones(5, 3), torch.ones(5, 3))


SOLVERS = {
    "neumann": hvp.Neumann(4, 0.1),
    "automatic": hvp.Neumann(4),
    "horner": hvp.Neumann(4, 0.1, form="horner"),
    "identity": hvp.Identity(),
    "conjugate gradient": hvp.ConjugateGradient(4),
    "exact": hvp.Exact(),
}


def live_tensors() -> int:
    return sum(isinstance(item, Tensor) for item in gc.get_objects())


STYLES = ("tape", "eager", "recorded", "linearized", "auto")


@pytest.mark.parametrize(
    ("style", "solver"),
    [*((style, "neumann") for style in STYLES), *((s, n) for s in ("tape", "linearized") for n in list(SOLVERS)[1:])],
)
def test_live_tensors_stay_as_many_without_the_collector(style: str, solver: str) -> None:
    run = tape(SOLVERS[solver]) if style == "tape" else functional(SOLVERS[solver], style)
    for _ in range(4):  # until all that is kept for further calls is there
        run()
    gc.collect()
    gc.disable()
    try:
        before = live_tensors()
        for _ in range(20):
            run()
        assert live_tensors() <= before + 2
    finally:
        gc.enable()


def test_live_tensors_stay_as_many_over_exceptions() -> None:
    hypergradient = hvp.Hypergradient(train, val, hvp.Neumann(400, alpha=1e3))

    def run() -> None:
        with pytest.raises(hvp.DivergenceError):
            hypergradient(WEIGHTS, HYPER, torch.ones(5, 3), torch.ones(5, 3))

    for _ in range(3):  # until all its programs are there
        run()
    gc.collect()
    before = live_tensors()
    for _ in range(10):
        run()
    gc.collect()
    assert live_tensors() <= before + 2
