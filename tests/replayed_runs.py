"""Runs of a tuner whose steps are recordings, on a CPU by recorded calls, and the same runs without."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from recorder_on_cpu import CallRecorder
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import hvp_engine as hvp
from hvp_engine._support.random_state import RandomState
from hvp_engine.engines.cudagraph import CudaGraphEngine
from hvp_engine.engines.eager import EagerEngine
from hvp_engine.engines.replays import Counted, Tally

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
