"""Plots of a results file: solves by method, the fused step's bandwidth, and unrolling."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bench.problems import PROBLEMS
from bench.report import case
from bench.results import Row
from bench.steps import WORDS

matplotlib.use("Agg")


def draw(rows: Sequence[Row], folder: Path, stem: str) -> list[Path]:
    """Draw what the rows allow; the files that were written."""
    figures = {"solves": solves(rows), "step": steps(rows), "unrolling": unrolling(rows)}
    written = []
    for name, figure in figures.items():
        if figure is not None:
            file = folder / f"{stem}-{name}.png"
            figure.savefig(file, dpi=120, bbox_inches="tight")
            written.append(file)
    return written


def solves(rows: Sequence[Row]) -> Figure | None:
    """Time of an inverse-Hessian-vector product by each method, the list loop being 1."""
    rows = [row for row in rows if row.benchmark == "inverse_hvp" and row.p50 is not None]
    problems = [name for name in PROBLEMS if any(row.problem == name for row in rows)]
    if not problems:
        return None
    threads = sorted({row.threads for row in rows})
    names = list(dict.fromkeys(row.method for row in rows))
    figure = Figure(figsize=(1.6 * len(problems) + 4, 3.2 * len(threads)))
    for index, count in enumerate(threads):
        named: set[str] = set()
        axes = figure.add_subplot(len(threads), 1, index + 1)
        for position, problem in enumerate(problems):
            table = case(rows, "inverse_hvp", problem, PROBLEMS[problem].terms, count)
            for place, name in enumerate(names):
                if table.list_loop is not None and name in table.medians:
                    offset = (place + 0.5) / len(names) - 0.5
                    axes.bar(
                        position + 0.85 * offset, table.medians[name] / table.list_loop, 0.85 / len(names),
                        color=f"C{place % 10}", hatch="//" if place >= 10 else None,
                        label=None if name in named else name,
                    )  # fmt: skip
                    named.add(name)
        axes.axhline(1, color="black", linewidth=0.8)
        axes.set_xticks(range(len(problems)), [f"{p}\n{PROBLEMS[p].terms} HVPs" for p in problems], fontsize=8)
        axes.set_yscale("log", base=2)
        axes.set_ylabel("time / list loop")
        axes.set_title(f"inverse-Hessian-vector product, {count} thread{'s' * (count > 1)}", fontsize=9)
        if index == 0 and named:
            axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.tight_layout()
    return figure


def steps(rows: Sequence[Row]) -> Figure | None:
    """Bytes per second of the fused step and its rivals, by size."""
    rows = [row for row in rows if row.benchmark == "step" and row.p50 is not None]
    if not rows:
        return None
    problems, threads = list(dict.fromkeys(row.problem for row in rows)), max(row.threads for row in rows)
    figure = Figure(figsize=(4.2 * len(problems), 3.6))
    for index, problem in enumerate(problems):
        axes = figure.add_subplot(1, len(problems), index + 1)
        for name in WORDS:
            chosen = [r for r in rows if (r.problem, r.threads, r.method) == (problem, threads, name)]
            # Weights per second for all, so that the curves compare times; the legend has the words each one moves.
            _curve(
                axes, chosen, [row.size / row.p50 / 1e9 for row in chosen if row.p50], f"{name} ({WORDS[name]} words)"
            )
        axes.set_title(f"{problem}, {threads} thread{'s' * (threads > 1)}", fontsize=9)
        axes.set_xlabel("weights")
        axes.set_ylabel("billion weights per second")
        axes.legend(fontsize=7)
    figure.tight_layout()
    return figure


def unrolling(rows: Sequence[Row]) -> Figure | None:
    """Time and peak memory of a hypergradient by its number of products or unrolled steps."""
    panels = {"unrolling": ("seconds", 1.0), "unrolling memory": ("peak MB", 1e6)}
    if not any(row.benchmark in panels for row in rows):
        return None
    figure = Figure(figsize=(9, 3.6))
    for index, (benchmark, (label, unit)) in enumerate(panels.items()):
        axes = figure.add_subplot(1, 2, index + 1)
        found = [row for row in rows if row.benchmark == benchmark and row.p50 is not None]
        for name in dict.fromkeys(row.method for row in found):
            chosen = [row for row in found if row.method == name]
            _curve(axes, chosen, [row.p50 / unit for row in chosen if row.p50 is not None], name)
        axes.set_xlabel(f"products, or unrolled steps ({', '.join({row.problem for row in found})})")
        axes.set_ylabel(label)
        axes.legend(fontsize=7)
    figure.tight_layout()
    return figure


def _curve(axes: Axes, rows: Sequence[Row], values: Sequence[float], label: str) -> None:
    if rows:
        pairs = sorted(zip((row.size for row in rows), values, strict=True))
        axes.loglog(*zip(*pairs, strict=True), marker="o", markersize=3, label=label)
