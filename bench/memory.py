"""Peak memory: of a run in this process, by the package's own meter, and of a fresh process, as Linux sees it.

`python -m bench.memory PROBLEM METHOD ITERATIONS` is such a fresh process: it prints by how many bytes the
hypergradient raised the process's peak.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import torch

from bench import methods
from bench.methods import Preparation, Run
from bench.problems import build
from bench.results import ROOT
from hvp_engine.diagnostics import peak_memory

UNSEEN = ("hvp_engine compiled", "hvp_engine auto")
"""Methods whose memory the meter does not (always) see on a CPU: what inductor allocates. A fresh process does."""

IN_FRESH_PROCESSES = ("hvp_engine eager", "hvp_engine linearized", "hvp_engine compiled", "unrolling")


def peak_of(run: Run, iterations: int, device: torch.device) -> int:
    """Bytes of tensors above the level before, at the highest point of a run; what it prepares once is there before.

    The lower of two runs: the few that an engine checks against eager hold both.
    """
    run(1)
    peaks = []
    for _ in range(2):
        with peak_memory(device) as meter:
            run(iterations)
        peaks.append(meter.peak_bytes)
    return min(peaks)


def reserved_of(run: Run, iterations: int, device: torch.device) -> int:
    """Bytes that torch holds of a CUDA device at the highest point of a run beyond the tensors alive before it: what
    :func:`peak_of` counts, and the pools of CUDA graphs, which it misses (those of other methods too)."""
    run(iterations)
    torch.cuda.empty_cache()
    level = torch.cuda.memory_allocated(device)
    with peak_memory(device) as meter:
        run(iterations)
    assert meter.reserved_bytes is not None
    return meter.reserved_bytes - level


def peak_of_fresh_process(problem: str, method: str, iterations: int) -> int:
    """Bytes by which a run raised the resident set of a new process, after one of a single product."""
    command = [sys.executable, "-m", "bench.memory", problem, method, str(iterations)]
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return int(finished.stdout.split()[-1])


def _hypergradients() -> dict[str, Preparation]:
    return methods.own_hypergradients(methods.own_engines()) | {"unrolling": methods.unrolled}


def high_water(reset: bool) -> int:
    """The peak of this process's resident set since the last reset, in bytes."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    found = re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return 1024 * int(found[1])


if __name__ == "__main__":
    name, method, iterations = sys.argv[1:]
    run = _hypergradients()[method](build(name))
    run(1)
    before = high_water(reset=True)
    run(int(iterations))
    print(high_water(reset=False) - before)
