"""What the pytest-benchmark suites share. Run them one by one: `pytest bench/bench_inverse_hvp.py -k "lenet and auto"`.

They show a case as pytest-benchmark does, `--benchmark-json=FILE` included; the numbers of record are those of
`python -m bench.run`, which lets the methods take turns.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from bench.interleave import Work, synchronize
from bench.suite import Case
from bench.verification import Verified

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

Show = Callable[[Case, str], None]


@pytest.fixture
def show(benchmark: BenchmarkFixture) -> Show:
    """Time one work of a case, in the group of its case."""

    def timed(case: Case, name: str) -> None:
        work: Work = case.works[name]
        benchmark.group = f"{case.benchmark}, {case.problem}, {case.size:,}"
        benchmark.extra_info.update(units=work.units, threads=torch.get_num_threads())

        def call() -> None:
            work.call()
            synchronize(DEVICE)

        benchmark.pedantic(call, rounds=5, warmup_rounds=1)

    return timed


def require(verified: Verified, name: str) -> None:
    """Skip another package's method that was left out, with the reason; fail for one of ours that is wrong."""
    if any(text.startswith(f"{name}:") for text in verified.broken):
        pytest.fail(verified.left_out[name])
    if name in verified.left_out:
        pytest.skip(verified.left_out[name])
