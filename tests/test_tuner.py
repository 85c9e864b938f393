"""Algorithm 1: it finds optima that are known, and survives what goes wrong on the way."""

from __future__ import annotations

import copy
import csv
import dataclasses
import json
import math
import sys
import types
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import BILEVEL, DTYPE, Bilevel, matrix_with, randn
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import hvp_engine as hvp
from hvp_engine.estimation import Estimate

pytestmark = pytest.mark.filterwarnings("ignore:the weights are far from a minimum")


def sgd(lr: float) -> Callable[[Any], torch.optim.Optimizer]:
    return lambda tensors: torch.optim.SGD(tensors, lr=lr)


def adam(lr: float) -> Callable[[Any], torch.optim.Optimizer]:
    return lambda tensors: torch.optim.Adam(tensors, lr=lr)


def shrink(w: Tensor, h: Tensor, batch: Tensor) -> Tensor:
    """w* = batch / (1 + e^h)."""
    return (w - batch).square().sum() / 2 + (h.exp() * w.square()).sum() / 2


def distance(w: Tensor, h: Tensor, batch: Tensor) -> Tensor:
    return (w - batch).square().sum() / 2


def tuner_of(w: Any, h: Any, **options: Any) -> hvp.Tuner:
    settings = {
        "weight_optimizer": sgd(0.3),
        "hyper_optimizer": adam(0.1),
        "solver": hvp.Neumann(20),
        "engine": "eager",
        **options,
    }
    if "estimator" in options:
        settings["solver"] = None
    return hvp.Tuner(w, h, settings.pop("train", shrink), settings.pop("val", distance), **settings)


DATA, TARGET = torch.tensor([1.0, 3.0, -2.0], dtype=DTYPE), torch.tensor([0.8, 1.5, -0.5], dtype=DTYPE)


def test_finds_the_closed_form_optimum() -> None:
    """1 + e^h = data / target, reached from any start."""
    w, h = torch.zeros(3, dtype=DTYPE), torch.zeros(3, dtype=DTYPE)
    history = tuner_of(w, h).fit([DATA], [TARGET], hyper_steps=300, progress=False)
    torch.testing.assert_close(w, TARGET, rtol=1e-3, atol=0)
    torch.testing.assert_close(h, torch.log(DATA / TARGET - 1), rtol=1e-2, atol=1e-2)
    assert len(history) == 300 and [record.hyper_step for record in history] == list(range(300))
    assert history[-1].val_loss < 1e-6 < history[0].val_loss
    assert history[-1].status == "CONVERGED" or history[-1].status == "ITERATION_LIMIT"
    assert all(record.training_seconds > 0 and record.hypergradient_seconds > 0 for record in history)


def test_optimum_with_a_direct_term() -> None:
    """L_V = (w - 2)^2 / 2 + (h - 1)^2 / 2 with w* = h: the optimum h = 3/2 needs both terms."""
    w, h = torch.zeros((), dtype=DTYPE), torch.zeros((), dtype=DTYPE)
    tuner = tuner_of(
        w,
        h,
        train=lambda w, h, b: (w - h).square() / 2,
        val=lambda w, h, b: (w - 2).square() / 2 + (h - 1).square() / 2,
        hyper_optimizer=sgd(0.2),
    )
    tuner.fit([None], [None], hyper_steps=150, progress=False)
    assert float(h) == pytest.approx(1.5, abs=1e-4)


def test_module_with_loaders_and_a_hypermodule() -> None:
    torch.manual_seed(0)
    x = randn(40, 3, seed=1)
    y = x @ torch.tensor([1.0, -2.0, 0.0], dtype=DTYPE)[:, None] + 0.5 * randn(40, 1, seed=2)
    module, decay = nn.Linear(3, 1, dtype=DTYPE), nn.Linear(3, 1, dtype=DTYPE)
    net = hvp.functional(module)

    def train(w: dict[str, Tensor], h: dict[str, Tensor], batch: list[Tensor]) -> Tensor:
        return (net(w, batch[0]) - batch[1]).square().mean() + sum((h[n].exp() * w[n].square()).sum() for n in w)

    def val(w: dict[str, Tensor], h: dict[str, Tensor], batch: list[Tensor]) -> Tensor:
        return (net(w, batch[0]) - batch[1]).square().mean()

    tuner = tuner_of(module, decay, train=train, val=val, weight_optimizer=sgd(0.05), inner_steps=3)
    history = tuner.fit(
        DataLoader(TensorDataset(x[:30], y[:30]), batch_size=10),
        DataLoader(TensorDataset(x[30:], y[30:]), batch_size=10),
        hyper_steps=80,
        progress=False,
    )
    assert history[-1].val_loss < 0.5 * history[0].val_loss
    assert decay.weight[0, 0] < decay.weight[0, 2], "the weight that is truly zero decays more"


@pytest.mark.parametrize("inner_steps", [1, 3])
def test_order_of_steps(inner_steps: int) -> None:
    """Inner steps first, on their batches in order; the hyper step then takes the next training batch."""
    seen: list[tuple[str, int]] = []

    def train(w: Tensor, h: Tensor, batch: Tensor) -> Tensor:
        seen.append(("train", int(batch)))
        return (w - h).square().sum()

    def val(w: Tensor, h: Tensor, batch: Tensor) -> Tensor:
        seen.append(("val", int(batch)))
        return w.square().sum()

    w, h = torch.zeros(2), torch.ones(2)
    tuner = tuner_of(w, h, train=train, val=val, inner_steps=inner_steps, weight_optimizer=sgd(0.1))
    tuner.fit([torch.tensor(k) for k in range(100)], [torch.tensor(k) for k in range(100)], 2, progress=False)
    trained = [number for kind, number in seen if kind == "train"]
    assert trained == list(range(2 * (inner_steps + 1)))
    assert [number for kind, number in seen if kind == "val"] == [0, 1]


def test_train_step_is_the_optimizers_step() -> None:
    w, h = randn(3, seed=3), randn(3, seed=4)
    before = w.clone()
    loss = tuner_of(w, h, weight_optimizer=sgd(0.1)).train_step(DATA)
    gradient = before - DATA + h.exp() * before
    torch.testing.assert_close(w, before - 0.1 * gradient)
    torch.testing.assert_close(loss, shrink(before, h, DATA))
    assert w.grad is None and not w.requires_grad


def test_hyper_step_is_the_optimizers_step() -> None:
    w, h = DATA / 2, torch.zeros(3, dtype=DTYPE)
    result = tuner_of(w, h, hyper_optimizer=sgd(0.1), solver=hvp.Neumann(200)).hyper_step(DATA, TARGET)
    assert result is not None
    torch.testing.assert_close(result.grads, -w * (w - TARGET) / 2)  # e^h = 1, H = 2 I
    torch.testing.assert_close(h, -0.1 * result.grads)
    assert h.grad is None


def test_gradients_that_were_there_stay() -> None:
    module = nn.Linear(2, 1, dtype=DTYPE)
    for parameter in module.parameters():
        parameter.grad = torch.full_like(parameter, 7.0)
    net, x = hvp.functional(module), randn(4, 2, seed=5)
    h = torch.zeros((), dtype=DTYPE)
    train = lambda w, h, b: net(w, x).square().mean() + h.exp() * w["weight"].square().sum()  # noqa: E731
    tuner_of(module, h, train=train, val=lambda w, h, b: net(w, x).mean()).fit([0], [0], 2, progress=False)
    assert all(torch.equal(p.grad, torch.full_like(p, 7.0)) for p in module.parameters())
    assert h.grad is None


def test_buffers_move_in_training_only() -> None:
    module = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Linear(3, 1)).to(DTYPE)
    net, x = hvp.functional(module), randn(6, 2, seed=6)
    h = torch.zeros((), dtype=DTYPE)
    train = lambda w, h, b: net(w, x).square().mean() + h.exp() * w["0.weight"].square().sum()  # noqa: E731
    tuner = tuner_of(module, h, train=train, val=lambda w, h, b: net(w, x).mean(), inner_steps=4)
    tuner.fit([0], [0], hyper_steps=3, progress=False)
    assert int(module[1].num_batches_tracked) == 12


def test_optimizers_given_as_objects() -> None:
    w, h = torch.zeros(3, dtype=DTYPE), torch.zeros(3, dtype=DTYPE)
    tuner = tuner_of(
        w, h, weight_optimizer=torch.optim.SGD([w], lr=0.3), hyper_optimizer=torch.optim.RMSprop([h], lr=0.02)
    )
    history = tuner.fit([DATA], [TARGET], 100, progress=False)
    assert history[-1].val_loss < 0.2 * history[0].val_loss


def test_fit_continues_where_it_stopped() -> None:
    w, h = torch.zeros(3, dtype=DTYPE), torch.zeros(3, dtype=DTYPE)
    tuner = tuner_of(w, h)
    tuner.fit([DATA], [TARGET], 3, progress=False)
    history = tuner.fit([DATA], [TARGET], 5, progress=False)
    assert [record.hyper_step for record in history] == [0, 1, 2, 3, 4]


# What goes wrong


def failing(where: str, bad_calls: set[int], value: float) -> dict[str, Callable[..., Tensor]]:
    """Losses of which one is multiplied by NaN or Inf at some calls of the hypergradient."""
    calls = {"val": -1}

    def val(w: Tensor, h: Tensor, batch: Tensor) -> Tensor:
        calls["val"] += 1
        bad = where == "val" and calls["val"] in bad_calls
        return distance(w, h, batch) * (value if bad else 1.0)

    def train(w: Tensor, h: Tensor, batch: Tensor) -> Tensor:
        bad = calls["val"] in bad_calls and h.requires_grad  # only inside the hypergradient
        if where == "train" and bad:
            return shrink(w, h, batch) * value
        if where == "mixed" and bad:
            root = (h - h.detach()).clamp(min=0).sqrt()  # zero, with an infinite derivative
            return shrink(w, h, batch) + (root * w).sum()
        return shrink(w, h, batch)

    return {"train": train, "val": val}


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("where", ["val", "train", "mixed"])
@pytest.mark.parametrize("alpha", ["auto", 0.1])
def test_a_bad_hypergradient_never_reaches_the_optimizer(where: str, value: float, alpha: float | str) -> None:
    w, h = torch.zeros(3, dtype=DTYPE), torch.zeros(3, dtype=DTYPE)
    tuner = tuner_of(w, h, solver=hvp.Neumann(5, alpha=alpha), **failing(where, {2, 3}, value))
    with pytest.warns(UserWarning, match="hyper step left out") as caught:
        history = tuner.fit([DATA], [TARGET], 6, progress=False)
    assert len([w for w in caught if "left out" in str(w.message)]) == 2
    assert len(history) == 4
    states = [s for state in tuner.hyper_optimizer.state.values() for s in state.values()]
    assert all(bool(torch.isfinite(tensor).all()) for tensor in [w, h, *states])


def test_divergence_is_left_out() -> None:
    w, h = DATA.clone(), torch.zeros(3, dtype=DTYPE)
    tuner = tuner_of(w, h, solver=hvp.Neumann(100, alpha=5.0))
    with pytest.warns(UserWarning, match="hyper step left out: Neumann diverged"):
        assert tuner.hyper_step(DATA, TARGET) is None
    assert torch.equal(h, torch.zeros(3, dtype=DTYPE))


def test_ten_failures_in_a_row_raise_and_nine_do_not() -> None:
    for bad, total in ((9, 12), (10, 12)):
        w, h = torch.zeros(3, dtype=DTYPE), torch.zeros(3, dtype=DTYPE)
        tuner = tuner_of(w, h, **failing("val", set(range(1, 1 + bad)), math.nan))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if bad == 9:
                assert len(tuner.fit([DATA], [TARGET], total, progress=False)) == total - 9
            else:
                with pytest.raises(hvp.DivergenceError, match="val_loss"):
                    tuner.fit([DATA], [TARGET], total, progress=False)
                assert len(tuner.history) == 1


def test_a_success_resets_the_count() -> None:
    w, h = torch.zeros(3, dtype=DTYPE), torch.zeros(3, dtype=DTYPE)
    tuner = tuner_of(w, h, **failing("val", set(range(40)) - {9, 19, 29}, math.nan))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert len(tuner.fit([DATA], [TARGET], 39, progress=False)) == 3


def test_survives_curvature_that_grows_thirteenfold() -> None:
    w, h = torch.zeros(3, dtype=DTYPE), torch.zeros(3, dtype=DTYPE)
    tuner = tuner_of(
        w,
        h,
        train=lambda w, h, b: b["scale"] * shrink(w, h, b["data"]),
        weight_optimizer=sgd(0.02),
        solver=hvp.Neumann(200),
    )
    batches = [{"data": DATA, "scale": scale} for scale in (1.0, 1.0, 13.0, 13.0, 0.5)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        history = tuner.fit(batches, [TARGET], 20, progress=False)
    assert len(history) == 20


def test_empty_loader_is_named() -> None:
    w, h = torch.zeros(3, dtype=DTYPE), torch.zeros(3, dtype=DTYPE)
    with pytest.raises(ValueError, match="train_loader: expected at least one batch"):
        tuner_of(w, h).fit([], [TARGET], 1, progress=False)
    with pytest.raises(ValueError, match="val_loader: expected at least one batch"):
        tuner_of(w, h).fit([DATA], [], 1, progress=False)


# Known optima


def test_one_decay_for_all_weights() -> None:
    """w* = s x with s = 1 / (1 + e^h); ||s x - t||^2 is smallest at s = x.t / x.x."""
    w, h = torch.zeros(3, dtype=DTYPE), torch.zeros((), dtype=DTYPE)
    tuner_of(w, h, warmup_steps=30).fit([DATA], [TARGET], hyper_steps=200, progress=False)
    share = float(DATA @ TARGET / (DATA @ DATA))
    assert float(h) == pytest.approx(math.log(1 / share - 1), abs=1e-3)
    torch.testing.assert_close(w, share * DATA, rtol=1e-3, atol=0)


def test_one_decay_for_each_weight_of_a_coupled_problem() -> None:
    """L_T = w A w / 2 - b w + sum(e^h w^2) / 2 has w* = t where e^h = (b - A t) / t, chosen positive."""
    a = matrix_with([0.5, 1.0, 2.0, 3.0], seed=41)
    target, h_best = torch.tensor([1.0, -0.5, 0.8, 1.5], dtype=DTYPE), torch.tensor([0.3, -1.0, 0.0, -0.5], dtype=DTYPE)
    b = a @ target + h_best.exp() * target
    w, h = torch.zeros(4, dtype=DTYPE), torch.zeros(4, dtype=DTYPE)
    tuner = tuner_of(
        w,
        h,
        train=lambda w, h, batch: w @ a @ w / 2 - b @ w + (h.exp() * w.square()).sum() / 2,
        val=lambda w, h, batch: (w - target).square().sum() / 2,
        weight_optimizer=sgd(0.25),
        inner_steps=10,
        solver=hvp.Neumann(20),
    )
    tuner.fit([None], [None], hyper_steps=200, progress=False)
    torch.testing.assert_close(h, h_best, rtol=0, atol=1e-3)
    torch.testing.assert_close(w, target, rtol=1e-3, atol=0)


class Jump(torch.optim.Optimizer):
    """Goes to the minimum of the training loss in one step: an optimizer of the user's own."""

    def __init__(self, tensors: Any, minimum: Callable[[], Tensor]):
        super().__init__(tensors, {})
        self.minimum = minimum

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        self.param_groups[0]["params"][0].copy_(self.minimum())


class Unrolled:
    """The hypergradient through `steps` steps of SGD from the current weights."""

    def __init__(self, case: Bilevel, steps: int, lr: float):
        self.case, self.steps, self.lr = case, steps, lr

    def __call__(self, weights: Tensor, hyper: Tensor, train_batch: Any, val_batch: Any) -> Estimate:
        w, h = weights.detach().requires_grad_(), hyper.detach().requires_grad_()
        norm = torch.zeros((), dtype=DTYPE)
        for step in range(self.steps):
            loss = self.case.train_loss(w, h, train_batch)
            (gradient,) = torch.autograd.grad(loss, w, create_graph=True)
            norm = torch.linalg.vector_norm(gradient.detach()) if step == 0 else norm
            w = w - self.lr * gradient
        val_loss = self.case.val_loss(w, h, val_batch)
        (grads,) = torch.autograd.grad(val_loss, h)
        return Estimate(grads, loss.detach(), val_loss.detach(), norm)


@pytest.mark.parametrize("name", ["quadratic", "ridge"])
@pytest.mark.parametrize("steps", [1, 2, 5])
def test_unrolled_training_equals_the_truncated_series(steps: int, name: str) -> None:
    """Through i steps of SGD from w*: i - 1 products, over ten hyper steps, in value and in what was moved."""
    case = BILEVEL[name]()
    found = []
    for options in (
        {"estimator": Unrolled(case, steps, case.alpha)},
        {"solver": hvp.Neumann(steps - 1, alpha=case.alpha)},
    ):
        h = case.hyper.clone()
        tuner = tuner_of(
            case.weights.clone(),
            h,
            train=case.train_loss,
            val=case.val_loss,
            weight_optimizer=lambda tensors, h=h: Jump(tensors, lambda: case.minimum(h)),
            hyper_optimizer=adam(0.05),
            inner_steps=1,
            **options,
        )
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            history = tuner.fit([None], [None], hyper_steps=10, progress=False)
        figures = [[r.val_loss, r.train_loss, r.hypergradient_norm] for r in history]
        found.append((h, torch.tensor(figures, dtype=DTYPE)))
    (one, figures), (other, other_figures) = found
    torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(figures, other_figures, rtol=1e-10, atol=1e-12)
    assert not torch.allclose(one, case.hyper, atol=1e-2)


def test_an_estimator_of_ones_own() -> None:
    """It gets the trees, lists of batches where there are several, and its lack of a solve shows in the record."""
    seen: list[Any] = []

    def estimator(weights: Any, hyper: Any, train_batch: Any, val_batch: Any) -> Estimate:
        seen.append((weights["w"], hyper[0], train_batch, val_batch))
        one = torch.ones(())
        return Estimate([torch.ones(2)], one, 2 * one, 3 * one.double())

    w, h = torch.zeros(2), torch.zeros(2)
    tuner = tuner_of(
        {"w": w},
        [h],
        train=lambda w, h, b: w["w"].square().sum(),
        estimator=estimator,
        hyper_optimizer=sgd(0.5),
        val_batches=2,
        inner_steps=1,
    )
    (record,) = tuner.fit([10, 20], [30, 40], 1, progress=False)
    assert seen[0][0] is w and seen[0][1] is h and seen[0][2:] == (20, [30, 40])
    assert (record.train_loss, record.val_loss, record.gradient_norm) == (1.0, 2.0, 3.0)
    assert record.hypergradient_norm == pytest.approx(math.sqrt(2))
    assert math.isnan(record.residual_norm) and math.isnan(record.unfinished)
    assert record.status == "" and record.alpha is None
    assert torch.equal(h, torch.full((2,), -0.5))


def test_an_estimator_that_returns_another_container() -> None:
    one = torch.ones(())
    tuner = tuner_of(torch.zeros(2), [torch.zeros(2)], estimator=lambda *_: Estimate(torch.ones(2), one, one, one))
    with pytest.raises(ValueError, match="^estimator: expected grads in the container of hyper"):
        tuner.hyper_step(None, None)


# Training and hyper steps


def test_accumulation_is_the_step_on_the_average() -> None:
    batches = [randn(3, seed=50 + k) for k in range(6)]
    w, h = randn(3, seed=3), torch.zeros(3, dtype=DTYPE)
    mean = torch.stack([w - b + w for b in batches[:3]]).mean(0)
    tuner = tuner_of(w, h, weight_optimizer=sgd(0.1), accumulate=3, inner_steps=1)
    loss = torch.stack([shrink(w, h, b) for b in batches[:3]]).mean()
    expected = w - 0.1 * mean
    seen: list[Tensor] = []
    tuner.fit([batches], [TARGET], 0, progress=False)
    torch.testing.assert_close(tuner.train_step(*batches[:3]), loss)
    torch.testing.assert_close(w, expected)
    tuner.hyper_optimizer.register_step_post_hook(lambda *_: seen.append(w.clone()))
    tuner.fit(batches, [TARGET], 1, progress=False)
    torch.testing.assert_close(seen[0], expected - 0.1 * (2 * expected - torch.stack(batches[:3]).mean(0)))


@pytest.mark.parametrize("engine", ["eager", "linearized"])
def test_averaged_hypergradients_are_those_of_one_large_batch(engine: str) -> None:
    """Products and right-hand sides are averages over the batches, to rounding."""
    x, y = randn(12, 3, seed=60), randn(12, seed=61)

    def train(w: Tensor, h: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
        return (torch.tanh(batch[0] @ w) - batch[1]).square().mean() + (h.exp() * w.square()).sum()

    def val(w: Tensor, h: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
        return (batch[0] @ w - batch[1]).square().mean()

    parts = [(x[k : k + 4], y[k : k + 4]) for k in (0, 4, 8)]
    results = []
    for count, train_batch, val_batch in ((3, parts, parts[:2]), (1, (x, y), (x[:8], y[:8]))):
        tuner = tuner_of(
            randn(3, seed=62),
            torch.zeros(3, dtype=DTYPE),
            train=train,
            val=val,
            train_batches=count,
            val_batches=min(count, 2),
            engine=engine,
            solver=hvp.Neumann(10, alpha=0.1),
        )
        results.append(tuner.hyper_step(train_batch, val_batch))
    for name in ("grads", "train_loss", "val_loss", "gradient_norm", "unfinished"):
        torch.testing.assert_close(getattr(results[0], name), getattr(results[1], name))


def test_warm_up_comes_once_and_before_everything() -> None:
    order: list[str] = []
    tuner = tuner_of(torch.zeros(3, dtype=DTYPE), torch.zeros(3, dtype=DTYPE), warmup_steps=4, inner_steps=2)
    tuner.weight_optimizer.register_step_post_hook(lambda *_: order.append("w"))
    tuner.hyper_optimizer.register_step_post_hook(lambda *_: order.append("h"))
    history = tuner.fit([DATA], [TARGET], 2, progress=False)
    assert "".join(order) == "wwww" + "wwh" * 2
    assert [record.weight_steps for record in history] == [6, 8]


def test_inner_training_to_a_tolerance() -> None:
    """Each step halves the gradient; the round ends at the first gradient that is small enough, or at the maximum."""
    w, h = torch.zeros((), dtype=DTYPE), torch.zeros((), dtype=DTYPE)
    tuner = tuner_of(
        w,
        h,
        train=lambda w, h, b: (w - 1).square() / 2 + 0 * h * w,
        val=lambda w, h, b: (w + h).square(),
        weight_optimizer=sgd(0.5),
        inner_steps=100,
        inner_tolerance=0.1,
    )
    history = tuner.fit([None], [None], 3, progress=False)
    assert [record.weight_steps for record in history] == [4, 4, 4]  # 1, 1/2, 1/4, 1/8, then 1/16 <= 0.1
    assert history[0].gradient_norm == pytest.approx(1 / 16)
    tuner.inner_tolerance, tuner.steps_to_go, tuner.inner_steps = 1e-9, 3, 3
    tuner.fit([None], [None], 5, progress=False)
    assert tuner.history[-1].weight_steps == 4 + 2 * 3, "at most inner_steps"


def test_schedulers_on_both_sides() -> None:
    def halve(every: int) -> Callable[[torch.optim.Optimizer], Any]:
        return lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, every, gamma=0.5)

    tuner = tuner_of(
        torch.zeros(3, dtype=DTYPE),
        torch.zeros(3, dtype=DTYPE),
        inner_steps=3,
        weight_scheduler=halve(3),
        hyper_scheduler=halve(2),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tuner.fit([DATA], [TARGET], 4, progress=False)
    assert tuner.weight_optimizer.param_groups[0]["lr"] == pytest.approx(0.3 / 2**4)
    assert tuner.hyper_optimizer.param_groups[0]["lr"] == pytest.approx(0.1 / 2**2)


def test_plateau_schedulers_get_the_losses_of_their_side() -> None:
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau
    w, h = torch.zeros(3, dtype=DTYPE), torch.zeros(3, dtype=DTYPE)
    weight_optimizer = torch.optim.SGD([w], lr=0.1)
    tuner = tuner_of(
        w,
        h,
        weight_optimizer=weight_optimizer,
        weight_scheduler=plateau(weight_optimizer),
        hyper_scheduler=lambda optimizer: plateau(optimizer),
        inner_steps=2,
    )
    losses = [tuner.train_step(DATA).item() for _ in range(3)]
    assert tuner.weight_side.scheduler.best == min(losses)
    result = tuner.hyper_step(DATA, TARGET)
    assert tuner.hyper_side.scheduler.best == result.val_loss.item()


def test_clipping_on_both_sides() -> None:
    w, h = torch.zeros(3, dtype=DTYPE), torch.zeros(3, dtype=DTYPE)
    tuner = tuner_of(w, h, weight_optimizer=sgd(1.0), hyper_optimizer=sgd(1.0), weight_clip=0.1, hyper_clip=1e-3)
    tuner.train_step(DATA)
    torch.testing.assert_close(w, 0.1 * DATA / DATA.norm())
    result = tuner.hyper_step(DATA, TARGET)
    torch.testing.assert_close(h, -1e-3 * result.grads / result.grads.norm())
    before = w.clone()
    tuner_of(w, h, weight_optimizer=sgd(1.0), weight_clip=1e3).train_step(DATA)
    torch.testing.assert_close(w, before - (before - DATA + h.exp() * before))


def test_clipping_where_autograd_returns_one_tensor_twice() -> None:
    weights = [torch.zeros(2, dtype=DTYPE), torch.zeros(2, dtype=DTYPE)]
    tuner = tuner_of(
        weights, DATA.clone(), train=lambda w, h, b: (w[0] + w[1]).sum(), weight_optimizer=sgd(1.0), weight_clip=1.0
    )
    tuner.train_step(None)
    for weight in weights:
        torch.testing.assert_close(weight, torch.full((2,), -0.5, dtype=DTYPE))


BOUNDS: dict[str, Any] = {
    "numbers": (-0.2, 0.1),
    "tensors": ({"a": torch.tensor(-0.2), "b": torch.full((3,), -0.2)}, {"a": 0.1, "b": torch.tensor([0.1] * 3)}),
    "mixed": (-0.2, {"a": 0.1, "b": 0.1}),
}


@pytest.mark.parametrize("name", BOUNDS)
def test_bounds(name: str) -> None:
    w = torch.zeros(3, dtype=DTYPE)
    hyper = {"a": torch.zeros((), dtype=DTYPE), "b": torch.zeros(3, dtype=DTYPE)}
    tuner = tuner_of(
        w,
        hyper,
        train=lambda w, h, b: shrink(w, h["a"] + h["b"], b),
        hyper_optimizer=adam(1.0),
        bounds=BOUNDS[name],
    )
    touched = False
    for _ in range(10):
        tuner.fit([DATA], [TARGET], tuner.hyper_steps + 1, progress=False)
        both = torch.cat([hyper["a"][None], hyper["b"]])
        assert both.min() >= -0.2 - 1e-6 and both.max() <= 0.1 + 1e-6
        touched = touched or bool(((both <= -0.2 + 1e-6) | (both >= 0.1 - 1e-6)).any())
    assert touched


def test_one_sided_bounds() -> None:
    h = torch.zeros(3, dtype=DTYPE)
    tuner = tuner_of(torch.zeros(3, dtype=DTYPE), h, hyper_optimizer=sgd(1e4), bounds=(None, 0.5))
    tuner.fit([DATA], [-100 * DATA], 1, progress=False)
    tuner.fit([DATA], [TARGET], 2, progress=False)
    assert h.max() <= 0.5 and h.min() < -1


def test_lbfgs_on_the_weights() -> None:
    """Its closure is evaluated again at the moved weights: the same steps as by hand, four evaluations in each."""
    w, by_hand, h = torch.zeros(3, dtype=DTYPE), torch.zeros(3, dtype=DTYPE), torch.arange(3, dtype=DTYPE)
    evaluations: list[int] = []

    def quartic(w: Tensor, h: Tensor, batch: Tensor) -> Tensor:
        evaluations.append(1)
        return shrink(w, h, batch) + w.pow(4).sum()

    tuner = tuner_of(
        w, h, train=quartic, weight_optimizer=lambda tensors: torch.optim.LBFGS(tensors, max_iter=4, lr=0.5)
    )
    losses = [float(tuner.train_step(DATA)) for _ in range(3)]
    assert len(evaluations) == 12
    by_hand.requires_grad_()
    optimizer = torch.optim.LBFGS([by_hand], max_iter=4, lr=0.5)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = quartic(by_hand, h, DATA)
        loss.backward()
        return loss

    assert losses == pytest.approx([float(optimizer.step(closure)) for _ in range(3)], rel=1e-12)
    torch.testing.assert_close(w, by_hand.detach())
    history = tuner.fit([DATA], [TARGET], 2, progress=False)
    assert len(history) == 2


def test_sparse_gradients() -> None:
    module = nn.Embedding(5, 2, sparse=True)
    net, h = hvp.functional(module), torch.zeros(())
    words = torch.tensor([1, 3])
    tuner = tuner_of(
        module, h, train=lambda w, h, b: net(w, b).square().sum(), weight_optimizer=sgd(0.1), weight_clip=1e-2
    )
    before = module.weight.detach().clone()
    tuner.train_step(words)
    moved = (module.weight - before).norm(dim=1)
    assert moved[[0, 2, 4]].max() == 0 and moved.norm().item() == pytest.approx(1e-3, rel=1e-4)


def test_frozen_parameters_are_no_weights() -> None:
    module = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1)).to(DTYPE)
    module[0].requires_grad_(False)
    net, x, h = hvp.functional(module), randn(5, 2, seed=7), torch.zeros((), dtype=DTYPE)
    before = module[0].weight.clone()

    def train(w: dict[str, Tensor], h: Tensor, b: Any) -> Tensor:
        return net(w, x).square().mean() + h.exp() * w["1.weight"].square().sum()

    tuner = tuner_of(module, h, train=train, val=lambda w, h, b: net(w, x).mean(), weight_optimizer=sgd(0.1))
    tuner.fit([0], [0], 2, progress=False)
    assert tuner.weight_names == ["['1.weight']", "['1.bias']"]
    assert torch.equal(module[0].weight, before)


# Watching a run


def test_history_as_tables(tmp_path: Path) -> None:
    tuner = tuner_of(torch.zeros(3, dtype=DTYPE), torch.zeros(3, dtype=DTYPE))
    history = tuner.fit(
        [DATA],
        [TARGET],
        4,
        progress=False,
        evaluate=lambda tuner: {"test_loss": torch.tensor(float(tuner.hyper_steps))},
        evaluate_every=2,
    )
    assert [record.metrics for record in history] == [{}, {"test_loss": 2.0}, {}, {"test_loss": 4.0}]
    rows = history.rows()
    assert rows[1]["test_loss"] == 2.0 and "test_loss" not in rows[0] and "metrics" not in rows[1]
    history.write_csv(tmp_path / "run.csv")
    with open(tmp_path / "run.csv") as file:
        read = list(csv.DictReader(file))
    assert [row["test_loss"] for row in read] == ["", "2.0", "", "4.0"]
    assert [float(row["val_loss"]) for row in read] == [record.val_loss for record in history]
    history.append(dataclasses.replace(history[-1], residual_norm=math.nan))
    history.write_json(tmp_path / "run.json")
    read = json.loads((tmp_path / "run.json").read_text())
    assert read[:4] == rows and read[4]["residual_norm"] is None


def test_evaluation_names_must_not_hide_fields() -> None:
    tuner = tuner_of(torch.zeros(3, dtype=DTYPE), torch.zeros(3, dtype=DTYPE))
    with pytest.raises(ValueError, match="evaluate: expected names that are no fields of the record; got 'val_loss'"):
        tuner.fit([DATA], [TARGET], 1, progress=False, evaluate=lambda tuner: {"val_loss": 1.0})


def test_callbacks_see_every_record_and_can_stop() -> None:
    tuner = tuner_of(torch.zeros(3, dtype=DTYPE), torch.zeros(3, dtype=DTYPE))
    seen: list[Any] = []
    callbacks = [
        lambda tuner, record: record.hyper_step == 2,
        lambda tuner, record: seen.append((tuner.hyper_steps, record)),
    ]
    history = tuner.fit([DATA], [TARGET], 10, progress=False, callbacks=callbacks)
    assert len(history) == 3 and seen == [(k + 1, history[k]) for k in range(3)]
    assert len(tuner.fit([DATA], [TARGET], 5, progress=False)) == 5


METRICS: dict[str, Any] = {
    "field": "val_loss",
    "evaluation": "score",
    "function": lambda record: -record.metrics["accuracy"],
}


@pytest.mark.parametrize("name", METRICS)
def test_early_stopping(name: str, tmp_path: Path) -> None:
    """The best is at step 3; with a patience of 4 the last step is 7, also if a checkpoint lies between."""
    values = [5.0, 4.0, 3.0, 1.0, 2.0, 1.0, math.nan, 2.0, 0.0]

    def run(steps: int) -> hvp.History:
        tuner = tuner_of(
            torch.zeros(1),
            torch.zeros(1),
            train=lambda w, h, b: (w * h).sum(),
            estimator=lambda w, h, t, v: Estimate(
                torch.ones(1), h.sum(), torch.tensor(values[tuner.hyper_steps]), h.sum()
            ),
        )
        return tuner.fit(
            [None],
            [None],
            steps,
            progress=False,
            metric=METRICS[name],
            patience=4,
            evaluate=lambda tuner: {k: s * values[tuner.hyper_steps - 1] for k, s in (("score", 1), ("accuracy", -1))},
            checkpoint=tmp_path / "run.pt",
        )

    run(5)
    assert len(run(9)) == 8
    assert len(run(9)) == 8, "a run that is over stays over"


def test_verbose_prints_a_line_for_each_step(capsys: pytest.CaptureFixture[str]) -> None:
    tuner = tuner_of(torch.zeros(3, dtype=DTYPE), torch.zeros(3, dtype=DTYPE))
    history = tuner.fit([DATA], [TARGET], 2, progress=False, verbose=True, evaluate=lambda tuner: {"test": 0.25})
    lines = capsys.readouterr().out.strip().splitlines()
    assert len(lines) == 2
    record = history[1]
    for part in (
        "hyper step 1:",
        f"train {record.train_loss:.4g}",
        f"val {record.val_loss:.4g}",
        f"|dL_T/dw| {record.gradient_norm:.2e}",
        f"|hypergradient| {record.hypergradient_norm:.2e}",
        f"residual {record.residual_norm:.1e} ({record.status.lower().replace('_', ' ')})",
        f"alpha {record.alpha:.3g}",
        "test 0.25",
        f"{record.training_seconds:.2f} + {record.hypergradient_seconds:.2f} s",
    ):
        assert part in lines[1]
    assert "->" not in lines[1]


def test_a_line_names_the_remedy_of_a_bad_solve() -> None:
    h = torch.zeros(2, dtype=DTYPE)
    w = torch.ones(2, dtype=DTYPE)
    curvature = torch.tensor([1.0, -0.5], dtype=DTYPE)
    tuner = tuner_of(w, h, train=lambda w, h, b: (curvature * w.square()).sum() / 2 + w @ h, val=distance)
    (record,) = tuner.fit([torch.ones(2)], [torch.zeros(2, dtype=DTYPE)], 1, progress=False)
    assert record.status == "NEGATIVE_CURVATURE"
    assert record.line().endswith("-> use damping or a Gauss-Newton operator")


class Writer:
    def __init__(self) -> None:
        self.scalars: list[tuple[str, float, int]] = []

    def add_scalar(self, name: str, value: float, step: int) -> None:
        self.scalars.append((name, value, step))


def test_tensorboard_writer_of_ones_own() -> None:
    writer = Writer()
    tuner = tuner_of(torch.zeros(3, dtype=DTYPE), torch.zeros(3, dtype=DTYPE))
    history = tuner.fit([DATA], [TARGET], 2, progress=False, tensorboard=writer, evaluate=lambda t: {"test": 3.0})
    assert ("hvp_engine/val_loss", history[1].val_loss, 1) in writer.scalars
    assert ("hvp_engine/test", 3.0, 0) in writer.scalars
    assert not [name for name, _, _ in writer.scalars if "status" in name or "hyper_step" in name]


def test_tensorboard_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []

    class Summary(Writer):
        def __init__(self, folder: str):
            super().__init__()
            made.append((folder, self))

        def close(self) -> None:
            self.scalars.append(("closed", 0.0, 0))

    tuner = tuner_of(torch.zeros(3, dtype=DTYPE), torch.zeros(3, dtype=DTYPE))
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", types.SimpleNamespace(SummaryWriter=Summary))
    tuner.fit([DATA], [TARGET], 1, progress=False, tensorboard=tmp_path)
    ((folder, writer),) = made
    assert folder == str(tmp_path) and len(writer.scalars) > 5 and writer.scalars[-1][0] == "closed"
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(hvp.HvpError, match="tensorboard: expected the package tensorboard.*pip install tensorboard"):
        tuner.fit([DATA], [TARGET], 2, progress=False, tensorboard=tmp_path)


def test_progress_bar(capsys: pytest.CaptureFixture[str]) -> None:
    tuner_of(torch.zeros(3, dtype=DTYPE), torch.zeros(3, dtype=DTYPE)).fit([DATA], [TARGET], 3)
    assert "hyper steps: 100%" in capsys.readouterr().err


# Far from stationary


def test_weights_far_from_a_minimum_are_warned_about_once() -> None:
    """Newton's step moves w by -(w - w*), so L_V = |w - t|^2 / 2 changes by (w - t).(w* - w) to first order."""
    w, h = torch.zeros(3, dtype=DTYPE), torch.zeros(3, dtype=DTYPE)
    hypergradient = hvp.Hypergradient(shrink, distance, hvp.Neumann(80), engine="eager")
    with pytest.warns(UserWarning, match=r"far from a minimum.*is 3.74, .* 1.57, by about -3.15;.*longer"):
        result = hypergradient(w, h, DATA, TARGET)
    expected = float((w - TARGET) @ (DATA / 2 - w))
    assert float(result.unfinished) == pytest.approx(expected, rel=1e-6)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(8):
            hypergradient(w, h, DATA, TARGET)


def test_no_warning_near_a_minimum_or_without_a_solve() -> None:
    h = torch.zeros(3, dtype=DTYPE)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        hvp.Hypergradient(shrink, distance, hvp.Neumann(80))(0.45 * DATA, h, DATA, TARGET)
        hvp.Hypergradient(shrink, distance, hvp.Identity())(torch.zeros(3, dtype=DTYPE), h, DATA, TARGET)


def test_the_warning_can_come_later() -> None:
    h = torch.zeros(3, dtype=DTYPE)
    hypergradient = hvp.Hypergradient(shrink, distance, hvp.Neumann(80), engine="eager")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        hypergradient(0.5 * DATA, h, DATA, TARGET)
    with pytest.warns(UserWarning, match="far from a minimum"):
        hypergradient(torch.zeros(3, dtype=DTYPE), h, DATA, TARGET)


# Training at fixed hyperparameters


def test_retraining_begins_at_the_initial_weights_with_a_new_optimizer() -> None:
    module = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Linear(3, 1)).to(DTYPE)
    net, x = hvp.functional(module), randn(6, 2, seed=6)
    h = torch.full((), -3.0, dtype=DTYPE)

    def train(w: dict[str, Tensor], h: Tensor, b: Any) -> Tensor:
        return (net(w, x) - 1).square().mean() + h.exp() * w["0.weight"].square().sum()

    tuner = tuner_of(
        module,
        h,
        train=train,
        val=lambda w, h, b: (net(w, x) - 2).square().mean(),
        weight_optimizer=adam(0.01),
        weight_scheduler=lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 2, gamma=0.5),
        inner_steps=3,
        solver=hvp.Neumann(3, damping=1.0),
    )
    initial = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    with torch.no_grad():
        fresh = copy.deepcopy(module)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tuner.fit([0], [0], 4, progress=False)
    tuned = h.clone()
    assert not torch.equal(tuned, torch.full_like(tuned, -3.0))
    losses = tuner.retrain([0], 5, progress=False)
    # the same by hand
    optimizer = torch.optim.Adam(fresh.parameters(), lr=0.01)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, gamma=0.5)
    expected = []
    for _ in range(5):
        optimizer.zero_grad()
        loss = (fresh(x) - 1).square().mean() + tuned.exp() * fresh[0].weight.square().sum()
        loss.backward()
        optimizer.step()
        scheduler.step()
        expected.append(loss.item())
    assert losses == pytest.approx(expected, rel=1e-12)
    for name, tensor in module.state_dict().items():
        torch.testing.assert_close(tensor, fresh.state_dict()[name])
    assert torch.equal(h, tuned) and len(tuner.history) == 4
    tuner.retrain([0], 0, progress=False)
    assert all(torch.equal(tensor, initial[name]) for name, tensor in module.state_dict().items())


def test_retraining_from_an_init_function() -> None:
    w, h = torch.zeros(3, dtype=DTYPE), torch.zeros(3, dtype=DTYPE)
    tuner = tuner_of(w, h, weight_optimizer=sgd(0.5))
    tuner.fit([DATA], [TARGET], 3, progress=False)
    tuner.retrain([DATA], 0, init=lambda weights: weights.fill_(2.0), progress=False)
    assert torch.equal(w, torch.full_like(w, 2.0))
    tuner.fit([DATA], [TARGET], 4, progress=False)
    assert len(tuner.history) == 4, "tuning can go on from there"


def test_training_goes_on_in_the_epoch() -> None:
    seen: list[int] = []

    def train(w: Tensor, h: Tensor, batch: int) -> Tensor:
        seen.append(batch)
        return w.square().sum()

    tuner = tuner_of(torch.ones(2), torch.ones(2), train=train, accumulate=2)
    loader = [0, 1, 2, 3, 4]
    assert len(tuner.train(loader, 2, progress=False)) == 2
    tuner.train(loader, 1, progress=False)
    assert seen == [0, 1, 2, 3, 4, 0]
    assert tuner.hyper_steps == 0 and torch.equal(tuner.hyper[0], torch.ones(2))


REFUSED: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "warmup": ({"warmup_steps": -1}, ValueError, "^warmup_steps: expected an int >= 0; got -1"),
    "accumulate": ({"accumulate": 0}, ValueError, "^accumulate: expected an int >= 1; got 0"),
    "val_batches": ({"val_batches": True}, ValueError, "^val_batches: expected an int >= 1; got True"),
    "tolerance": ({"inner_tolerance": -1.0}, ValueError, "^inner_tolerance: expected a number >= 0"),
    "clip": ({"weight_clip": 0.0}, ValueError, "^weight_clip: expected a number > 0 or None; got 0.0"),
    "hyper clip": ({"hyper_clip": math.nan}, ValueError, "^hyper_clip: expected a number > 0 or None; got nan"),
    "bounds": ({"bounds": 3.0}, TypeError, r"^bounds: expected a pair \(low, high\)"),
    "bounds order": ({"bounds": (1.0, 0.0)}, ValueError, "^bounds: expected low <= high; got the opposite"),
    "bounds nan": ({"bounds": (math.nan, 0.0)}, ValueError, r"^bounds\[0\]: expected numbers; got NaN"),
    "bounds tree": ({"bounds": (None, [1.0])}, ValueError, r"^bounds\[1\]: expected a number, None or the container"),
    "bounds shape": ({"bounds": (torch.zeros(4), None)}, ValueError, r"^bounds\[0\]: expected a shape that broadcasts"),
    "bounds leaf": ({"bounds": (None, "high")}, TypeError, r"^bounds\[1\]: expected numbers or tensors; got str"),
    "scheduler": (
        {"weight_scheduler": lambda optimizer: 3},
        TypeError,
        "^weight_scheduler: expected a torch scheduler",
    ),
    "other's scheduler": (
        {"hyper_scheduler": torch.optim.lr_scheduler.StepLR(torch.optim.SGD([torch.zeros(1)], lr=0.1), 1)},
        ValueError,
        "^hyper_scheduler: expected a scheduler of the tuner's optimizer; got one of another",
    ),
    "hyper lbfgs": ({"hyper_optimizer": torch.optim.LBFGS}, TypeError, "^hyper_optimizer: expected .*got LBFGS"),
    "estimator": ({"estimator": 3}, TypeError, "^estimator: expected a callable of .*got int"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_at_construction(name: str) -> None:
    options, error, message = REFUSED[name]
    with pytest.raises(error, match=message):
        tuner_of(torch.zeros(3, dtype=DTYPE), torch.zeros(3, dtype=DTYPE), **options)


def test_solver_beside_an_estimator() -> None:
    with pytest.raises(ValueError, match="^solver: expected None beside an estimator"):
        hvp.Tuner(
            torch.zeros(3),
            torch.zeros(3),
            shrink,
            distance,
            weight_optimizer=sgd(0.1),
            hyper_optimizer=sgd(0.1),
            solver=hvp.Neumann(3),
            estimator=lambda *_: None,
        )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hyper_steps": -1}, "^hyper_steps: expected an int >= 0; got -1"),
        ({"checkpoint_every": 0}, "^checkpoint_every: expected an int >= 1; got 0"),
        ({"evaluate_every": 0}, "^evaluate_every: expected an int >= 1; got 0"),
        ({"patience": 0}, "^patience: expected an int >= 1 or None; got 0"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_refused_by_fit(options: dict[str, Any], message: str) -> None:
    tuner = tuner_of(torch.zeros(3, dtype=DTYPE), torch.zeros(3, dtype=DTYPE))
    with pytest.raises(ValueError, match=message):
        tuner.fit([DATA], [TARGET], **{"progress": False, "hyper_steps": 1} | options)
