"""The state of a tuner: its layout, old files, exchange between tuners, and the count of failures."""

from __future__ import annotations

import random
import warnings
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from test_checkpoint import tuner
from torch import Tensor

import hvp_engine as hvp
from hvp_engine.errors import CheckpointError
from hvp_engine.tuning import checkpoint


def state_in_layout_1(tuner: hvp.Tuner) -> dict[str, Any]:
    """A state in the layout of version 1, written out key by key: such files must load whatever becomes of the code."""
    generator = torch.Generator().manual_seed(3)
    weights = {
        name: torch.full_like(w, 2.0) for name, w in zip(tuner.problem.weights.names, tuner.weights, strict=True)
    }
    record = {
        "hyper_step": 0, "weight_steps": 5, "train_loss": 1.0, "val_loss": 2.0, "gradient_norm": 3.0,
        "hypergradient_norm": 4.0, "unfinished": 5.0, "residual_norm": 6.0, "status": "CONVERGED", "alpha": 0.5,
        "training_seconds": 0.1, "hypergradient_seconds": 0.2, "metrics": {"score": 7.0},
    }  # fmt: skip
    side = {"scheduler": None, "scheduler_type": "NoneType"}
    moment = {"step": torch.tensor(1.0), "exp_avg": torch.ones(3), "exp_avg_sq": torch.ones(3)}
    scalar = {name: value if name == "step" else torch.ones(()) for name, value in moment.items()}
    groups = [tuner.weight_optimizer.state_dict(), tuner.hyper_optimizer.state_dict()]
    return {
        "weights": weights,
        "hyper": {"['decay']": torch.full((3,), -1.0), "['scale']": torch.tensor(0.5)},
        "initial_weights": {name: torch.zeros_like(w) for name, w in weights.items()},
        "initial_buffers": {name: torch.zeros_like(b) for name, b in tuner.buffers().items()},
        "buffers": {name: torch.ones_like(b) for name, b in tuner.buffers().items()},
        "weight_side": {"steps": 5, "optimizer": groups[0], "optimizer_type": "SGD", **side},
        "hyper_side": {
            "steps": 1,
            "optimizer": {**groups[1], "state": {0: moment, 1: scalar}},
            "optimizer_type": "Adam",
            **side,
        },
        "history": [record],
        "counters": {"hyper_steps": 1, "steps_to_go": 4, "failures": 2},
        "random": {
            "cpu": generator.get_state(),
            "cuda": None,
            "python": (3, (*range(624), 624), None),
            "numpy": {
                "bit_generator": "MT19937",
                "state": {"key": torch.arange(624), "pos": 0},
                "has_gauss": 0,
                "gauss": 0.0,
            },
        },
        "streams": {
            "train_loader": {
                "epoch": 1, "taken": 1, "seed": 0, "generators": [], "random": None, "loader": None, "checksum": 0,
            }
        },
        "estimator": {},
        "estimator_type": "function",
    }  # fmt: skip


def estimator(weights: Any, hyper: Any, train_batch: Any, val_batch: Any) -> hvp.Estimate:
    one = torch.ones(())
    return hvp.Estimate({name: torch.ones_like(h) for name, h in hyper.items()}, one, one, one)


def test_files_of_version_1_are_loaded(tmp_path: Path) -> None:
    seen: list[int] = []

    def train_loss(weights: Any, hyper: Any, batch: int) -> Tensor:
        seen.append(batch)
        return weights["0.weight"].square().sum()

    before = random.getstate(), numpy.random.get_state()
    try:
        one = tuner(estimator=estimator, train_loss=train_loss)
        content = {"format": "hvp_engine.Tuner", "version": 1, "state": state_in_layout_1(one)}
        torch.save(content, tmp_path / "run.pt")
        one.load(tmp_path / "run.pt")
        drawn, expected = torch.rand(3), torch.rand(3, generator=torch.Generator().manual_seed(3))
        assert torch.equal(drawn, expected)
        assert random.getstate()[1][:3] == (0, 1, 2) and numpy.random.get_state()[1][2] == 2
    finally:
        random.setstate(before[0]), numpy.random.set_state(before[1])
    assert all(bool((weight == 2).all()) for weight in one.weights)
    assert all(bool((buffer == 1).all()) for buffer in one.buffers().values())
    assert bool((one.hyper[0] == -1).all()) and float(one.hyper[1]) == 0.5
    assert (one.hyper_steps, one.steps_to_go, one.failures) == (1, 4, 2)
    assert (one.weight_side.steps, one.hyper_side.steps) == (5, 1)
    assert [record.metrics for record in one.history] == [{"score": 7.0}]
    assert all(bool((state["exp_avg"] == 1).all()) for state in one.hyper_optimizer.state.values())
    seen.clear()
    one.fit([10, 20], [0], 2, progress=False)
    assert seen == [20, 10, 20, 10] and one.weight_side.steps == 9
    one.retrain([0], 0, progress=False)
    assert all(bool((weight == 0).all()) for weight in one.weights)


def test_a_state_written_today_has_the_keys_of_its_version() -> None:
    """Another layout needs another version and a migration."""
    one = tuner(estimator=estimator)
    state = one.state_dict()
    assert checkpoint.VERSION == 1 and state.keys() == state_in_layout_1(one).keys()
    assert state["counters"].keys() == {"hyper_steps", "steps_to_go", "failures"}
    assert state["estimator_type"] == "function"


def test_a_state_goes_from_tuner_to_tuner_without_a_file_and_shares_no_memory() -> None:
    one, other = tuner(estimator=estimator), tuner(estimator=estimator)
    one.fit([0], [0], 3, progress=False)
    other.load_state_dict(one.state_dict())
    assert other.hyper_steps == 3 and other.history == one.history
    kept = [tensor.clone() for state in one.hyper_optimizer.state.values() for tensor in state.values()]
    weights = [weight.clone() for weight in one.weights]
    other.fit([0], [0], 5, progress=False)
    found = [tensor for state in one.hyper_optimizer.state.values() for tensor in state.values()]
    assert all(torch.equal(a, b) for a, b in zip(found, kept, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(one.weights, weights, strict=True))
    one.fit([0], [0], 5, progress=False)
    assert all(torch.equal(a, b) for a, b in zip(one.weights, other.weights, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(one.hyper, other.hyper, strict=True))


class Momentum(torch.optim.Optimizer):
    """One whose state is wider than its parameters, and not only tensors by name."""

    def __init__(self, tensors: Any):
        super().__init__(tensors, {})

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for tensor in self.param_groups[0]["params"]:
            state = self.state[tensor]
            momentum = 0.9 * state.get("sums", [torch.zeros(())])[0] + tensor.grad.double()
            state["sums"] = [momentum]
            tensor.data.sub_(0.1 * momentum)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("optimizer", [torch.optim.NAdam, torch.optim.RAdam, Momentum], ids=lambda kind: kind.__name__)
def test_what_an_optimizer_keeps_in_another_dtype_than_its_tensors(optimizer: Any, dtype: torch.dtype) -> None:
    """torch casts it when a state is loaded: NAdam's products of momenta are float32, whatever the weights are."""

    def make() -> hvp.Tuner:
        return hvp.Tuner(
            torch.ones(3, dtype=dtype),
            torch.zeros(3, dtype=dtype),
            lambda w, h, batch: (w - batch).square().sum() + (h.exp() * w.square()).sum(),
            lambda w, h, batch: (w + batch).square().sum(),
            weight_optimizer=optimizer,
            hyper_optimizer=optimizer,
            engine="eager",
        )

    def fit(tuner: hvp.Tuner, steps: int) -> hvp.Tuner:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "the weights are far from a minimum")
            tuner.fit([0.7], [0.3], steps, progress=False)
        return tuner

    straight, stopped, resumed = fit(make(), 6), fit(make(), 3), make()
    resumed.load_state_dict(stopped.state_dict())
    fit(resumed, 6)
    for one, other in (
        (straight.weight_optimizer, resumed.weight_optimizer),
        (straight.hyper_optimizer, resumed.hyper_optimizer),
    ):
        pairs = zip(tensors_of(one), tensors_of(other), strict=True)
        assert all(a.dtype == b.dtype and torch.equal(a, b) for a, b in pairs)
    assert torch.equal(straight.weights[0], resumed.weights[0]) and torch.equal(straight.hyper[0], resumed.hyper[0])


def tensors_of(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    leaves = torch.utils._pytree.tree_leaves(optimizer.state_dict())
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]


def test_a_state_that_does_not_fit_is_named() -> None:
    with pytest.raises(CheckpointError, match="^state: expected a complete checkpoint; got one without buffers"):
        tuner().load_state_dict({"weights": {}})


class Infinite(hvp.hypergradients.Estimator):
    """Every hypergradient is infinite."""

    def __call__(self, weights: Any, hyper: Any, train_batch: Any, val_batch: Any) -> hvp.Estimate:
        zero = torch.zeros(())
        return hvp.Estimate(hyper * torch.inf, zero, zero, zero)


def failing_tuner() -> hvp.Tuner:
    sgd = lambda tensors: torch.optim.SGD(tensors, lr=0.1)  # noqa: E731
    return hvp.Tuner(
        torch.ones(2),
        torch.ones(2),
        lambda w, h, b: w.square().sum(),
        lambda w, h, b: w.sum(),
        weight_optimizer=sgd,
        hyper_optimizer=sgd,
        estimator=Infinite(),
    )


def test_the_count_of_failed_hypergradients_is_saved_and_restored(tmp_path: Path) -> None:
    """Nine failures before a checkpoint and one after it are ten in a row."""
    path, one = tmp_path / "run.pt", failing_tuner()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        one.fit([0], [0], 9, progress=False, checkpoint=path)
        assert checkpoint.read(path)["counters"]["failures"] == 9
        other = failing_tuner()
        with pytest.raises(hvp.DivergenceError):
            other.fit([0], [0], 10, progress=False, checkpoint=path)
        assert other.hyper_steps == 9
    assert checkpoint.read(path)["counters"] == {"hyper_steps": 9, "steps_to_go": 0, "failures": 9}


@pytest.mark.parametrize("failures", [0, 8, 9])
def test_a_restored_count_of_failures_goes_on(failures: int) -> None:
    one, other = failing_tuner(), failing_tuner()
    state = one.state_dict()
    other.load_state_dict({**state, "counters": {**state["counters"], "failures": failures}})
    assert other.failures == failures
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(9 - failures):
            assert other.hyper_step(None, None) is None
        with pytest.raises(hvp.DivergenceError):
            other.hyper_step(None, None)


def test_the_optimizers_of_a_tuner_cannot_be_replaced_without_a_word() -> None:
    made = tuner()
    for name in ("weight_optimizer", "hyper_optimizer", "failures"):
        with pytest.raises(AttributeError):
            setattr(made, name, None)
