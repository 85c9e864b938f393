"""Calls that take losses: hypergradients, responses, influences, checks, tuning."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from call_descriptions import Call, Prepare, failing
from callers_state import DTYPE, Caller
from torch import Tensor
from torch.nn.functional import cross_entropy

import hvp_engine as hvp


def of_functions(engine: str, alpha: float = 0.05, hyper: Any = None) -> Prepare:
    def prepare(caller: Caller) -> Callable[[], object]:
        caller.traced = engine in ("linearized", "compiled")
        hypergradient = hvp.Hypergradient(caller.train_loss, caller.val_loss, hvp.Neumann(4, alpha), engine)
        return lambda: hypergradient(caller.module, caller.hyper if hyper is None else hyper, caller.x, caller.x)

    return prepare


def of_engine(engine: str) -> list[Call]:
    return [
        *failing(of_functions(engine), 1, 2),
        Call(of_functions(engine, alpha=1e9), hvp.DivergenceError),
    ]


def hypergradients() -> list[Call]:
    calls = [call for engine in ("eager", "linearized", "finite_difference", "auto") for call in of_engine(engine)]
    return [
        *calls,
        Call(of_functions("eager", hyper="nothing"), TypeError),
        Call(of_functions("finite_difference"), KeyError, 5),
    ]


def of_tensors(
    function: Callable[..., object], alpha: float = 0.05, graph: bool = True, weights: Any = None
) -> Prepare:
    """A call with losses that are already computed."""

    def prepare(caller: Caller) -> Callable[[], object]:
        tensors = list(caller.weights.values())
        train = caller.train_loss(caller.weights, caller.hyper, caller.x)
        val = caller.val_loss(caller.weights, caller.hyper, caller.x)
        train = train if graph else train.detach()
        solver = hvp.Neumann(4, alpha)
        if function is hvp.approx_inverse_hvp:
            return lambda: function([torch.ones_like(t) for t in tensors], train, weights or tensors, 4, alpha)
        losses = (train,) if function is hvp.best_response else (train, val)
        return lambda: function(*losses, weights or tensors, caller.hyper, solver)

    return prepare


def backward_of_response(alpha: float, caller: Caller) -> Callable[[], object]:
    train = caller.train_loss(caller.weights, caller.hyper, caller.x)
    response = hvp.best_response(train, list(caller.weights.values()), caller.hyper, hvp.Neumann(4, alpha))
    value = caller.val_loss(dict(zip(caller.weights, response, strict=True)), caller.hyper, caller.x)
    return value.backward


def tape(function: Callable[..., object]) -> list[Call]:
    return [
        Call(of_tensors(function)),
        Call(of_tensors(function, graph=False), hvp.GraphError),
        Call(of_tensors(function, weights=["nothing"]), TypeError),
    ]


def fixed_point(matrix: float, caller: Caller) -> Callable[[], object]:
    def phi(w: Tensor, h: Tensor, batch: Any) -> Tensor:
        caller.counted()
        return matrix * w + h + torch.rand((), dtype=DTYPE)

    hypergradient = hvp.FixedPointHypergradient(phi, lambda w, h, batch: w.sum(), hvp.Neumann(60))
    return lambda: hypergradient(caller.x[0], caller.hyper, None, None)


def influence(caller: Caller) -> Callable[[], object]:
    def loss(w: Tensor, batch: Tensor) -> Tensor:
        caller.counted()
        return ((w - batch) ** 2).mean() / 2 + 0.0 * torch.rand((), dtype=DTYPE)

    w = caller.x.mean(0)

    def call() -> object:
        operator = hvp.HessianOperator(loss, w, caller.x, engine="eager")
        return hvp.influence_matrix(operator, loss, loss, w, caller.x, caller.x[:2])

    return call


def leaving_out(caller: Caller) -> Callable[[], object]:
    found: Any = influence(caller)()
    return lambda: (found.of_leaving_out(), found)[-1]


def response(caller: Caller) -> Callable[[], object]:
    stacked = {name: torch.ones((2, *weight.shape), dtype=DTYPE) for name, weight in caller.weights.items()}
    return lambda: hvp.response_jacobian(
        caller.train_loss, caller.weights, caller.hyper, caller.x, stacked, hvp.Neumann(3, 0.05), engine="eager"
    )


def checked(caller: Caller) -> Callable[[], object]:
    caller.module.eval()

    def train(w: dict[str, Tensor], h: Tensor, batch: Tensor) -> Tensor:
        caller.counted()
        decay = sum(weight.square().sum() for weight in w.values())
        return cross_entropy(caller.net(w, batch * h.exp()), caller.y) + decay

    val = lambda w, h, batch: cross_entropy(caller.net(w, batch), caller.y)  # noqa: E731
    return lambda: hvp.check(
        train, val, caller.weights, caller.hyper, (caller.x, caller.x), solver=hvp.Neumann(40), directions=1
    )


def verdict(caller: Caller) -> Callable[[], object]:
    found: Callable[[], Any] = checked(caller)
    return lambda: found().verdict


TRAINING = frozenset({"weights", "weights' versions", "hyper", "buffers", "optimizer", "random numbers"})
"""What training is for; of the random numbers those that the caller's own losses draw."""


def tuner(caller: Caller, alpha: float = 0.05) -> hvp.Tuner:
    return hvp.Tuner(
        caller.module,
        caller.hyper,
        caller.train_loss,
        caller.val_loss,
        weight_optimizer=lambda tensors: torch.optim.Adam(tensors, lr=1e-3),
        hyper_optimizer=lambda tensors: torch.optim.Adam(tensors, lr=1e-3),
        solver=hvp.Neumann(3, alpha),
        inner_steps=2,
        engine="eager",
    )


def tuned(caller: Caller, pick: Callable[[hvp.History], object] = lambda history: history) -> Callable[[], object]:
    mine = tuner(caller)
    path = Path(caller.cleanup.enter_context(tempfile.TemporaryDirectory())) / "run.pt"
    return lambda: pick(mine.fit([caller.x], [caller.x], 3, progress=False, checkpoint=path))


def resumed_from_junk(caller: Caller) -> Callable[[], object]:
    path = Path(caller.cleanup.enter_context(tempfile.TemporaryDirectory())) / "run.pt"
    path.write_bytes(b"junk")
    mine = tuner(caller)
    return lambda: mine.load(path)
