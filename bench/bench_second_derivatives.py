"""Operations of `hvp_engine.differentiable` beside torch's own: time, memory and error of value, gradient and product.

    python -m bench.bench_second_derivatives [--only NAME]     writes bench/results/second-derivatives.csv

Times are those of the process's processor, medians of samples that take turns; memory is the peak above what was held
before, of all three together; errors are relative to torch's in float64, of the product.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from bench import second_derivatives_of_losses, second_derivatives_of_normalizations
from bench.results import FOLDER
from hvp_engine.diagnostics.memory import peak_memory

FAMILIES = {
    "losses": second_derivatives_of_losses.cases,
    "normalizations": second_derivatives_of_normalizations.cases,
}
FILE = FOLDER / "second-derivatives.csv"
SECONDS = 0.5
"""For all samples of one case."""


@dataclass(frozen=True)
class Case:
    """Functions that compute the same of `inputs`, in float32, torch's own first."""

    name: str
    size: str
    functions: dict[str, Callable[..., Tensor]]
    inputs: Sequence[Tensor]


def levels(function: Callable[..., Tensor], inputs: Sequence[Tensor]) -> tuple[list[float], Sequence[Tensor]]:
    """Seconds of value, gradient and product, and the product of fixed tangents."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    start = time.process_time()
    value = function(*leaves)
    evaluated = time.process_time()
    gradient = torch.autograd.grad(value, leaves, torch.ones_like(value), create_graph=True)
    differentiated = time.process_time()
    tangents = [x.detach() for x in inputs]
    begun = time.process_time()
    product = torch.autograd.grad(gradient, leaves, tangents)
    end = time.process_time()
    return [evaluated - start, differentiated - evaluated, end - begun], product


def rows(case: Case) -> Iterator[dict[str, object]]:
    """One for each function."""
    exact = levels(next(iter(case.functions.values())), [x.double() for x in case.inputs])[1]
    samples: dict[str, list[list[float]]] = {name: [] for name in case.functions}
    errors, peaks = {}, {}
    for name, function in case.functions.items():
        with peak_memory() as meter:
            product = levels(function, case.inputs)[1]
        peaks[name] = meter.peak_bytes
        pairs = list(zip(product, exact, strict=True))
        off = sum(float((a.double() - b).square().sum()) for a, b in pairs)
        errors[name] = (off / sum(float(b.square().sum()) for _, b in pairs)) ** 0.5
        del product, pairs
    del exact
    start = time.process_time()
    while time.process_time() - start < SECONDS or len(samples[name]) < 3:
        for name, function in case.functions.items():
            samples[name].append(levels(function, case.inputs)[0])
        if len(samples[name]) >= 200:
            break
    for name, found in samples.items():
        value, gradient, product_time = (statistics.median(part) for part in zip(*found, strict=True))
        yield {
            "operation": case.name, "size": case.size, "method": name, "value_ms": f"{1e3 * value:.4g}",
            "gradient_ms": f"{1e3 * gradient:.4g}", "product_ms": f"{1e3 * product_time:.4g}",
            "peak_mib": f"{peaks[name] / 2**20:.4g}", "error": f"{errors[name]:.2g}",
        }  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=FAMILIES, action="append", help="families to measure, all by default")
    parser.add_argument("--out", type=Path, default=FILE)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    wanted = options.only or list(FAMILIES)
    found: list[dict[str, object]] = []
    for family in wanted:
        for name, size, functions, inputs in FAMILIES[family]():
            for row in rows(Case(name, size, functions, inputs)):
                print("  ".join(str(value) for value in row.values()), flush=True)
                found.append({"family": family, **row})
    kept: list[dict[str, object]] = []
    if options.out.exists():
        with options.out.open(newline="") as lines:
            kept = [dict(row) for row in csv.DictReader(lines) if row["family"] not in wanted]
    with options.out.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(found[0]))
        writer.writeheader()
        writer.writerows([*kept, *found])


if __name__ == "__main__":
    main()
