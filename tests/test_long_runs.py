"""Many hypergradients, with retraces, losses that raise and solves that diverge: memory stays as it is."""

from __future__ import annotations

import gc
import os
from typing import Any

import pytest
import torch
from torch import Tensor

import hvp_engine as hvp

pytestmark = pytest.mark.filterwarnings("ignore")
SIZE = 2000
"""Of the largest weight: what is left behind is seen."""


class Run:
    """Hypergradients of a small network: the batch's size changes at every call, each seventh raises, each eleventh
    diverges."""

    def __init__(self, style: str):
        self.style, self.calls, self.raises = style, 0, False
        self.weights = [torch.linspace(-1, 1, 3 * SIZE).reshape(3, SIZE) / SIZE, torch.linspace(0, 1, SIZE)]
        self.hyper = torch.tensor(-1.0)
        engine = "eager" if style == "tape" else style
        self.good, self.bad = (
            hvp.Hypergradient(self.train, self.val, hvp.Neumann(4, alpha), engine) for alpha in (0.1, 1e12)
        )

    def let_go(self) -> None:
        """Of the memory that settled calls keep, which is bounded by itself."""
        self.good._wholes = self.bad._wholes = ()

    def train(self, w: list[Tensor], h: Tensor, batch: Tensor) -> Tensor:
        return (torch.tanh(batch @ w[0]) - w[1]).square().mean() + h.exp() * w[0].square().sum()

    def val(self, w: list[Tensor], h: Tensor, batch: Tensor) -> Tensor:
        value = (torch.tanh(batch @ w[0]) - w[1] + 0.1).square().mean()
        if self.raises:
            raise KeyError("from the loss")
        return value

    def call(self) -> None:
        self.calls += 1
        self.raises = self.calls % 7 == 0
        diverges = self.calls % 11 == 0
        batch = torch.ones(7 if self.raises else 4 + self.calls % 3, 3)  # a shape of which there is no program
        function = self.recorded if self.style == "tape" else self.bad if diverges else self.good
        if self.raises:
            with pytest.raises(KeyError):
                function(self.weights, self.hyper, batch, batch)
        elif diverges:
            with pytest.raises(hvp.DivergenceError):
                function(self.weights, self.hyper, batch, batch)
        else:
            function(self.weights, self.hyper, batch, batch)

    def recorded(self, weights: list[Tensor], hyper: Tensor, batch: Tensor, _: Any) -> object:
        w, h = [weight.clone().requires_grad_() for weight in weights], hyper.clone().requires_grad_()
        solver = hvp.Neumann(4, 1e12 if self.calls % 11 == 0 else 0.1)
        return hvp.hypergradient(self.train(w, h, batch), self.val(w, h, batch), w, h, solver)


def live_bytes() -> int:
    """Of the tensors that the collector knows, after a collection."""
    gc.collect()
    storages = {}
    for item in gc.get_objects():
        if isinstance(item, Tensor) and type(item) in (Tensor, torch.nn.Parameter) and item.layout is torch.strided:
            storage = item.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def resident_bytes() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def growth(run: Run, calls: int) -> tuple[int, int]:
    """Of live and of resident bytes over the last three quarters of the calls."""
    for _ in range(calls // 4):
        run.call()
    run.let_go()
    live, resident = live_bytes(), resident_bytes()
    for _ in range(calls - calls // 4):
        run.call()
    run.let_go()
    return live_bytes() - live, resident_bytes() - resident


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="resident memory is read from /proc")
@pytest.mark.parametrize("calls", [200, pytest.param(2000, marks=pytest.mark.soak)])
@pytest.mark.parametrize("style", ["tape", "eager", "linearized", "auto"])
def test_memory_stays_flat(style: str, calls: int) -> None:
    """A weight is 24 kB, so that one left behind by each call would be 3.6 MB in 200 calls, 36 MB in 2,000; and in a
    quarter of the calls every shape has come twice, with all its programs."""
    live, resident = growth(Run(style), calls)
    assert live <= 4 * 3 * SIZE
    assert resident <= 16 << 20
