"""Attention's products: one layer of 8 heads of 64 by length, and a whole transformer, against torch's math kernel.

`python -m bench.second_derivatives_attention METHOD LENGTH CAUSAL` is a fresh process, which prints by how many bytes
a layer's value, gradient and product raised its peak: what torch and the extension allocate alike.
"""

from __future__ import annotations

import csv
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import cross_entropy, scaled_dot_product_attention

import hvp_engine as hvp
from bench.memory import high_water
from bench.methods import list_loop
from bench.networks import Transformer
from bench.report import grid
from bench.results import FOLDER, ROOT

LENGTHS = (32, 64, 128, 512, 2048, 8192)
MATH_UP_TO = 2048
"""Longer sequences take torch's math kernel several seconds and gigabytes."""

CAUSAL_UP_TO = 512

MEASURED_FROM = 512
"""Shorter sequences raise the peak of a process by less than its own noise."""

TERMS = 5
SECONDS = 0.4
"""Time spent on the samples of each method in a case, of which there are at least three."""


def math_attention(*arguments: Any, **options: Any) -> Tensor:
    with sdpa_kernel(SDPBackend.MATH):
        return scaled_dot_product_attention(*arguments, **options)


METHODS: dict[str, Callable[..., Tensor]] = {
    "torch, math": math_attention,
    "hvp_engine": hvp.differentiable.scaled_dot_product_attention,
}


def tensors(length: int, dtype: torch.dtype) -> list[Tensor]:
    """Query, key, value, the loss's weights, and a tangent for each of the first three; the same numbers each time."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(1, 8, length, 64, generator=generator).to(dtype) for _ in range(7)]


def layer(method: str, length: int, causal: bool, dtype: torch.dtype = torch.float32) -> Callable[[], Sequence[Tensor]]:
    """The product with the Hessian of sum(w o^2), in query, key and value."""
    query, key, value, weights, *tangents = tensors(length, dtype)
    leaves = [x.requires_grad_() for x in (query, key, value)]
    loss = (weights * METHODS[method](*leaves, is_causal=causal).square()).sum()
    gradient = torch.autograd.grad(loss, leaves, create_graph=True)
    return lambda: torch.autograd.grad(gradient, leaves, tangents, retain_graph=True)


def transformer(length: int) -> dict[str, Callable[[], Any]]:
    """Solves of a language model by a list loop on the math kernel, and by engines."""
    torch.manual_seed(0)
    net = Transformer(100, 64, length)
    words, targets = torch.randint(100, (2, 4, length))
    function = hvp.functional(net)
    weights = {name: p.detach().clone() for name, p in net.named_parameters()}
    v = {name: torch.randn_like(w) for name, w in weights.items()}

    def loss(w: Any) -> Tensor:
        return cross_entropy(function(w, words).flatten(0, 1), targets.flatten())

    leaves = [w.clone().requires_grad_() for w in weights.values()]
    with sdpa_kernel(SDPBackend.MATH):
        value = loss(dict(zip(weights, leaves, strict=True)))
    gradient = torch.autograd.grad(value, leaves, create_graph=True)
    works: dict[str, Callable[[], Any]] = {
        "list loop, math": lambda: list_loop(list(v.values()), gradient, leaves, TERMS, 1e-3)
    }
    for engine in ("eager", "recorded", "linearized"):
        operator = hvp.HessianOperator(loss, weights, engine=engine)
        works[f"hvp_engine {engine}"] = lambda operator=operator: hvp.solve(operator, v, hvp.Neumann(TERMS, alpha=1e-3))
    return works


def seconds(works: Mapping[str, Callable[[], Any]], budget: float) -> dict[str, float]:
    """The median process time of each, in turns; the first sample warms up, and counts only without a budget."""
    samples: dict[str, list[float]] = {name: [] for name in works}
    start = time.process_time()
    while len(next(iter(samples.values()))) < 3 * (budget > 0) + 1 or time.process_time() - start < budget * len(works):
        for name, work in works.items():
            began = time.process_time()
            work()
            samples[name].append(time.process_time() - began)
    return {name: statistics.median(found[1:] or found) for name, found in samples.items()}


def error(product: Sequence[Tensor], truth: Sequence[Tensor]) -> float:
    """Relative, by the global norm."""
    distances = torch.stack([(a.double() - b).norm() for a, b in zip(product, truth, strict=True)])
    return float(distances.norm() / torch.stack([b.norm() for b in truth]).norm())


def peak_of_fresh_process(method: str, length: int, causal: bool) -> int:
    command = [sys.executable, "-m", "bench.second_derivatives_attention", method, str(length), str(causal)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return int(done.stdout.split()[-1])


def measure(quick: bool) -> Iterator[dict[str, Any]]:
    """A row for each method in each case; errors are those of the product against float64."""
    budget = 0.1 if quick else SECONDS
    for length in LENGTHS[:4] if quick else LENGTHS:
        for causal in (False, True)[: 2 if length <= CAUSAL_UP_TO else 1]:
            names = [name for name in METHODS if length <= MATH_UP_TO or name != "torch, math"]
            works = {name: layer(name, length, causal) for name in names}
            found = seconds(works, budget if length <= MATH_UP_TO else 0.0)
            truth = layer("torch, math", length, causal, torch.float64)() if length <= MATH_UP_TO else None
            for name, work in works.items():
                yield {
                    "case": "layer, causal" if causal else "layer",
                    "method": name,
                    "length": length,
                    "seconds": f"{found[name]:.6f}",
                    "peak_bytes": ""
                    if causal or length < MEASURED_FROM
                    else peak_of_fresh_process(name, length, causal),
                    "error": "" if truth is None else f"{error(work(), truth):.3g}",
                }
    for length in (32, 128) if quick else (32, 512):
        for name, median in seconds(transformer(length), budget).items():
            yield {
                "case": f"transformer, {TERMS} terms",
                "method": name,
                "length": length,
                "seconds": f"{median:.6f}",
                "peak_bytes": "",
                "error": "",
            }


def markdown() -> str:
    """The table of the documentation: a layer by length."""
    with (FOLDER / "second-derivatives-attention.csv").open(newline="") as lines:
        rows = {(row["case"], row["method"], row["length"]): row for row in csv.DictReader(lines)}
    body = []
    for (case, method, length), ours in rows.items():
        if method != "hvp_engine":
            continue
        theirs = rows.get((case, "torch, math", length), {})
        times = [f"{1e3 * float(row['seconds']):.3g} ms" if row else "-" for row in (theirs, ours)]
        sizes = [f"{float(row['peak_bytes']) / 1e6:.0f} MB" if row.get("peak_bytes") else "-" for row in (theirs, ours)]
        errors = [f"{float(row['error']):.1e}" if row.get("error") else "-" for row in (theirs, ours)]
        faster = f"{float(theirs['seconds']) / float(ours['seconds']):.2f}x" if theirs else "-"
        body.append([case, length, *times, faster, *sizes, *errors])
    columns = ("time", "memory", "error")
    head = ["case", "length"]
    for column in columns:
        head += [f"{column}, math", f"{column}, ours"] + (["faster"] if column == "time" else [])
    return grid(head, body)


def plot(rows: Sequence[Mapping[str, Any]], file: Path) -> None:
    """Time and memory of a layer by length."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for axis, column, label in zip(
        axes, ("seconds", "peak_bytes"), ("seconds of a product", "peak bytes"), strict=True
    ):
        for name in METHODS:
            for case, style in (("layer", "-"), ("layer, causal", "--")):
                mine = [row for row in rows if (row["case"], row["method"]) == (case, name) and row[column]]
                points = [(row["length"], float(row[column])) for row in mine]
                axis.loglog(*zip(*points, strict=True), style, marker=".", label=f"{name}{case.removeprefix('layer')}")
        axis.set_xlabel("length")
        axis.set_ylabel(label)
        axis.grid(alpha=0.3)
    axes[0].legend(frameon=False)
    figure.savefig(file, dpi=120)
    pyplot.close(figure)


if __name__ == "__main__":
    torch.set_num_threads(1)
    chosen, length, causal = sys.argv[1:]
    layer(chosen, 16, False)()
    before = high_water(reset=True)
    layer(chosen, int(length), causal == "True")()
    print(high_water(reset=False) - before)
