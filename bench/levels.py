"""Functions that compute the same, one of them torch's: time, memory and error of value, gradient and product."""

from __future__ import annotations

import csv
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from bench.report import grid
from bench.results import FOLDER
from hvp_engine.diagnostics.memory import peak_memory

SECONDS = 0.25
"""Time spent on the samples of each comparison, of which there are at least three."""


def levels(function: Callable[..., Tensor], inputs: Sequence[Tensor]) -> tuple[list[float], Sequence[Tensor]]:
    """Seconds of value, gradient and product with the inputs as tangents; and the product."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    times = [time.process_time()]
    value = function(*leaves)
    times.append(time.process_time())
    gradient = torch.autograd.grad(value, leaves, create_graph=True)
    times.append(time.process_time())
    product = torch.autograd.grad(gradient, leaves, list(inputs))
    times.append(time.process_time())
    return [end - start for start, end in zip(times, times[1:], strict=False)], product


def compared(
    operation: str, size: str, functions: Mapping[str, Callable[..., Tensor]], inputs: Sequence[Tensor], quick: bool
) -> Iterator[Mapping[str, Any]]:
    """A row for each function, torch's own first: medians of interleaved samples, the peak above what was held before,
    of the three levels together, and the product's distance from torch's in float64."""
    exact = levels(next(iter(functions.values())), [x.double() for x in inputs])[1]
    size_of_exact = sum(float(b.square().sum()) for b in exact)
    samples: dict[str, list[list[float]]] = {name: [] for name in functions}
    errors, peaks = {}, {}
    for name, function in functions.items():
        with peak_memory() as meter:
            product = levels(function, inputs)[1]
        peaks[name] = meter.peak_bytes
        off = sum(float((a.double() - b).square().sum()) for a, b in zip(product, exact, strict=True))
        errors[name] = (off / size_of_exact) ** 0.5
    start, rounds = time.process_time(), 0
    while rounds < 3 or (time.process_time() - start < SECONDS and rounds < 200 and not quick):
        rounds += 1
        for name, function in functions.items():
            samples[name].append(levels(function, inputs)[0])
    for name, found in samples.items():
        value, gradient, product_seconds = (statistics.median(part) for part in zip(*found, strict=True))
        yield {
            "operation": operation, "size": size, "method": name, "value_ms": f"{1e3 * value:.4g}",
            "gradient_ms": f"{1e3 * gradient:.4g}", "product_ms": f"{1e3 * product_seconds:.4g}",
            "peak_mib": f"{peaks[name] / 2**20:.4g}", "error": f"{errors[name]:.2g}",
        }  # fmt: skip


def markdown(family: str) -> str:
    """Results of a family as a table: each of our rows beside torch's."""
    with (FOLDER / f"second-derivatives-{family}.csv").open(newline="") as lines:
        found = list(csv.DictReader(lines))
    torchs = {(row["operation"], row["size"]): row for row in found if row["method"] == "torch"}
    body = []
    for row in found:
        other = torchs[row["operation"], row["size"]]
        if row is other:
            continue
        parts = [
            f"{float(row[level]):.3g} ({float(other[level]):.3g})"
            for level in ("value_ms", "gradient_ms", "product_ms", "peak_mib", "error")
        ]
        note = row["method"].removeprefix("hvp_engine")
        body.append([row["operation"] + note, row["size"], *parts])
    titles = ["operation", "size", "value, ms", "gradient, ms", "product, ms", "peak, MiB", "error"]
    return grid([titles[0], titles[1], *(f"{title} (torch)" for title in titles[2:])], body)
