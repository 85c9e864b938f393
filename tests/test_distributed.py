"""Many processes give what one gives; see distributed_checks.py and its neighbours."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import distributed_checks
import distributed_failure_checks
import distributed_shard_checks
import distributed_tuner_checks
import pytest
import spawned_processes
import torch

import hvp_engine as hvp

CHECKS = [
    *distributed_checks.CHECKS,
    *distributed_failure_checks.CHECKS,
    *distributed_tuner_checks.CHECKS,
    *distributed_shard_checks.CHECKS,
]


def _nothing_wrong(checks: Sequence[spawned_processes.Check]) -> dict[str, str]:
    return {check.__name__: "" for check in checks}


def test_two_processes(tmp_path: Path) -> None:
    """All checks in one test, so that the processes are started once, on whatever worker it runs."""
    assert spawned_processes.run(CHECKS, 2, tmp_path) == _nothing_wrong(CHECKS)


@pytest.mark.soak
def test_four_processes(tmp_path: Path) -> None:
    checks = [*CHECKS, *distributed_checks.SLOW_CHECKS]
    assert spawned_processes.run(checks, 4, tmp_path) == _nothing_wrong(checks)


@pytest.mark.soak
def test_torchrun(tmp_path: Path) -> None:
    script = Path(spawned_processes.__file__)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(script.parents[1]), str(script.parent)])}
    subprocess.run([*command, str(script), str(tmp_path)], check=True, env=environment, timeout=300)
    assert spawned_processes.collected(2, tmp_path) == _nothing_wrong(CHECKS)


def test_without_a_group() -> None:
    with pytest.raises(hvp.DistributedError, match="init_process_group"):
        hvp.DataParallel(lambda w, batch: w.sum())
    with pytest.raises(TypeError, match="loss: expected a function"):
        hvp.DataParallel(torch.ones(1))  # type: ignore[arg-type]
