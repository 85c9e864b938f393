"""Whole hypergradients by programs of the extension: eager's numbers, none of the caller's code, nothing changed."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import hvp_engine as hvp
from hvp_engine.engines import AutoEngine, LinearizedEngine

pytestmark = pytest.mark.filterwarnings("ignore:the weights are far from a minimum")
F64 = torch.float64


def data(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(12, 5, dtype=F64, generator=generator)
    return x, torch.randint(4, (12,), generator=generator), torch.randn(12, 4, dtype=F64, generator=generator)


def net(w: dict[str, Tensor], x: Tensor) -> Tensor:
    return F.linear(torch.tanh(F.linear(x, w["first"], w["bias"])), w["last"])


def decayed(loss: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
    def train(w: dict[str, Tensor], h: dict[str, Tensor], batch: Any) -> Tensor:
        x, y, t = batch
        penalty = sum((h[name].exp() * w[name] ** 2).sum() for name in ("first", "last"))
        return loss(net(w, x * h["scale"]), y, t) + penalty / 2

    return train


# Written without a look at what programs know.
LOSSES: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "cross entropy": lambda s, y, t: F.cross_entropy(s, y),
    "smoothed": lambda s, y, t: F.cross_entropy(s, y, label_smoothing=0.2),
    "probabilities": lambda s, y, t: F.cross_entropy(s, F.softmax(t, 1)),
    "least squares": lambda s, y, t: F.mse_loss(s, t),
    "huber": lambda s, y, t: F.huber_loss(s, t),
    "gaussian": lambda s, y, t: ((s[:, :2] - t[:, :2]) ** 2 * s[:, 2:].exp() - s[:, 2:]).mean(),
    "poisson": lambda s, y, t: F.poisson_nll_loss(s, t.abs()),
    "hinge": lambda s, y, t: torch.relu(1 - s * t.sign()).square().mean(),
    "cosine": lambda s, y, t: 1 - F.cosine_similarity(s, t).mean(),
    "ranking": lambda s, y, t: F.softplus(s[:, :1] - s[:, 1:]).mean(),
    "focal": lambda s, y, t: -((1 - F.softmax(s, 1)) ** 2 * F.log_softmax(s, 1))[torch.arange(12), y].mean(),
    "energy": lambda s, y, t: (torch.logsumexp(s, 1) - s[torch.arange(12), y]).pow(3).mean() + s.abs().mean(),
}


def point() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    torch.manual_seed(0)
    weights = {name: torch.randn(shape, dtype=F64) / 3 for name, shape in
               (("first", (6, 5)), ("bias", (6,)), ("last", (4, 6)))}  # fmt: skip
    hyper = {"first": torch.full((6, 5), -2.0, dtype=F64), "last": torch.tensor(-1.0, dtype=F64),
             "scale": torch.ones(5, dtype=F64), "unused": torch.ones(2, dtype=F64)}  # fmt: skip
    return weights, hyper


def assert_alike(found: Any, expected: Any, tolerance: float = 1e-10) -> None:
    for name, value in expected.grads.items():
        torch.testing.assert_close(found.grads[name], value, rtol=tolerance, atol=tolerance)
    for name in ("train_loss", "val_loss", "gradient_norm", "unfinished"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), rtol=tolerance, atol=tolerance)
    for name, value in expected.solution.value.items():
        torch.testing.assert_close(found.solution.value[name], value, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("solver", [hvp.Neumann(6, alpha=0.1), hvp.ConjugateGradient(5)], ids=["neumann", "cg"])
@pytest.mark.parametrize("name", LOSSES)
def test_the_numbers_are_eagers(name: str, solver: Any) -> None:
    train, val = decayed(LOSSES[name]), lambda w, h, b: LOSSES[name](net(w, b[0]), b[1], b[2])
    ours = hvp.Hypergradient(train, val, solver, engine="linearized")
    theirs = hvp.Hypergradient(train, val, solver, engine="eager")
    weights, hyper = point()
    for seed in range(3):
        batches = data(seed), data(seed + 10)
        assert_alike(ours(weights, hyper, *batches), theirs(weights, hyper, *batches))
        weights = {key: 0.9 * value for key, value in weights.items()}
    assert "replaced" not in ours.report() and "1 gradients by the extension" in ours.report(), ours.report()


def counted() -> tuple[hvp.Hypergradient, list[int]]:
    calls = [0, 0]

    def train(w: Any, h: Any, b: Any) -> Tensor:
        calls[0] += 1
        return decayed(LOSSES["cross entropy"])(w, h, b)

    def val(w: Any, h: Any, b: Any) -> Tensor:
        calls[1] += 1
        return F.cross_entropy(net(w, b[0]), b[1])

    return hvp.Hypergradient(train, val, hvp.Neumann(5, alpha=0.1), engine="linearized"), calls


def test_the_losses_run_only_where_they_are_checked() -> None:
    hypergradient, calls = counted()
    seen = []
    for _ in range(11):
        hypergradient(*point(), data(0), data(1))
        seen.append(tuple(calls))
    assert seen[0] == seen[8] and seen[9] == seen[10], seen
    assert (seen[9][0] - seen[8][0], seen[9][1] - seen[8][1]) == (1, 1)


def test_nothing_of_the_callers_changes() -> None:
    hypergradient, _ = counted()
    weights, hyper = point()
    for tensor in (*weights.values(), *hyper.values()):
        tensor.requires_grad_().grad = torch.ones_like(tensor)
    copies = [tensor.detach().clone() for tensor in (*weights.values(), *hyper.values())]
    for _ in range(12):
        states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
        with torch.no_grad():
            result = hypergradient(weights, hyper, data(0), data(1))
        assert torch.equal(torch.get_rng_state(), states[0]) and random.getstate() == states[1]
        assert np.random.get_state()[1].tolist() == states[2] and not torch.is_inference_mode_enabled()
        result.grads["first"].zero_()
        result.solution.value["first"].zero_()
    for tensor, copy in zip((*weights.values(), *hyper.values()), copies, strict=True):
        assert torch.equal(tensor, copy) and tensor.requires_grad and torch.equal(tensor.grad, torch.ones_like(tensor))  # type: ignore[arg-type]


def test_results_do_not_share_memory_with_arguments_or_later_results() -> None:
    linear = hvp.Hypergradient(
        lambda w, h, b: ((w - h) ** 2).sum() / 2, lambda w, h, b: (w * b).sum() + (h * b).sum(),
        hvp.Neumann(3, alpha=0.5), engine="linearized",
    )  # fmt: skip
    w, h, b = (torch.randn(4, dtype=F64) for _ in range(3))
    first = linear(w, h, b, b)
    kept = first.grads.clone()
    second = linear(w, h, b, 2 * b)
    assert torch.equal(first.grads, kept) and not torch.equal(second.grads, kept)
    storages = {tensor.untyped_storage().data_ptr() for tensor in (w, h, b)}
    assert first.grads.untyped_storage().data_ptr() not in storages
    torch.testing.assert_close(first.grads, b + b * (1 - 0.5**4))


def test_a_validation_loss_that_reads_a_hidden_number_is_found() -> None:
    scale = ContextVar("scale", default=1.0)
    hypergradient = hvp.Hypergradient(
        decayed(LOSSES["least squares"]), lambda w, h, b: scale.get() * F.mse_loss(net(w, b[0]), b[2]),
        hvp.Neumann(3, alpha=0.1), engine="linearized",
    )  # fmt: skip
    hypergradient(*point(), data(0), data(1))
    scale.set(2.0)
    with pytest.warns(UserWarning, match="traced gradient of val_loss is replaced by autograd's: the loss differs"):
        for _ in range(9):
            result = hypergradient(*point(), data(0), data(1))
    torch.testing.assert_close(result.val_loss, 2 * F.mse_loss(net(point()[0], data(1)[0]), data(1)[2]))
    assert "the loss differs" in hypergradient.report()


def test_modes_of_modules_are_part_of_a_trace() -> None:
    module = nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Linear(6, 4)).to(F64)
    network = hvp.functional(module)
    weights = {name: parameter.detach() for name, parameter in module.named_parameters()}

    def loss(w: Any, h: Tensor, b: Any) -> Tensor:
        return F.cross_entropy(network(w, b[0]), b[1]) + h.exp() * sum((p**2).sum() for p in w.values())

    results = {}
    before = {name: buffer.clone() for name, buffer in module.named_buffers()}
    for engine in ("linearized", "eager"):
        hypergradient = hvp.Hypergradient(loss, loss, hvp.Neumann(3, alpha=0.1), engine=engine)
        for mode in (True, False, True):
            module.train(mode)
            results[engine, mode] = hypergradient(weights, torch.zeros((), dtype=F64), data(0), data(1))
    for mode in (True, False):
        torch.testing.assert_close(
            results["linearized", mode].grads, results["eager", mode].grads, rtol=1e-9, atol=1e-9
        )
    assert not torch.equal(results["eager", True].grads, results["eager", False].grads)
    assert all(torch.equal(buffer, before[name]) for name, buffer in module.named_buffers())


def test_dropout_draws_anew_in_every_call_and_is_isolated() -> None:
    hypergradient = hvp.Hypergradient(
        decayed(LOSSES["least squares"]), lambda w, h, b: F.mse_loss(F.dropout(net(w, b[0]), 0.5), b[2]),
        hvp.Neumann(3, alpha=0.1), engine="linearized",
    )  # fmt: skip
    given, state = point(), torch.get_rng_state()
    losses = {float(hypergradient(*given, data(0), data(1)).val_loss) for _ in range(5)}
    assert len(losses) == 5 and torch.equal(torch.get_rng_state(), state)


def test_not_a_number_raises() -> None:
    hypergradient, _ = counted()
    for _ in range(3):
        hypergradient(*point(), data(0), data(1))
    weights, hyper = point()
    weights["first"][0, 0] = float("nan")
    with pytest.raises(hvp.DivergenceError):
        hypergradient(weights, hyper, data(0), data(1))


def test_auto_comes_to_programs_and_continues_with_them() -> None:
    engine = AutoEngine()
    train, val = decayed(LOSSES["cross entropy"]), lambda w, h, b: F.cross_entropy(net(w, b[0]), b[1])
    hypergradient = hvp.Hypergradient(train, val, hvp.Neumann(5, alpha=0.1), engine=engine)
    expected = hvp.Hypergradient(train, val, hvp.Neumann(5, alpha=0.1), engine="eager")(*point(), data(0), data(1))
    for known in range(400):
        result = hypergradient(*point(), data(0), data(1))
        if "gradients by the extension" in engine.report() or known == 399:
            break
        for entry in engine._linearized.gradients._known.values():
            entry.spent += 1.0
    assert "1 gradients by the extension" in engine.report() or "it is faster" in engine.report(), engine.report()
    assert_alike(result, expected)
    continued = AutoEngine()
    continued.load_state_dict(engine.state_dict())
    other = hvp.Hypergradient(train, val, hvp.Neumann(5, alpha=0.1), engine=continued)
    assert_alike(other(*point(), data(0), data(1)), expected)
    assert engine.report().count("by the extension") == continued.report().count("by the extension") or (
        "as before the checkpoint" in continued.report()
    )


def test_what_cannot_be_traced_is_left_to_autograd_and_said() -> None:
    def val(w: Any, h: Any, b: Any) -> Tensor:
        loss = F.mse_loss(net(w, b[0]), b[2])
        return loss * 2 if float(loss.detach()) > 1e9 else loss

    hypergradient = hvp.Hypergradient(
        decayed(LOSSES["least squares"]), val, hvp.Neumann(3, alpha=0.1), engine="linearized"
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        warnings.filterwarnings("ignore", "the weights are far")
        for _ in range(3):
            hypergradient(*point(), data(0), data(1))
    assert "gradients by autograd: TraceError" in hypergradient.report()
    assert isinstance(hypergradient.engine, LinearizedEngine)
