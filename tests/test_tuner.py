"""Algorithm 1 finds known optima, and survives failures on the way."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from problems_with_known_answers import DTYPE, randn
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from tuning_problem_with_known_optimum import DATA, TARGET, distance, sgd, shrink, tuner_of, zeros

import hvp_engine as hvp

pytestmark = pytest.mark.filterwarnings("ignore:the weights are far from a minimum")


def test_finds_the_closed_form_optimum() -> None:
    """1 + e^h = data / target, reached from any start."""
    w, h = zeros(3), zeros(3)
    history = tuner_of(w, h).fit([DATA], [TARGET], hyper_steps=300, progress=False)
    torch.testing.assert_close(w, TARGET, rtol=1e-3, atol=0)
    torch.testing.assert_close(h, torch.log(DATA / TARGET - 1), rtol=1e-2, atol=1e-2)
    assert len(history) == 300 and [record.hyper_step for record in history] == list(range(300))
    assert history[-1].val_loss < 1e-6 < history[0].val_loss
    assert history[-1].status == "CONVERGED" or history[-1].status == "ITERATION_LIMIT"
    assert all(record.training_seconds > 0 and record.hypergradient_seconds > 0 for record in history)


def test_optimum_with_a_direct_term() -> None:
    """L_V = (w - 2)^2 / 2 + (h - 1)^2 / 2 with w* = h: the optimum h = 3/2 needs both terms."""
    w, h = zeros(), zeros()
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
    w, h = DATA / 2, zeros(3)
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
    h = zeros()
    train = lambda w, h, b: net(w, x).square().mean() + h.exp() * w["weight"].square().sum()  # noqa: E731
    tuner_of(module, h, train=train, val=lambda w, h, b: net(w, x).mean()).fit([0], [0], 2, progress=False)
    assert all(torch.equal(p.grad, torch.full_like(p, 7.0)) for p in module.parameters())
    assert h.grad is None


def test_buffers_move_in_training_only() -> None:
    module = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Linear(3, 1)).to(DTYPE)
    net, x = hvp.functional(module), randn(6, 2, seed=6)
    h = zeros()
    train = lambda w, h, b: net(w, x).square().mean() + h.exp() * w["0.weight"].square().sum()  # noqa: E731
    tuner = tuner_of(module, h, train=train, val=lambda w, h, b: net(w, x).mean(), inner_steps=4)
    tuner.fit([0], [0], hyper_steps=3, progress=False)
    assert int(module[1].num_batches_tracked) == 12


def test_optimizers_given_as_objects() -> None:
    w, h = zeros(3), zeros(3)
    tuner = tuner_of(
        w, h, weight_optimizer=torch.optim.SGD([w], lr=0.3), hyper_optimizer=torch.optim.RMSprop([h], lr=0.02)
    )
    history = tuner.fit([DATA], [TARGET], 100, progress=False)
    assert history[-1].val_loss < 0.2 * history[0].val_loss


def test_fit_continues_where_it_stopped() -> None:
    w, h = zeros(3), zeros(3)
    tuner = tuner_of(w, h)
    tuner.fit([DATA], [TARGET], 3, progress=False)
    history = tuner.fit([DATA], [TARGET], 5, progress=False)
    assert [record.hyper_step for record in history] == [0, 1, 2, 3, 4]


# What goes wrong


def failing(where: str, bad_calls: set[int], value: float) -> dict[str, Callable[..., Tensor]]:
    """Two losses, one of which is multiplied by NaN or Inf in some calls of the hypergradient."""
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
            root = (h - h.detach()).sqrt()  # zero, with an infinite derivative
            return shrink(w, h, batch) + (root * w).sum()
        return shrink(w, h, batch)

    return {"train": train, "val": val}


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("where", ["val", "train", "mixed"])
@pytest.mark.parametrize("alpha", ["auto", 0.1])
def test_a_bad_hypergradient_never_reaches_the_optimizer(where: str, value: float, alpha: float | str) -> None:
    w, h = zeros(3), zeros(3)
    tuner = tuner_of(w, h, solver=hvp.Neumann(5, alpha=alpha), **failing(where, {2, 3}, value))
    with pytest.warns(UserWarning, match="hyper step left out") as caught:
        history = tuner.fit([DATA], [TARGET], 6, progress=False)
    assert len([w for w in caught if "left out" in str(w.message)]) == 2
    assert len(history) == 4
    states = [s for state in tuner.hyper_optimizer.state.values() for s in state.values()]
    assert all(bool(torch.isfinite(tensor).all()) for tensor in [w, h, *states])


def test_divergence_is_left_out() -> None:
    w, h = DATA.clone(), zeros(3)
    tuner = tuner_of(w, h, solver=hvp.Neumann(100, alpha=5.0))
    with pytest.warns(UserWarning, match="hyper step left out: Neumann diverged"):
        assert tuner.hyper_step(DATA, TARGET) is None
    assert torch.equal(h, zeros(3))


def test_ten_failures_in_a_row_raise_and_nine_do_not() -> None:
    for bad, total in ((9, 12), (10, 12)):
        w, h = zeros(3), zeros(3)
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
    w, h = zeros(3), zeros(3)
    tuner = tuner_of(w, h, **failing("val", set(range(40)) - {9, 19, 29}, math.nan))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert len(tuner.fit([DATA], [TARGET], 39, progress=False)) == 3


def test_survives_curvature_that_grows_thirteenfold() -> None:
    w, h = zeros(3), zeros(3)
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
    w, h = zeros(3), zeros(3)
    with pytest.raises(ValueError, match="train_loader: expected at least one batch"):
        tuner_of(w, h).fit([], [TARGET], 1, progress=False)
    with pytest.raises(ValueError, match="val_loader: expected at least one batch"):
        tuner_of(w, h).fit([DATA], [], 1, progress=False)


# Arguments


REFUSED: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "warmup": ({"warmup_steps": -1}, ValueError, "^warmup_steps: expected an int >= 0; got -1"),
    "accumulate": ({"accumulate": 0}, ValueError, "^accumulate: expected an int >= 1; got 0"),
    "val_batches": ({"val_batches": True}, TypeError, "^val_batches: expected an int >= 1; got bool"),
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
    "clip text": ({"weight_clip": "1"}, TypeError, "^weight_clip: expected a number > 0 or None; got '1'"),
    "tolerance text": (
        {"inner_tolerance": "1"},
        TypeError,
        "^inner_tolerance: expected a number >= 0 or None; got '1'",
    ),
    "optimizer text": ({"weight_optimizer": "adam"}, TypeError, "^weight_optimizer: expected a torch .*; got str"),
    "scheduler list": ({"weight_scheduler": [1]}, TypeError, "^weight_scheduler: expected a torch .*; got list"),
    "estimator": ({"estimator": 3}, TypeError, "^estimator: expected a callable of .*got int"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_at_construction(name: str) -> None:
    options, error, message = REFUSED[name]
    with pytest.raises(error, match=message):
        tuner_of(zeros(3), zeros(3), **options)


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
        ({"checkpoint_minutes": -1}, "^checkpoint_minutes: expected a number >= 0 or None; got -1"),
        ({"evaluate_every": 0}, "^evaluate_every: expected an int >= 1; got 0"),
        ({"patience": 0}, "^patience: expected an int >= 1, or None; got 0"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_refused_by_fit(options: dict[str, Any], message: str) -> None:
    tuner = tuner_of(zeros(3), zeros(3))
    with pytest.raises(ValueError, match=message):
        tuner.fit([DATA], [TARGET], **{"progress": False, "hyper_steps": 1} | options)


FIT_REFUSED: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "minutes": ({"checkpoint_minutes": "3"}, TypeError, "^checkpoint_minutes: expected a number >= 0 or None; got '3'"),
    "checkpoint": ({"checkpoint": True}, TypeError, "^checkpoint: expected the path of a file; got bool"),
    "callbacks": (
        {"callbacks": lambda tuner, record: None},
        TypeError,
        r"^callbacks: .*got function: pass \[callback\]",
    ),
    "callback": ({"callbacks": [print, 3]}, TypeError, r"^callbacks\[1\]: expected a Callback or a function .*got int"),
    "callback class": (
        {"callbacks": [hvp.tuning.Callback]},
        TypeError,
        r"^callbacks\[0\]: .*the class Callback itself",
    ),
    "evaluate": (
        {"evaluate": lambda tuner: 1.0},
        TypeError,
        "^evaluate: expected a dict of numbers by name; got float",
    ),
    "metric": ({"evaluate": lambda tuner: {"a": "x"}}, TypeError, "^evaluate: expected a number as 'a'; got 'x'"),
    "vector": ({"evaluate": lambda tuner: {"a": torch.ones(2)}}, TypeError, "^evaluate: expected a number as 'a'"),
    "train_loader": ({"train_loader": {"x": DATA}}, TypeError, "^train_loader: expected a loader .*got dict"),
    "val_loader": ({"val_loader": "data"}, TypeError, "^val_loader: expected a loader .*got str"),
}


@pytest.mark.parametrize("name", FIT_REFUSED)
def test_what_fit_refuses_is_named(name: str) -> None:
    options, error, message = FIT_REFUSED[name]
    with pytest.raises(error, match=message):
        tuner_of(zeros(3), zeros(3)).fit(
            **{"train_loader": [DATA], "val_loader": [TARGET], "progress": False, "hyper_steps": 1} | options
        )


@pytest.mark.parametrize(
    ("train", "error", "message"),
    [
        (lambda w, h, b: None, TypeError, "^train_loss: expected a scalar tensor; got NoneType"),
        (lambda w, h, b: w - b, ValueError, r"^train_loss: expected a scalar tensor; got shape \(3,\): reduce it"),
        (lambda w, h, b: b.sum(), hvp.GraphError, "^train_loss: expected a loss that depends on the weights; got one"),
    ],
    ids=["nothing", "vector", "constant"],
)
def test_a_training_loss_that_is_none_is_named(train: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        tuner_of(zeros(3), zeros(3), train=train).train([DATA], 1, progress=False)


def test_training_losses_of_one_element_are_numbers() -> None:
    tuner = tuner_of(zeros(3), zeros(3), train=lambda w, h, b: (w - b).square().sum()[None])
    assert tuner.train([DATA], 1, progress=False) == [float(DATA.square().sum())]


def test_a_hyperparameter_that_is_a_weight_is_refused() -> None:
    module = torch.nn.Linear(2, 1)
    with pytest.raises(ValueError, match=r"^hyper\[0\]: expected a tensor that is no weight"):
        tuner_of(module, {"decay": module.bias})


def test_a_function_that_estimates_nothing_is_named() -> None:
    tuner = tuner_of(zeros(3), zeros(3), estimator=lambda *_: None)
    with pytest.raises(TypeError, match="^estimator: expected a function that returns an hvp.Estimate; got NoneType"):
        tuner.hyper_step(DATA, TARGET)
