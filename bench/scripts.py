"""What a public training script gains: `python -m bench.scripts [--problems NAME ...] [--out FILE.csv]`.

Every step draws a fresh batch. *drop-in*: the inverse-Hessian-vector product alone, `approx_inverse_hvp` in place of
the script's own loop on the same gradient. *hyper step*: three steps of SGD, the hypergradient, the hyperparameters'
step; the hypergradient by the script's own loop, by `hvp.hypergradient`, and by `hvp.Hypergradient`. Process CPU time
on one thread, the methods in turns. Rows named "first calls" have the seconds of the calls before the steady state
together, in which a drop-in builds programs and tries what is faster.

The loops are written anew from the formulas of the packages that are named: Neumann series of implicit-hyper-opt
(betty and AuxiLearn do the same sums), stocBiO's products of (I - alpha H) by a gradient step's own graph, and
hypergrad's fixed-point iteration.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

import hvp_engine as hvp
from bench import results, script_problems
from bench.interleave import threads
from bench.methods import foreach_loop, list_loop
from bench.problems import Batch, Problem
from bench.report import README, grid, put
from bench.results import Environment, Row

FILE = results.FOLDER / "scripts.csv"
TERMS = (3, 5, 10, 20)
WARM_UP, INNER_STEPS, LEARNING_RATE = 12, 3, 1e-3

List = Sequence[Tensor]
InverseHvp = Callable[[List, List, List, int, float], List]


def stocbio_loop(v: List, f: List, w: List, iterations: int, alpha: float) -> List:
    """Products with I - alpha H by differentiating the step w - alpha f."""
    steps = [a - alpha * b for a, b in zip(w, f, strict=True)]
    total = list(v)
    for _ in range(iterations):
        v = torch.autograd.grad(steps, w, v, retain_graph=True)
        total = [a + b for a, b in zip(total, v, strict=True)]
    return [alpha * a for a in total]


def fixed_point_loop(v: List, f: List, w: List, iterations: int, alpha: float) -> List:
    """x <- (I - alpha H) x + alpha v, from x = alpha v."""
    steps = [a - alpha * b for a, b in zip(w, f, strict=True)]
    x = [alpha * a for a in v]
    for _ in range(iterations):
        products = torch.autograd.grad(steps, w, x, retain_graph=True)
        x = [a + alpha * b for a, b in zip(products, v, strict=True)]
    return x


LOOPS: dict[str, InverseHvp] = {
    "list loop": list_loop,
    "list loop, foreach": foreach_loop,
    "stocBiO's loop": stocbio_loop,
    "hypergrad's fixed point": fixed_point_loop,
}
DROP_IN = "hvp_engine approx_inverse_hvp"


def gradient(problem: Problem, batch: Batch) -> List:
    """dL_T/dw with its graph."""
    loss = problem.train_loss(problem.weights, problem.hyper, batch)
    return torch.autograd.grad(loss, list(problem.weights.values()), create_graph=True)


def timed(call: Callable[[], object]) -> tuple[float, object]:
    start = time.process_time()
    result = call()
    return time.process_time() - start, result


def drop_in(problem: Problem, batch: Callable[[], Batch], terms: int, seconds: float) -> dict[str, list[float]]:
    """Seconds of each inverse-Hessian-vector product, on fresh gradients; the first calls of ours under another key."""
    weights = list(problem.weights.values())
    methods: dict[str, InverseHvp] = {**LOOPS, DROP_IN: hvp.approx_inverse_hvp}
    samples: dict[str, list[float]] = {name: [] for name in methods}
    first, step, began = 0.0, 0, time.perf_counter()
    while step < WARM_UP + 5 or time.perf_counter() - began < seconds:
        f = gradient(problem, batch())
        v = [torch.randn_like(w) / 100 for w in weights]
        names = list(methods) if step >= WARM_UP else ["list loop", DROP_IN]
        found = {}
        for name in names[step % len(names) :] + names[: step % len(names)]:
            took, found[name] = timed(partial(methods[name], v, f, weights, terms, problem.alpha))
            if step >= WARM_UP:
                samples[name].append(took)
            elif name == DROP_IN:
                first += took
        check(problem.name, found[DROP_IN], found["list loop"])
        step += 1
    return {**samples, f"{DROP_IN}, first calls": [first]}


def check(name: str, ours: object, theirs: object) -> None:
    """No speed of what is wrong."""
    assert isinstance(ours, Sequence) and isinstance(theirs, Sequence)
    distance = torch.stack([(a - b).norm() for a, b in zip(ours, theirs, strict=True)]).norm()
    size = torch.stack([b.norm() for b in theirs]).norm()
    if not distance <= 1e-4 * size:
        raise AssertionError(f"{name}: the drop-in differs from the list loop by {float(distance / size):.2g}")


def hyper_step(problem: Problem, batch: Callable[[], Batch], terms: int, seconds: float) -> dict[str, list[float]]:
    """Seconds of a whole hyper step by each style."""
    weights, hyper = list(problem.weights.values()), list(problem.hyper.values())
    detached = {key: w.detach() for key, w in problem.weights.items()}
    log_decays = {key: h.detach() for key, h in problem.hyper.items()}
    automatic = hvp.Hypergradient(problem.train_loss, problem.val_loss, hvp.Neumann(terms, problem.alpha))

    def own_loop(train: Batch, val: Batch) -> List:
        value = problem.val_loss(problem.weights, problem.hyper, val)
        v = torch.autograd.grad(value, weights)
        f = gradient(problem, train)
        mixed = torch.autograd.grad(f, hyper, list_loop(v, f, weights, terms, problem.alpha))
        return [-m for m in mixed]

    def recorded(train: Batch, val: Batch) -> List:
        losses = [
            problem.train_loss(problem.weights, problem.hyper, train),
            problem.val_loss(problem.weights, problem.hyper, val),
        ]
        return hvp.hypergradient(*losses, weights, hyper, hvp.Neumann(terms, problem.alpha))

    def functional(train: Batch, val: Batch) -> List:
        return list(automatic(detached, log_decays, train, val).grads.values())

    styles = {"list loop": own_loop, "hvp_engine hypergradient": recorded, "hvp_engine Hypergradient": functional}
    samples: dict[str, list[float]] = {name: [] for name in styles}
    firsts = dict.fromkeys(styles, 0.0)

    def whole(style: Callable[[Batch, Batch], List], batches: Sequence[Batch]) -> None:
        for train in batches[2:]:
            loss = problem.train_loss(problem.weights, problem.hyper, train)
            steps = torch.autograd.grad(loss, weights)
            with torch.no_grad():
                torch._foreach_add_(weights, steps, alpha=-LEARNING_RATE)
        grads = style(batches[0], batches[1])
        with torch.no_grad():
            torch._foreach_add_(hyper, [g.sign() for g in grads], alpha=-LEARNING_RATE)

    step, began = 0, time.perf_counter()
    while step < WARM_UP + 5 or time.perf_counter() - began < seconds:
        for name in list(styles)[step % 3 :] + list(styles)[: step % 3]:
            batches = [batch() for _ in range(2 + INNER_STEPS)]
            took, _ = timed(partial(whole, styles[name], batches))
            if step >= WARM_UP:
                samples[name].append(took)
            else:
                firsts[name] += took
        step += 1
    return samples | {f"{name}, first calls": [took] for name, took in firsts.items()}


def measure(name: str, environment: Environment, seconds: float) -> Iterable[Row]:
    """The rows of a problem, one case after another."""
    reason = script_problems.missing(name)
    if reason is not None:
        yield environment.row("drop-in", name, DROP_IN, 0, 1, [], note=reason)
        return
    for terms in TERMS if name != "resnet20" else TERMS[:1]:
        for benchmark, measured in (("drop-in", drop_in), ("hyper step", hyper_step)):
            problem, batch = script_problems.build(name)
            for method, samples in measured(problem, batch, terms, seconds).items():
                yield environment.row(benchmark, name, method, terms, 1, samples)


def markdown(file: Path = FILE) -> str:
    """How many times as fast as the list loop: the table of the README."""
    rows = results.read(file) if file.exists() else []
    if not rows:
        return "No results have been committed yet."
    medians = {(row.benchmark, row.problem, row.method, row.size): row.p50 for row in rows}

    def ratio(benchmark: str, problem: str, method: str, terms: int) -> str:
        loop = medians.get((benchmark, problem, "list loop", terms))
        ours = medians.get((benchmark, problem, method, terms))
        return f"{loop / ours:.2f}x" if loop and ours else "-"

    head = ["", *(f"drop-in, {terms} terms" for terms in TERMS), "hyper step, `hypergradient`", "`Hypergradient`"]
    body = []
    for problem in dict.fromkeys(row.problem for row in rows if row.p50 is not None):
        last = max(row.size for row in rows if row.problem == problem)
        drop_ins = [ratio("drop-in", problem, DROP_IN, terms) for terms in TERMS]
        styles = ("hvp_engine hypergradient", "hvp_engine Hypergradient")
        body.append([problem, *drop_ins, *(ratio("hyper step", problem, style, last) for style in styles)])
    last_row = rows[-1]
    return (
        f"{grid(head, body)}\n\nTimes as fast as the script's own list loop; {last_row.device}, one thread, torch "
        f"{last_row.torch_version}, {last_row.date}."
    )


def main() -> None:
    """Measure, and write the file after every problem."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--problems", nargs="+", choices=script_problems.NAMES, default=script_problems.NAMES)
    parser.add_argument("--seconds", type=float, default=3.0, help="for each case")
    parser.add_argument("--out", type=Path, default=FILE)
    given = parser.parse_args()
    warnings.filterwarnings("ignore", message="the weights are far")
    environment = Environment.of(torch.device("cpu"))
    for name in given.problems:
        with threads(1):
            rows = list(measure(name, environment, given.seconds))
        results.write(given.out, results.merged(results.read(given.out) if given.out.exists() else [], rows))
        medians = {(row.method, row.size): row.p50 for row in rows if row.benchmark == "drop-in" and row.p50}
        for terms in sorted({size for _, size in medians}):
            loop, ours = medians["list loop", terms], medians[DROP_IN, terms]
            print(f"{name}: {terms} terms, list loop {1e3 * loop:.2f} ms, drop-in {loop / ours:.2f}x", flush=True)
    if given.out == FILE and README.exists():
        put(markdown(), "scripts", README)


if __name__ == "__main__":
    main()
