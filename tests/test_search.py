"""Searches on problems whose best hyperparameters are known, and the account of their work."""

from __future__ import annotations

import math
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
from problems_with_known_answers import DTYPE, randn
from torch import Tensor, nn

import hvp_engine as hvp
from baselines.search import (
    BayesianOptimization,
    GridSearch,
    HypergradientDescent,
    LinearHypernetwork,
    RandomSearch,
    Search,
    SelfTuningNetwork,
    TuningProblem,
)
from baselines.search.problem import Run
from hvp_engine._support.isolation import isolated


def sgd(rate: float) -> Any:
    return lambda tensors: torch.optim.SGD(tensors, lr=rate)


def adam(rate: float) -> Any:
    return lambda tensors: torch.optim.Adam(tensors, lr=rate)


DATA, TARGET = torch.tensor([1.0, 3.0], dtype=DTYPE), torch.tensor([0.8, 1.2], dtype=DTYPE)
BEST = torch.log(DATA / TARGET - 1)  # where w* = data / (1 + e^h) is the target


def two_decays(**options: Any) -> TuningProblem:
    """w* = data / (1 + e^h); the validation loss is zero at h = (-1.386, 0.405)."""
    return TuningProblem(
        train_loss=lambda w, h, batch: ((w["a"] - batch).square() + h["decay"].exp() * w["a"].square()).sum() / 2,
        val_loss=lambda w, h, batch: (w["a"] - batch).square().sum() / 2,
        weights={"a": torch.zeros(2, dtype=DTYPE)},
        hyper={"decay": torch.zeros(2, dtype=DTYPE)},
        train_batches=[DATA],
        val_batches=[TARGET],
        **{"bounds": (-3.0, 2.0)} | options,
    )


def neumann(train: Any, val: Any) -> Any:
    return hvp.Hypergradient(train, val, hvp.Neumann(5, alpha=0.2), engine="eager")


# (Its losses are no means over examples.)
STN = SelfTuningNetwork(sgd(0.2), adam(0.05), scale=0.2, warmup_steps=50, perturbations=1)
SEARCHES: dict[str, tuple[Search, int, float]] = {  # with a budget, and the validation loss that it has to reach
    "random": (RandomSearch(20, sgd(0.2)), 1200, 0.02),
    "grid": (GridSearch(8, 20, sgd(0.2)), 1280, 0.02),
    "Bayesian": (BayesianOptimization(20, sgd(0.2)), 600, 1e-3),
    "linear hypernetwork": (LinearHypernetwork(sgd(0.2), adam(0.1), scale=0.1), 1500, 1e-3),
    "self-tuning network": (
        SelfTuningNetwork(sgd(0.2), adam(0.05), scale=0.2, warmup_steps=50, perturbations=1),
        1500,
        5e-3,
    ),
    "Algorithm 1": (HypergradientDescent(neumann, 13, sgd(0.3), adam(0.1)), 1500, 1e-3),
}


@pytest.mark.parametrize("name", SEARCHES)
def test_known_optimum_is_found_within_the_budget(name: str) -> None:
    search, gradients, reached = SEARCHES[name]
    problem = two_decays()
    random = torch.get_rng_state()
    result = search(problem, gradients)
    assert result.val_loss < reached < float(problem.val_loss({"a": DATA / 2}, None, TARGET))
    torch.testing.assert_close(result.hyper["decay"], BEST, rtol=0, atol=0.5 if reached > 1e-3 else 0.15)
    assert result.val_loss == pytest.approx(float(problem.val_loss(result.weights, result.hyper, TARGET)))
    assert 0.9 * gradients <= result.gradients <= gradients
    assert [spent for spent, _ in result.curve] == sorted(spent for spent, _ in result.curve)
    assert min(loss for _, loss in result.curve) == result.curve[-1][1] <= result.val_loss
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.equal(problem.weights["a"], torch.zeros(2)) and torch.equal(problem.hyper["decay"], torch.zeros(2))
    again = search(problem, gradients)
    assert torch.equal(again.hyper["decay"], result.hyper["decay"]), "seeded"


@pytest.mark.parametrize("name", SEARCHES)
def test_gradients_are_counted(name: str) -> None:
    """Every loss that has a graph to differentiate is counted as one, by each kind."""
    seen = {"train": 0, "val": 0}
    plain = two_decays()

    def counted(kind: str, loss: Any) -> Any:
        def evaluate(w: Any, h: Any, batch: Any) -> Tensor:
            seen[kind] += torch.is_grad_enabled()
            return loss(w, h, batch)

        return evaluate

    problem = two_decays(bounds=(-3.0, 2.0))
    object.__setattr__(problem, "train_loss", counted("train", plain.train_loss))
    object.__setattr__(problem, "val_loss", counted("val", plain.val_loss))
    search, gradients, _ = SEARCHES[name]
    result = search(problem, gradients)
    assert result.validation_gradients == seen["val"]
    hyper_steps = result.validation_gradients if name == "Algorithm 1" else 0
    # A hypergradient of 5 products evaluates the training loss once, and counts as 12 gradients of it.
    assert result.training_gradients == seen["train"] + 11 * hyper_steps


def test_searches_agree_with_a_module_on_batches() -> None:
    """A network with BatchNorm, loaders with several batches: buffers stay, and tuning helps."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 1)).to(DTYPE)
    net, before = hvp.functional(module), {n: b.clone() for n, b in module.named_buffers()}

    def val_loss(w: Any, h: Any, batch: Any) -> Tensor:
        return (net(w, batch[0]) - batch[1]).square().mean()

    def train_loss(w: Any, h: Any, batch: Any) -> Tensor:
        return val_loss(w, h, batch) + h.exp() * sum(t.square().sum() for t in w.values())

    def batches(seed: int) -> Any:
        x = randn(40, 4, seed=seed)
        y = x[:, :1] + 0.5 * randn(40, 1, seed=seed + 1)
        return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=16)

    problem = TuningProblem(
        train_loss, val_loss, dict(module.named_parameters()), torch.tensor(0.0, dtype=DTYPE), batches(1), batches(3),
        bounds=(-6.0, 1.0),
    )  # fmt: skip
    start = GridSearch(2, 100, adam(0.03))(problem, 200)
    for search in (
        RandomSearch(100, adam(0.03)),
        SelfTuningNetwork(adam(0.03), adam(0.1), warmup_steps=100, perturbations=1),
    ):
        result = search(problem, 700)
        assert result.val_loss < 1.1 * start.val_loss and result.hyper.shape == ()
    assert all(torch.equal(b, before[n]) for n, b in module.named_buffers())


# Perturbations for each example


def ridge(seen: set[int] | None = None) -> TuningProblem:
    """Least squares with a decay; losses are means over examples, whose numbers join `seen`."""
    w_true = randn(16, seed=30) / 4
    x, x_val = randn(24, 16, seed=31), randn(96, 16, seed=32)
    y, y_val = x @ w_true + randn(24, seed=33), x_val @ w_true

    def val_loss(w: Any, h: Any, batch: Any) -> Tensor:
        if seen is not None:
            seen.add(len(batch[0]))
        return (batch[0] @ w - batch[1]).square().mean() / 2

    return TuningProblem(
        lambda w, h, batch: val_loss(w, h, batch) + h.exp() * w.square().sum() / 2,
        val_loss,
        torch.zeros(16, dtype=DTYPE),
        torch.tensor(-4.0, dtype=DTYPE),
        [(x, y)],
        [(x_val, y_val)],
        bounds=(-5.0, 2.0),
    )


@pytest.mark.parametrize("perturbations, sizes", [(None, {1}), (4, {6, 24}), (1, {24, 96})])
def test_examples_have_perturbations_of_their_own(perturbations: int | None, sizes: set[int]) -> None:
    """One for each example, each part, or the batch: all come close to the best decay's loss, 0.441 (1.25 at first)."""
    seen: set[int] = set()
    network = SelfTuningNetwork(sgd(0.05), adam(0.03), scale=0.3, warmup_steps=50, perturbations=perturbations)
    result = network(ridge(seen), 1500)
    assert 1498 <= result.gradients <= 1500 and result.validation_losses == len(result.curve)
    assert seen == sizes | {96}  # (looks at the validation loss see all of it)
    best = GridSearch(15, 200, sgd(0.2))(ridge(), 3000)
    assert best.val_loss < 0.45
    assert result.val_loss < best.val_loss + 0.05


def test_perturbations_of_examples_lower_the_variance_and_keep_the_mean() -> None:
    run = Run(ridge(), 100_000)
    slope, point = randn(16, seed=35) / 2, randn(16, seed=34)

    def at(noise: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        return [point + slope * noise], [noise[0] - 1.0]

    with isolated(0, run.device):
        losses = {
            parts: torch.stack([run.perturbed_loss("train", at, 1, parts) for _ in range(400)])
            for parts in (1, 4, None)
        }
    mean, deviation = float(losses[1].mean()), float(losses[1].std())
    for parts, count in ((4, 4), (None, 24)):
        assert abs(float(losses[parts].mean()) - mean) < 4 * deviation / 400**0.5
        assert float(losses[parts].std()) < 1.6 * deviation / count**0.5


@pytest.mark.parametrize("kind", [LinearHypernetwork, SelfTuningNetwork])
def test_perturbed_hyperparameters_stay_within_bounds(kind: Any) -> None:
    """So do scales that have no share in the loss and only grow: up to a quarter of the distance."""
    seen: list[Tensor] = []

    def train_loss(w: Any, h: Any, batch: Any) -> Tensor:
        seen.append(torch.cat([h["a"].detach(), h["b"].detach().reshape(1)]))
        return (w - h["a"].sum()).square().mean() + 0.0 * h["b"]

    hyper = {"a": torch.zeros(3, dtype=DTYPE), "b": torch.zeros((), dtype=DTYPE)}
    bounds = ({"a": torch.tensor([-1.0, -2.0, -3.0]), "b": -0.5}, {"a": 1.0, "b": torch.tensor(4.0)})
    problem = TuningProblem(
        train_loss, lambda w, h, batch: w.square().mean(), torch.zeros(2, dtype=DTYPE), hyper, [None], [None], bounds
    )
    more = {"entropy_weight": 1.0, "perturbations": 1} if kind is SelfTuningNetwork else {}
    result = kind(sgd(0.02), adam(0.5), scale=2.0, **more)(problem, 200)
    points = torch.stack(seen)
    low, high = torch.tensor([-1.0, -2.0, -3.0, -0.5]), torch.tensor([1.0, 1.0, 1.0, 4.0])
    assert (points >= low).all() and (points <= high).all()
    assert (points == low).any() and (points == high).any(), "and some would have left them"
    assert math.isfinite(result.val_loss)
    if kind is SelfTuningNetwork:
        assert float(result.scales["b"]) == pytest.approx(4.5 / 4)


def test_self_tuning_network_of_many_hyperparameters() -> None:
    """A decay for each of 300 weights: the response neither explodes during the warm-up nor later."""
    x, x_val, w_true = randn(40, 300, seed=40), randn(200, 300, seed=41), randn(300, seed=42) / 17
    y, y_val = x @ w_true + randn(40, seed=43) / 2, x_val @ w_true

    def val_loss(w: Tensor, h: Tensor, batch: Any) -> Tensor:
        return (batch[0] @ w - batch[1]).square().mean() / 2

    problem = TuningProblem(
        lambda w, h, batch: val_loss(w, h, batch) + (h.exp() * w.square()).sum() / 2,
        val_loss, torch.zeros(300, dtype=DTYPE), torch.full((300,), -4.0, dtype=DTYPE), [(x, y)], [(x_val, y_val)],
        bounds=(-9.0, 3.0),
    )  # fmt: skip
    search = SelfTuningNetwork(adam(0.02), adam(0.1), 0.3, 1e-4, warmup_steps=100, perturbations=8)
    result = search(problem, 600)
    at_zero = float(y_val.square().mean()) / 2
    assert result.curve[0][1] < 2 * at_zero, "after the warm-up"
    assert result.val_loss < 1.2 * at_zero


# Bad input


@pytest.mark.parametrize("name", SEARCHES)
def test_budget_must_cover_one_round(name: str) -> None:
    search = SEARCHES[name][0]
    for gradients, error in ((0, ValueError), (True, TypeError), (1.5, TypeError)):
        with pytest.raises(error, match="gradients: expected an int >= 1"):
            search(two_decays(), gradients)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="gradients: expected a budget of at least|points: expected a grid that fits"):
        search(two_decays(), 2)


@pytest.mark.parametrize("name", ["random", "grid", "Bayesian"])
def test_trials_need_finite_bounds(name: str) -> None:
    for bounds in ((None, 2.0), (-3.0, math.inf)):
        with pytest.raises(ValueError, match=r"bounds: expected finite bounds .* got none for hyper\['decay'\]"):
            SEARCHES[name][0](two_decays(bounds=bounds), 1280)


@pytest.mark.filterwarnings("ignore")
def test_trials_that_all_diverge() -> None:
    with pytest.raises(hvp.DivergenceError, match="expected a finite validation loss after some trial; got none in 3"):
        RandomSearch(400, sgd(1e4))(two_decays(), 1200)


@pytest.mark.parametrize(
    "search, message",
    [
        (RandomSearch(0, sgd(0.1)), "training_steps: expected an int >= 1; got 0"),
        (RandomSearch(5, sgd(0.1), weight_clip=0.0), "weight_clip: expected a number > 0"),
        (BayesianOptimization(5, sgd(0.1), startup_trials=0), "startup_trials: expected an int >= 1; got 0"),
        (GridSearch(1, 5, sgd(0.1)), "points: expected an int >= 2; got 1"),
        (GridSearch(9, 5, sgd(0.1)), "points: expected a grid that fits into the budget of 20 trials; got 9"),
        (LinearHypernetwork(sgd(0.1), sgd(0.1), scale=0.0), "scale: expected a finite number > 0"),
        (LinearHypernetwork(sgd(0.1), sgd(0.1), inner_steps=0), "inner_steps: expected an int >= 1; got 0"),
        (SelfTuningNetwork(sgd(0.1), sgd(0.1), entropy_weight=-1.0), "entropy_weight: expected a finite number >= 0"),
        (SelfTuningNetwork(sgd(0.1), sgd(0.1), warmup_steps=-1), "warmup_steps: expected an int >= 0; got -1"),
        (SelfTuningNetwork(sgd(0.1), sgd(0.1), perturbations=0), "perturbations: expected an int >= 1"),
        (SelfTuningNetwork(sgd(0.1), sgd(0.1), perturbations=3), "perturbations: expected a divisor of the 2 examples"),
        (HypergradientDescent(neumann, 0, sgd(0.1), sgd(0.1)), "cost: expected an int >= 1"),
    ],
)
def test_bad_options(search: Search, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        search(two_decays(), 100)


@pytest.mark.parametrize("make", [RandomSearch, LinearHypernetwork, SelfTuningNetwork, HypergradientDescent])
def test_learning_rates_fall_and_gradients_are_clipped(make: Any) -> None:
    """Each step of a linear loss is the clipped gradient times the rate: 1 + 1/2 + 1/4 of it in three."""
    problem = replace(two_decays(), train_loss=lambda w, h, batch: (30 + h["decay"].sum()) * w["a"][0])
    halving: dict[str, Any] = {
        "weight_scheduler": lambda optimizer: torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5),
        "weight_clip": 4.0,
    }
    search: Search
    if make is RandomSearch:
        search, budget = make(3, sgd(1.0), **halving), 3
    elif make is HypergradientDescent:
        search, budget = make(neumann, 13, sgd(1.0), sgd(0.0), inner_steps=3, **halving), 16
    else:
        search, budget = make(sgd(1.0), sgd(0.0), inner_steps=3, **halving, **{"scale": 1e-6}), 4
    found = search(problem, budget)
    torch.testing.assert_close(found.weights["a"], torch.tensor([-7.0, 0.0], dtype=DTYPE), atol=1e-4, rtol=0)


def test_grid_in_many_dimensions_is_refused_before_it_is_counted() -> None:
    problem = two_decays()
    object.__setattr__(problem, "hyper", {"decay": torch.zeros(2, 1000, dtype=DTYPE)})
    with pytest.raises(ValueError, match=r"got 9 points for each of 2000 hyperparameters, 9\^2000 trials"):
        GridSearch(9, 5, sgd(0.1))(problem, 100)


@pytest.mark.parametrize("batches, message", [([], "expected at least one batch"), (iter([1]), "got list_iterator")])
def test_bad_batches(batches: Any, message: str) -> None:
    problem = two_decays()
    object.__setattr__(problem, "train_batches", batches)
    with pytest.raises((TypeError, ValueError), match=f"train_batches: .*{message}"):
        RandomSearch(5, sgd(0.1))(problem, 10)


def test_missing_optuna_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    for name in ("random", "grid", "Bayesian"):
        with pytest.raises(hvp.HvpError, match=r"needs Optuna .*pip install optuna"):
            SEARCHES[name][0](two_decays(), 1280)
