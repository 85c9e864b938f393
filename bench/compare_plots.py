"""The plot of a comparison of methods: error by work and by length, memory by length, and searches by budget."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bench.results import Row

matplotlib.use("Agg")

COLORS = colormaps["tab20"].colors[::2] + colormaps["tab20"].colors[1::2]  # type: ignore[attr-defined]
MARKERS = "osd^v"
SMALLEST_ERROR = 1e-7
"""Smaller ones are rounding, and drawn as this one."""


def draw(rows: Sequence[Row], problem: str, folder: Path) -> Path:
    """Write compare-<problem>.png from the rows of one problem."""
    panels = [
        ("compare error", "at w*", "gradients", f"relative l2 error at w* (at least {SMALLEST_ERROR:g})"),
        ("compare error", "early", "gradients", f"relative l2 error, early weights (at least {SMALLEST_ERROR:g})"),
        ("compare memory", "at w*", "i", "peak bytes"),
        ("compare time", "at w*", "i", "seconds"),
        ("search", "one decay", "budget", "lowest validation loss, one decay"),
        ("search", "a decay for each weight", "budget", "lowest validation loss, a decay for each weight"),
    ]
    rows = [row for row in rows if row.problem.startswith(f"{problem}, ")]
    names = list(dict.fromkeys(row.method for row in rows))
    drawn = [panel for panel in panels if any(_fits(row, panel[0], f"{problem}, {panel[1]}") for row in rows)]
    figure = Figure(figsize=(6.2 * ((len(drawn) + 1) // 2) + 3, 8.4), layout="constrained")
    for index, (benchmark, place, unit, label) in enumerate(drawn):
        axes = figure.add_subplot(2, (len(drawn) + 1) // 2, index + 1)
        for name in names:
            _curve(axes, rows, benchmark, f"{problem}, {place}", name, unit, names.index(name))
        axes.set_xscale("log")
        axes.set_yscale("log")
        if benchmark == "compare error":
            axes.set_ylim(SMALLEST_ERROR / 2, 1e2)
        axes.set_xlabel({"gradients": "gradient evaluations (a product is two)", "i": "products or steps, i"}.get(
            unit, "gradient evaluations"))  # fmt: skip
        axes.set_ylabel(label)
    labels = {line.get_label(): line for axes in figure.axes for line in axes.get_lines()}
    figure.legend(labels.values(), labels.keys(), loc="outside right center", fontsize=8)
    figure.suptitle(problem)
    file = folder / f"compare-{problem}.png"
    figure.savefig(file, dpi=100)
    return file


def _fits(row: Row, benchmark: str, problem: str) -> bool:
    return row.benchmark == benchmark and row.problem == problem and row.p50 is not None


def _curve(axes: Axes, rows: Sequence[Row], benchmark: str, problem: str, name: str, unit: str, place: int) -> None:
    points = [(row.size, row.p50) for row in rows if _fits(row, benchmark, problem) and row.method == name]
    if unit == "gradients":
        work = {row.size: row.p50 for row in rows if _fits(row, "compare gradients", problem) and row.method == name}
        points = [(work[size], value) for size, value in points]
    if points:
        x, y = zip(*sorted(points), strict=True)
        y = [max(value, SMALLEST_ERROR) for value in y] if benchmark == "compare error" else y
        marker, color = MARKERS[place % len(MARKERS)], COLORS[place % len(COLORS)]
        axes.plot(x, y, ("-", "--", ":")[place % 3], marker=marker, markersize=4, color=color, label=name)
