"""A call, or several, of everything public, that works and where it makes sense one that fails in the middle.

Each is prepared from a :class:`caller.Caller`; only what is prepared is the call.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from caller import DTYPE, Caller
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

import hvp_engine as hvp
from hvp_engine.datasets import mnist

Prepare = Callable[[Caller], Callable[[], object]]


@dataclass(frozen=True)
class Call:
    """A call.

    Attributes:
        prepare: makes the call; not part of it.
        error: what the call raises.
        fails_at: the evaluation of a loss that raises.
        returns: what the call returns an instance of.
        changes: what of the snapshot it is for the call to change.
    """

    prepare: Prepare
    error: type[BaseException] | None = None
    fails_at: int | None = None
    returns: type = object
    changes: frozenset[str] = frozenset()


def failing(prepare: Prepare, *evaluations: int) -> list[Call]:
    """The call as it is, and with a loss that raises at each of these evaluations."""
    return [Call(prepare), *(Call(prepare, KeyError, number) for number in evaluations)]


# Hypergradients


def of_functions(engine: str, alpha: float = 0.05, hyper: Any = None) -> Prepare:
    def prepare(caller: Caller) -> Callable[[], object]:
        hypergradient = hvp.Hypergradient(caller.train_loss, caller.val_loss, hvp.Neumann(4, alpha), engine)
        return lambda: hypergradient(caller.module, caller.hyper if hyper is None else hyper, caller.x, caller.x)

    return prepare


def hypergradients() -> list[Call]:
    calls = [Call(of_functions("eager", hyper="nothing"), TypeError)]
    for engine in ("eager", "linearized", "finite_difference", "auto"):
        calls += failing(of_functions(engine), 1, 2)
        calls.append(Call(of_functions(engine, alpha=1e9), hvp.DivergenceError))
    return [*calls, Call(of_functions("finite_difference"), KeyError, 5)]


def of_tensors(
    function: Callable[..., object], alpha: float = 0.05, graph: bool = True, weights: Any = None
) -> Prepare:
    """A call with losses that were computed before."""

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


# Operators


def hessian(engine: str, caller: Caller) -> Callable[[], object]:
    return lambda: (
        hvp.HessianOperator(caller.loss_of_weights, caller.weights, caller.x, engine=engine) @ (caller.like_weights())
    )


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


def status(caller: Caller) -> Callable[[], object]:
    return lambda: hvp.solve(lambda v: 2.0 * v, caller.x[0], hvp.Identity()).status


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


# What is built on them


def eigenvalues(function: Callable[..., object], caller: Caller) -> Callable[[], object]:
    return lambda: function(hvp.HessianOperator(caller.loss_of_weights, caller.weights, caller.x, engine="eager"))


def density(caller: Caller) -> Callable[[], object]:
    operator = hvp.HessianOperator(caller.loss_of_weights, caller.weights, caller.x, engine="eager")
    found = hvp.spectral_density(operator, probes=2, steps=3)
    return lambda: (found(torch.linspace(0, 1, 3)), found.mean(), found)[-1]


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


def preconditioner(make: Callable[[Caller, Any], Any], caller: Caller) -> Callable[[], object]:
    def call() -> object:
        operator = hvp.HessianOperator(caller.loss_of_weights, caller.weights, caller.x, engine="eager")
        solver = hvp.ConjugateGradient(3, damping=0.1, preconditioner=make(caller, operator))
        return operator.solve(caller.like_weights(), solver)

    return call


def kfac(caller: Caller) -> Callable[[], object]:
    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        caller.counted()
        return cross_entropy(outputs, targets)

    module = nn.Sequential(caller.module[0], nn.Tanh(), caller.module[4])
    weights = {name: p for name, p in module.named_parameters() if p.requires_grad}
    return lambda: hvp.KFACPreconditioner(module, loss, weights, caller.x, caller.y, shift=0.1)(
        [torch.ones_like(weight) for weight in weights.values()]
    )


# Tuning

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


# Errors that need more than a failing loss


def with_backend(name: str, caller: Caller) -> Callable[[], object]:
    def call() -> object:
        with hvp.use_backend(name):
            return solved(hvp.Neumann(3, alpha=0.1), caller)()

    return call


def no_data(caller: Caller) -> Callable[[], object]:
    folder = caller.cleanup.enter_context(tempfile.TemporaryDirectory())
    return lambda: mnist(folder)


def branching(caller: Caller) -> Callable[[], object]:
    def loss(w: dict[str, Tensor]) -> Tensor:
        first = caller.net(w, caller.x).sum() + sum(weight.square().sum() for weight in w.values())
        return first if first.item() > 0 else -first

    return lambda: hvp.HessianOperator(loss, caller.weights, engine="linearized") @ caller.like_weights()


def once(caller: Caller) -> Callable[[], object]:
    class Once(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            return grad

    loss = lambda w: Once.apply(caller.net(w, caller.x)).square().sum()  # noqa: E731
    return lambda: hvp.HessianOperator(loss, caller.weights) @ caller.like_weights()


def infinite(caller: Caller) -> Callable[[], object]:
    loss = lambda w: caller.net(w, caller.x).sum() * float("inf")  # noqa: E731
    return lambda: hvp.HessianOperator(loss, caller.weights).solve(caller.like_weights(), hvp.Neumann(3))


def alone(caller: Caller) -> Callable[[], object]:
    return lambda: hvp.DataParallel(caller.train_loss)


def of_solver(solver: Any, *evaluations: int) -> list[Call]:
    prepare = partial(solved, solver)
    return [Call(prepare, returns=hvp.Solution), *(Call(prepare, KeyError, number) for number in evaluations)]


CALLS: dict[str, list[Call]] = {
    "Averaged": failing(averaged, 1, 2),
    "MINRES": of_solver(hvp.MINRES(3), 1),
    "BackendError": [Call(partial(with_backend, "cuda"), hvp.BackendError)],
    "Budget": of_solver(hvp.Budget(error=1e-3), 1),
    "Chebyshev": of_solver(hvp.Chebyshev(5), 2),
    "CheckResult": [Call(checked, returns=hvp.CheckResult)],
    "CheckpointError": [Call(resumed_from_junk, hvp.CheckpointError)],
    "ConjugateGradient": of_solver(hvp.ConjugateGradient(3), 1),
    "DataError": [Call(no_data, hvp.DataError)],
    "DataParallel": failing(data_parallel, 1, 2),
    "DiagonalPreconditioner": failing(
        partial(preconditioner, lambda caller, _: hvp.DiagonalPreconditioner(caller.like_weights())), 1
    ),
    "DistributedError": [Call(alone, hvp.DistributedError)],
    "DivergenceError": [Call(of_functions("auto", alpha=1e9), hvp.DivergenceError)],
    "Estimate": [Call(of_functions("eager"), returns=hvp.Estimate)],
    "Exact": of_solver(hvp.Exact(), 2),
    "ExtremeEigenvalues": [Call(partial(eigenvalues, hvp.extreme_eigenvalues), returns=hvp.ExtremeEigenvalues)],
    "FixedPointHypergradient": [
        *failing(partial(fixed_point, 0.5), 1),
        Call(partial(fixed_point, 1e9), hvp.DivergenceError),
    ],
    "GaussNewtonOperator": failing(gauss_newton, 1),
    "GraphError": [Call(of_tensors(hvp.hypergradient, graph=False), hvp.GraphError)],
    "HessianOperator": [
        call for engine in ("eager", "linearized", "auto") for call in failing(partial(hessian, engine), 1)
    ],
    "History": [Call(tuned, returns=hvp.History, changes=TRAINING)],
    "HvpError": [Call(of_functions("auto", alpha=1e9), hvp.HvpError)],
    "Hypergradient": hypergradients(),
    "HypergradientResult": [Call(of_functions("eager"), returns=hvp.HypergradientResult)],
    "Identity": of_solver(hvp.Identity()),
    "Influence": [Call(leaving_out, returns=hvp.Influence)],
    "JacobiPreconditioner": failing(
        partial(preconditioner, lambda _, operator: hvp.JacobiPreconditioner(operator, probes=2, shift=1.0)), 1
    ),
    "KFACPreconditioner": failing(kfac, 1),
    "LinearModelOperator": [
        Call(partial(linear_model, 0.1), returns=hvp.Solution),
        Call(partial(linear_model, 1e9), hvp.DivergenceError),
    ],
    "Neumann": of_solver(hvp.Neumann(5), 2),
    "NonFiniteError": [Call(infinite, hvp.NonFiniteError)],
    "Nystrom": of_solver(hvp.Nystrom(2), 2),
    "NystromPreconditioner": failing(
        partial(preconditioner, lambda _, operator: hvp.NystromPreconditioner(operator, rank=2, rho=0.1)), 1
    ),
    "Record": [Call(partial(tuned, pick=lambda history: history[0]), returns=hvp.Record, changes=TRAINING)],
    "ResponseJacobian": [Call(response, returns=hvp.ResponseJacobian)],
    "SecondDerivativeError": [Call(once, hvp.SecondDerivativeError)],
    "Solution": of_solver(hvp.Neumann(3, alpha=0.1, form="accumulate")),
    "SpectralDensity": [Call(density, returns=hvp.SpectralDensity)],
    "Status": [Call(status, returns=hvp.Status)],
    "StochasticHessianOperator": failing(stochastic, 2),
    "TraceError": [Call(branching, hvp.TraceError)],
    "Tuner": [
        Call(tuned, changes=TRAINING),
        *(Call(tuned, KeyError, number, changes=TRAINING) for number in (1, 3, 4)),
    ],
    "Verdict": [Call(verdict, returns=hvp.Verdict)],
    "approx_inverse_hvp": [
        *tape(hvp.approx_inverse_hvp),
        Call(of_tensors(hvp.approx_inverse_hvp, alpha=1e9), hvp.DivergenceError),
    ],
    "best_response": [
        *tape(hvp.best_response),
        Call(partial(backward_of_response, 0.05), changes=frozenset({"gradients"})),
        Call(partial(backward_of_response, 1e9), hvp.DivergenceError),
    ],
    "check": failing(checked, 1, 3),
    "extreme_eigenvalues": failing(partial(eigenvalues, hvp.extreme_eigenvalues), 1),
    "functional": [
        Call(
            lambda caller: lambda: caller.net(caller.weights, caller.x),
            changes=frozenset({"buffers", "random numbers"}),
        ),
        Call(lambda caller: lambda: caller.net({"nothing": caller.x}, caller.x), ValueError),
    ],
    "hypergradient": [
        *tape(hvp.hypergradient),
        Call(of_tensors(hvp.hypergradient, alpha=1e9), hvp.DivergenceError),
    ],
    "influence_matrix": failing(influence, 1, 3),
    "response_jacobian": failing(response, 1),
    "solve": of_solver(hvp.ConjugateGradient(3), 1),
    "spectral_density": failing(partial(eigenvalues, partial(hvp.spectral_density, probes=2, steps=3)), 1),
    "use_backend": [*failing(partial(with_backend, "reference"), 1), Call(partial(with_backend, "none"), ValueError)],
}
