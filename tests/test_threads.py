"""Several Python threads, and forked processes, at once: the numbers of one alone."""

from __future__ import annotations

import os
import signal
import threading
import time
import warnings
from collections.abc import Callable
from functools import partial

import numpy
import pytest
import torch
from numpy.random import mtrand
from threads_at_once import at_once
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from torch.utils.data import DataLoader, Dataset, TensorDataset

import hvp_engine as hvp
from hvp_engine._support.random_state import one_thread

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:the weights are far from a minimum")


def problem(seed: int, engine: str) -> tuple[hvp.Hypergradient, Callable[[hvp.Hypergradient], list[Tensor]]]:
    """A hypergradient of a small network of its own, and what calls one at this problem's point."""
    generator = torch.Generator().manual_seed(seed)
    module = nn.Sequential(nn.Linear(6, 40), nn.Tanh(), nn.Linear(40, 2))
    net = hvp.functional(module)
    weights = {name: torch.randn(w.shape, generator=generator) / 5 for name, w in module.named_parameters()}
    hyper = {name: torch.full_like(weight, -3.0) for name, weight in weights.items()}
    train, val = ((torch.randn(9, 6, generator=generator), torch.randn(9, 2, generator=generator)) for _ in range(2))

    def train_loss(w: dict[str, Tensor], h: dict[str, Tensor], batch: tuple[Tensor, Tensor]) -> Tensor:
        decay = sum((h[name].exp() * weight.square()).sum() for name, weight in w.items())
        return mse_loss(net(w, batch[0]), batch[1]) + decay

    def val_loss(w: dict[str, Tensor], h: dict[str, Tensor], batch: tuple[Tensor, Tensor]) -> Tensor:
        return mse_loss(net(w, batch[0]), batch[1])

    hypergradient = hvp.Hypergradient(train_loss, val_loss, solver=hvp.Neumann(5, alpha=0.05), engine=engine)
    return hypergradient, lambda hg: list(hg(weights, hyper, train, val).grads.values())


def same(found: list[Tensor], expected: list[Tensor]) -> bool:
    return all(torch.equal(mine, theirs) for mine, theirs in zip(found, expected, strict=True))


@pytest.mark.parametrize("engine", ["eager", "recorded", "linearized"])
def test_threads_with_a_hypergradient_each(engine: str) -> None:
    """Traced at the same time, and called at the same time."""
    expected = []
    for seed in range(4):
        hypergradient, call = problem(seed, engine)
        expected.append(call(hypergradient))
    start, count = threading.Barrier(4), torch.get_num_threads()

    def work(seed: int) -> bool:
        torch.set_num_threads(count)  # each thread has a number of its own, and rounding depends on it
        hypergradient, call = problem(seed, engine)
        start.wait()
        return all(same(call(hypergradient), expected[seed]) for _ in range(10))

    assert at_once(*(partial(work, seed) for seed in range(4))) == [True] * 4


def test_a_backward_pass_in_another_thread_waits_for_nobody() -> None:
    """On a GPU that is where backward passes run, and where checkpointing calls the module again."""
    module = nn.Linear(3, 2)
    net, weights = hvp.functional(module), dict(module.named_parameters())
    x = torch.randn(4, 3, requires_grad=True)
    found: list[Tensor] = []
    x.register_hook(lambda gradient: found.append(net(weights, gradient)))
    with one_thread():
        backward = threading.Thread(target=x.square().sum().backward, daemon=True)
        backward.start()
        backward.join(timeout=20)
    assert len(found) == 1


@pytest.mark.parametrize("engine", ["eager", "recorded", "linearized"])
def test_threads_that_share_a_hypergradient(engine: str) -> None:
    """And the module in its losses, and the process's generators."""
    hypergradient, call = problem(0, engine)
    expected = call(hypergradient)
    before = torch.get_rng_state(), mtrand.get_bit_generator(), str(numpy.random.get_state())
    count = torch.get_num_threads()

    def work() -> bool:
        torch.set_num_threads(count)
        return all(same(call(hypergradient), expected) for _ in range(10))

    assert at_once(*[work] * 4) == [True] * 4
    assert torch.equal(before[0], torch.get_rng_state())
    assert (mtrand.get_bit_generator(), str(numpy.random.get_state())) == before[1:]


def exit_code(child: int, seconds: float = 60.0) -> int | None:
    """How a child ended; None for one that had to be killed after so long."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


def large_solve() -> list[Tensor]:
    """A solve whose steps use all threads, those of torch and of the extension."""
    w = torch.linspace(-1, 1, 1 << 19)
    operator = hvp.HessianOperator(lambda w: (w.square() * w).sum() / 9 + w.square().sum(), w, engine="eager")
    return [operator.solve(torch.ones_like(w), hvp.Neumann(3, alpha=0.05)).value]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("engine", ["eager", "recorded", "linearized"])
def test_a_fork_after_use(engine: str, threads: int) -> None:
    """The child goes on with what the parent had bound and traced, on one thread; so does the parent, on all."""
    hypergradient, call = problem(0, engine)

    def results(threads: int) -> list[Tensor]:
        torch.set_num_threads(threads)
        return [*call(hypergradient), *large_solve()]

    before = torch.get_num_threads()
    try:
        on_one, expected = results(1), results(threads)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            child = os.fork()
        if child == 0:
            code = 1
            try:  # on more threads torch itself would wait for those of the parent
                code = 0 if same(results(1), on_one) else 2
            finally:
                os._exit(code)
        assert exit_code(child) == 0
        assert same(results(threads), expected)
    finally:
        torch.set_num_threads(before)


class Curvatures(Dataset[Tensor]):
    """Examples that are solves: what a loader's worker computes with this package."""

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> Tensor:
        return large_solve()[0] * (index + 1)


def test_solves_in_loader_workers_after_use() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        (expected,) = large_solve()
        loader = DataLoader(Curvatures(), batch_size=None, num_workers=2, timeout=60)
        assert same(list(loader), [expected, 2 * expected])
    finally:
        torch.set_num_threads(before)


def test_loader_workers_after_use() -> None:
    """Processes that a loader forks after hypergradients were computed; one that hangs is an error after 60 s."""
    hypergradient, call = problem(0, "linearized")
    call(hypergradient)

    def tuned(workers: int) -> list[Tensor]:
        generator = torch.Generator().manual_seed(0)
        examples = TensorDataset(torch.randn(12, 6, generator=generator), torch.randn(12, 2, generator=generator))
        loader = DataLoader(examples, batch_size=4, num_workers=workers, timeout=60 if workers else 0)
        torch.manual_seed(0)
        module, decay = nn.Linear(6, 2), torch.tensor(-3.0)
        net = hvp.functional(module)

        def train_loss(w: dict[str, Tensor], h: Tensor, batch: list[Tensor]) -> Tensor:
            return mse_loss(net(w, batch[0]), batch[1]) + sum(h.exp() * weight.square().sum() for weight in w.values())

        tuner = hvp.Tuner(
            module,
            decay,
            train_loss,
            lambda w, h, batch: mse_loss(net(w, batch[0]), batch[1]),
            weight_optimizer=lambda tensors: torch.optim.SGD(tensors, lr=0.1),
            hyper_optimizer=lambda tensors: torch.optim.SGD(tensors, lr=0.1),
            solver=hvp.Neumann(4, alpha=0.1),
            inner_steps=2,
            engine="eager",
        )
        tuner.fit(loader, loader, 4, progress=False)
        return [decay, *(parameter.detach() for parameter in module.parameters())]

    assert same(tuned(2), tuned(0))
