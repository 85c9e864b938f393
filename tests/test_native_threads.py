"""Threads of native programs: one for small operations, several for large ones. By who ran, since clocks lie here."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import hvp_engine as hvp

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="threads are counted in /proc")


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def switches() -> dict[str, int]:
    """How often each other thread of this process has gone to sleep or was interrupted."""
    found = {}
    for task in Path("/proc/self/task").iterdir():
        lines = dict(line.split(":", 1) for line in (task / "status").read_text().splitlines())
        found[task.name] = sum(int(lines[f"{kind}_ctxt_switches"]) for kind in ("voluntary", "nonvoluntary"))
    del found[str(threading.get_native_id())]
    return found


def asleep() -> dict[str, int]:
    """The same, when nobody is busy any more: threads wait for work a while before they sleep."""
    before = switches()
    for _ in range(100):
        time.sleep(0.02)
        now = switches()
        if now == before:
            return now
        before = now
    pytest.skip("another thread of this process is never quiet")


def product(rows: int, inputs: int, outputs: int) -> tuple[hvp.HessianOperator, Tensor]:
    """A Hessian whose product has two matrix products of rows x inputs x outputs multiplications."""
    x, y = torch.randn(rows, inputs, dtype=torch.float32), torch.randint(outputs, (rows,))
    w = torch.zeros(outputs, inputs, dtype=torch.float32)
    operator = hvp.HessianOperator(lambda w: F.cross_entropy(x @ w.t(), y), w, engine="linearized")
    return operator, torch.randn_like(w)


def test_small_products_wake_nobody_and_large_ones_do() -> None:
    ran = {}
    for name, sizes in {"small": (50, 784, 10), "large": (256, 784, 256)}.items():
        operator, v = product(*sizes)
        operator @ v
        assert "by the extension" in operator.engine.report()
        before = asleep()
        for _ in range(3):
            operator @ v
        ran[name] = {task for task, count in asleep().items() if count > before.get(task, 0)}
    assert ran["large"], "this machine has no second thread, or it is not used"
    assert not ran["small"] & ran["large"]
