"""Operations of our own with second derivatives against torch's kernels and compositions: time, memory and error.

    python -m bench.bench_second_derivatives [FAMILY ...] [--quick]

Each family is a module `bench.second_derivatives_FAMILY` with a function `measure(quick)`, whose rows go to
bench/results/second-derivatives-FAMILY.csv, and if it has one `plot(rows, file)`. One thread, process time, medians of
interleaved samples.
"""

from __future__ import annotations

import argparse
import csv
import importlib
import pkgutil
from collections.abc import Mapping
from typing import Any

import torch

import bench
from bench.results import FOLDER, Environment

PREFIX = "second_derivatives_"


def families() -> list[str]:
    """The names of all families."""
    names = [module.name for module in pkgutil.iter_modules(bench.__path__)]
    return sorted(name.removeprefix(PREFIX) for name in names if name.startswith(PREFIX))


def write(family: str, quick: bool) -> list[Mapping[str, Any]]:
    """Measure a family and write what was found."""
    module = importlib.import_module(f"bench.{PREFIX}{family}")
    rows: list[Mapping[str, Any]] = list(module.measure(quick))
    here = Environment.of(torch.device("cpu"))
    with (FOLDER / f"second-derivatives-{family}.csv").open("w", newline="") as file:
        where = {"device": here.device, "torch": here.torch_version, "commit": here.commit, "date": here.date}
        writer = csv.DictWriter(file, [*rows[0], *where], lineterminator="\n")
        writer.writeheader()
        writer.writerows({**row, **where} for row in rows)
    if hasattr(module, "plot"):
        module.plot(rows, FOLDER / f"second-derivatives-{family}.png")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", default=families())
    parser.add_argument("--quick", action="store_true", help="few samples of small sizes")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for family in arguments.families:
        for row in write(family, arguments.quick):
            print(*row.values(), sep=" | ", flush=True)


if __name__ == "__main__":
    main()
