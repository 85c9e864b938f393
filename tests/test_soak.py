"""What takes minutes: `make soak`."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import hvp_engine as hvp

pytestmark = pytest.mark.soak

ROOT = Path(hvp.__file__).parents[1]
TESTS = Path(__file__).parent


def test_every_case_of_every_op_in_the_interpreter() -> None:
    """With none of the cases left out that the default run leaves out."""
    pytest.importorskip("triton", reason="Triton is optional, and not installed here")
    tests = [str(TESTS / "test_ops.py"), str(TESTS / "test_ops_registered.py")]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests, "-k", "cpu-triton"]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
