"""Other packages, each called as its documentation says; `pip install -e '.[peers]'` installs them.

Every import is inside the preparation that needs it: a package that is missing, or that fails on a problem, is left
out of that problem with the reason.
"""

from __future__ import annotations

import types
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

from bench import peers_jax
from bench.methods import Preparation, Run, Tape, taped_hypergradient, taped_inverse_hvp
from bench.problems import Problem, Tensors

PACKAGES = {
    "betty": "betty-ml",
    "torchopt": "torchopt",
    "curvlinops": "curvlinops-for-pytorch",
    "hypergrad": "hypergrad",
    "higher": "higher",
    "jax": "jax",
}
"""Where the first word of a method's name is a package: its name in the package index."""

_LARGEST_COMPILED = 700
"""Operations of a product that are compiled; an LSTM's thousands took minutes, and the compiler then failed."""


def _betty() -> Tape:
    from betty.hypergradient.neumann import approx_inverse_hvp

    return approx_inverse_hvp


def _torchopt() -> Tape:
    from torchopt.linear_solve import solve_inv

    def tape(
        v: Sequence[Tensor], f: Sequence[Tensor], weights: Sequence[Tensor], iterations: int, alpha: float
    ) -> Sequence[Tensor]:
        def product(tangents: Sequence[Tensor]) -> Sequence[Tensor]:
            return torch.autograd.grad(f, weights, tangents, retain_graph=True)

        return solve_inv(ns=True, maxiter=iterations, alpha=alpha)(product, tuple(v))

    return tape


def _curvlinops(compiled: bool, problem: Problem) -> Run:
    """`NeumannInverseLinearOperator` of the whole training loss, without its NaN check, which waits for the device."""
    from curvlinops import HessianLinearOperator, NeumannInverseLinearOperator

    class Model(nn.Module):
        """Outputs and penalty, since the operator knows a loss only as loss_func(model_func(inputs), targets)."""

        def __init__(self) -> None:
            super().__init__()
            self.module = problem.module

        def forward(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
            weights: Tensors = dict(self.module.named_parameters())
            with problem.kernels():
                outputs = self.module(inputs)
            return outputs, problem.penalty(weights, problem.hyper)

    class Loss(nn.Module):
        reduction = "mean"

        def forward(self, parts: tuple[Tensor, Tensor], targets: Tensor) -> Tensor:
            return problem.loss_of_outputs(parts[0], targets) + parts[1]

    model = Model()
    hessian = HessianLinearOperator(model, Loss(), list(model.parameters()), [problem.train], check_deterministic=False)
    if compiled:
        # torch.compile alone falls back to eager: it cannot follow the nested transforms. A trace of them it can.
        columns = [v.unsqueeze(-1) for v in problem.vector]
        traced = make_fx(hessian._mp)(*problem.train, *columns)
        if len(traced.graph.nodes) > _LARGEST_COMPILED:
            raise RuntimeError(f"not compiled: {len(traced.graph.nodes)} operations would take minutes")
        hessian.__dict__["_mp"] = torch.compile(traced)

    def run(iterations: int) -> Sequence[Tensor]:
        inverse = NeumannInverseLinearOperator(hessian, num_terms=iterations, scale=problem.alpha, check_nan=False)
        return inverse @ problem.vector

    return run


def _betty_hypergradient(problem: Problem) -> Run:
    """Its `neumann`, which takes two levels of an optimization; it knows no direct term, and there is none here."""
    from betty.hypergradient.neumann import neumann

    weights, hyper = list(problem.weights.values()), list(problem.hyper.values())

    def run(iterations: int) -> Sequence[Tensor]:
        value = problem.val_loss(problem.weights, problem.hyper, problem.val)
        lower = types.SimpleNamespace(
            paths=(),
            config=types.SimpleNamespace(neumann_iterations=iterations, neumann_alpha=problem.alpha),
            cur_batch=problem.train,
            training_step_exec=lambda batch: problem.train_loss(problem.weights, problem.hyper, batch),
            trainable_parameters=lambda: weights,
        )
        upper = types.SimpleNamespace(trainable_parameters=lambda: hyper)
        return neumann(torch.autograd.grad(value, weights), lower, upper)

    return run


def _hypergrad(problem: Problem) -> Run:
    from hypergrad.approx_hypergrad import neumann

    weights = tuple(w.detach() for w in problem.weights.values())
    hyper = tuple(h.detach() for h in problem.hyper.values())

    def named(tensors: Sequence[Tensor], like: Tensors) -> Tensors:
        return dict(zip(like, tensors, strict=True))

    def inner(w: Sequence[Tensor], h: Sequence[Tensor]) -> Tensor:
        return problem.train_loss(named(w, problem.weights), named(h, problem.hyper), problem.train)

    def outer(w: Sequence[Tensor], h: Sequence[Tensor]) -> Tensor:
        return problem.val_loss(named(w, problem.weights), named(h, problem.hyper), problem.val)

    return lambda iterations: neumann(inner, outer, weights, hyper, iterations, problem.alpha)


def _higher(problem: Problem) -> Run:
    import higher

    names = list(problem.weights)

    def run(iterations: int) -> Sequence[Tensor]:
        optimizer = torch.optim.SGD(problem.module.parameters(), lr=problem.alpha)
        with higher.innerloop_ctx(problem.module, optimizer, copy_initial_weights=False) as (network, inner):
            for _ in range(iterations + 1):
                with problem.kernels():
                    outputs = network(problem.train[0])
                weights = dict(zip(names, network.parameters(), strict=True))
                inner.step(problem.loss_of_outputs(outputs, problem.train[1]) + problem.penalty(weights, problem.hyper))
            with problem.kernels():
                value = problem.loss_of_outputs(network(problem.val[0]), problem.val[1])
            return torch.autograd.grad(value, list(problem.hyper.values()))

    return run


def inverse_hvps() -> dict[str, Preparation]:
    """Inverse-Hessian-vector products by other packages."""
    return {
        "betty": lambda problem: taped_inverse_hvp(_betty(), problem),
        "torchopt": lambda problem: taped_inverse_hvp(_torchopt(), problem),
        "curvlinops": partial(_curvlinops, False),
        "curvlinops, compiled": partial(_curvlinops, True),
        "jax, jitted": peers_jax.inverse_hvp,
    }


def hypergradients() -> dict[str, Preparation]:
    """Implicit hypergradients by other packages."""
    return {
        "betty": _betty_hypergradient,
        "torchopt": lambda problem: taped_hypergradient(_torchopt(), problem),
        "hypergrad": _hypergrad,
        "jax, jitted": peers_jax.hypergradient,
    }


def unrolled() -> dict[str, Preparation]:
    """Hypergradients through unrolled steps by other packages."""
    return {"higher": _higher}
