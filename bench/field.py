"""Results of tools/field.py: models of other packages on each engine."""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from bench.report import grid
from bench.results import FOLDER

FILE = FOLDER / "field.csv"


@dataclass(frozen=True)
class Row:
    """One model. Of each engine whether it is right, or its error; milliseconds of a hypergradient of 20 products."""

    model: str
    package: str
    weights: int
    eager: str
    linearized: str
    auto: str
    chosen: str
    plain_ms: float
    eager_ms: float
    linearized_ms: float
    auto_ms: float
    first_auto_s: float
    device: str
    torch: str
    commit: str
    date: str


def read(file: Path = FILE) -> list[Row]:
    """The rows of a file; none where there is no file."""
    if not file.exists():
        return []
    types = {field.name: {"int": int, "float": float}.get(str(field.type), str) for field in fields(Row)}
    with file.open(newline="") as lines:
        return [Row(**{name: types[name](value) for name, value in row.items()}) for row in csv.DictReader(lines)]


def write(file: Path, rows: Sequence[Row]) -> None:
    """Replace a file."""
    with file.open("w", newline="") as lines:
        writer = csv.DictWriter(lines, [field.name for field in fields(Row)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)


def markdown(file: Path = FILE) -> str:
    """The table of docs/field.md."""
    rows = read(file)
    if not rows:
        return "No results have been committed yet."
    head = ["model", "weights", "eager", "linearized", "`auto` takes", "plain loop", "eager", "linearized", "`auto`"]
    body = [
        [
            row.model,
            f"{row.weights:,}",
            cell(row.eager),
            cell(row.linearized),
            row.chosen.partition(":")[0] or cell(row.auto),
            f"{row.plain_ms:.0f} ms",
            *(ratio(row, milliseconds) for milliseconds in (row.eager_ms, row.linearized_ms, row.auto_ms)),
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
