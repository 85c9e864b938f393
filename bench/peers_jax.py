"""Jitted JAX, the strongest thing outside PyTorch that a user could take: models and series written by hand.

The Hessian is linearized once (`jax.linearize`), and all terms are one `fori_loop` in one compiled function. XLA takes
its number of threads when it starts: torch's of that moment, on which alone it is then timed.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from bench.methods import Run
from bench.problems import Problem


@cache
def _threads() -> int:
    """XLA's threads in this process. It has one for each core that the process may use, unless `NPROC` says otherwise;
    the flag keeps matrix products from being cut up for more than one."""
    count = torch.get_num_threads()
    os.environ["NPROC"] = str(count)
    os.environ["XLA_FLAGS"] = f"--xla_cpu_multi_thread_eigen={str(count > 1).lower()}"
    return count


def _numpy(module: Any, tensor: Tensor) -> Any:
    return module.asarray(tensor.detach().numpy())


Weights = dict[str, Any]


def _dense(layers: Sequence[str], w: Weights, x: Any) -> Any:
    import jax

    z = x.reshape(x.shape[0], -1)
    for index, layer in enumerate(layers):
        z = z @ w[f"{layer}.weight"].T + w[f"{layer}.bias"]
        z = jax.nn.relu(z) if index < len(layers) - 1 else z
    return z


def _lenet(w: Weights, x: Any) -> Any:
    """Convolutions as products with patches, which take XLA a sixth of what its own convolutions do."""
    import jax
    import jax.numpy as jnp

    def block(x: Any, layer: int, padding: int) -> Any:
        kernel = w[f"{layer}.weight"].transpose(2, 3, 1, 0)
        size = len(kernel)
        x = jnp.pad(x, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
        height, width = (extent - size + 1 for extent in x.shape[1:3])
        shifted = [x[:, i : i + height, j : j + width] for i in range(size) for j in range(size)]
        patches = jnp.concatenate(shifted, 3).reshape(-1, kernel[..., 0].size)
        x = jax.nn.relu(patches @ kernel.reshape(patches.shape[1], -1) + w[f"{layer}.bias"])
        return x.reshape(len(shifted[0]), height // 2, 2, width // 2, 2, -1).max((2, 4))

    images = block(block(x.transpose(0, 2, 3, 1), 0, (32 - x.shape[2]) // 2), 3, 0)
    return _dense(("7", "9", "11"), w, images.transpose(0, 3, 1, 2))


def _lstm(w: Weights, x: Any) -> Any:
    import jax
    import jax.numpy as jnp

    z = w["embedding.weight"][x].swapaxes(0, 1)
    for layer in range(sum(name.startswith("rnn.weight_ih") for name in w)):
        from_state = w[f"rnn.weight_hh_l{layer}"].T
        given = z @ w[f"rnn.weight_ih_l{layer}"].T + w[f"rnn.bias_ih_l{layer}"] + w[f"rnn.bias_hh_l{layer}"]

        def step(carry: Any, given: Any, from_state: Any = from_state) -> Any:
            state, cell = carry
            enter, forget, candidate, leave = jnp.split(given + state @ from_state, 4, 1)
            cell = jax.nn.sigmoid(forget) * cell + jax.nn.sigmoid(enter) * jnp.tanh(candidate)
            state = jax.nn.sigmoid(leave) * jnp.tanh(cell)
            return (state, cell), state

        zeros = jnp.zeros((z.shape[1], from_state.shape[0]), z.dtype)
        _, z = jax.lax.scan(step, (zeros, zeros), given)
    return z.swapaxes(0, 1) @ w["embedding.weight"].T + w["bias"]


def _transformer(w: Weights, x: Any) -> Any:
    import jax
    import jax.numpy as jnp

    heads, z = 4, w["embedding.weight"][x] + w["position"]
    rows, length, width = z.shape

    def normalized(name: str, z: Any) -> Any:
        centred = z - z.mean(-1, keepdims=True)
        return centred / jnp.sqrt(centred.var(-1, keepdims=True) + 1e-5) * w[f"{name}.weight"] + w[f"{name}.bias"]

    for layer in (name.removesuffix("linear1.weight") for name in w if name.endswith("linear1.weight")):
        inside = normalized(f"{layer}norm1", z) @ w[f"{layer}self_attn.in_proj_weight"].T
        inside = (inside + w[f"{layer}self_attn.in_proj_bias"]).reshape(rows, length, 3, heads, width // heads)
        query, key, value = (inside[:, :, i].swapaxes(1, 2) for i in range(3))
        shares = jax.nn.softmax(query @ key.swapaxes(2, 3) / (width // heads) ** 0.5)
        mixed = (shares @ value).swapaxes(1, 2).reshape(rows, length, width)
        z = z + mixed @ w[f"{layer}self_attn.out_proj.weight"].T + w[f"{layer}self_attn.out_proj.bias"]
        hidden = jax.nn.relu(normalized(f"{layer}norm2", z) @ w[f"{layer}linear1.weight"].T + w[f"{layer}linear1.bias"])
        z = z + hidden @ w[f"{layer}linear2.weight"].T + w[f"{layer}linear2.bias"]
    return z @ w["decoder.weight"].T + w["decoder.bias"]


def _scores(problem: Problem) -> Callable[[Weights, Any], Any]:
    """The network by hand."""
    by_name = {
        "lenet": _lenet,
        "lstm": _lstm,
        "looped-lstm": _lstm,
        "transformer": _transformer,
    }
    kinds = {type(part) for part in problem.module.modules() if not list(part.children())}
    if kinds <= {nn.Flatten, nn.Linear, nn.ReLU}:
        return partial(_dense, [name.removesuffix(".weight") for name in problem.weights if name.endswith("weight")])
    if problem.name not in by_name:
        raise NotImplementedError("not written by hand")
    return by_name[problem.name]


def _losses(problem: Problem) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """(training loss, validation loss) with cross-entropy, as functions of (w, h, x, y)."""
    import jax
    import jax.numpy as jnp

    scores = _scores(problem)

    def val(w: Weights, h: Weights, x: Any, y: Any) -> Any:
        return -jnp.take_along_axis(jax.nn.log_softmax(scores(w, x)), y[..., None], -1).mean()

    def train(w: Weights, h: Weights, x: Any, y: Any) -> Any:
        decays = [h["all"]] * len(w) if "all" in h else [h[name] for name in w]
        penalty = sum((jnp.exp(decay) * w[name] ** 2).sum() for name, decay in zip(w, decays, strict=True)) / 2
        return val(w, h, x, y) + penalty

    return train, val


def _jitted(problem: Problem, whole: bool) -> Run:
    """The inverse-Hessian-vector product of the problem's vector or, `whole`, the hypergradient."""
    threads = _threads()
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

    run.threads = threads  # type: ignore[attr-defined]  # the only number on which it can be timed
    return run


def inverse_hvp(problem: Problem) -> Run:
    """The inverse-Hessian-vector product, gradient included."""
    return _jitted(problem, whole=False)


def hypergradient(problem: Problem) -> Run:
    """The whole hypergradient."""
    return _jitted(problem, whole=True)
