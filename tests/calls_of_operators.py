"""Calls of operators, of solvers on them, and of what is built on them."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from callers_state import DTYPE, Caller
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

import hvp_engine as hvp


def hessian(engine: str, caller: Caller) -> Callable[[], object]:
    caller.traced = engine == "linearized"
    return lambda: (
        hvp.HessianOperator(caller.loss_of_weights, caller.weights, caller.x, engine=engine) @ (caller.like_weights())
    )


def compiled(caller: Caller) -> Callable[[], object]:
    """Small, since compiling takes seconds."""
    operator = hvp.HessianOperator(lambda w: w.sin().square().sum(), caller.x, engine="compiled")
    return lambda: operator.solve(caller.x, hvp.Neumann(3, alpha=0.1))


def solved(solver: Any, caller: Caller) -> Callable[[], object]:
    """A solve with an operator of ours, or with a product that raises in the middle."""

    def product(v: Tensor) -> Tensor:
        caller.counted()
        return 2.0 * v

    v = torch.ones(3, dtype=DTYPE)
    if caller.fails_at is not None:
        return lambda: hvp.solve(product, v, solver)
    loss = lambda w: product(w) @ w / 2 + torch.rand((), dtype=DTYPE)  # noqa: E731
    return lambda: hvp.HessianOperator(loss, v, engine="eager").solve(v, solver)


def gauss_newton(caller: Caller) -> Callable[[], object]:
    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        caller.counted()
        return cross_entropy(outputs, targets)

    def call() -> object:
        operator = hvp.GaussNewtonOperator(caller.net, loss, caller.weights, caller.x, caller.y)
        return operator.solve(caller.like_weights(), hvp.ConjugateGradient(3, damping=0.1))

    return call


def linear_model(alpha: float, caller: Caller) -> Callable[[], object]:
    operator = hvp.LinearModelOperator(caller.x, torch.zeros(3, dtype=DTYPE), loss="squared", decay=0.5)
    return lambda: operator.solve(torch.ones(3, dtype=DTYPE), hvp.Neumann(500, alpha))


def stochastic(caller: Caller) -> Callable[[], object]:
    loader = DataLoader(TensorDataset(caller.x), batch_size=7, shuffle=True)

    def call() -> object:
        operator = hvp.StochasticHessianOperator(
            lambda w, batch: caller.loss_of_weights(w, batch[0]), caller.weights, loader, engine="eager"
        )
        return operator.solve(caller.like_weights(), hvp.Neumann(3, alpha=0.01))

    return call


def averaged(caller: Caller) -> Callable[[], object]:
    loss = hvp.Averaged(caller.loss_of_weights)
    return lambda: hvp.HessianOperator(loss, caller.weights, [caller.x, caller.x]) @ caller.like_weights()


def data_parallel(caller: Caller) -> Callable[[], object]:
    one_process(caller)
    hypergradient = hvp.Hypergradient(
        hvp.DataParallel(caller.train_loss), hvp.DataParallel(caller.val_loss), hvp.Neumann(3, 0.05)
    )
    return lambda: hypergradient(caller.module, caller.hyper, caller.x, caller.x)


def one_process(caller: Caller) -> None:
    folder = caller.cleanup.enter_context(tempfile.TemporaryDirectory())
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
    caller.cleanup.callback(dist.destroy_process_group)


def eigenvalues(function: Callable[..., object], caller: Caller) -> Callable[[], object]:
    return lambda: function(hvp.HessianOperator(caller.loss_of_weights, caller.weights, caller.x, engine="eager"))


def density(caller: Caller) -> Callable[[], object]:
    operator = hvp.HessianOperator(caller.loss_of_weights, caller.weights, caller.x, engine="eager")
    found = hvp.spectral_density(operator, probes=2, steps=3)
    return lambda: (found(torch.linspace(0, 1, 3)), found.mean(), found)[-1]


def preconditioner(make: Callable[[Caller, Any], Any], caller: Caller) -> Callable[[], object]:
    def call() -> object:
        operator = hvp.HessianOperator(caller.loss_of_weights, caller.weights, caller.x, engine="eager")
        solver = hvp.ConjugateGradient(3, damping=0.1, preconditioner=make(caller, operator))
        return operator.solve(caller.like_weights(), solver)

    return call


def of_layers(make: Callable[..., Any], caller: Caller) -> Callable[[], object]:
    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        caller.counted()
        return cross_entropy(outputs, targets)

    module = nn.Sequential(caller.module[0], nn.Tanh(), caller.module[4])
    weights = {name: p for name, p in module.named_parameters() if p.requires_grad}
    return lambda: make(module, loss, weights, caller.x, caller.y, 0.1)(
        [torch.ones_like(weight) for weight in weights.values()]
    )
