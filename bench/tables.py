"""Tables of results as CSV files: each row is a dataclass of numbers, booleans and strings."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, TypeVar

Row = TypeVar("Row")

_KINDS: dict[str, Any] = {"int": int, "float": float, "bool": lambda text: text == "True"}


def read(file: Path, kind: type[Row]) -> list[Row]:
    """The rows of a file; none where there is no file."""
    if not file.exists():
        return []
    types = {field.name: _KINDS.get(str(field.type), str) for field in fields(kind)}  # type: ignore[arg-type]
    with file.open(newline="") as lines:
        return [kind(**{name: types[name](text) for name, text in row.items()}) for row in csv.DictReader(lines)]


def write(file: Path, rows: Sequence[Any]) -> None:
    """Replace a file."""
    with file.open("w", newline="") as lines:
        writer = csv.DictWriter(lines, [field.name for field in fields(rows[0])], lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)
