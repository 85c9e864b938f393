"""Calls of everything public: some that work, and some that fail in the middle.

Each is prepared from a :class:`callers_state.Caller`; preparing is not part of the call.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from call_descriptions import Call, failing
from callers_state import Caller
from calls_of_operators import (
    averaged,
    compiled,
    data_parallel,
    density,
    eigenvalues,
    gauss_newton,
    hessian,
    linear_model,
    of_layers,
    preconditioner,
    solved,
    stochastic,
)
from calls_that_take_losses import (
    TRAINING,
    backward_of_response,
    checked,
    fixed_point,
    hypergradients,
    influence,
    leaving_out,
    of_engine,
    of_tensors,
    response,
    resumed_from_junk,
    tape,
    tuned,
    verdict,
)
from torch import Tensor

import hvp_engine as hvp
from hvp_engine.demo.images import mnist


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


def of_operations(caller: Caller) -> Callable[[], object]:
    """A product with the Hessian of a loss that is made of them."""

    def loss(w: dict[str, Tensor]) -> Tensor:
        caller.counted()
        scores = hvp.differentiable.layer_norm(caller.net(w, caller.x), (2,))
        return hvp.differentiable.cross_entropy(scores, caller.y)

    return lambda: hvp.HessianOperator(loss, caller.weights, engine="eager") @ caller.like_weights()


def infinite(caller: Caller) -> Callable[[], object]:
    loss = lambda w: caller.net(w, caller.x).sum() * float("inf")  # noqa: E731
    return lambda: hvp.HessianOperator(loss, caller.weights).solve(caller.like_weights(), hvp.Neumann(3))


def alone(caller: Caller) -> Callable[[], object]:
    return lambda: hvp.DataParallel(caller.train_loss)


def of_solver(solver: Any, *evaluations: int) -> list[Call]:
    prepare = partial(solved, solver)
    return [Call(prepare, returns=hvp.Solution), *(Call(prepare, KeyError, number) for number in evaluations)]


COMPILING = frozenset({"environment", "recursion limit"})
"""What torch's compiler sets for the process at its first use: a larger limit, and where its cache is."""

CALLS: dict[str, list[Call]] = {
    "Averaged": failing(averaged, 1, 2),
    "MINRES": of_solver(hvp.MINRES(3), 1),
    "BackendError": [Call(partial(with_backend, "cuda"), hvp.BackendError)],
    "Budget": of_solver(hvp.Budget(error=1e-3), 1),
    "Chebyshev": of_solver(hvp.Chebyshev(5), 2),
    "CheckpointError": [Call(resumed_from_junk, hvp.CheckpointError)],
    "ConjugateGradient": of_solver(hvp.ConjugateGradient(3), 1),
    "DataError": [Call(no_data, hvp.DataError)],
    "DataParallel": failing(data_parallel, 1, 2),
    "DiagonalPreconditioner": failing(
        partial(preconditioner, lambda caller, _: hvp.DiagonalPreconditioner(caller.like_weights())), 1
    ),
    "DistributedError": [Call(alone, hvp.DistributedError)],
    "Exact": of_solver(hvp.Exact(), 2),
    "ExtremeEigenvalues": [Call(partial(eigenvalues, hvp.extreme_eigenvalues), returns=hvp.ExtremeEigenvalues)],
    "FixedPointHypergradient": [
        *failing(partial(fixed_point, 0.5), 1),
        Call(partial(fixed_point, 1e9), hvp.DivergenceError),
    ],
    "GaussNewtonOperator": failing(gauss_newton, 1),
    "HessianOperator": [
        *(call for engine in ("eager", "linearized", "auto") for call in failing(partial(hessian, engine), 1)),
        Call(compiled, returns=hvp.Solution, changes=COMPILING, slow=True),
    ],
    "Hypergradient": [
        *hypergradients(),
        *(replace(call, changes=COMPILING, slow=True) for call in of_engine("compiled")),
    ],
    "Identity": of_solver(hvp.Identity()),
    "Influence": [Call(leaving_out, returns=hvp.Influence)],
    "JacobiPreconditioner": failing(
        partial(preconditioner, lambda _, operator: hvp.JacobiPreconditioner(operator, probes=2, shift=1.0)), 1
    ),
    "KFACPreconditioner": failing(partial(of_layers, hvp.KFACPreconditioner), 1),
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
    "ResponseJacobian": [Call(response, returns=hvp.ResponseJacobian)],
    "SecondDerivativeError": [Call(once, hvp.SecondDerivativeError)],
    "SpectralDensity": [Call(density, returns=hvp.SpectralDensity)],
    "StochasticHessianOperator": failing(stochastic, 2),
    "TraceError": [Call(branching, hvp.TraceError)],
    "Tuner": [
        Call(tuned, changes=TRAINING),
        *(Call(tuned, KeyError, number, changes=TRAINING) for number in (1, 3, 4)),
    ],
    "WoodburyPreconditioner": failing(partial(of_layers, hvp.WoodburyPreconditioner), 1),
    "approx_inverse_hvp": [
        *tape(hvp.approx_inverse_hvp),
        Call(of_tensors(hvp.approx_inverse_hvp, alpha=1e9), hvp.DivergenceError),
    ],
    "best_response": [
        *tape(hvp.best_response),
        Call(partial(backward_of_response, 0.05), changes=frozenset({"gradients"})),
        Call(partial(backward_of_response, 1e9), hvp.DivergenceError),
    ],
    "check": [Call(verdict, returns=hvp.Verdict), *failing(checked, 1, 3)[1:]],
    "differentiable": failing(of_operations, 1),
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

PARTS_OF = {
    "I": "HessianOperator",
    "LinearOperator": "HessianOperator",
    "CheckResult": "check",
    "DivergenceError": "Hypergradient",
    "Estimate": "Hypergradient",
    "GraphError": "hypergradient",
    "History": "Tuner",
    "HvpError": "Hypergradient",
    "HypergradientResult": "Hypergradient",
    "Record": "Tuner",
    "Solution": "solve",
    "Status": "solve",
    "Verdict": "check",
}
"""What calls of another name return or raise, and so need no call of their own."""
