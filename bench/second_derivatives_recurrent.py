"""Recurrent layers: gradients and Hessian-vector products beside torch's own kernels, and a hyper step on a text."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

import hvp_engine as hvp
from bench.methods import settle
from examples import ptb_tuning
from examples.datasets import Text
from hvp_engine._support.torch_compat import without_onednn
from hvp_engine.differentiation.differentiable_kernels import plain_kernels

SIZES = {"LSTM": (nn.LSTM, (20, 10, 64), (70, 20, 128), (70, 20, 256)), "GRU": (nn.GRU, (20, 10, 64), (70, 20, 128))}
"""Layers, and their (times, sequences, units)."""

_WARM_UP, _ROUNDS = 3, 7

Kernels = Callable[[], AbstractContextManager[None]]

KERNELS: dict[str, Kernels] = {
    "torch, without oneDNN": without_onednn,
    "hvp_engine": plain_kernels,
    "torch": contextlib.nullcontext,
}
"""The first is all that torch has for second derivatives; the last for first ones alone."""


def measure(quick: bool) -> Iterator[Mapping[str, Any]]:
    """CPU seconds of gradients and products of a layer, of a hyper step beside a training step, and relative errors of
    the products."""
    for kind, (layer, *sizes) in SIZES.items():
        for size in sizes[:1] if quick else sizes:
            yield from _layer(kind, layer, size)
    yield from _hyper_step()


def _rows(
    what: str, case: str, calls: Mapping[str, Callable[[], object]], errors: Mapping[str, float] | None = None
) -> Iterator[Mapping[str, Any]]:
    for method, samples in _timed(calls).items():
        error = (errors or {}).get(method, "")
        yield {"what": what, "case": case, "method": method, "seconds": median(samples), "error": error}


def _layer(
    kind: str, layer: Callable[[int, int], nn.RNNBase], size: tuple[int, int, int]
) -> Iterator[Mapping[str, Any]]:
    torch.manual_seed(0)
    times, sequences, units = size
    rnn, x = layer(units, units), torch.randn(times, sequences, units)
    wide, y = layer(units, units).double(), x.double()
    wide.load_state_dict({name: w.double() for name, w in rnn.state_dict().items()})
    tangents = [torch.randn_like(w) for w in rnn.parameters()]

    def gradient(rnn: nn.RNNBase, x: Tensor, kernels: Kernels, create_graph: bool) -> tuple[Tensor, ...]:
        with kernels():
            loss = rnn(x)[0].square().mean()
            return torch.autograd.grad(loss, list(rnn.parameters()), create_graph=create_graph)

    def product(graph: tuple[Tensor, ...], rnn: nn.RNNBase, tangents: list[Tensor]) -> Tensor:
        parts = torch.autograd.grad(graph, list(rnn.parameters()), tangents, retain_graph=True)
        return torch.cat([part.flatten() for part in parts])

    exact = product(gradient(wide, y, without_onednn, True), wide, [tangent.double() for tangent in tangents])
    graphs = {name: gradient(rnn, x, kernels, True) for name, kernels in KERNELS.items() if name != "torch"}
    products = {name: partial(product, graph, rnn, tangents) for name, graph in graphs.items()}
    errors = {name: float((call().double() - exact).norm() / exact.norm()) for name, call in products.items()}
    case = f"{kind}, {times} times, {sequences} sequences, {units} units"
    yield from _rows(
        "gradient", case, {name: partial(gradient, rnn, x, kernels, False) for name, kernels in KERNELS.items()}
    )
    yield from _rows("product", case, products, errors)


def _hyper_step() -> Iterator[Mapping[str, Any]]:
    """A training step with torch's fused layers, and a hypergradient without products, of examples/ptb_tuning.py."""
    settings = ptb_tuning.EXPERIMENT.sizes["small"]
    torch.manual_seed(0)
    count = settings.rows * (8 * settings.time + 1)
    words = [torch.randint(settings.words, (count,)) for _ in range(3)]
    problem = settings.problem(Text(*words, tuple(map(str, range(settings.words)))), torch.device("cpu"))
    weights = dict(problem.module.named_parameters())
    optimizer = torch.optim.SGD(weights.values(), lr=1e-3)
    hyper = {name: tensor.requires_grad_() for name, tensor in problem.seven.items()}

    def train() -> None:
        optimizer.zero_grad()
        problem.train_loss(weights, hyper, problem.train[0]).backward(inputs=list(weights.values()))
        optimizer.step()

    calls: dict[str, Callable[[], object]] = {"training step": train}
    for engine in ("eager", "linearized", "auto"):
        estimate = hvp.Hypergradient(problem.train_loss, problem.val_loss, solver=hvp.Identity(), engine=engine)
        call = partial(estimate, weights, hyper, problem.train[0], problem.validation[0])
        call()
        settle({engine: estimate.engine}, lambda terms, call=call: call())
        calls[f"hvp_engine {engine}"] = call
    yield from _rows("hyper step", f"text, {settings.layers} layers of {settings.units} units", calls)


def _timed(calls: Mapping[str, Callable[[], object]]) -> dict[str, list[float]]:
    """CPU seconds of each, in turns."""
    for call in calls.values():
        for _ in range(_WARM_UP):
            call()
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(_ROUNDS):
        for name, call in calls.items():
            before = time.process_time()
            call()
            samples[name].append(time.process_time() - before)
    return samples
