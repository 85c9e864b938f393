"""Training and hyper steps: averages, warm-up, tolerance, schedulers, clipping, bounds, every kind of optimizer."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from problems_with_known_answers import DTYPE, randn
from torch import Tensor, nn
from tuning_problem_with_known_optimum import DATA, TARGET, adam, sgd, shrink, tuner_of, zeros

import hvp_engine as hvp

pytestmark = pytest.mark.filterwarnings("ignore:the weights are far from a minimum")


def test_accumulation_is_the_step_on_the_average() -> None:
    batches = [randn(3, seed=50 + k) for k in range(6)]
    w, h = randn(3, seed=3), zeros(3)
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


@pytest.mark.parametrize("engine", ["eager", "recorded", "linearized"])
def test_averaged_hypergradients_are_those_of_one_large_batch(engine: str) -> None:
    """Averages over batches equal one batch that holds all of them, up to rounding."""
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
            zeros(3),
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
    tuner = tuner_of(zeros(3), zeros(3), warmup_steps=4, inner_steps=2)
    tuner.weight_optimizer.register_step_post_hook(lambda *_: order.append("w"))
    tuner.hyper_optimizer.register_step_post_hook(lambda *_: order.append("h"))
    history = tuner.fit([DATA], [TARGET], 2, progress=False)
    assert "".join(order) == "wwww" + "wwh" * 2
    assert [record.weight_steps for record in history] == [6, 8]


def test_the_tolerance_waits_for_the_end_of_the_warm_up() -> None:
    """However small the gradient: the warm-up is made in full, and then no training step at all."""
    tuner = tuner_of(zeros(3), zeros(3), warmup_steps=4, inner_steps=2, inner_tolerance=1e9)
    history = tuner.fit([DATA], [TARGET], 2, progress=False)
    assert [record.weight_steps for record in history] == [4, 4]


def test_inner_training_to_a_tolerance() -> None:
    """Each step halves the gradient; the round ends at the first gradient that is small enough, or at the maximum."""
    w, h = zeros(), zeros()
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
        zeros(3),
        zeros(3),
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
    w, h = zeros(3), zeros(3)
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
    w, h = zeros(3), zeros(3)
    tuner = tuner_of(w, h, weight_optimizer=sgd(1.0), hyper_optimizer=sgd(1.0), weight_clip=0.1, hyper_clip=1e-3)
    tuner.train_step(DATA)
    torch.testing.assert_close(w, 0.1 * DATA / DATA.norm())
    result = tuner.hyper_step(DATA, TARGET)
    torch.testing.assert_close(h, -1e-3 * result.grads / result.grads.norm())
    before = w.clone()
    tuner_of(w, h, weight_optimizer=sgd(1.0), weight_clip=1e3).train_step(DATA)
    torch.testing.assert_close(w, before - (before - DATA + h.exp() * before))


def test_clipping_where_autograd_returns_one_tensor_twice() -> None:
    weights = [zeros(2), zeros(2)]
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
    w = zeros(3)
    hyper = {"a": zeros(), "b": zeros(3)}
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


def test_bounds_are_numbers_of_the_hyperparameters_dtype() -> None:
    """0.1 in float32 is larger than 0.1 by 1.5e-9."""
    h = zeros(3)
    tuner = tuner_of(zeros(3), h, hyper_optimizer=sgd(1e4), bounds=(0.1, 0.1))
    tuner.fit([DATA], [TARGET], 1, progress=False)
    assert h.tolist() == [0.1] * 3


def test_one_sided_bounds() -> None:
    h = zeros(3)
    tuner = tuner_of(zeros(3), h, hyper_optimizer=sgd(1e4), bounds=(None, 0.5))
    tuner.fit([DATA], [-100 * DATA], 1, progress=False)
    tuner.fit([DATA], [TARGET], 2, progress=False)
    assert h.max() <= 0.5 and h.min() < -1


def test_lbfgs_on_the_weights() -> None:
    """Its closure is evaluated again at the updated weights: the same steps as by hand, with four evaluations each."""
    w, by_hand, h = zeros(3), zeros(3), torch.arange(3, dtype=DTYPE)
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

    assert losses == pytest.approx([optimizer.step(closure).item() for _ in range(3)], rel=1e-12)
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
    net, x, h = hvp.functional(module), randn(5, 2, seed=7), zeros()
    before = module[0].weight.clone()

    def train(w: dict[str, Tensor], h: Tensor, b: Any) -> Tensor:
        return net(w, x).square().mean() + h.exp() * w["1.weight"].square().sum()

    tuner = tuner_of(module, h, train=train, val=lambda w, h, b: net(w, x).mean(), weight_optimizer=sgd(0.1))
    tuner.fit([0], [0], 2, progress=False)
    assert tuner.problem.weights.names == ["['1.weight']", "['1.bias']"]
    assert torch.equal(module[0].weight, before)
