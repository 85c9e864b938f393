"""Training at fixed hyperparameters: from the current weights, or from scratch."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from problems_with_known_answers import DTYPE, randn
from torch import Tensor, nn
from tuning_problem_with_known_optimum import DATA, TARGET, adam, sgd, tuner_of, zeros

import hvp_engine as hvp

pytestmark = pytest.mark.filterwarnings("ignore:the weights are far from a minimum")


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
    w, h = zeros(3), zeros(3)
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


def test_retraining_begins_anew_in_a_tuner_whose_state_was_loaded() -> None:
    loader = [0.0, 1.0, 2.0]

    def make() -> hvp.Tuner:
        return tuner_of(torch.ones(2), torch.ones(2), train=lambda w, h, batch: (w - batch).square().sum())

    one, other = make(), make()
    one.train(loader, 2, progress=False)
    other.load_state_dict(one.state_dict())
    assert other.retrain(loader, 4, progress=False) == make().train(loader, 4, progress=False)


@pytest.mark.parametrize(
    ("loader", "steps"), [(DATA, 3), (iter([DATA]), 3), ([DATA], -1)], ids=["tensor", "iterator", "steps"]
)
def test_retraining_that_is_refused_leaves_the_weights(loader: Any, steps: int) -> None:
    tuner = tuner_of(zeros(3), zeros(3))
    tuner.train([DATA], 2, progress=False)
    trained = tuner.weights[0].clone()
    with pytest.raises((TypeError, ValueError), match="^(train_loader|steps): expected"):
        tuner.retrain(loader, steps, progress=False)
    assert torch.equal(tuner.weights[0], trained)
