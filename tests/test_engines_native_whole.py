"""Hypergradients by native programs on memory that stays: the numbers of eager, and nothing of the call before."""

from __future__ import annotations

import copy
import gc
import math
import sys
import weakref
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from problems_with_known_answers import DTYPE, flat, randn, relative_error
from threads_at_once import at_once
from torch import Tensor, nn

import hvp_engine as hvp
from hvp_engine import engines
from hvp_engine.engines.gradients import Gradients
from hvp_engine.engines.native_whole import NativeWhole
from hvp_engine.errors import DivergenceError
from hvp_engine.hypergradients.implicit import HypergradientResult
from hvp_engine.solvers.base import Solver

pytestmark = pytest.mark.filterwarnings("ignore:the weights are far from a minimum")

Tensors = dict[str, Tensor]
Batch = tuple[Tensor, Tensor]


def train_loss(w: Tensors, h: Tensors, batch: Batch) -> Tensor:
    residual = torch.tanh(batch[0] @ w["in"]) @ w["out"] - batch[1]
    return residual.square().mean() + sum((h[key].exp() * part.square()).sum() for key, part in w.items())


def val_loss(w: Tensors, h: Tensors, batch: Batch) -> Tensor:
    return (torch.tanh(batch[0] @ w["in"]) @ w["out"] - batch[1]).square().mean() + 0.01 * h["in"].square().sum()


def arguments(seed: int, rows: int = 8) -> tuple[Tensors, Tensors, Batch, Batch]:
    w = {"in": randn(5, 4, seed=seed) / 3, "out": randn(4, seed=seed + 1) / 3}
    h = {key: (randn(*part.shape, seed=seed + 2) / 3 - 2).requires_grad_() for key, part in w.items()}
    batches = [(randn(rows, 5, seed=seed + k), randn(rows, seed=seed + k + 1)) for k in (3, 5)]
    return w, h, batches[0], batches[1]


def everything(result: HypergradientResult) -> list[Tensor]:
    solution = result.solution
    figures = torch.tensor([solution.residual_norm, solution.alpha or 0.0, solution.iterations, solution.hvps])
    losses = [result.train_loss, result.val_loss, result.gradient_norm, result.unfinished]
    return [*result.grads.values(), *solution.value.values(), *losses, figures]


def agree(ours: HypergradientResult, eager: HypergradientResult, tolerance: float = 1e-10) -> None:
    assert ours.solution.status is eager.solution.status
    for mine, theirs in zip(everything(ours), everything(eager), strict=True):
        assert mine.dtype == theirs.dtype and mine.shape == theirs.shape and not mine.requires_grad
        assert relative_error(flat([mine]), flat([theirs])) < tolerance


def settled(
    train: Callable[..., Tensor] = train_loss, solver: Solver | None = None, engine: str = "linearized"
) -> hvp.Hypergradient:
    """A hypergradient that has left its checks of the first call behind."""
    made = hvp.Hypergradient(train, val_loss, solver or hvp.Neumann(6, alpha=0.1), engine=engine)
    for seed in range(3):
        made(*arguments(seed))
    return made


def by_eager(*call: Any, solver: Solver | None = None) -> HypergradientResult:
    return hvp.Hypergradient(train_loss, val_loss, solver or hvp.Neumann(6, alpha=0.1), engine="eager")(*call)


def all_at_once(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether each call from now on is one by :meth:`NativeWhole.at_once`."""
    seen: list[bool] = []
    original = NativeWhole.at_once

    def watched(whole: NativeWhole) -> Any:
        found = original(whole)
        seen.append(found is not None)
        return found

    monkeypatch.setattr(NativeWhole, "at_once", watched)
    return seen


SOLVERS: dict[str, tuple[Solver, bool]] = {
    "horner": (hvp.Neumann(6, alpha=0.1), True),
    "accumulate": (hvp.Neumann(6, alpha=0.1, form="accumulate"), True),
    "damped": (hvp.Neumann(6, alpha=0.1, damping=0.3), True),
    "one term": (hvp.Neumann(1, alpha=0.1), True),
    "no term": (hvp.Neumann(0, alpha=0.1), False),
    "an estimate": (hvp.Neumann(6), False),
}
"""With each, whether it needs no look in between."""


@pytest.mark.parametrize("name", SOLVERS)
def test_numbers_are_eagers(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    solver, looks_at_nothing = SOLVERS[name]
    made, eager = settled(solver=solver), settled(solver=solver, engine="eager")
    seen = all_at_once(monkeypatch)
    calls = [arguments(seed) for seed in range(10, 14)]
    results = [made(*call) for call in calls]  # all before any is compared: nothing may be overwritten
    for call, result in zip(calls, results, strict=True):
        agree(result, eager(*call))
    assert seen == [looks_at_nothing] * len(calls)


def test_float32_and_arguments_laid_out_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    made = settled()
    seen = all_at_once(monkeypatch)
    w, h, train, val = arguments(20)
    turned = {**w, "in": w["in"].t().contiguous().t()}
    agree(made(turned, h, train, val), by_eager(w, h, train, val))
    single = [{key: t.detach().float() for key, t in one.items()} for one in (w, h)]
    batches = [(x.float(), y.float()) for x, y in (train, val)]
    agree(made(*single, *batches), by_eager(*single, *batches), 1e-4)
    agree(made(w, h, *arguments(21, rows=3)[2:]), by_eager(w, h, *arguments(21, rows=3)[2:]))
    assert True not in seen, "what was bound is of other tensors"
    agree(made(w, h, train, val), by_eager(w, h, train, val))
    agree(made(w, h, train, val), by_eager(w, h, train, val))
    agree(made(w, h, train, val), by_eager(w, h, train, val))
    assert seen[-1]


def test_a_warm_start_goes_on_from_the_solution_before() -> None:
    ours, theirs = (
        hvp.Hypergradient(train_loss, val_loss, hvp.Neumann(3, alpha=0.1), engine=name, warm_start=True)
        for name in ("linearized", "eager")
    )
    for _ in range(5):
        call = arguments(30)
        agree(ours(*call), theirs(*call))
    assert ours._wholes


def test_checks_come_at_the_same_calls() -> None:
    calls = 0

    def loss(w: Tensors, h: Tensors, batch: Batch) -> Tensor:
        nonlocal calls
        calls += 1
        return train_loss(w, h, batch)

    made = hvp.Hypergradient(loss, val_loss, hvp.Neumann(2, alpha=0.1), engine="linearized")
    asked = []
    for number in range(1, 13):
        before = calls
        made(*arguments(0))
        asked += [number] if calls > before else []
    assert asked == [1, 10]


def test_what_a_loss_reads_is_watched() -> None:
    settings = {"power": 2.0}

    def loss(w: Tensors, h: Tensors, batch: Batch) -> Tensor:
        return train_loss(w, h, batch) * settings["power"]

    made = settled(loss)
    call = arguments(40)
    plain = float(train_loss(*call[:3]).detach())
    assert made._wholes and float(made(*call).train_loss) == pytest.approx(2 * plain)
    settings["power"] = 3.0
    with pytest.warns(UserWarning, match="settings"):
        found = made(*call)
    assert float(found.train_loss) == pytest.approx(3 * plain)


def test_modes_of_modules_are_watched() -> None:
    module = nn.Sequential(nn.Linear(5, 4), nn.Dropout(0.5), nn.Linear(4, 1)).double().eval()
    net = hvp.functional(module)

    def loss(w: Tensors, h: Tensor, batch: Batch) -> Tensor:
        decay = sum((h.exp() * part.square()).sum() for part in w.values())
        return (net(w, batch[0]).squeeze(1) - batch[1]).square().mean() + decay

    made = hvp.Hypergradient(loss, loss, hvp.Neumann(3, alpha=0.1), engine="linearized")
    weights, h = dict(module.named_parameters()), torch.tensor(-1.0, dtype=DTYPE)
    batches = arguments(0)[2:]
    first = [float(made(weights, h, *batches).train_loss) for _ in range(4)]
    assert made._wholes and len(set(first)) == 1
    module.train()
    assert len({float(made(weights, h, *batches).train_loss) for _ in range(4)}) == 4, "new masks in each call"


def test_divergence_is_an_error_as_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    made = settled(solver=hvp.Neumann(12, alpha=0.1))
    w, h, train, val = arguments(50)
    steep = {key: torch.full_like(part, 6.0) for key, part in h.items()}
    with pytest.raises(DivergenceError, match="alpha"):
        made(w, steep, train, val)
    with pytest.raises(ValueError, match="finite"):
        made(w, h, train, (val[0] * torch.nan, val[1]))
    seen = all_at_once(monkeypatch)
    agree(made(w, h, train, val), by_eager(w, h, train, val, solver=hvp.Neumann(12, alpha=0.1)))
    assert seen == [True]


def test_nothing_of_the_callers_changes_or_is_kept() -> None:
    made = settled()
    w, h, train, val = arguments(60)
    h["in"].grad = torch.ones_like(h["in"])
    before, state = copy.deepcopy((w, h, train, val)), torch.get_rng_state()
    with torch.no_grad():
        made(w, h, train, val)
    assert torch.equal(torch.get_rng_state(), state) and h["in"].requires_grad
    assert torch.equal(h["in"].grad, torch.ones_like(h["in"]))
    after = [*w.values(), *h.values(), *train, *val]
    assert all(map(torch.equal, after, [*before[0].values(), *before[1].values(), *before[2], *before[3]]))
    kept = [weakref.ref(tensor) for tensor in after]
    del w, h, train, val, before, after
    gc.collect()
    assert not any(one() is not None for one in kept)


def test_two_threads_get_their_own_numbers() -> None:
    made = settled()
    calls = [arguments(seed) for seed in (70, 80)]
    expected = [by_eager(*call) for call in calls]

    def work(index: int) -> None:
        for _ in range(25):
            agree(made(*calls[index]), expected[index])

    assert at_once(*(partial(work, index) for index in range(2))) == [None, None]


def test_auto_takes_it_once_its_choice_is_final(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Gradients, "_slower", lambda *_: "")
    made = hvp.Hypergradient(train_loss, val_loss, hvp.Neumann(6, alpha=0.1))
    call = arguments(90)
    made(*call)
    assert isinstance(made.engine, engines.AutoEngine)
    for choice in made.engine.choices.values():
        choice.engine, choice.trace_seconds, choice.compile_seconds = made.engine._linearized, None, None
    for known in made.engine._linearized.gradients._known.values():
        known.spent = math.inf
    for _ in range(4):
        made(*call)
    seen = all_at_once(monkeypatch)
    for _ in range(3):  # one of them may be a check
        agree(made(*call), by_eager(*call))
    assert True in seen


def test_a_settled_call_is_a_short_way_through_few_files() -> None:
    made, call = settled(), arguments(0)
    made(*call)
    root = str(Path(hvp.__file__).parent)
    entered: list[str] = []

    def watch(frame: Any, event: str, argument: Any) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(root):
            entered.append(frame.f_code.co_filename)

    sys.setprofile(watch)
    try:
        made(*call)
    finally:
        sys.setprofile(None)
    changes = sum(one != other for one, other in pairwise(entered))
    assert len(set(entered)) <= 12 and changes <= 34 and len(entered) <= 110, (len(set(entered)), changes, len(entered))


@pytest.mark.parametrize("engine", ["auto", "linearized", "recorded", "eager"])
def test_a_settled_hypergradient_can_be_copied(engine: str) -> None:
    ours = settled(engine=engine)
    twin = copy.deepcopy(ours)
    assert not twin._wholes
    for seed in range(5, 8):
        expected = hvp.Hypergradient(train_loss, val_loss, hvp.Neumann(6, alpha=0.1), engine="eager")(*arguments(seed))
        agree(ours(*arguments(seed)), expected)
        agree(twin(*arguments(seed)), expected)


def test_shapes_that_take_turns_keep_memory_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, made = settled(), []
    of = NativeWhole.of
    monkeypatch.setattr(NativeWhole, "of", lambda *given: made.append(1) or of(*given))
    for seed in range(20, 60):
        call = arguments(seed, rows=6 + seed % 6)
        agree(ours(*call), hvp.Hypergradient(train_loss, val_loss, ours.solver, engine="eager")(*call))
    assert len(ours._wholes) == 4 and len(made) <= 4
