"""Steps that cannot be recorded, and recordings that fail or turn out wrong: a run has the numbers of one without."""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import numpy
import pytest
import torch
from recorder_on_cpu import CallRecorder, FailingRecorder, OutOfMemory
from replayed_runs import (  # noqa: F401  the fixture is used by itself
    GRADIENT,
    HYPER,
    WEIGHTS,
    Loss,
    Run,
    StepsOnly,
    adam,
    as_on_a_gpu,
    assert_equal,
    plain,
    sgd,
)
from torch import Tensor, nn
from torch.optim.lr_scheduler import LinearLR, StepLR

import hvp_engine as hvp
from hvp_engine.tuning.replayed import Replayed

pytestmark = pytest.mark.filterwarnings("ignore:the weights are far from a minimum")


@pytest.mark.parametrize(
    ("optimizer", "reason"),
    [
        (adam(capturable=False), "Adam was made with capturable=False: pass capturable=True"),
        (lambda tensors: torch.optim.Adagrad(tensors, lr=0.05), "_local_scalar_dense"),
        (sgd(torch.tensor(0.05), foreach=False), "_local_scalar_dense"),
        (lambda tensors: torch.optim.SGD([*tensors, torch.zeros(2)], lr=0.05), "SGD moves other tensors, too"),
        (lambda tensors: Own(tensors, lr=0.05), "Own is not one of torch's optimizers"),
    ],
)
def test_optimizers_that_cannot_be_recorded(optimizer: Any, reason: str) -> None:
    ours, theirs = Run(weight_optimizer=optimizer).steps(8), plain(weight_optimizer=optimizer).steps(8)
    assert_equal(ours, theirs)
    assert ours.line(WEIGHTS).startswith("weight step: 0 graphs") and reason in ours.line(WEIGHTS)
    assert ours.line(GRADIENT) == "training gradient: 1 graphs, 5 replays"


def test_a_state_that_is_no_tensor_is_not_baked_in() -> None:
    ours = Run(weight_optimizer=sgd())
    ours.tuner.weight_optimizer.state[ours.tuner.weights[0]]["count"] = 3
    ours.steps(5)
    assert ours.line(WEIGHTS).startswith("weight step: 0 graphs") and "its count is no tensor" in ours.line(WEIGHTS)


def test_sparse_gradients_are_left_alone() -> None:
    def loss(weights: Tensor, hyper: Tensor, batch: Tensor) -> Tensor:
        return nn.functional.embedding(batch, weights, sparse=True).square().sum() * hyper.exp()

    runs = [Small(engine, loss, torch.ones(4, 2), sgd(0.1)) for engine in (StepsOnly(), "eager")]
    for one in runs:
        for _ in range(6):
            one.tuner.train_step(torch.tensor([0, 2]))
    assert torch.equal(runs[0].weights, runs[1].weights)
    assert runs[0].tuner.report().count("since gradients are sparse") == 2


class Own(torch.optim.SGD):
    """An optimizer that could do anything."""


def test_a_number_that_changes_at_every_step_costs_no_recordings() -> None:
    options = {"weight_scheduler": lambda optimizer: LinearLR(optimizer, total_iters=100)}
    ours, theirs = Run(**options).steps(20), plain(**options).steps(20)
    assert_equal(ours, theirs)
    assert ours.line(WEIGHTS).startswith("weight step: 0 graphs, 0 replays; otherwise without, since lr changed")


def test_recordings_that_do_not_last_are_given_up() -> None:
    options = {"weight_scheduler": lambda optimizer: StepLR(optimizer, 5, 0.9)}
    ours, theirs = Run(**options).steps(60), plain(**options).steps(60)
    assert_equal(ours, theirs)
    assert ours.line(WEIGHTS).startswith("weight step: 3 graphs")


SPARSE = torch.eye(8).to_sparse()
LAST: ContextVar[Tensor] = ContextVar("last")


def renewing(loss: Loss) -> Loss:
    """It takes what it has put where no look at its variables sees it."""
    LAST.set(torch.ones(3))

    def own(w: Any, h: Any, b: Any) -> Tensor:
        value = loss(w, h, b) * LAST.get().mean()
        LAST.set(torch.ones(3))
        return value

    return own


ELSEWHERE = torch.ones(2, device="meta")
SCALE = ContextVar("scale", default=1.0)


class Counter:
    def __init__(self, loss: Loss):
        self.loss, self.calls = loss, 0

    def __call__(self, weights: Any, hyper: Any, batch: Any) -> Tensor:
        self.calls += 1
        return self.loss(weights, hyper, batch) / self.calls


LOSSES: dict[str, tuple[Callable[[Loss], Loss], str]] = {
    "reads a value": (lambda loss: lambda w, h, b: loss(w, h, b) * (1 + b[0].sum().item()), "_local_scalar_dense"),
    "counts": (Counter, "the loss reads Counter.calls, which changes"),
    "draws on the host": (lambda loss: lambda w, h, b: loss(w, h, b) * numpy.random.rand(), "draws random numbers"),
    "reads what is elsewhere": (lambda loss: lambda w, h, b: loss(w, h, b) + 0 * len(ELSEWHERE + 1), "tensor on meta"),
    "reads what is sparse": (lambda loss: lambda w, h, b: loss(w, h, [SPARSE @ b[0], b[1]]), "made of several tensors"),
    "reads something new": (renewing, "the loss reads other tensors every time"),
    "changes its batch": (lambda loss: lambda w, h, b: loss(w, h, [b[0].mul_(0.9), b[1]]), "changes a tensor that it"),
}


@pytest.mark.parametrize("name", LOSSES)
def test_losses_that_cannot_be_recorded(name: str) -> None:
    around, reason = LOSSES[name]

    def run(make: Callable[..., Run]) -> Run:
        numpy.random.seed(0)
        return make(around=around).steps(10)

    ours = run(Run)
    assert_equal(ours, run(plain))
    assert ours.line(GRADIENT).startswith("training gradient: 0 graphs, 0 replays") and reason in ours.line(GRADIENT)
    assert "1 graphs" in ours.line(WEIGHTS)


def test_what_a_loss_changes_in_place_is_changed_once() -> None:
    """Statistics that belong to no module: their kernel does not tell that it has changed them."""

    def run(make: Callable[..., Run]) -> tuple[Run, Tensor]:
        statistics, count = (torch.zeros(4), torch.ones(4)), torch.zeros(())

        def around(loss: Loss) -> Loss:
            def own(w: Any, h: Any, b: Any) -> Tensor:
                count.add_(1)
                normal = nn.functional.batch_norm(b[0], *statistics, training=True)
                return loss(w, h, [normal, b[1]]) * (1 + 1 / count)

            return own

        one = make(around=around, accumulate=1).steps(15)
        return one, torch.cat([*statistics, count[None]])

    (ours, changed), (theirs, expected) = run(Run), run(plain)
    assert_equal(ours, theirs)
    assert torch.equal(changed, expected) and int(changed[-1]) == 30
    assert ours.line(GRADIENT).endswith("1 graphs, 12 replays")


def test_a_loss_that_changes_unseen_is_found_out() -> None:
    def run(make: Callable[..., Run]) -> Run:
        one = make(around=lambda loss: lambda w, h, b: SCALE.get() * loss(w, h, b))
        token = SCALE.set(1.0)
        try:
            return one.steps(30, lambda number: SCALE.set(1.0 if number < 12 else 2.0))
        finally:
            SCALE.reset(token)

    with pytest.warns(UserWarning, match="training gradients are not replayed from now on: the loss differs"):
        ours = run(Run)
    assert_equal(ours, run(plain))  # it changes when the tenth replay is checked
    assert ours.line(GRADIENT).endswith("10 replays; otherwise without, since the loss differs")


def test_a_recording_that_fails_costs_no_result(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = plain().fit(4)
    for fails, name in enumerate((GRADIENT, WEIGHTS, HYPER), 1):
        monkeypatch.setattr(FailingRecorder, "fails", fails)
        monkeypatch.setattr(FailingRecorder, "made", 0)
        ours = Run(StepsOnly(FailingRecorder)).fit(4)
        assert_equal(ours, expected)
        assert FailingRecorder.made == 3  # what failed is not tried again
        assert ours.line(name).endswith(f"0 graphs, 0 replays; otherwise without, since recording {fails} failed")


class Forgetful(CallRecorder):
    """Leaves out the last change of what does nothing but change tensors, as the step of an optimizer."""

    def record(self, body: Any) -> Any:
        recording = super().record(body)
        calls = recording._calls.calls
        if not recording.outputs:
            del calls[max(place for place, call in enumerate(calls) if call[0]._schema.is_mutable)]
        return recording


def test_a_step_whose_graph_does_something_else_is_made_without() -> None:
    optimizer = sgd(momentum=0.9)
    ours, theirs = Run(StepsOnly(Forgetful), weight_optimizer=optimizer).steps(8), plain(weight_optimizer=optimizer)
    assert_equal(ours, theirs.steps(8))
    assert "a replay does not give the same" in ours.line(WEIGHTS)


class Small:
    """A problem of a few numbers, for what is tried many times."""

    def __init__(self, engine: Any, loss: Loss | None = None, weights: Any = (0.3, -0.2), optimizer: Any = None):
        self.weights, self.hyper = torch.as_tensor(weights).clone(), torch.zeros(())
        optimizer = sgd(0.1, momentum=0.9) if optimizer is None else optimizer
        given = self.loss if loss is None else loss
        self.tuner = hvp.Tuner(
            self.weights, self.hyper, given, given, weight_optimizer=optimizer, hyper_optimizer=sgd(),
            estimator=hvp.Hypergradient(given, given, hvp.Neumann(2, 0.1), engine), inner_steps=5,
        )  # fmt: skip

    @staticmethod
    def loss(weights: Tensor, hyper: Tensor, batch: Tensor) -> Tensor:
        return (weights.tanh() - batch).square().sum() + hyper.exp() * weights.square().sum()

    def fit(self) -> Small:
        self.tuner.fit([torch.tensor([1.0, 2.0])], [torch.tensor([1.0, 1.5])], 5, progress=False)
        return self


def test_full_memory_while_it_is_recorded_costs_no_result(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever tensor does not fit."""
    expected, record, places = Small("eager").fit(), Replayed._record, set()
    for number in range(1000):
        full = OutOfMemory(number)

        def recorded(*arguments: Any) -> Any:
            with full:  # noqa: B023
                return record(*arguments)

        monkeypatch.setattr(Replayed, "_record", recorded)
        ours = Small(StepsOnly()).fit()
        assert torch.equal(ours.weights, expected.weights) and torch.equal(ours.hyper, expected.hyper)
        if not full.failed:
            break
        places.add(full.failed)
        assert "since OutOfMemoryError: CUDA out of memory in" in ours.tuner.report()
        assert "how to avoid it" not in ours.tuner.report()
    assert number >= 5 and "aten.clone.default" in places


def test_where_a_graph_leaves_no_room_for_its_check_it_is_given_up() -> None:
    full = ContextVar("full", default=0)

    def loss(weights: Tensor, hyper: Tensor, batch: Tensor) -> Tensor:
        if full.get():
            full.set(0)
            raise torch.OutOfMemoryError("CUDA out of memory")
        return Small.loss(weights, hyper, batch)

    ours, theirs = Small(StepsOnly(), loss), Small("eager")
    for number in range(6):
        full.set(number == 3)  # the first replay is checked
        ours.tuner.train_step(torch.tensor([1.0, 2.0])), theirs.tuner.train_step(torch.tensor([1.0, 2.0]))
    assert torch.equal(ours.weights, theirs.weights)
    assert "1 graphs, 0 replays; otherwise without, since OutOfMemoryError: CUDA out of" in ours.tuner.report()


def test_an_error_in_the_middle_of_a_recording_puts_all_back() -> None:
    """Such as an interruption from the keyboard, after which a run is saved and continued."""
    armed = ContextVar("armed", default=-1)

    def loss(weights: Tensor, hyper: Tensor, batch: Tensor) -> Tensor:
        armed.set(armed.get() - 1)
        if armed.get() == 0:
            raise KeyboardInterrupt
        return Small.loss(weights, hyper, batch)

    ours, theirs = Small(StepsOnly(), loss), Small("eager")
    batch = torch.tensor([1.0, 2.0])
    for number in range(8):
        armed.set(3 if number == 2 else -1)  # its second run is the recording's
        if number == 2:
            with pytest.raises(KeyboardInterrupt):
                ours.tuner.train_step(batch)
            armed.set(-1)
            assert torch.equal(ours.weights, theirs.weights)
        ours.tuner.train_step(batch), theirs.tuner.train_step(batch)
    assert torch.equal(ours.weights, theirs.weights)


def test_without_a_gpu_nothing_is_recorded() -> None:
    ours = Run("cudagraph").fit(2)
    assert_equal(ours, plain().fit(2))
    assert "training gradient" not in ours.tuner.report() and "need a CUDA device" in ours.tuner.report()
