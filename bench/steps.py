"""The fused step by itself, the update part of a whole solve, and a neighbour that keeps a core busy."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bench.interleave import Work, synchronize
from bench.methods import solver_of
from bench.problems import Problem
from hvp_engine import ops
from hvp_engine._support.flat_vector import FlatVector, Layout
from hvp_engine.differentiation.double_backward import Tape
from hvp_engine.engines.base import begin
from hvp_engine.solvers.iteration import scalar

WORDS = {"neumann_step": 5, "neumann_step_horner": 4, "two _foreach_add_": 6, "add_": 3, "copy_": 2}
"""Elements that each weight makes a step read and write."""

SIZES = (1_000, 10_000, 100_000, 1_000_000, 10_000_000, 50_000_000)
TENSORS = (1, 20, 200)
ALPHA = 1e-6


def step_works(weights: int, tensors: int, device: torch.device) -> dict[str, Work]:
    """One step on `weights` float32 weights in `tensors` tensors; with one tensor also `add_` and `copy_`.

    Everything is written before it is timed: pages of `torch.zeros` are all the same one until then.
    """
    product = list(torch.randn(weights, device=device).split(weights // tensors))[:tensors]
    product = [part.clone() for part in product]
    layout = Layout.of(product)
    v, p = FlatVector.of(layout, product), FlatVector.of(layout, product)
    alpha, partials = scalar(ALPHA, device), layout.empty_partials()
    fused = ops.bind("neumann_step", (v.data, p.data), layout, (alpha,), 0.0, partials)
    horner = ops.bind("neumann_step_horner", (p.data, v.data), layout, (alpha,), 0.0, partials)
    v_list, p_list = [part.clone() for part in product], [part.clone() for part in product]

    def foreach() -> None:
        torch._foreach_add_(v_list, product, alpha=-ALPHA)
        torch._foreach_add_(p_list, v_list)

    works = {
        "neumann_step": Work(lambda: fused(product)),
        "neumann_step_horner": Work(lambda: horner(product)),
        "two _foreach_add_": Work(foreach),
    }
    if tensors == 1:
        x, y = torch.randn(weights, device=device), torch.randn(weights, device=device)
        works |= {"add_": Work(lambda: x.add_(y, alpha=ALPHA)), "copy_": Work(lambda: x.copy_(y))}
    return works


@contextlib.contextmanager
def busy_neighbour() -> Iterator[None]:
    """Another process that never rests, for the time of the block."""
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        time.sleep(0.2)
        yield
    finally:
        process.kill()
        process.wait()


Update = Callable[[list[Tensor], list[Tensor], Sequence[Tensor]], tuple[list[Tensor], list[Tensor]]]


@dataclass
class Stopwatch:
    """Adds up the time inside its blocks, waiting for the device at both ends."""

    device: torch.device
    seconds: float = 0.0

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        synchronize(self.device)
        start = time.perf_counter()
        yield
        synchronize(self.device)
        self.seconds += time.perf_counter() - start


def update_works(problem: Problem, terms: int) -> dict[str, Work]:
    """The updates alone of a solve of `terms` products, measured inside it, so with the caches that it leaves."""
    weights, alpha = list(problem.weights.values()), problem.alpha
    loss = problem.train_loss(problem.weights, problem.hyper, problem.train)
    gradient = torch.autograd.grad(loss, weights, create_graph=True)

    def plain(v: list[Tensor], p: list[Tensor], hv: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        v = [a - alpha * b for a, b in zip(v, hv, strict=True)]
        return v, [a + b for a, b in zip(p, v, strict=True)]

    def foreach(v: list[Tensor], p: list[Tensor], hv: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        torch._foreach_add_(v, list(hv), alpha=-alpha)
        torch._foreach_add_(p, v)
        return v, p

    def on_lists(update: Update) -> float:
        stopwatch = Stopwatch(problem.device)
        v, p = [t.clone() for t in problem.vector], [t.clone() for t in problem.vector]
        for _ in range(terms):
            hv = torch.autograd.grad(gradient, weights, v, retain_graph=True)
            with stopwatch.running():
                v, p = update(v, p, hv)
        return stopwatch.seconds

    def fused() -> float:
        stopwatch = Stopwatch(problem.device)
        tape = Tape(gradient, weights)
        iteration = begin(tape, problem.vector, solver_of(problem, terms), None)
        for _ in range(terms):
            hv = tape.product(iteration.direction.tangents)
            with stopwatch.running():
                iteration.step(hv)
        return stopwatch.seconds

    return {
        "list loop": Work(lambda: on_lists(plain), terms, self_timed=True),
        "list loop, foreach": Work(lambda: on_lists(foreach), terms, self_timed=True),
        "hvp_engine step": Work(fused, terms, self_timed=True),
    }
