"""What must hold when something fails in one process of a group; see spawned_processes.py."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from distributed_problem import (
    assert_same_bits,
    batch,
    compare,
    decays,
    losses,
    network,
    parallel,
    shard,
    weights_of,
)
from torch import Tensor

import hvp_engine as hvp
from hvp_engine.distributed import collectives
from hvp_engine.engines import auto


class _Broken(torch.autograd.Function):
    """The identity, whose second derivative fails when none is `left` that goes well."""

    left = 0

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return _BrokenBackward.apply(gradient)


class _BrokenBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        _Broken.left -= 1
        if _Broken.left < 0:
            raise RuntimeError("out of memory, say")
        return gradient


def _failing(rank: int, what: Callable[[Tensor], Tensor]) -> tuple[hvp.DataParallel, hvp.DataParallel]:
    """Losses; `what` changes the training loss in the last process."""
    train, val = losses(network())

    def broken(weights: Any, hyper: Any, batch: Any) -> Tensor:
        if rank == dist.get_world_size() - 1:
            weights = {name: what(weight) for name, weight in weights.items()}
        return train(weights, hyper, batch)

    return hvp.DataParallel(broken), hvp.DataParallel(val)


def check_errors_reach_all(rank: int, count: int, folder: Path) -> None:
    def raising(error: BaseException) -> Callable[[Tensor], Tensor]:
        def what(_: Tensor) -> Tensor:
            raise error

        return what

    last = count - 1
    arguments = weights_of(network()), decays(), shard(batch(1), rank, count), shard(batch(2), rank, count)
    for what, there, elsewhere in (
        (raising(ValueError("a bad batch")), ValueError, hvp.DistributedError),
        (raising(KeyboardInterrupt()), KeyboardInterrupt, hvp.DistributedError),
        (raising(hvp.DataError("no file")), hvp.DataError, hvp.DataError),
        (_Broken.apply, RuntimeError, hvp.DistributedError),  # only the first product fails
    ):
        _Broken.left = 0
        for solver in (hvp.Neumann(3, alpha=0.05), hvp.Neumann(3), hvp.ConjugateGradient(3)):
            hypergradient = hvp.Hypergradient(*_failing(rank, what), solver=solver, engine="eager")
            with pytest.raises(there if rank == last else elsewhere) as caught:
                hypergradient(*arguments)
            if rank != last:
                assert str(caught.value).startswith(f"process {last} of {count} failed: ")
    # A shape that only one process gets wrong; in the validation loss; and all goes on afterwards.
    module = network()
    hypergradient = hvp.Hypergradient(*parallel(module), solver=hvp.Neumann(3))
    wrong = (arguments[3][0][:, :2] if rank == last else arguments[3][0], arguments[3][1])
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        hypergradient(*arguments[:3], wrong)
    ours = hypergradient(*arguments)
    compare(ours, hvp.Hypergradient(*losses(module), solver=hvp.Neumann(3))(*arguments[:2], batch(1), batch(2)))


def check_an_error_at_any_product(rank: int, count: int, folder: Path) -> None:
    """Whichever product of a solve fails, the last one too: all raise, and none hangs."""
    last, terms, weights = count - 1, 4, len(weights_of(network()))
    arguments = weights_of(network()), decays(), shard(batch(1), rank, count), shard(batch(2), rank, count)
    for solver in (hvp.Neumann(terms, alpha=0.05), hvp.ConjugateGradient(terms, tol=0.0)):
        for product in range(terms):
            _Broken.left = product * weights
            hypergradient = hvp.Hypergradient(*_failing(rank, _Broken.apply), solver=solver, engine="eager")
            with pytest.raises(RuntimeError if rank == last else hvp.DistributedError, match="out of memory, say"):
                hypergradient(*arguments)
    _Broken.left = 10**6
    hvp.Hypergradient(*_failing(rank, _Broken.apply), solver=solver, engine="eager")(*arguments)


def check_no_product_waits_for_the_one_before(rank: int, count: int, folder: Path) -> None:
    """In a solve the flag of a message is read when the next product is on its way: one message is unread at most."""
    events: list[str] = []

    class Flag(collectives._Flag):
        def __init__(self, *arguments: Any):
            super().__init__(*arguments)
            self.number = len([event for event in events if event.startswith("sent")])
            events.append(f"sent {self.number}")

        def raised(self) -> bool:
            events.append(f"read {self.number}")
            return super().raised()

    arguments = weights_of(network()), decays(), shard(batch(1), rank, count), shard(batch(2), rank, count)
    hypergradient = hvp.Hypergradient(*parallel(network()), solver=hvp.Neumann(4, alpha=0.05), engine="eager")
    hypergradient(*arguments)
    with mock.patch.object(collectives, "_Flag", Flag):
        hypergradient(*arguments)
    # The two gradients; four products, each read after the next one was sent; the mixed product.
    solve = "sent 2, sent 3, read 2, sent 4, read 3, sent 5, read 4, read 5"
    expected = f"sent 0, read 0, sent 1, read 1, {solve}, sent 6, read 6"
    assert ", ".join(events) == expected, events


def check_divergence_is_raised_in_all(rank: int, count: int, folder: Path) -> None:
    arguments = weights_of(network()), decays(), shard(batch(1), rank, count), shard(batch(2), rank, count)
    with pytest.raises(hvp.DivergenceError) as caught:
        hvp.Hypergradient(*parallel(network()), solver=hvp.Neumann(300, alpha=50.0))(*arguments)
    assert_same_bits([], str(caught.value))
    infinite = _failing(rank, lambda weight: weight * torch.inf)
    with pytest.raises(hvp.NonFiniteError) as caught:
        hvp.Hypergradient(*infinite)(*arguments)
    assert_same_bits([], str(caught.value))


def check_different_weights_are_refused(rank: int, count: int, folder: Path) -> None:
    weights = weights_of(network())
    if rank == 1:
        weights["2.bias"] = weights["2.bias"] + 1e-6
    arguments = weights, decays(), shard(batch(1), rank, count), shard(batch(2), rank, count)
    with pytest.raises(hvp.DistributedError, match="others in process 1 than in process 0"):
        hvp.Hypergradient(*parallel(network()))(*arguments)
    with pytest.raises(ValueError, match="both or none"):
        hvp.Hypergradient(parallel(network())[0], losses(network())[1])


def check_an_agreed_engine_that_fails(rank: int, count: int, folder: Path) -> None:
    """The processes agree on eager, which process 0 has to build again; that fails."""
    arguments = weights_of(network()), decays(), shard(batch(1), rank, count), shard(batch(2), rank, count)

    def measured(contenders: Any) -> list[float]:
        eager_is_faster = rank == count - 1
        return [1.0 if (engine.name == "eager") == eager_is_faster else 2.0 for engine, _ in contenders]

    def failing(*_: Any) -> Any:
        raise RuntimeError("out of memory, say")

    with (
        mock.patch.object(auto, "seconds_per_term", measured),
        mock.patch.object(auto.AutoEngine, "linearize_by", failing if rank == 0 else auto.AutoEngine.linearize_by),
        pytest.raises(RuntimeError if rank == 0 else hvp.DistributedError, match="out of memory, say"),
    ):
        hvp.Hypergradient(*parallel(network()), solver=hvp.Neumann(5, alpha=0.05), engine="auto")(*arguments)


CHECKS = [
    check_errors_reach_all,
    check_an_error_at_any_product,
    check_no_product_waits_for_the_one_before,
    check_an_agreed_engine_that_fails,
    check_divergence_is_raised_in_all,
    check_different_weights_are_refused,
]
