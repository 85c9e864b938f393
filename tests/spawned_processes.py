"""Run checks in several processes that communicate by gloo."""

from __future__ import annotations

import os
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

Check = Callable[[int, int, Path], None]
"""A check of (rank, number of processes, a folder they share); it raises if something is wrong."""

_PATIENCE = timedelta(seconds=20)
"""What hangs for so long has failed."""


def run(checks: Sequence[Check], count: int, folder: Path) -> dict[str, str]:
    """Run all checks in `count` processes, started once: the failure of each check by name, "" if it passed."""
    try:
        mp.start_processes(_work, (list(checks), count, folder), nprocs=count, start_method="spawn")
    except (mp.ProcessExitedException, mp.ProcessRaisedException) as error:  # what led to it is in the results
        print(error)
    return collected(count, folder)


def collected(count: int, folder: Path) -> dict[str, str]:
    """The output of the processes."""
    results: dict[str, str] = {}
    for rank in range(count):
        for name, text in torch.load(folder / f"results-{rank}.pt").items():
            results[name] = results.get(name, "") + (f"\n--- process {rank}\n{text}" if text else "")
    return results


def _work(rank: int, checks: Sequence[Check], count: int, folder: Path) -> None:
    store = dist.FileStore(str(folder / "store"), count)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=count, timeout=_PATIENCE)
    _go_through(rank, count, checks, folder)


def _go_through(rank: int, count: int, checks: Sequence[Check], folder: Path) -> None:
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message="the weights are far from a minimum")
    results = {}
    for check in checks:
        start = time.perf_counter()
        try:
            check(rank, count, folder)
            results[check.__name__] = ""
        except BaseException:  # pytest's failures too
            results[check.__name__] = traceback.format_exc()
        if os.environ.get("SHOW_SECONDS"):
            print(f"{rank} {check.__name__} {time.perf_counter() - start:.2f} s", flush=True)
        torch.save(results, folder / f"results-{rank}.pt")
        dist.barrier()  # raises, after some patience, where others wait elsewhere
    dist.destroy_process_group()


if __name__ == "__main__":  # by torchrun
    from test_distributed import CHECKS

    dist.init_process_group("gloo", timeout=_PATIENCE)
    _go_through(dist.get_rank(), dist.get_world_size(), CHECKS, Path(sys.argv[1]))
