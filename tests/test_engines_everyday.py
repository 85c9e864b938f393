"""What everyday use asks of the engines: minima, dropout beside attention, checkpointing, batches whose length changes,
operators made anew for each task."""

from __future__ import annotations

import gc
import warnings
import weakref
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import hvp_engine as hvp
from hvp_engine.engines import AutoEngine, LinearizedEngine
from hvp_engine.operators.hessian import engine_for_operator

pytestmark = pytest.mark.filterwarnings("ignore:the weights are far from a minimum")

SOAK = pytest.mark.soak

# --- At a minimum the gradient is rounding ---------------------------------------------------------------------------


def ridge(seed: int, dtype: torch.dtype) -> tuple[Callable[..., Tensor], list[Tensor], Tensor]:
    """A ridge regression at its exact minimum, its two weights of very different sizes."""
    generator = torch.Generator(torch.get_default_device()).manual_seed(seed)
    rows, columns = 20 + seed % 30, 2 + seed % 5
    X = torch.randn(rows, columns, generator=generator, dtype=torch.float64) * 10.0 ** (seed % 7 - 3)
    y = torch.randn(rows, generator=generator, dtype=torch.float64) + seed % 3
    decay = torch.randn(columns, generator=generator, dtype=torch.float64)
    w = torch.linalg.solve(X.T @ X / rows + torch.diag(decay.exp()), X.T @ y / rows).to(dtype)
    X, y = X.to(dtype), y.to(dtype)

    def loss(weights: list[Tensor], decay: Tensor, batch: Any) -> Tensor:
        w = torch.cat(weights)
        return 0.5 * (X @ w - y).square().mean() + 0.5 * (decay.exp() * w * w).sum()

    return loss, [w[:1], w[1:]], decay.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("first", [0, 10, *(pytest.param(k, marks=SOAK) for k in range(20, 1000, 10))])
def test_no_false_alarm_at_a_minimum(dtype: torch.dtype, first: int) -> None:
    for seed in range(first, first + 10):
        loss, weights, decay = ridge(seed, dtype)
        engine = LinearizedEngine()
        hg = hvp.Hypergradient(loss, lambda w, h, b: torch.cat(w).square().sum(), hvp.Identity(), engine)
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            warnings.filterwarnings("ignore", message="the weights are far")
            hg(weights, decay, None, None)
        assert not any(functions.distrust for functions in engine._cache.values())


@pytest.mark.parametrize("fault", [1e-3, 1e-6])
@pytest.mark.parametrize("seed", range(8))
def test_a_fault_at_a_minimum_is_found(fault: float, seed: int) -> None:
    """A hidden number that is another one after the trace; here so that one term of the gradient moves a little."""
    loss, weights, decay = ridge(seed, torch.float64)
    factor = ContextVar("factor", default=0.0)

    def faulty(weights: list[Tensor], decay: Tensor, batch: Any) -> Tensor:
        return loss(weights, decay, batch) + factor.get() * (decay.exp() * torch.cat(weights).square()).sum()

    engine = LinearizedEngine()
    hg = hvp.Hypergradient(faulty, lambda w, h, b: torch.cat(w).square().sum(), hvp.Identity(), engine)
    hg(weights, decay, None, None)
    factor.set(fault)
    with pytest.warns(UserWarning, match="replaced by 'eager'"):
        for _ in range(10):  # the tenth call looks
            hg(weights, decay, None, None)


# --- Kernels without a second derivative -----------------------------------------------------------------------------


class Attention(nn.Module):
    """Dropout beside attention that has none, as LoRA and vision transformers have it."""

    def __init__(self, checkpointed: bool = False, dropout: float = 0.5):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(8, 8) for _ in range(3))
        self.dropout, self.checkpointed = nn.Dropout(dropout), checkpointed

    def forward(self, x: Tensor) -> Tensor:
        if self.checkpointed:
            return checkpoint(self.attend, x, use_reentrant=False)
        return self.attend(x)

    def attend(self, x: Tensor) -> Tensor:
        x = self.dropout(x)
        heads = [part(x).view(2, 5, 2, 4).transpose(1, 2) for part in (self.q, self.k, self.v)]
        return F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)


def losses_of(module: nn.Module) -> tuple[Callable[..., Tensor], Callable[..., Tensor], dict[str, Tensor], Tensor]:
    net = hvp.functional(module)

    def val(w: Any, h: Any, x: Tensor) -> Tensor:
        return net(w, x).square().mean()

    def train(w: Any, h: Any, x: Tensor) -> Tensor:
        return net(w, x).sin().mean() + h.exp() * sum(p.square().sum() for p in w.values())

    return train, val, {name: p.detach() for name, p in module.named_parameters()}, torch.randn(2, 5, 8)


@pytest.mark.filterwarnings("ignore:.*plain kernels")
def test_dropout_beside_attention_draws_the_same_mask_in_every_engine() -> None:
    torch.manual_seed(0)
    train, val, weights, x = losses_of(Attention())
    results = {}
    for engine in ("eager", "linearized"):
        hg = hvp.Hypergradient(train, val, hvp.Neumann(3, alpha=0.1), engine)
        torch.manual_seed(1)
        results[engine] = [hg(weights, torch.tensor(-3.0), x, x).grads for _ in range(3)]
        if engine == "linearized":
            assert not any(functions.distrust for functions in hg.engine._cache.values())


@pytest.mark.filterwarnings("ignore:.*plain kernels")
def test_checkpointed_attention_has_the_products_of_the_plain_module() -> None:
    values = []
    for checkpointed in (False, True):
        torch.manual_seed(0)
        train, val, weights, x = losses_of(Attention(checkpointed, dropout=0.0))
        hg = hvp.Hypergradient(train, val, hvp.Neumann(5, alpha=0.1), "eager")
        values.append(hg(weights, torch.tensor(-3.0), x, x).grads)
    torch.testing.assert_close(values[1], values[0], rtol=1e-5, atol=1e-7)


@pytest.mark.filterwarnings("ignore:.*plain kernels")
def test_dropout_before_a_checkpoint_draws_the_masks_of_the_plain_module() -> None:
    """A functional call finds out about checkpointing on the way, and begins again."""

    class Net(nn.Module):
        def __init__(self, checkpointed: bool):
            super().__init__()
            self.checkpointed, self.first, self.second = checkpointed, nn.Linear(8, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = F.dropout(self.first(x), 0.5)
            return checkpoint(self.second, x, use_reentrant=False) if self.checkpointed else self.second(x)

    values = []
    for checkpointed in (False, True):
        torch.manual_seed(0)
        train, val, weights, x = losses_of(Net(checkpointed))
        torch.manual_seed(3)
        hg = hvp.Hypergradient(train, val, hvp.Neumann(5, alpha=0.1), "eager")
        values.append(hg(weights, torch.tensor(-3.0), x, x).grads)
    torch.testing.assert_close(values[1], values[0], rtol=1e-5, atol=1e-7)


def test_no_false_alarm_where_the_loss_is_constant() -> None:
    def loss(w: Tensor, h: Tensor, x: Tensor) -> Tensor:
        return torch.view_as_real(torch.exp(1j * w) * x).square().mean() + h * 0.0

    engine = LinearizedEngine()
    x = torch.randn(5, dtype=torch.complex128)
    hg = hvp.Hypergradient(loss, lambda w, h, x: w.sum() + h, hvp.Identity(), engine)
    hg(torch.randn(5, dtype=torch.float64), torch.tensor(1.0, dtype=torch.float64), x, x)
    assert not any(functions.distrust for functions in engine._cache.values())


# --- Batches whose length changes ------------------------------------------------------------------------------------


def lengths_loss(w: Tensor, h: Tensor, x: Tensor) -> Tensor:
    state = torch.zeros(3)
    for row in x:
        state = torch.tanh(w @ state + row)
    return state.square().sum() + h * w.square().sum()


def test_only_the_first_shape_is_traced_at_first_sight() -> None:
    engine = AutoEngine(compile_budget_s=0.0)
    hg = hvp.Hypergradient(lengths_loss, lengths_loss, hvp.Neumann(2, alpha=0.01), engine)
    w = torch.eye(3) / 2
    for length in range(2, 12):
        hg(w, torch.tensor(0.1), torch.ones(length, 3), torch.ones(2, 3))
    assert engine._linearized.traces <= 1
    assert "another shape of a loss" in engine.report()


def test_a_shape_that_comes_again_and_again_is_traced() -> None:
    engine = AutoEngine(compile_budget_s=0.0)
    hg = hvp.Hypergradient(lengths_loss, lengths_loss, hvp.Neumann(2, alpha=0.01), engine)
    w = torch.eye(3) / 2
    for length in (2, 3):
        hg(w, torch.tensor(0.1), torch.ones(length, 3), torch.ones(2, 3))
    traces = engine._linearized.traces
    waiting = next(choice for choice in engine.choices.values() if choice.trace_seconds is not None)
    waiting.trace_seconds = 1e-9  # as if the time had come
    hg(w, torch.tensor(0.1), torch.ones(3, 3), torch.ones(2, 3))
    assert engine._linearized.traces == traces + 1 or waiting.engine.name == "eager"
    assert list(engine.choices.values())[-1].trace_seconds is None


def test_traces_are_forgotten_the_oldest_first() -> None:
    engine = LinearizedEngine()

    def loss(w: Tensor, h: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(x @ w).square().sum() + h * w.square().sum()

    hg = hvp.Hypergradient(loss, loss, hvp.Neumann(1, alpha=0.01), engine)
    w = torch.eye(3) / 2
    for length in range(1, 21):
        hg(w, torch.tensor(0.1), torch.ones(length, 3), torch.ones(2, 3))
        hg(w, torch.tensor(0.1), torch.ones(1, 3), torch.ones(2, 3))  # always in use
    assert engine.traces == 20 and len(engine._cache) == 16
    assert "4 of them forgotten" in hg.report()


# --- Operators made anew ---------------------------------------------------------------------------------------------


def test_fresh_operators_of_a_loss_share_what_was_chosen() -> None:
    def loss(w: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(x @ w).square().sum() + w.square().sum()

    engines = [hvp.HessianOperator(loss, torch.ones(3), torch.full((4, 3), float(k))).engine for k in range(3)]
    assert engines[0] is engines[1] is engines[2]
    assert engines[0]._linearized.traces <= 1
    for k in range(3):
        H = hvp.HessianOperator(loss, torch.ones(3), torch.full((4, 3), float(k)))
        eager = hvp.HessianOperator(loss, torch.ones(3), torch.full((4, 3), float(k)), engine="eager")
        torch.testing.assert_close(H @ torch.arange(3.0), eager @ torch.arange(3.0))


def test_a_shared_engine_does_not_keep_the_loss_alive() -> None:
    data = torch.ones(1000)

    def loss(w: Tensor) -> Tensor:
        return (w * data[0]).square().sum()

    hvp.HessianOperator(loss, torch.ones(3))
    watched, watched_engine = weakref.ref(loss), weakref.ref(engine_for_operator("auto", loss))
    del loss
    gc.collect()
    assert watched() is None and watched_engine() is None


# --- Batches whose optional parts come and go ------------------------------------------------------------------------


def optional_parts(w: Tensor, batch: tuple[Tensor, Tensor | None, Tensor | None]) -> Tensor:
    x, factor, shift = batch
    y = (x @ w).tanh()
    y = y if factor is None else y * factor
    return (y if shift is None else y + shift).square().mean()


def number_of_any_type(w: Tensor, batch: tuple[Tensor, bool | int | float]) -> Tensor:
    x, number = batch
    return (x @ w).tanh().square().mean() * (3.0 if type(number) is int else number)


PART = torch.linspace(0.5, 2.0, 6, dtype=torch.float64)

COMING_AND_GOING: dict[str, tuple[Callable[..., Tensor], list[tuple[Any, ...]]]] = {
    "a tensor or None": (optional_parts, [(None, None), (PART, None)]),
    "one or the other": (optional_parts, [(PART, None), (None, PART)]),
    "equal numbers of other types": (number_of_any_type, [(1,), (1.0,), (True,)]),
}


@pytest.mark.parametrize("engine", ["recorded", "linearized", "auto"])
@pytest.mark.parametrize("name", COMING_AND_GOING)
def test_optional_parts_of_a_batch(name: str, engine: str) -> None:
    loss, parts = COMING_AND_GOING[name]
    generator = torch.Generator().manual_seed(0)

    def train(w: Tensor, decay: Tensor, batch: Any) -> Tensor:
        return loss(w, batch) + decay * w.square().sum()

    ours, plain = (
        hvp.Hypergradient(train, lambda w, h, batch: loss(w, batch), hvp.Neumann(3, 0.1), e) for e in (engine, "eager")
    )
    w, decay = torch.ones(4, dtype=torch.float64), torch.tensor(0.1, dtype=torch.float64)
    for k in range(12):
        x = torch.randn(6, 4, generator=generator, dtype=torch.float64)
        batches = [(x, *parts[i % len(parts)]) for i in (k // 2, k // 3)]
        torch.testing.assert_close(ours(w, decay, *batches).grads, plain(w, decay, *batches).grads)
