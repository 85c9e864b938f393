"""Ways to an inverse-Hessian-vector product and to a hypergradient: plain loops, our engines, unrolling.

A *tape* takes (v, f, weights, iterations, alpha), f the gradient with its graph, as public code does. A *preparation*
takes a problem, does what a training script does once, and returns a run: iterations -> list of tensors, which does
everything else, from the forward on.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial

import torch
from torch import Tensor

import hvp_engine as hvp
from bench.problems import Problem
from hvp_engine import engines
from hvp_engine.engines.auto import AutoEngine

Tape = Callable[[Sequence[Tensor], Sequence[Tensor], Sequence[Tensor], int, float], Sequence[Tensor]]
Run = Callable[[int], Sequence[Tensor]]
Preparation = Callable[[Problem], Run]

OURS = "hvp_engine"
"""What the names of our own methods begin with."""

APPROXIMATE = ("finite_difference",)
"""Engines for losses without second derivatives; their error is no fault, but there is nothing to compare."""


# Tapes


def list_loop(
    v: Sequence[Tensor], f: Sequence[Tensor], weights: Sequence[Tensor], iterations: int, alpha: float
) -> Sequence[Tensor]:
    """Algorithm 3 on lists, tensor by tensor."""
    p = v
    for _ in range(iterations):
        hv = torch.autograd.grad(f, weights, v, retain_graph=True)
        v = [a - alpha * b for a, b in zip(v, hv, strict=True)]
        p = [a + b for a, b in zip(p, v, strict=True)]
    return [alpha * a for a in p]


def foreach_loop(
    v: Sequence[Tensor], f: Sequence[Tensor], weights: Sequence[Tensor], iterations: int, alpha: float
) -> Sequence[Tensor]:
    """Algorithm 3 on lists, updated in place by two multi-tensor additions."""
    v, p = [a.clone() for a in v], [a.clone() for a in v]
    for _ in range(iterations):
        hv = torch.autograd.grad(f, weights, v, retain_graph=True)
        torch._foreach_add_(v, hv, alpha=-alpha)
        torch._foreach_add_(p, v)
    torch._foreach_mul_(p, alpha)
    return p


def flat_loop(
    v: Sequence[Tensor], f: Sequence[Tensor], weights: Sequence[Tensor], iterations: int, alpha: float
) -> Sequence[Tensor]:
    """Algorithm 3 on one vector, concatenated anew for every product, as the paper's code has it."""
    gradient, term = _concatenated(f), _concatenated(v)
    p = term
    for _ in range(iterations):
        term = term - alpha * _concatenated(torch.autograd.grad(gradient, weights, term, retain_graph=True))
        p = p + term
    parts = (alpha * p).split([w.numel() for w in weights])
    return [part.view_as(w) for part, w in zip(parts, weights, strict=True)]


def _concatenated(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([t.reshape(-1) for t in tensors])


TAPES: dict[str, Tape] = {
    "list loop": list_loop,
    "list loop, foreach": foreach_loop,
    "flat loop": flat_loop,
    f"{OURS} approx_inverse_hvp": hvp.approx_inverse_hvp,
}
LIST_LOOPS = ("list loop", "list loop, foreach")
"""The plain list loop in its two forms; the faster one counts."""


def taped_inverse_hvp(tape: Tape, problem: Problem) -> Run:
    """The inverse-Hessian-vector product by a tape, the gradient included."""
    weights = list(problem.weights.values())

    def run(iterations: int) -> Sequence[Tensor]:
        loss = problem.train_loss(problem.weights, problem.hyper, problem.train)
        f = torch.autograd.grad(loss, weights, create_graph=True)
        return tape(problem.vector, f, weights, iterations, problem.alpha)

    return run


def taped_hypergradient(tape: Tape, problem: Problem) -> Run:
    """The hypergradient around a tape."""
    weights, hyper = list(problem.weights.values()), list(problem.hyper.values())

    def run(iterations: int) -> Sequence[Tensor]:
        value = problem.val_loss(problem.weights, problem.hyper, problem.val)
        found = torch.autograd.grad(value, weights + hyper, allow_unused=True)
        loss = problem.train_loss(problem.weights, problem.hyper, problem.train)
        f = torch.autograd.grad(loss, weights, create_graph=True)
        x = tape(found[: len(weights)], f, weights, iterations, problem.alpha)
        mixed = torch.autograd.grad(f, hyper, x)
        direct = found[len(weights) :]
        return [-second if first is None else first - second for first, second in zip(direct, mixed, strict=True)]

    return run


# Our engines


def solver_of(problem: Problem, iterations: int) -> hvp.Neumann:
    return hvp.Neumann(iterations, alpha=problem.alpha)


def operator_of(engine: engines.Engine, problem: Problem) -> hvp.HessianOperator:
    """The training loss's Hessian at the problem's point."""
    return hvp.HessianOperator(problem.train_loss, problem.weights, problem.hyper, problem.train, engine=engine)


def engine_inverse_hvp(engine: engines.Engine, problem: Problem) -> Run:
    """The same through a :class:`HessianOperator`; a trace is made once and reused."""
    vector = dict(zip(problem.weights, problem.vector, strict=True))

    def run(iterations: int) -> Sequence[Tensor]:
        operator = operator_of(engine, problem)
        return list(operator.solve(vector, solver_of(problem, iterations)).value.values())

    return run


def engine_hypergradient(engine: engines.Engine, problem: Problem) -> Run:
    """The hypergradient through :class:`Hypergradient`, which a script makes once."""

    @cache
    def made(iterations: int) -> hvp.Hypergradient:
        solver = solver_of(problem, iterations)
        return hvp.Hypergradient(problem.train_loss, problem.val_loss, solver=solver, engine=engine)

    def run(iterations: int) -> Sequence[Tensor]:
        found = made(iterations)(problem.weights, problem.hyper, problem.train, problem.val)
        return list(found.grads.values())

    return run


# Unrolling


def unrolled(problem: Problem) -> Run:
    """The hypergradient through iterations + 1 steps of SGD, by plain autograd as a script without this package has it.

    So it is to `baselines.estimators.Unrolled`, whose numbers it has, what the list loop is to our engines. At a
    minimum of the training loss it equals the implicit one of that many products.
    """
    names, hyper = list(problem.weights), list(problem.hyper.values())

    def run(iterations: int) -> Sequence[Tensor]:
        weights: Sequence[Tensor] = list(problem.weights.values())
        for _ in range(iterations + 1):
            loss = problem.train_loss(dict(zip(names, weights, strict=True)), problem.hyper, problem.train)
            gradient = torch.autograd.grad(loss, weights, create_graph=True)
            weights = [w - problem.alpha * g for w, g in zip(weights, gradient, strict=True)]
        value = problem.val_loss(dict(zip(names, weights, strict=True)), problem.hyper, problem.val)
        return torch.autograd.grad(value, hyper)

    return run


# What there is


def own_engines() -> dict[str, engines.Engine]:
    """A new engine of every exact kind that is more than eager here; kept for a problem, so that its traces are."""
    left_out = APPROXIMATE if torch.cuda.is_available() else (*APPROXIMATE, "cudagraph")
    made = {name: engines.create(name) for name in engines.ENGINES if name not in left_out}
    return made if "cudagraph" in left_out else made | {COMPILED_GRAPH: compiled_graph()}


COMPILED_GRAPH = "cudagraph, compiled"


def compiled_graph() -> engines.CudaGraphEngine:
    """CUDA graphs of compiled parts."""
    return engines.CudaGraphEngine(compile_budget_s=120.0)


def settle(made: Mapping[str, engines.Engine], run: Run) -> None:
    """Let `auto` come to its final choice: it puts off traces, and compiling, until they can repay themselves."""
    for engine in made.values():
        if isinstance(engine, AutoEngine):
            while any(choice.trace_seconds is not None for choice in engine.choices.values()):
                for choice in engine.choices.values():
                    choice.trace_seconds = None if choice.trace_seconds is None else 0.0
                run(1)
            for choice in engine.choices.values():
                if choice.compile_seconds is not None:
                    choice.compile_seconds = 0.0
            for known in engine._linearized.gradients._known.values():
                known.spent = math.inf
            run(1)


def own_inverse_hvps(made: Mapping[str, engines.Engine]) -> dict[str, Preparation]:
    """Every inverse-Hessian-vector product that needs no other package."""
    found: dict[str, Preparation] = {name: partial(taped_inverse_hvp, tape) for name, tape in TAPES.items()}
    return found | {f"{OURS} {name}": partial(engine_inverse_hvp, engine) for name, engine in made.items()}


def own_hypergradients(made: Mapping[str, engines.Engine]) -> dict[str, Preparation]:
    """Every implicit hypergradient that needs no other package."""
    found: dict[str, Preparation] = {name: partial(taped_hypergradient, tape) for name, tape in TAPES.items()}
    return found | {f"{OURS} {name}": partial(engine_hypergradient, engine) for name, engine in made.items()}


def is_ours(name: str) -> bool:
    return name.startswith(OURS)
