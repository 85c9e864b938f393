"""The tables of the documentation, from committed results and lists in code; `<!-- table: NAME -->` is their place."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from baselines import methods
from bench import (
    cuda_code,
    demo,
    field,
    hard_models,
    influence,
    levels,
    precision,
    products,
    report,
    results,
    scripts,
    second_derivatives_attention,
)


def plots(files: list[Path]) -> str:
    """Every plot that belongs to a results file, and links to the files."""
    images = [image for file in files for image in sorted(file.parent.glob(f"{file.stem}-*.png"))]
    return _shown(images, files)


def named(prefix: str) -> str:
    """All plots and tables of results whose names begin so."""
    files = sorted(results.FOLDER.glob(f"{prefix}*"))
    return _shown([file for file in files if file.suffix == ".png"], [file for file in files if file.suffix == ".csv"])


def _shown(images: list[Path], files: list[Path]) -> str:
    if not files:
        return "No results have been committed yet."
    lines = [f"![{image.stem}](results/{image.name})" for image in images]
    return "\n\n".join([*lines, "Files: " + ", ".join(f"[{file.name}](results/{file.name})" for file in files) + "."])


TABLES: dict[str, Callable[[], str]] = {
    "benchmark plots": lambda: plots(results.device_files()),
    "comparison plots": lambda: named("compare-"),
    "distributed plots": lambda: named("distributed"),
    "benchmark": lambda: report.markdown(report.everything()),
    "summary": lambda: report.summary(report.everything()),
    "attention": second_derivatives_attention.markdown,
    "cuda code": cuda_code.markdown,
    "demo": demo.block,
    "second derivatives of losses": partial(levels.markdown, "losses"),
    "second derivatives of normalizations": partial(levels.markdown, "normalizations"),
    "field": field.markdown,
    "hard models": hard_models.markdown,
    "influence": influence.markdown,
    "methods": methods.markdown,
    "precision": precision.markdown,
    "products": products.markdown,
    "scripts": scripts.markdown,
    "product curves": lambda: named("product-curves"),
}
"""Each by its name."""
