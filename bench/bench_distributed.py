"""One solve over several processes: measured here on CPUs, and estimated for many GPUs.

    python -m bench.bench_distributed [--largest 4] [--out FOLDER]

Measured: the time of a term (a Hessian-vector product, its reduction and the step) of a network of 623,290 weights on
400 digits-sized examples, divided between 1, 2 and 4 processes that talk by gloo, with whole weights in each process
and with shards. Beside it, the parts of the processes without their reduction, all at once, which shows what the cores
allow, and a bare all-reduce of as many numbers. And the bytes that a process sends for a term, as counted here and as
the loopback device counts them, against the least that a reduction of the product needs.

Estimated: a term on 8 to 1,024 GPUs at 1e8 to 1e11 weights, each GPU with its own examples, by the alpha-beta model of
:class:`Machine`. It is arithmetic on the constants there, and says where a limit lies, not what somebody measured.

Writes `distributed.csv` and `distributed.png`.
"""

from __future__ import annotations

import argparse
import math
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import matplotlib
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

import hvp_engine as hvp
from bench.networks import DIGIT
from bench.results import FOLDER, Environment, Row, write
from examples import models

matplotlib.use("Agg")

EXAMPLES, TERMS, ROUNDS = 400, 10, 7
MODES = ("whole weights", "shards")
ALONE = "own part alone"
GPUS = tuple(2**power for power in range(3, 11))
WEIGHTS = (10**8, 10**9, 10**10, 10**11)


# Measured


def measure(count: int) -> dict[str, Any]:
    """What process 0 of `count` finds."""
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(_work, (count, Path(folder)), nprocs=count, start_method="spawn")
        return torch.load(Path(folder) / "found.pt")


def _work(rank: int, count: int, folder: Path) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "store"), count)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=count)
    torch.manual_seed(0)
    module = models.one_layer(DIGIT)
    inputs, targets = torch.randn(EXAMPLES, 784)[rank::count], torch.randint(0, 10, (EXAMPLES,))[rank::count]
    net = hvp.functional(module)

    def loss(weights: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
        penalty = sum((weight**2).sum() for weight in weights.values())
        return torch.nn.functional.cross_entropy(net(weights, batch[0]), batch[1]) + 1e-3 * penalty

    weights = {name: weight.detach() for name, weight in module.named_parameters()}
    mesh = init_device_mesh("cpu", (count,))
    shards = {name: distribute_tensor(weight, mesh, [Shard(0)]) for name, weight in weights.items()}
    solver = hvp.Neumann(TERMS, alpha=0.01)
    runs: dict[str, Callable[[], object]] = {}
    found: dict[str, Any] = {"weights": sum(weight.numel() for weight in weights.values())}
    for mode, point in zip(MODES, (weights, shards), strict=True):
        union = hvp.DataParallel(loss)
        operator = hvp.HessianOperator(union, point, (inputs, targets), engine="linearized")
        v = {name: torch.ones_like(weight) for name, weight in point.items()}
        runs[mode] = lambda operator=operator, v=v: operator.solve(v, solver)
        dist.barrier()
        before, device = union.processes.sent, _loopback_bytes()
        runs[mode]()
        dist.barrier()
        found[f"{mode}: counted"] = (union.processes.sent - before) / TERMS
        found[f"{mode}: loopback"] = (_loopback_bytes() - device) / TERMS / count
    alone = hvp.HessianOperator(loss, weights, (inputs, targets), engine="linearized")
    v = {name: torch.ones_like(weight) for name, weight in weights.items()}
    runs[ALONE] = lambda: alone.solve(v, solver)
    buffer = torch.zeros(found["weights"])
    runs["all-reduce alone"] = lambda: [dist.all_reduce(buffer) for _ in range(TERMS)]
    for name in runs:
        found[name] = []
    for _ in range(ROUNDS):  # in turns, so that a busy moment hits all
        for name, run in runs.items():
            dist.barrier()
            start = time.perf_counter()
            run()
            found[name].append((time.perf_counter() - start) / TERMS)
    if rank == 0:
        torch.save(found, folder / "found.pt")
    dist.destroy_process_group()


def _loopback_bytes() -> int:
    """Bytes that all processes of this machine have sent over loopback; 0 where it is not known."""
    table = Path("/proc/self/net/dev")
    if not table.exists():
        return 0
    lines = [line.split(":") for line in table.read_text().splitlines() if ":" in line]
    return next((int(figures.split()[8]) for name, figures in lines if name.strip() == "lo"), 0)


def measured_rows(largest: int, environment: Environment) -> Iterator[Row]:
    for count in (1, 2, 4):
        if count > largest:
            return
        found = measure(count)
        size, problem = found["weights"], f"mlp, {count} processes"
        for name in (*MODES, ALONE, "all-reduce alone"):
            yield environment.row("distributed", problem, f"hvp_engine {name}", size, 1, found[name])
        least = 2 * (count - 1) / count * size * 4
        for mode in MODES:
            for source in ("counted", "loopback"):
                sent = found[f"{mode}: {source}"]
                note = f"least {least:.0f}" + (f", {sent / least:.4f} of it" if least else "")
                yield environment.row(
                    "distributed",
                    problem,
                    f"hvp_engine {mode}, {source}",
                    size,
                    1,
                    [sent],
                    "bytes a process a term",
                    note,
                )


# Estimated


@dataclass(frozen=True)
class Machine:
    """GPUs in nodes, by round numbers for eight H100 with one 400 Gb/s adapter for each GPU; nothing overlaps.

    A ring or tree over N GPUs moves 2 (N - 1) / N of the vector through the slowest link of each GPU, and starts
    2 log2 N messages. A product is two gradients of 6 operations a weight and token each.

    Attributes:
        flops: operations a second of a GPU in bfloat16, peak times the share that training reaches.
        memory_bandwidth: bytes a second.
        memory: bytes of a GPU.
        per_node: GPUs of a node.
        inside, outside: bytes a second and GPU, within a node and between nodes.
        start_inside, start_outside: seconds to start a message.
        tokens: of each GPU in a product.
    """

    flops: float = 0.4 * 989e12
    memory_bandwidth: float = 3.35e12
    memory: float = 80e9
    per_node: int = 8
    inside: float = 450e9
    outside: float = 50e9
    start_inside: float = 5e-6
    start_outside: float = 15e-6
    tokens: int = 8192

    def product(self, weights: float) -> float:
        return 12 * weights * self.tokens / self.flops

    def reduction(self, weights: float, gpus: int, word: int = 4) -> float:
        """A sum over the GPUs, of float32: all-reduce, or all-gather and reduce-scatter, which move as much."""
        bandwidth = self.inside if gpus <= self.per_node else self.outside
        start = self.start_inside * math.log2(min(gpus, self.per_node))
        start += self.start_outside * math.log2(max(1, gpus / self.per_node))
        return 2 * start + 2 * (gpus - 1) / gpus * weights * word / bandwidth

    def step(self, weights: float) -> float:
        """A Horner step: reads p, v and the product, writes p, in float32."""
        return 4 * 4 * weights / self.memory_bandwidth

    def term(self, weights: float, gpus: int, sharded: bool) -> float:
        own = weights / gpus if sharded else weights
        return self.product(weights) + self.reduction(weights, gpus) + self.step(own)

    def bytes_needed(self, weights: float, gpus: int, sharded: bool) -> float:
        """Weights, tangent and product in bfloat16 and the message in float32, whole in each GPU either way; the
        solver's two vectors in float32, which shards divide. Activations come on top."""
        return weights * (3 * 2 + 4) + weights * 2 * 4 / (gpus if sharded else 1)


def estimated_rows(machine: Machine, environment: Environment) -> Iterator[Row]:
    for size in WEIGHTS:
        for gpus in GPUS:
            for mode in MODES:
                sharded = mode == "shards"
                seconds, needed = machine.term(size, gpus, sharded), machine.bytes_needed(size, gpus, sharded)
                share = machine.product(size) / seconds
                fits = "fits" if needed <= machine.memory else "does not fit"
                note = f"{share:.3f} of it the product; {needed / 1e9:.3g} GB a GPU, which {fits}"
                row = environment.row("estimate", f"{gpus} GPUs", f"hvp_engine {mode}", size, 0, [seconds], note=note)
                yield Row(**{**row.__dict__, "device": "alpha-beta model, see bench/bench_distributed.py"})


# Drawn


def draw(rows: Sequence[Row], machine: Machine) -> Figure:
    figure = Figure(figsize=(13, 9.5))
    (times, sent), (estimates, memory) = figure.subplots(2, 2)
    measured = [row for row in rows if row.benchmark == "distributed"]
    _draw_times(times, [row for row in measured if row.unit == "s"])
    _draw_bytes(sent, [row for row in measured if row.unit != "s"])
    _draw_shares(estimates, machine)
    _draw_memory(memory, machine)
    figure.tight_layout()
    return figure


def _processes(row: Row) -> int:
    return int(row.problem.split()[1])


def _draw_times(axes: Axes, rows: Sequence[Row]) -> None:
    for method in dict.fromkeys(row.method for row in rows):
        own = [row for row in rows if row.method == method]
        counts = [_processes(row) for row in own]
        low, middle, high = ([1e3 * (getattr(row, name) or 0.0) for row in own] for name in ("p20", "p50", "p80"))
        (line,) = axes.plot(counts, middle, marker="o", label=method.removeprefix("hvp_engine "))
        axes.fill_between(counts, low, high, alpha=0.2, color=line.get_color())
    first = next(1e3 * (row.p50 or 0.0) for row in rows)
    counts = sorted({_processes(row) for row in rows})
    axes.plot(counts, [first / min(count, os.cpu_count() or 1) for count in counts], "k--", label="first / cores")
    axes.set(xlabel="processes, one thread each", ylabel="ms a term", xticks=counts, ylim=(0, None))
    axes.set_title(f"Measured: {rows[0].size:,} weights, {EXAMPLES} examples in all\n{rows[0].device}", fontsize=9)
    axes.legend(fontsize=8)


def _draw_bytes(axes: Axes, rows: Sequence[Row]) -> None:
    counts = sorted({_processes(row) for row in rows} - {1})
    methods = list(dict.fromkeys(row.method for row in rows))
    width = 0.8 / len(methods)
    for index, method in enumerate(methods):
        own = {_processes(row): row for row in rows if row.method == method}
        heights = [(own[count].p50 or 0.0) / (2 * (count - 1) / count * own[count].size * 4) for count in counts]
        places = [place + (index - (len(methods) - 1) / 2) * width for place in range(len(counts))]
        bars = axes.bar(places, heights, width, label=method.removeprefix("hvp_engine "))
        axes.bar_label(bars, fmt="%.3f", fontsize=7)
    axes.axhline(1, color="k", linestyle="--", linewidth=0.8)
    axes.set(xticks=range(len(counts)), xticklabels=counts, xlabel="processes", ylabel="bytes sent a term / least")
    axes.set_ylim(0, 2)
    axes.set_title(
        "Measured: bytes that a process sends for a term,\nleast: 2 (N - 1) / N of the weights in float32", fontsize=9
    )
    axes.legend(fontsize=7, ncols=2, loc="upper left")


def _draw_shares(axes: Axes, machine: Machine) -> None:
    for color, tokens in enumerate((1024, 8192, 65536)):
        other = replace(machine, tokens=tokens)
        for size, style in zip((WEIGHTS[0], WEIGHTS[-1]), ("-", ":"), strict=True):
            shares = [other.product(size) / other.term(size, gpus, sharded=True) for gpus in GPUS]
            axes.plot(GPUS, shares, color=f"C{color}", linestyle=style, label=f"{tokens:,} tokens, {size:.0e} weights")
    axes.set_xscale("log", base=2)
    axes.set(xticks=GPUS, xticklabels=GPUS, xlabel="GPUs", ylabel="share of a term that is the product", ylim=(0, 1))
    axes.set_title(
        f"Estimated, not measured: tokens of each GPU, {machine.flops / 1e12:.0f} Tflop/s, nothing overlaps,\n"
        f"{machine.inside / 1e9:.0f} GB/s in nodes of {machine.per_node}, {machine.outside / 1e9:.0f} GB/s between, "
        f"{1e6 * machine.start_inside:.0f} / {1e6 * machine.start_outside:.0f} us a message",
        fontsize=9,
    )
    axes.legend(fontsize=7, loc="center right", bbox_to_anchor=(1, 0.42))


def _draw_memory(axes: Axes, machine: Machine) -> None:
    for color, size in enumerate(WEIGHTS):
        for mode, style in zip(MODES, ("--", "-"), strict=True):
            needed = [machine.bytes_needed(size, gpus, mode == "shards") / 1e9 for gpus in GPUS]
            axes.plot(GPUS, needed, color=f"C{color}", linestyle=style, label=f"{size:.0e}, {mode}")
    axes.axhline(machine.memory / 1e9, color="k", linewidth=0.8, label=f"a GPU: {machine.memory / 1e9:.0f} GB")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set(xticks=GPUS, xticklabels=GPUS, xlabel="GPUs", ylabel="GB a GPU, activations apart", ylim=(0.5, 5e4))
    axes.set_title(
        "Estimated, not measured: memory of a Neumann solve, bfloat16 weights;\n"
        "weights, tangent, product and message are whole either way",
        fontsize=9,
    )
    axes.legend(fontsize=7, ncols=3, loc="upper center")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--largest", type=int, default=4, help="most processes to start")
    parser.add_argument("--out", type=Path, default=FOLDER)
    options = parser.parse_args(arguments)
    environment, machine = Environment.of(torch.device("cpu")), Machine()
    rows = [*measured_rows(options.largest, environment), *estimated_rows(machine, environment)]
    for row in rows:
        if row.benchmark == "distributed":
            print(f"{row.problem}  {row.method}  {row.p50:.4g} {row.unit}  {row.note}")
    options.out.mkdir(parents=True, exist_ok=True)
    write(options.out / "distributed.csv", rows)
    draw(rows, machine).savefig(options.out / "distributed.png", dpi=110)


if __name__ == "__main__":
    main()
