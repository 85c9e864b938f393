"""Training and hyper steps as recordings, on a CPU by recorded calls: the same numbers, bit for bit, as without."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from recorder_on_cpu import CallRecorder
from replayed_runs import (  # noqa: F401  the fixture is used by itself
    GRADIENT,
    HYPER,
    WEIGHTS,
    HypergradientsOnly,
    Loss,
    Run,
    StepsOnly,
    adam,
    as_on_a_gpu,
    assert_equal,
    plain,
    sgd,
)
from torch import Tensor
from torch.optim.lr_scheduler import LinearLR, StepLR

import hvp_engine as hvp
from hvp_engine._support.random_state import RandomState
from hvp_engine.engines.cudagraph import CudaGraphEngine

pytestmark = pytest.mark.filterwarnings("ignore:the weights are far from a minimum")


def test_steps_are_replayed_with_the_same_numbers() -> None:
    ours, theirs = Run().steps(20), plain().steps(20)
    assert_equal(ours, theirs)
    before = [loss.clone() for loss in ours.losses]
    ours.steps(1)
    assert torch.equal(torch.stack(before), torch.stack(ours.losses[:-1]))  # no replay has overwritten them
    assert ours.line(GRADIENT) == "training gradient: 1 graphs, 18 replays"  # from the fourth step on
    assert ours.line(WEIGHTS) == "weight step: 1 graphs, 19 replays"  # from the fourth on, and one to check
    assert "training gradient" not in theirs.tuner.report()


def test_a_run_is_the_same_and_its_hyper_steps_are_replayed_too() -> None:
    ours, theirs = Run().fit(6), plain().fit(6)
    assert_equal(ours, theirs)
    assert ours.line(GRADIENT) == "training gradient: 1 graphs, 24 replays"
    assert ours.line(WEIGHTS) == "weight step: 1 graphs, 25 replays"
    assert ours.line(HYPER) == "hyper step: 1 graphs, 4 replays"


def test_the_engine_of_graphs_replays_all() -> None:
    ours = Run(CudaGraphEngine(recorder=CallRecorder), weight_optimizer=sgd(), hyper_optimizer=sgd()).fit(5)
    theirs = plain(weight_optimizer=sgd(), hyper_optimizer=sgd()).fit(5)
    torch.testing.assert_close(ours.tuner.weights, theirs.tuner.weights, rtol=1e-3, atol=1e-5)
    report = ours.tuner.report()
    assert report.startswith("engine cudagraph") and "instead" not in report and "otherwise" not in report
    assert [" 1 graphs" in ours.line(name) for name in (GRADIENT, WEIGHTS, HYPER)] == [True] * 3


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_gradient_descent_with_a_tolerance(momentum: float) -> None:
    options = {"weight_optimizer": sgd(momentum=momentum), "inner_tolerance": 0.7, "weight_clip": None}
    ours, theirs = Run(**options).fit(6), plain(**options).fit(6)
    assert_equal(ours, theirs)
    assert ours.tuner.weight_side.steps < 3 + 6 * 4  # the tolerance was reached
    assert "1 graphs" in ours.line(WEIGHTS) and "otherwise" not in ours.line(GRADIENT)


def test_a_weight_without_a_gradient_is_left_alone() -> None:
    def run(engine: Any) -> Tensor:
        weights, hyper = {"a": torch.ones(3), "unused": torch.ones(2)}, torch.zeros(())
        loss: Loss = lambda w, h, batch: (w["a"] - batch).square().sum() + h.exp() * w["a"].square().sum()  # noqa: E731
        tuner = hvp.Tuner(
            weights, hyper, loss, loss, weight_optimizer=sgd(0.1, weight_decay=0.1), hyper_optimizer=sgd(),
            estimator=hvp.Hypergradient(loss, loss, hvp.Neumann(2, 0.1), engine),
        )  # fmt: skip
        for _ in range(6):
            tuner.train_step(torch.arange(3.0))
        assert torch.equal(weights["unused"], torch.ones(2))
        return weights["a"]

    assert torch.equal(run(StepsOnly()), run("eager"))


def test_a_rate_that_is_a_tensor_may_change() -> None:
    def run(make: Callable[..., Run]) -> Run:
        return make(
            weight_optimizer=sgd(torch.tensor(0.1), fused=True, momentum=0.9),
            weight_scheduler=lambda optimizer: LinearLR(optimizer, total_iters=20),
        ).steps(20)

    ours = run(Run)
    assert_equal(ours, run(plain))
    assert ours.line(WEIGHTS) == "weight step: 1 graphs, 18 replays"


def test_a_number_that_changes_now_and_then_is_recorded_anew() -> None:
    options = {"weight_scheduler": lambda optimizer: StepLR(optimizer, 15, 0.5)}
    ours, theirs = Run(**options).steps(40), plain(**options).steps(40)
    assert_equal(ours, theirs)
    assert ours.line(WEIGHTS) == "weight step: 3 graphs, 36 replays"


def test_batches_of_two_kinds() -> None:
    def run(make: Callable[..., Run]) -> Run:
        one = make(accumulate=1)
        one.batches[3] = [part[:5] for part in one.batches[3]]
        return one.fit(5)

    ours = run(Run)
    assert_equal(ours, run(plain))
    assert ours.line(GRADIENT).startswith("training gradient: 2 graphs")


def test_more_kinds_of_batches_than_are_kept_are_not_recorded() -> None:
    def run(make: Callable[..., Run]) -> Run:
        one = make(accumulate=1)
        points, labels = (torch.cat(parts) for parts in zip(*one.batches, strict=True))
        one.batches = [[points[:size], labels[:size]] for size in range(4, 16)]
        return one.fit(8)

    ours = run(Run)
    assert_equal(ours, run(plain))
    assert ours.line(GRADIENT) == (
        "training gradient: 0 graphs, 0 replays; otherwise without, since there are more than 8 kinds of batches"
    )


# --- interruptions, callbacks, other uses ---------------------------------------------------------------------------


@pytest.mark.parametrize("stop", [1, 3])
def test_an_interrupted_run_continues_with_the_same_numbers(tmp_path: Path, stop: int) -> None:
    whole = Run().fit(6)
    first = Run().fit(stop, checkpoint=tmp_path / "run.pt")
    second = Run()
    second.random = first.random
    second.fit(6, checkpoint=tmp_path / "run.pt")
    assert_equal(second, whole)
    assert "replays; otherwise" not in second.tuner.report()


def test_a_state_that_is_loaded_into_a_running_tuner_is_taken() -> None:
    def run(make: Callable[..., Run]) -> Run:
        one = make().fit(2)
        state = torch.utils._pytree.tree_map_only(Tensor, torch.clone, one.tuner.state_dict())
        one.fit(4)
        one.tuner.load_state_dict(state)
        one.random = RandomState.now(torch.device("cpu"))
        return one.fit(6)

    ours = run(Run)
    assert_equal(ours, run(plain))
    assert ours.line(WEIGHTS).startswith("weight step: 2 graphs")


def test_training_anew_with_a_new_start() -> None:
    def run(make: Callable[..., Run]) -> Run:
        one = make().fit(3)
        torch.manual_seed(3)
        one.losses = [torch.tensor(one.tuner.retrain(one.batches, 15, progress=False))]
        return one

    ours = run(Run)
    assert_equal(ours, run(plain))
    assert ours.line(WEIGHTS).startswith("weight step: 2 graphs")


def test_callbacks_may_change_modes_and_weights_between_steps() -> None:
    def run(make: Callable[..., Run]) -> Run:
        one = make()

        def change(tuner: hvp.Tuner, record: hvp.Record) -> None:
            one.module.train(record.hyper_step < 3)
            tuner.weights[0].data.mul_(0.9)
            if record.hyper_step == 4:
                one.module[0].weight.data = one.module[0].weight.data.clone()  # other memory

        return one.fit(8, callbacks=[change])

    ours = run(Run)
    assert_equal(ours, run(plain))
    assert ours.line(GRADIENT).startswith("training gradient: 3 graphs")


def test_a_hook_that_comes_later_is_called() -> None:
    ours, calls = Run().steps(8), []
    ours.tuner.weight_optimizer.register_step_post_hook(lambda *_: calls.append(1))
    assert_equal(ours.steps(8), plain().steps(16))
    assert len(calls) == 8 and "Adam has hooks, which a graph would not call" in ours.line(WEIGHTS)


def test_an_optimizer_that_asks_for_losses_gets_replayed_ones() -> None:
    options = {"weight_optimizer": lambda tensors: torch.optim.LBFGS(tensors, lr=0.1, max_iter=3)}
    ours, theirs = Run(**options).steps(6), plain(**options).steps(6)
    assert_equal(ours, theirs)
    assert "LBFGS evaluates the loss in the middle of its step" in ours.line(WEIGHTS)
    assert ours.line(GRADIENT).startswith("training gradient: 1 graphs")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", ["adam", "descent", "a rate that changes"])
def test_graphs_of_a_gpu_give_the_same_numbers(name: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {"device": "cuda"}
    if name == "descent":
        options["weight_optimizer"] = sgd(momentum=0.9)
    elif name == "a rate that changes":
        options["weight_optimizer"] = lambda tensors: torch.optim.SGD(
            tensors, lr=torch.tensor(0.1, device="cuda"), fused=True
        )
        options["weight_scheduler"] = lambda optimizer: LinearLR(optimizer, total_iters=20)
    with hvp.use_backend("auto"):
        ours, theirs = Run("cudagraph", **options).fit(6), Run(HypergradientsOnly(), **options).fit(6)
        torch.testing.assert_close(ours.result(), theirs.result(), rtol=1e-3, atol=1e-4)
        report = ours.tuner.report()
        assert [" 1 graphs" in ours.line(part) for part in (GRADIENT, WEIGHTS, HYPER)] == [True] * 3, report
        Run("cudagraph", **options).fit(3, checkpoint=tmp_path / "run.pt")
        resumed = Run("cudagraph", **options).fit(6, checkpoint=tmp_path / "run.pt")
    torch.testing.assert_close(resumed.tuner.weights, ours.tuner.weights, rtol=1e-3, atol=1e-4)
    assert not torch.cuda.is_current_stream_capturing()
