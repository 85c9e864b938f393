"""Training and hyper steps as recordings, on a CPU by recorded calls: the same numbers, bit for bit, as without."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from recorder_on_cpu import CallRecorder, FailingRecorder, OutOfMemory
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim.lr_scheduler import LinearLR, StepLR

import hvp_engine as hvp
from hvp_engine._support.random_state import RandomState
from hvp_engine.engines.cudagraph import CudaGraphEngine
from hvp_engine.engines.eager import EagerEngine
from hvp_engine.engines.replays import Counted, Tally
from hvp_engine.tuning.replayed import Replayed

pytestmark = pytest.mark.filterwarnings("ignore:the weights are far from a minimum")
Loss = Callable[[Any, Any, Any], Tensor]


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Torch's capturable optimizers ask for a GPU, and recorded calls for operations that torch dispatches."""
    for optimizer in ("adam", "rmsprop"):
        module = importlib.import_module(f"torch.optim.{optimizer}")
        monkeypatch.setattr(module, "_get_capturable_supported_devices", lambda supports_xla=True: ["cpu", "cuda"])
    with hvp.use_backend("reference"):
        yield


class HypergradientsOnly(CudaGraphEngine):
    """Steps are not recorded."""

    def recorder(self, device: torch.device) -> None:
        return None


class StepsOnly(EagerEngine):
    """Steps are recorded, and hypergradients are eager's."""

    def __init__(self, recorder: type[CallRecorder] = CallRecorder):
        super().__init__()
        self._recorder = recorder

    def recorder(self, device: torch.device) -> Counted:
        return Counted(self._recorder(device), Tally())


def adam(**options: Any) -> Callable[[Any], torch.optim.Optimizer]:
    return lambda tensors: torch.optim.Adam(tensors, **{"lr": 0.05, "capturable": True, **options})


def sgd(lr: float | Tensor = 0.05, **options: Any) -> Callable[[Any], torch.optim.Optimizer]:
    return lambda tensors: torch.optim.SGD(tensors, lr=lr, **options)


def rmsprop(tensors: Any) -> torch.optim.Optimizer:
    return torch.optim.RMSprop(tensors, lr=0.05, momentum=0.5, capturable=True)


class Run:
    """Everything that a step may move: dropout, statistics of batches, momenta, clipping, bounds, accumulation."""

    def __init__(
        self,
        engine: Any = None,
        around: Callable[[Loss], Loss] = lambda loss: loss,
        device: str = "cpu",
        **options: Any,
    ):
        torch.manual_seed(0)
        layers = nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Dropout(0.2), nn.Linear(6, 2)
        self.module = nn.Sequential(*layers).to(device)
        net = hvp.functional(self.module)
        hyper = {name: torch.full_like(weight, -4.0) for name, weight in self.module.named_parameters()}

        def val_loss(weights: dict[str, Tensor], hyper: dict[str, Tensor], batch: list[Tensor]) -> Tensor:
            return cross_entropy(net(weights, batch[0]), batch[1])

        def train_loss(weights: dict[str, Tensor], hyper: dict[str, Tensor], batch: list[Tensor]) -> Tensor:
            decay = sum((hyper[name].exp() * weight.square()).sum() for name, weight in weights.items())
            return val_loss(weights, hyper, batch) + decay / 2

        settings = {
            "weight_optimizer": adam(), "hyper_optimizer": rmsprop, "inner_steps": 4, "accumulate": 2,
            "weight_clip": 0.5, "bounds": (-5.0, 1.0), "warmup_steps": 3,
        } | options  # fmt: skip
        loss, engine = around(train_loss), StepsOnly() if engine is None else engine
        estimator = hvp.Hypergradient(loss, val_loss, hvp.Neumann(3, 0.01), engine)
        self.tuner = hvp.Tuner(self.module, hyper, loss, val_loss, estimator=estimator, **settings)
        points = torch.randn(32, 4, generator=torch.Generator().manual_seed(1)).to(device)
        self.batches = [[points[k : k + 8], (points[k : k + 8, 0] > 0).long()] for k in range(0, 32, 8)]
        self.losses: list[Tensor] = []
        torch.manual_seed(1)
        self.random = RandomState.now(self.tuner.device)

    def steps(self, count: int, before: Callable[[int], Any] = lambda number: None) -> Run:
        """Training steps, with something before each."""
        self.random.restore(self.tuner.device)
        for number in range(count):
            before(number)
            self.losses.append(self.tuner.train_step(*self.batches[:2]))
        self.random = RandomState.now(self.tuner.device)
        return self

    def fit(self, hyper_steps: int = 5, **options: Any) -> Run:
        self.random.restore(self.tuner.device)
        self.tuner.fit(self.batches, self.batches, hyper_steps, progress=False, **options)
        self.random = RandomState.now(self.tuner.device)
        return self

    def result(self) -> dict[str, Any]:
        tuner = self.tuner
        optimizers = tuner.weight_optimizer, tuner.hyper_optimizer
        leaves = [leaf for optimizer in optimizers for entry in optimizer.state.values() for leaf in entry.values()]
        state = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        found = {"weights": tuner.weights, "hyper": tuner.hyper, "state": state}
        found |= {"generators": [self.random.cpu, self.random.cuda]}
        return found | tuner.buffers() | {"losses": self.losses, "rates": [r.val_loss for r in tuner.history]}

    def line(self, name: str) -> str:
        return next(line for line in self.tuner.report().splitlines() if line.startswith(name))


def plain(**options: Any) -> Run:
    return Run("eager", **options)


def assert_equal(ours: Run, theirs: Run) -> None:
    torch.testing.assert_close(ours.result(), theirs.result(), rtol=0, atol=0)


GRADIENT, WEIGHTS, HYPER = "training gradient: ", "weight step: ", "hyper step: "

# --- the same numbers -----------------------------------------------------------------------------------------------


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


# --- what cannot be recorded ----------------------------------------------------------------------------------------


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
