"""Threads whose losses draw nothing run at the same time; whatever needs the process for itself is run alone."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable

import numpy
import pytest
import torch
from threads_at_once import at_once
from torch import Tensor, nn

import hvp_engine as hvp

pytestmark = pytest.mark.filterwarnings("ignore:the weights are far from a minimum")


def same(found: list[Tensor], expected: list[Tensor]) -> bool:
    return all(torch.equal(mine, theirs) for mine, theirs in zip(found, expected, strict=True))


class Meeting:
    """A loss of its own module; if `of` is set, its evaluations wait for one another, and draw if `draws` is."""

    of: threading.Barrier | None = None
    draws: Callable[[], float] | None = None

    def __init__(self, module: nn.Module | None = None):
        self.net = hvp.functional(nn.Linear(6, 2) if module is None else module)

    def __call__(self, w: dict[str, Tensor], h: Tensor, batch: Tensor) -> Tensor:
        if self.of is not None:
            self.of.wait(20)
        scale = 1.0 if self.draws is None else 1.0 + self.draws()
        return scale * (self.net(w, batch).square().mean() + h.exp() * sum(p.square().sum() for p in w.values()))


def meeting(engine: str, module: nn.Module | None = None) -> tuple[Meeting, hvp.Hypergradient, Callable[[], Tensor]]:
    loss = Meeting(module)
    generator = torch.Generator().manual_seed(0)
    weights = {"weight": torch.randn(2, 6, generator=generator), "bias": torch.randn(2, generator=generator)}
    batch = torch.randn(5, 6, generator=generator)
    hypergradient = hvp.Hypergradient(loss, lambda w, h, b: w["bias"].square().sum(), hvp.Neumann(3, 0.1), engine)
    return loss, hypergradient, lambda: hypergradient(weights, torch.tensor(-1.0), batch, batch).grads


@pytest.mark.parametrize("engine", ["eager", "recorded"])
def test_losses_that_draw_nothing_run_at_the_same_time(engine: str) -> None:
    """Two evaluations that wait for one another would never end if threads took turns."""
    pairs = [meeting(engine) for _ in range(2)]
    expected = [call() for _, _, call in pairs]
    barrier = threading.Barrier(2)
    for loss, _, _ in pairs:
        loss.of = barrier
    for _ in range(3):
        found = at_once(*(call for _, _, call in pairs))
        assert all(isinstance(f, Tensor) and torch.equal(f, e) for f, e in zip(found, expected, strict=True)), found


def test_those_of_one_module_take_turns() -> None:
    """While one replaces the module's weights, the other waits; then it has them for itself."""
    module = nn.Linear(6, 2)
    pairs = [meeting("eager", module) for _ in range(4)]
    expected = [call() for _, _, call in pairs]
    found = at_once(*(lambda call=call: [call() for _ in range(20)] for _, _, call in pairs))
    for mine, theirs in zip(found, expected, strict=True):
        assert isinstance(mine, list) and all(torch.equal(one, theirs) for one in mine), mine


@pytest.mark.parametrize("draw", [lambda: float(torch.rand(())), lambda: float(numpy.random.rand()), random.random])
def test_a_loss_that_begins_to_draw(draw: Callable[[], float]) -> None:
    """It was taken for one that draws nothing: it is run again alone, with its own numbers, and nobody else notices."""
    torch.manual_seed(3)
    alone = meeting("eager")
    calls = [alone[2] for _ in range(6)]
    expected = []
    for index, call in enumerate(calls):
        alone[0].draws = draw if index >= 2 else None
        expected.append(call())
    assert not torch.equal(expected[1], expected[2]) and not torch.equal(expected[2], expected[3])
    torch.manual_seed(3)
    one, other = meeting("eager"), meeting("eager")
    before = torch.get_rng_state(), numpy.random.get_state()[1].tolist()

    def first() -> list[Tensor]:
        found = []
        for index in range(6):
            one[0].draws = draw if index >= 2 else None
            found.append(one[2]())
        return found

    plain = other[2]()
    found, beside = at_once(first, lambda: [other[2]() for _ in range(30)])
    assert isinstance(found, list) and same(found, expected), found
    assert isinstance(beside, list) and same(beside, [plain] * 30)
    assert torch.equal(before[0], torch.get_rng_state()) and before[1] == numpy.random.get_state()[1].tolist()


def test_what_needs_the_process_is_run_again_alone() -> None:
    """A trace for another shape, in a call that began together with others."""
    _, hypergradient, call = meeting("linearized")
    expected = call()
    assert torch.equal(call(), expected)
    weights = {"weight": torch.ones(2, 6), "bias": torch.ones(2)}

    def longer() -> Tensor:
        return hypergradient(weights, torch.tensor(-1.0), torch.ones(9, 6), torch.ones(9, 6)).grads

    found = at_once(longer, call, longer)
    assert all(isinstance(f, Tensor) for f in found), found
    assert torch.equal(found[1], expected) and torch.equal(found[0], found[2])  # type: ignore[arg-type]
    assert hypergradient.engine.traces == 2


def test_an_error_of_a_loss_stays_its_own() -> None:
    loss, _, call = meeting("eager")
    expected = call()
    loss.draws = lambda: 1 / 0
    assert isinstance(at_once(call)[0], ZeroDivisionError)
    loss.draws = None
    assert torch.equal(call(), expected)
