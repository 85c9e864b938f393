"""The tables of the documentation, made from committed results; a page has `<!-- table: NAME -->` in their place."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from bench import demo, precision, products, report, results
from hvp_engine import methods


def plots(files: list[Path]) -> str:
    """Every plot that belongs to a results file, and links to the files."""
    images = [image for file in files for image in sorted(file.parent.glob(f"{file.stem}-*.png"))]
    return _shown(images, files)


def comparisons() -> str:
    """The plots of the comparison of methods, and its files."""
    return _shown(sorted(results.FOLDER.glob("compare-*.png")), sorted(results.FOLDER.glob("compare-*.csv")))


def _shown(images: list[Path], files: list[Path]) -> str:
    lines = [f"![{image.stem}](results/{image.name})" for image in images]
    return "\n\n".join([*lines, "Files: " + ", ".join(f"[{file.name}](results/{file.name})" for file in files) + "."])


TABLES: dict[str, Callable[[], str]] = {
    "benchmark plots": lambda: plots(results.device_files()),
    "comparison plots": comparisons,
    "benchmark": lambda: report.markdown(report.everything()),
    "summary": lambda: report.summary(report.everything()),
    "demo": demo.block,
    "methods": methods.markdown,
    "precision": precision.markdown,
    "products": products.markdown,
}
"""Each by its name."""
