"""Tables of results as CSV files: each row is a dataclass of numbers, booleans and strings."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterable
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


def write(file: Path, kind: type[Any], rows: Iterable[Any], floats: str = "") -> None:
    """Replace a file, which is complete at every moment; `floats` says how they are formatted, as f-strings do."""

    def text(value: object) -> object:
        return "" if value is None else format(value, floats) if isinstance(value, float) else value

    lines = io.StringIO()
    writer = csv.DictWriter(lines, [field.name for field in fields(kind)], lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({name: text(value) for name, value in asdict(row).items()})
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        partial.write_text(lines.getvalue())
        partial.replace(file)
    finally:
        partial.unlink(missing_ok=True)
