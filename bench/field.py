"""Results of tools/field.py: models of other packages on each engine."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from bench import tables
from bench.report import grid
from bench.results import FOLDER

FILE = FOLDER / "field.csv"


@dataclass(frozen=True)
class Row:
    """One model. Of each engine whether it is right, or its error; milliseconds of a hypergradient of 20 products.

    `first_auto_s`: seconds of the first calls of `auto` together, in which it builds programs and measures engines.
    """

    model: str
    package: str
    weights: int
    recorded: str
    linearized: str
    auto: str
    chosen: str
    plain_ms: float
    recorded_ms: float
    linearized_ms: float
    auto_ms: float
    first_auto_s: float
    device: str
    torch: str
    commit: str
    date: str


def markdown(file: Path = FILE) -> str:
    """The table of docs/field.md."""
    rows = tables.read(file, Row)
    if not rows:
        return "No results have been committed yet."
    engines = ["recorded", "linearized"]
    head = ["model", "weights", *engines, "`auto` takes", "plain loop", *engines, "`auto`"]
    body = [
        [
            row.model,
            f"{row.weights:,}",
            cell(row.recorded),
            cell(row.linearized),
            row.chosen.partition(":")[0] or cell(row.auto),
            f"{row.plain_ms:.0f} ms",
            *(ratio(row, milliseconds) for milliseconds in (row.recorded_ms, row.linearized_ms, row.auto_ms)),
        ]
        for row in rows
    ]
    last = rows[-1]
    made = f"{last.device}, torch {last.torch}, {', '.join(sorted({row.package for row in rows}))}; {last.date}."
    return f"{grid(head, body)}\n\n{made}"


def cell(outcome: str) -> str:
    """An outcome, of an error its name."""
    name, colon, _ = outcome.partition(":")
    return f"`{name}`" if colon else outcome


def ratio(row: Row, milliseconds: float) -> str:
    """How many times as fast as the plain loop."""
    return "-" if math.isnan(milliseconds) else f"{row.plain_ms / milliseconds:.2f}x"
