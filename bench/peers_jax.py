"""Jitted JAX, the strongest thing outside PyTorch that a user could take: models and series written by hand.

A dense network is a loop over its layers, so one function serves logistic regression and the networks of one hidden
layer. The Hessian is linearized once (`jax.linearize`), and all terms are one `fori_loop` in one compiled function. XLA
runs on one thread, as it is told before it starts; so these figures belong beside others on one thread.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from bench.methods import Run
from bench.problems import Problem

_ONE_THREAD = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"


def _numpy(module: Any, tensor: Tensor) -> Any:
    return module.asarray(tensor.detach().numpy())


def _losses(problem: Problem) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """(training loss, validation loss) of a dense network with cross-entropy, as functions of (w, h, x, y)."""
    import jax
    import jax.numpy as jnp

    kinds = {type(part) for part in problem.module.modules() if not list(part.children())}
    if not kinds <= {nn.Flatten, nn.Linear, nn.ReLU} or problem.loss_of_outputs is not nn.functional.cross_entropy:
        raise RuntimeError("written by hand for dense networks only")
    layers = [name.removesuffix(".weight") for name in problem.weights if name.endswith("weight")]

    def val(w: Any, h: Any, x: Any, y: Any) -> Any:
        z = x.reshape(x.shape[0], -1)
        for index, layer in enumerate(layers):
            z = z @ w[f"{layer}.weight"].T + w[f"{layer}.bias"]
            z = jax.nn.relu(z) if index < len(layers) - 1 else z
        return -jnp.take_along_axis(jax.nn.log_softmax(z), y[:, None], 1).mean()

    def train(w: Any, h: Any, x: Any, y: Any) -> Any:
        decays = [h["all"]] * len(w) if "all" in h else [h[name] for name in w]
        penalty = sum((jnp.exp(decay) * w[name] ** 2).sum() for name, decay in zip(w, decays, strict=True)) / 2
        return val(w, h, x, y) + penalty

    return train, val


def _jitted(problem: Problem, whole: bool) -> Run:
    """The inverse-Hessian-vector product of the problem's vector or, `whole`, the hypergradient."""
    os.environ.setdefault("XLA_FLAGS", _ONE_THREAD)
    import jax
    import jax.numpy as jnp

    train, val = _losses(problem)
    w, h = ({n: _numpy(jnp, t) for n, t in ts.items()} for ts in (problem.weights, problem.hyper))
    batches = [_numpy(jnp, t) for t in (*problem.train, *problem.val)]
    given = dict(zip(w, (_numpy(jnp, v) for v in problem.vector), strict=True))
    alpha = problem.alpha

    @cache
    def compiled(iterations: int) -> Callable[..., Any]:
        def function(w: Any, h: Any, v: Any, x: Any, y: Any, x_val: Any, y_val: Any) -> Any:
            gradient = jax.grad(train)
            if whole:
                v = jax.grad(val)(w, h, x_val, y_val)
            _, product = jax.linearize(lambda w: gradient(w, h, x, y), w)

            def term(_: Any, state: Any) -> Any:
                v, p = state
                v = jax.tree.map(lambda a, b: a - alpha * b, v, product(v))
                return v, jax.tree.map(jnp.add, p, v)

            _, p = jax.lax.fori_loop(0, iterations, term, (v, v))
            p = jax.tree.map(lambda a: alpha * a, p)
            if not whole:
                return p
            _, pull = jax.vjp(lambda h: gradient(w, h, x, y), h)
            return jax.tree.map(jnp.negative, pull(p)[0])

        return jax.jit(function)

    names = list(problem.hyper if whole else problem.weights)

    def run(iterations: int) -> Sequence[Tensor]:
        found = jax.block_until_ready(compiled(iterations)(w, h, given, *batches))
        return [torch.from_dlpack(found[name]) for name in names]

    return run


def inverse_hvp(problem: Problem) -> Run:
    """The inverse-Hessian-vector product, gradient included."""
    return _jitted(problem, whole=False)


def hypergradient(problem: Problem) -> Run:
    """The whole hypergradient."""
    return _jitted(problem, whole=True)
