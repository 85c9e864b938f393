"""Losses that write into tensors (buffers in part, views, `out=`, statistics): traced, they are as eager runs them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import hvp_engine as hvp
from hvp_engine.engines.traced import LinearizedEngine

DTYPE = torch.float64
pytestmark = pytest.mark.filterwarnings("ignore:the weights are far from a minimum")


class Memory(nn.Module):
    """Keeps some activations in a buffer, and reads it back; `write` does the keeping."""

    def __init__(self, write: Callable[[Tensor, Tensor], None]):
        super().__init__()
        self.linear, self.write = nn.Linear(6, 4), write
        self.register_buffer("memory", torch.arange(20.0).view(5, 4))

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.linear(x))
        self.write(self.memory, hidden)
        return hidden * self.memory.sum(0) / 10 + hidden


def slices(memory: Tensor, hidden: Tensor) -> None:
    memory[1:3] = hidden[:2]


def detached(memory: Tensor, hidden: Tensor) -> None:
    memory[1:3] = hidden[:2].detach()
    memory[0].add_(1.0)


def view(memory: Tensor, hidden: Tensor) -> None:
    memory.view(-1)[:4].mul_(hidden.mean())
    memory.t()[2].copy_(hidden[:5, 2])


def out(memory: Tensor, hidden: Tensor) -> None:
    torch.mul(hidden[:5].detach(), 2.0, out=memory)


def instance_norm() -> nn.Module:
    norm = nn.InstanceNorm1d(2, affine=True, track_running_stats=True)
    return nn.Sequential(nn.Unflatten(1, (2, 3)), norm, nn.Flatten(), nn.Linear(6, 4))


def normalized(by: Callable[[nn.Module], nn.Module]) -> nn.Module:
    return nn.Sequential(by(nn.Linear(6, 4)), nn.Tanh(), nn.Linear(4, 4))


MODULES: dict[str, Callable[[], nn.Module]] = {
    "slice assignment": lambda: Memory(slices),
    "detached": lambda: Memory(detached),
    "views": lambda: Memory(view),
    "out=": lambda: Memory(out),
    "instance norm with statistics": instance_norm,
    "spectral norm": lambda: normalized(nn.utils.spectral_norm),
    "parametrized spectral norm": lambda: normalized(nn.utils.parametrizations.spectral_norm),
}


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("name", MODULES)
def test_traced_as_eager(name: str, training: bool) -> None:
    torch.manual_seed(0)
    module = MODULES[name]().to(DTYPE).train(training)
    net, x, y = hvp.functional(module), torch.randn(7, 6, dtype=DTYPE), torch.randint(4, (7,))
    weights = {key: parameter.detach().clone() for key, parameter in module.named_parameters()}

    def train(weights: dict[str, Tensor], hyper: Tensor, batch: Any) -> Tensor:
        return F.cross_entropy(net(weights, x), y) + hyper.exp() * sum(w.square().sum() for w in weights.values())

    def val(weights: dict[str, Tensor], hyper: Tensor, batch: Any) -> Tensor:
        return F.cross_entropy(net(weights, x), y)

    ours, theirs = (
        hvp.Hypergradient(train, val, hvp.Neumann(4, 0.05), engine=engine) for engine in ("linearized", "eager")
    )
    assert isinstance(ours.engine, LinearizedEngine)
    hyper = torch.tensor(-3.0, dtype=DTYPE)
    for scale in (1.0, 0.7):
        here = {key: scale * weight for key, weight in weights.items()}
        for buffer in filter(torch.is_floating_point, module.buffers()):
            buffer.mul_(scale)  # read by reference
        kept = [buffer.clone() for buffer in module.buffers()]
        found, expected = ours(here, hyper, None, None), theirs(here, hyper, None, None)
        torch.testing.assert_close(found.grads, expected.grads, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(found.solution.value, expected.solution.value, rtol=1e-9, atol=1e-12)
        assert all(map(torch.equal, module.buffers(), kept))
    assert ours.engine.traces == 1
    assert not any(functions.distrust for functions in ours.engine._cache.values())


@pytest.mark.parametrize("engine", ["linearized", "compiled"])
def test_a_change_of_a_tensor_from_outside_is_refused(engine: str) -> None:
    log = torch.zeros(2, 3, dtype=DTYPE)

    def train(w: Tensor, h: Tensor, batch: Any) -> Tensor:
        log[0] = w.detach()
        return w.pow(4).sum() * h + log.sum()

    w, h = torch.ones(3, dtype=DTYPE), torch.tensor(1.0, dtype=DTYPE)
    with pytest.raises(hvp.TraceError, match="engine='eager'"):
        hvp.Hypergradient(train, lambda w, h, b: w.sum(), hvp.Neumann(2, 0.01), engine)(w, h, None, None)
    automatic = hvp.Hypergradient(train, lambda w, h, b: w.sum(), hvp.Neumann(2, 0.01), "auto")
    eager = hvp.Hypergradient(train, lambda w, h, b: w.sum(), hvp.Neumann(2, 0.01), "eager")
    expected = eager(w, h, None, None)
    torch.testing.assert_close(automatic(w, h, None, None).grads, expected.grads)
    assert "eager: the loss cannot be traced: TraceError" in automatic.report()
