"""What takes minutes: `make soak`."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tuning_run import TuningRun

import hvp_engine as hvp

pytestmark = [pytest.mark.soak, pytest.mark.filterwarnings("ignore:the weights are far from a minimum")]

ROOT = Path(hvp.__file__).parents[1]
TESTS = Path(__file__).parent


def test_killed_again_and_again_at_any_moment(tmp_path: Path) -> None:
    """Processes that are each killed somewhere, until one gets to the end: bit for bit the run that nobody killed."""
    torch.set_num_threads(1)
    expected = TuningRun().fit(20)
    path, draw = tmp_path / "run.pt", random.Random(0)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    for _ in range(12):
        script = [sys.executable, str(TESTS / "tuning_run.py"), str(path), str(draw.randint(1, 60))]
        ended = subprocess.run(script, env=environment, capture_output=True, text=True, timeout=300)
        assert ended.returncode in (0, -signal.SIGKILL), ended.stderr
    found = TuningRun().fit(20, checkpoint=path)
    assert found.keys() == expected.keys()
    assert not [name for name in expected if not torch.equal(found[name], expected[name])]


def test_every_case_of_every_op_in_the_interpreter() -> None:
    """With none of the cases left out that the default run leaves out."""
    pytest.importorskip("triton", reason="Triton is optional, and not installed here")
    tests = [str(TESTS / "test_ops.py"), str(TESTS / "test_ops_registered.py")]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests, "-k", "cpu-triton"]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
