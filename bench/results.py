"""One format for every result: a CSV file for each device, a row for each method in each case."""

from __future__ import annotations

import csv
import datetime
import os
import re
import statistics
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from bench import tables
from bench.peers import PACKAGES
from hvp_engine.diagnostics.doctor import cpu_name

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "bench" / "results"


@dataclass(frozen=True)
class Row:
    """A method in a case.

    Attributes:
        benchmark, problem, method: what was measured; for steps the problem is the number of tensors.
        size: Hessian-vector products, or weights of a step.
        threads: of torch.
        p20, p50, p80: of the samples, in `unit` (s or bytes); None for a method that was left out.
        rounds: number of samples.
        note: the reason for leaving it out, or what the engine chose.
    """

    benchmark: str
    problem: str
    method: str
    size: int
    threads: int
    unit: str
    p20: float | None
    p50: float | None
    p80: float | None
    rounds: int
    note: str
    device: str
    torch_version: str
    triton_version: str
    package: str
    commit: str
    date: str

    @property
    def key(self) -> tuple[str, str, str, int, int]:
        return self.benchmark, self.problem, self.method, self.size, self.threads


@dataclass(frozen=True)
class Environment:
    """What all rows of a run share."""

    device: str
    torch_version: str
    triton_version: str
    commit: str
    date: str

    @classmethod
    def of(cls, device: torch.device) -> Environment:
        return cls(
            device_name(device),
            torch.__version__,
            version("triton") or "none",
            commit(),
            datetime.date.today().isoformat(),
        )

    def row(
        self,
        benchmark: str,
        problem: str,
        method: str,
        size: int,
        threads: int,
        samples: Sequence[float],
        unit: str = "s",
        note: str = "",
    ) -> Row:
        """The row of these samples; none means that the method was left out, for the reason in `note`."""
        p20, p50, p80 = percentiles(samples) if samples else (None, None, None)
        return Row(
            benchmark, problem, method, size, threads, unit, p20, p50, p80, len(samples), note,
            self.device, self.torch_version, self.triton_version, package_of(method), self.commit, self.date,
        )  # fmt: skip


def percentiles(samples: Sequence[float]) -> tuple[float, float, float]:
    """The 20th, 50th and 80th percentile.

    >>> percentiles([5.0, 1.0, 2.0, 3.0, 4.0])
    (1.8, 3.0, 4.2)
    """
    if len(samples) == 1:
        return samples[0], samples[0], samples[0]
    tenths = statistics.quantiles(samples, n=10, method="inclusive")
    return tenths[1], tenths[4], tenths[7]


def device_name(device: torch.device) -> str:
    """The model of the GPU, or of the CPU with its instruction set and how many cores of it there are."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    count = len(os.sched_getaffinity(0))
    return f"{cpu_name()}, {count} core{'s' if count > 1 else ''}"


def slug(device: str) -> str:
    """A device's name as a file name.

    >>> slug("Intel(R) Xeon(R) CPU @ 2.40GHz, 2 cores")
    'intel-xeon-cpu-2.40ghz-2-cores'
    """
    return re.sub(r"[^a-z0-9.]+", "-", re.sub(r"\((r|tm)\)", "", device.lower())).strip("-")


def version(package: str) -> str | None:
    """The installed version of a package, or None."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def package_of(method: str) -> str:
    """The package behind a method and its version; empty for plain torch."""
    first = re.split(r"[ ,]", method)[0]
    name = PACKAGES.get(first, first if first == "hvp_engine" else None)
    return "" if name is None else f"{name} {version(name) or 'not installed'}"


def commit() -> str:
    """The commit of the measured code, with a plus sign if the code has changed since; 'unknown' outside git."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--", "hvp_engine", "csrc", "kernels", "bench/*.py")
        return git("rev-parse", "--short", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def device_files() -> list[Path]:
    """The files of whole benchmarks, one for each device; other results lie beside them."""
    others = (
        "compare-",
        "cuda-code",
        "distributed",
        "field",
        "influence",
        "precision",
        "product",
        "scripts",
        "second-",
    )
    return sorted(file for file in FOLDER.glob("*.csv") if not file.name.startswith(others))


def read(file: Path) -> list[Row]:
    """The rows of a results file."""

    def number(text: str) -> float | None:
        return float(text) if text else None

    with file.open(newline="") as lines:
        records: Iterable[dict[str, Any]] = csv.DictReader(lines)
        return [
            Row(**{
                **record,
                **{name: number(record[name]) for name in ("p20", "p50", "p80")},
                **{name: int(record[name]) for name in ("size", "threads", "rounds")},
            })
            for record in records
        ]  # fmt: skip


def write(file: Path, rows: Iterable[Row]) -> None:
    """Write rows in the order of :class:`Row`, times to four digits."""
    tables.write(file, Row, rows, ".4g")


def merged(old: Iterable[Row], new: Iterable[Row]) -> list[Row]:
    """All rows, a new one in place of an old one for the same case."""
    return list({row.key: row for row in (*old, *new)}.values())
