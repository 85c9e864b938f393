"""Compare all ways to a hypergradient on a real problem: `python -m bench.compare_methods PROBLEM --out FOLDER`.

For every method of `baselines.methods`: cosine and relative l2 error against the exact hypergradient at w* (float64),
gradient evaluations (a Hessian-vector product is two), time, and peak memory, by the number of products or steps; at
the minimum w*, and at weights trained for a short while only. With --searches also the validation loss that searches
reach by the gradients they spend. Prints tables; writes compare-<device>.csv, where a later run of some methods or
problems replaces their rows, and a plot for each problem.
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from baselines import search
from baselines.methods import METHODS, Method, find
from bench import compare_plots, results
from bench.compare_problems import EXACT_LIMIT, FORWARD_LIMIT, LINEAR_LIMIT, PROBLEMS, Comparison, build
from bench.interleave import Work, interleave, threads
from bench.report import duration, grid, size_of
from bench.results import Environment, Row
from hvp_engine.diagnostics import peak_memory
from hvp_engine.hypergradients.estimator import Estimate, Estimator

LENGTHS = (1, 2, 5, 10, 20, 50, 100)
CPU = torch.device("cpu")
MINIMUM, EARLY = "at w*", "early"
SLOW = 1.0
"""Seconds above which a call is timed once: what the first one does beside is little then."""


@dataclass(frozen=True)
class Measured:
    """One method at one length: what the table shows."""

    method: str
    length: int
    cosine: float
    error: float
    gradients: int
    seconds: float
    peak_bytes: int


def refusal(method: Method, problem: Comparison) -> str | None:
    """Why a method is left out of a problem of this size; None if it takes part."""
    size = problem.weight_count
    if "P^2" in method.memory and size > EXACT_LIMIT:
        return f"a dense matrix of {size} weights"
    if method.memory == "O(P H)" and size * size > LINEAR_LIMIT:
        return f"{size} x {size} slopes"
    if method.name == "unrolled, forward" and size > FORWARD_LIMIT:
        return f"{size} passes"
    return None


def measure(method: Method, problem: Comparison, length: int, weights: Any, timed: bool) -> Measured | str:
    """Value, work, time and memory; or the error that the method raised."""
    arguments = (weights, problem.hyper, problem.train, problem.val)
    assert method.make is not None
    try:
        estimator = method.make(problem.setting(), length)
        start = time.perf_counter()
        estimate = estimator(*arguments)
        first = time.perf_counter() - start
    except (ArithmeticError, ValueError) as error:  # diverged, or more than this method can do with these weights
        return f"{type(error).__name__}: {str(error)[:120]}"
    found = torch.cat([g.reshape(-1) for g in estimate.grads.values()])
    cosine, error_norm = agreement(found, problem.reference)
    with peak_memory(CPU) as meter:
        estimator(*arguments)
    seconds = first if timed else float("nan")
    if timed and first <= SLOW:
        samples = interleave({"call": Work(lambda: estimator(*arguments))}, CPU, seconds=0.2, rounds=5)["call"]
        seconds = sorted(samples)[len(samples) // 2]
    size = problem.weight_count
    return Measured(
        method.name,
        length,
        cosine,
        error_norm,
        _work(method, estimator, estimate, length, size),
        seconds,
        meter.peak_bytes,
    )


def agreement(found: Tensor, reference: Tensor) -> tuple[float, float]:
    """Cosine, and ||found - reference|| / ||reference||."""
    norm = torch.linalg.vector_norm
    return float(found @ reference / (norm(found) * norm(reference))), float(norm(found - reference) / norm(reference))


def _work(method: Method, estimator: Estimator, estimate: Estimate, length: int, size: int) -> int:
    """Gradients of a call: by the registry, or with the products that a solution counted; and those that its
    preconditioner is made from, as if it were made for this call."""
    solution = getattr(estimate, "solution", None)
    if solution is None:
        return method.gradients(length, size, size)
    preconditioner = getattr(getattr(estimator, "solver", None), "preconditioner", None)
    return 3 + 2 * (solution.hvps + getattr(preconditioner, "hvps", 0))


def compare(problem: Comparison, lengths: Sequence[int], chosen: Sequence[Method], quick: bool) -> Iterator[tuple]:
    """(place, Measured or a refusal) for every method and length."""
    for place, weights in ((MINIMUM, problem.minimum), (EARLY, problem.early)):
        for method in chosen:
            reason = refusal(method, problem)
            for length in lengths if method.iterative and reason is None else lengths[:1]:
                found = reason or measure(method, problem, length, weights, timed=place == MINIMUM and not quick)
                yield place, method, length, found
                if isinstance(found, str):
                    break


def rows_of(environment: Environment, problem: str, place: str, method: str, length: int, found: Any) -> list[Row]:
    """The rows of one measurement in the results format."""
    label = f"{problem}, {place}"
    if isinstance(found, str):
        return [environment.row("compare", label, method, length, 1, [], note=found)]
    figures = {
        "compare error": (found.error, "relative l2"),
        "compare cosine": (found.cosine, "cosine"),
        "compare gradients": (float(found.gradients), "gradients"),
        "compare time": (found.seconds, "s"),
        "compare memory": (float(found.peak_bytes), "bytes"),
    }
    return [
        environment.row(benchmark, label, method, length, 1, [value], unit)
        for benchmark, (value, unit) in figures.items()
        if value == value
    ]


def table(rows: Sequence[tuple], place: str) -> str:
    """Markdown of one place: for each method its best length and one of the usual length."""
    head = ["method", "i", "cosine", "relative l2 error", "gradients", "time", "peak memory"]
    body = []
    for where, method, length, found in rows:
        if where != place:
            continue
        if isinstance(found, str):
            body.append([method.name, str(length), f"left out: {found}", "", "", "", ""])
        else:
            body.append([
                method.name, str(length) if method.iterative else "-", f"{found.cosine:.5f}", f"{found.error:.2e}",
                str(found.gradients), duration(found.seconds) if found.seconds == found.seconds else "-",
                size_of(found.peak_bytes),
            ])  # fmt: skip
    return grid(head, body)


# Searches


TRIAL_STEPS = 100
"""Training steps of a trial: from the start to where the validation loss changes little."""

COPIES = 1_000_000
"""Weights, all copies of them together, up to which a self-tuning network perturbs every example by itself; beyond,
one perturbation serves a twentieth of a batch."""


def searches(problem: Comparison, gradients: int) -> dict[str, search.Search]:
    """Every search, by name, with settings that were chosen by hand once for all problems; each has the whole budget:
    a grid over one hyperparameter has as many points as there are trials."""

    def adam(rate: float) -> Callable[[Sequence[Tensor]], torch.optim.Optimizer]:
        return lambda tensors: torch.optim.Adam(tensors, lr=rate)

    def estimator(train: Any, val: Any) -> Estimator:
        make = find("CG").make
        assert make is not None
        return make(problem.setting(), 10)

    few = problem.weight_count * len(problem.train[0]) > COPIES
    perturbations = 20 if few else None
    return {
        "random search": search.RandomSearch(TRIAL_STEPS, adam(0.05)),
        "grid search": search.GridSearch(max(2, gradients // TRIAL_STEPS), TRIAL_STEPS, adam(0.05)),
        "Bayesian optimization": search.BayesianOptimization(TRIAL_STEPS, adam(0.05)),
        # One perturbation serves a whole batch: at the rate of the others the fit would jump about.
        "linear hypernetwork": search.LinearHypernetwork(adam(0.005), adam(0.1), 0.3, warmup_steps=100),
        "self-tuning network": search.SelfTuningNetwork(
            adam(0.02), adam(0.1), 0.3, 1e-4, warmup_steps=100, perturbations=perturbations
        ),
        "Algorithm 1": search.HypergradientDescent(estimator, 23, adam(0.02), adam(0.1), warmup_steps=100),
    }


def run_searches(problem: Comparison, one_decay: bool, gradients: int) -> dict[str, search.SearchResult | str]:
    """The result of every search, or why it was left out."""
    found: dict[str, search.SearchResult | str] = {}
    task = problem.search_problem(one_decay)
    size = 1 if one_decay else problem.weight_count
    for name, method in searches(problem, gradients).items():
        if name == "linear hypernetwork" and size * problem.weight_count > LINEAR_LIMIT:
            found[name] = f"{problem.weight_count} x {size} slopes"
        elif name == "Bayesian optimization" and size > FORWARD_LIMIT:
            found[name] = f"a Gaussian process in {size} dimensions"
        else:
            try:
                found[name] = method(task, gradients)
            except ValueError as error:
                found[name] = str(error)
        print(f"search | {problem.name} | {name} | {_short(found[name])}", flush=True)
    return found


def _short(found: search.SearchResult | str) -> str:
    if isinstance(found, str):
        return f"left out: {found}"
    looks = f"{found.validation_losses} looks at the validation loss"
    return f"validation loss {found.val_loss:.5f} after {found.gradients} gradients, {looks}"


def search_rows(environment: Environment, label: str, found: dict[str, search.SearchResult | str]) -> list[Row]:
    """The curve of every search: the lowest validation loss after so many gradients."""
    rows = []
    for name, result in found.items():
        if isinstance(result, str):
            rows.append(environment.row("search", label, name, 0, 1, [], note=result))
        else:
            rows += [
                environment.row("search", label, name, spent, 1, [loss], "validation loss")
                for spent, loss in result.curve
                if loss < float("inf")
            ]
    return rows


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser("bench.compare_methods", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("problem", choices=list(PROBLEMS), help=f"one of {', '.join(PROBLEMS)}")
    add("--out", type=Path, default=results.FOLDER, metavar="FOLDER", help="for the results (default: bench/results)")
    add("--methods", nargs="+", choices=[m.name for m in METHODS if m.make], metavar="NAME", help="default: all")
    add("--lengths", nargs="+", type=int, default=list(LENGTHS), metavar="I", help="products or steps")
    add("--searches", type=int, default=0, metavar="GRADIENTS", help="also compare searches, each with this budget")
    add("--quick", action="store_true", help="no timing")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the comparison that the command line asks for."""
    options = parse(arguments)
    environment = Environment.of(CPU)
    chosen = [m for m in METHODS if m.make and (not options.methods or m.name in options.methods)]
    rows: list[Row] = []
    with threads(1), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        problem = build(options.problem)
        condition = "unknown" if problem.condition is None else f"{problem.condition:.3g}"
        print(f"{problem.name}: {problem.weight_count} weights, as many hyperparameters; condition {condition}; exact "
              f"hypergradient with relative residual {problem.residual:.1e}\n")  # fmt: skip
        found = []
        for place, method, length, outcome in compare(problem, options.lengths, chosen, options.quick):
            found.append((place, method, length, outcome))
            rows += rows_of(environment, problem.name, place, method.name, length, outcome)
            print(".", end="", flush=True, file=sys.stderr)
        for place in (MINIMUM, EARLY):
            print(f"\n{place}\n\n{table(found, place)}")
        for one_decay in (True, False) if options.searches else ():
            label = f"{problem.name}, {'one decay' if one_decay else 'a decay for each weight'}"
            rows += search_rows(environment, label, run_searches(problem, one_decay, options.searches))
    file = options.out / f"compare-{results.slug(environment.device)}.csv"
    old = results.read(file) if file.exists() else []
    rows = results.merged(old, rows)
    results.write(file, rows)
    plot = compare_plots.draw(rows, problem.name, options.out)
    print(f"\nwritten: {file}, {plot}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
