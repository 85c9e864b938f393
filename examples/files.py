"""Files of results: written completely or not at all, and small enough to be committed."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from PIL import Image


def write(target: Path, content: bytes) -> None:
    """Write a file completely or not at all."""
    partial = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(content)
        os.replace(partial, target)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def write_table(target: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write CSV: a header, a line for each row, an empty cell for a missing value; numbers have six digits."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(dict.fromkeys(key for row in rows for key in row)), lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({key: f"{value:.6g}" if isinstance(value, float) else value for key, value in row.items()})
    write(target, text.getvalue().encode())


def write_picture(target: Path, figure: Figure, dpi: int = 90) -> None:
    """Write a PNG with few colours."""
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=dpi)
    write(target, few_colours(content.getvalue()))


def few_colours(png: bytes) -> bytes:
    """The picture with at most 256 colours, which takes a third of the space."""
    picture = Image.open(io.BytesIO(png)).convert("RGB").quantize(256, dither=Image.Dither.NONE)
    content = io.BytesIO()
    picture.save(content, format="png", optimize=True)
    return content.getvalue()
