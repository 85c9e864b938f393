"""The cases of every benchmark: which methods stand beside each other on which problem."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial

import torch

from bench import methods, peers, steps
from bench.interleave import Work
from bench.methods import LIST_LOOPS, OURS, Preparation, Run
from bench.problems import Problem, build
from bench.verification import Verified, verify
from hvp_engine.differentiation.linear_map import LinearMap

HYPERGRADIENT_ENGINES = ("eager", "auto")
"""Engines whose whole hypergradient is timed: a trace for it is another one, and takes its time."""

UNROLLED_PROBLEM = "lenet"
UNROLLED_LENGTHS = (1, 2, 5, 10, 20, 50, 100, 200)
HYPERGRADIENT_PROBLEMS = (
    "logistic", "mlp", "mlp-one-decay", "lenet", "resnet44", "lstm", "looped-lstm", "large-lstm", "transformer",
)  # fmt: skip
MEMORY_PROBLEMS = ("logistic", "mlp", "lenet", "resnet20", "resnet44", "unet", "lstm", "large-lstm", "transformer")
UPDATE_PROBLEMS = ("logistic", "mlp", "lenet")
NEIGHBOUR_SIZES = (1_000_000, 10_000_000)


@dataclass(frozen=True)
class Case:
    """Works that are timed beside each other, under the names that results give them."""

    benchmark: str
    problem: str
    size: int
    works: dict[str, Work]


def step_cases(device: torch.device, sizes: Sequence[int] = steps.SIZES) -> Iterator[Case]:
    """The fused step at every size, in 1, 20 and 200 tensors; made one by one, since the largest fill gigabytes."""
    for weights in sizes:
        for tensors in steps.TENSORS:
            yield Case("step", tensor_count(tensors), weights, steps.step_works(weights, tensors, device))


def neighbour_cases(device: torch.device) -> Iterator[Case]:
    """The same in 20 tensors, to be timed inside :func:`bench.steps.busy_neighbour`."""
    for weights in NEIGHBOUR_SIZES:
        works = steps.step_works(weights, 20, device)
        yield Case("step, busy neighbour", tensor_count(20), weights, works)


def tensor_count(tensors: int) -> str:
    """What results call a step's problem."""
    return "1 tensor" if tensors == 1 else f"{tensors} tensors"


class ProblemSuite:
    """The benchmarks of one problem; its engines, and so their traces, are shared by all of them."""

    def __init__(self, name: str, device: torch.device):
        self.problem: Problem = build(name, device)
        self.engines = methods.own_engines()

    @cached_property
    def inverse_hvps(self) -> Verified:
        candidates = methods.own_inverse_hvps(self.engines) | peers.inverse_hvps()
        if self.problem.brief:
            names = [*LIST_LOOPS, *(f"{OURS} {name}" for name in self.engines)]
            candidates = {name: candidates[name] for name in names}
        return self._settled("inverse_hvp", candidates)

    @cached_property
    def hypergradients(self) -> Verified:
        made = {name: self.engines[name] for name in HYPERGRADIENT_ENGINES}
        return self._settled("hypergradient", methods.own_hypergradients(made) | peers.hypergradients())

    @cached_property
    def unrolled(self) -> Verified:
        return verify("unrolled", self.problem, {"unrolling": methods.unrolled} | peers.unrolled())

    def inverse_hvp(self, terms: int) -> Case:
        """Gradient and solve. Peers take part at the problem's usual length only."""
        runs = self.inverse_hvps.runs
        if terms != self.problem.terms:
            runs = {name: run for name, run in runs.items() if name in LIST_LOOPS or methods.is_ours(name)}
        return self._case("inverse_hvp", terms, runs)

    def hypergradient(self) -> Case:
        """The whole hypergradient, and unrolling that takes as many steps."""
        return self._case("hypergradient", self.problem.terms, self.hypergradients.runs | self.unrolled.runs)

    @property
    def against_unrolling(self) -> dict[str, Run]:
        """Our hypergradients by engine, and unrolling."""
        names = [f"{OURS} {name}" for name in HYPERGRADIENT_ENGINES]
        runs = {name: self.hypergradients.runs[name] for name in names if name in self.hypergradients.runs}
        return runs | {name: run for name, run in self.unrolled.runs.items() if name == "unrolling"}

    def unrolling(self, length: int) -> Case:
        """Hypergradients of `length` products and through as many steps."""
        return self._case("unrolling", length, self.against_unrolling)

    def hvp(self) -> Case:
        """One term of a solve, product and step, by every engine; and one gradient."""
        problem, terms = self.problem, 2 if self.problem.brief else self.problem.terms
        weights = list(problem.weights.values())

        def gradient() -> object:
            loss = problem.train_loss(problem.weights, problem.hyper, problem.train)
            return torch.autograd.grad(loss, weights)

        loss = problem.train_loss(problem.weights, problem.hyper, problem.train)
        f = torch.autograd.grad(loss, weights, create_graph=True)
        vector, alpha = problem.vector, problem.alpha
        works = {"gradient": Work(gradient)}
        for name in LIST_LOOPS:
            works[name] = Work(partial(methods.TAPES[name], vector, f, weights, terms, alpha), terms)
        for name, linearization in self._linearizations():
            solver = methods.solver_of(problem, terms)
            works[f"{OURS} {name}"] = Work(partial(self.engines[name].run, linearization, vector, solver, None), terms)
        return Case("hvp", problem.name, 1, works)

    def update(self) -> Case:
        """The updates of a solve alone."""
        return Case("update", self.problem.name, 1, steps.update_works(self.problem, self.problem.terms))

    def _settled(self, kind: str, candidates: dict[str, Preparation]) -> Verified:
        verified = verify(kind, self.problem, candidates)
        if f"{OURS} auto" in verified.runs:
            start = time.perf_counter()
            methods.settle(self.engines, verified.runs[f"{OURS} auto"])
            verified.setup[f"{OURS} auto"] += time.perf_counter() - start
        return verified

    def _linearizations(self) -> Iterator[tuple[str, LinearMap]]:
        for name, engine in self.engines.items():
            if f"{OURS} {name}" in self.inverse_hvps.runs:
                yield name, methods.operator_of(engine, self.problem).linear_map

    def _case(self, benchmark: str, size: int, runs: dict[str, Run]) -> Case:
        works = {name: Work(partial(run, size), threads=getattr(run, "threads", None)) for name, run in runs.items()}
        return Case(benchmark, self.problem.name, size, works)


@lru_cache(maxsize=1)
def suite_of(name: str, device: torch.device) -> ProblemSuite:
    """The suite of a problem; the last one is kept."""
    return ProblemSuite(name, device)
