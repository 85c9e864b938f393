"""Peak memory by the number of products: shown as a benchmark's extra information, and held to what is promised."""

from __future__ import annotations

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from bench import memory
from bench.conftest import DEVICE, require
from bench.methods import OURS, own_engines
from bench.suite import UNROLLED_PROBLEM, suite_of


@pytest.mark.parametrize("problem", ["logistic", "mlp", "lenet"])
@pytest.mark.parametrize("method", [f"{OURS} {name}" for name in own_engines()])
def test_constant_memory(benchmark: BenchmarkFixture, method: str, problem: str) -> None:
    own = suite_of(problem, DEVICE)
    require(own.inverse_hvps, method)
    run = own.inverse_hvps.runs[method]
    benchmark.group = f"memory, {problem}"
    peaks = {length: memory.peak_of(run, length, DEVICE) for length in (2, 100)}
    benchmark.extra_info.update({f"peak_bytes_{length}": peak for length, peak in peaks.items()})
    benchmark.pedantic(run, args=(2,), rounds=2)
    assert peaks[100] <= 1.01 * peaks[2]


@pytest.mark.parametrize("length", [2, 20])
@pytest.mark.parametrize("method", ["hvp_engine eager", "hvp_engine auto", "unrolling"])
def test_against_unrolling(benchmark: BenchmarkFixture, method: str, length: int) -> None:
    run = suite_of(UNROLLED_PROBLEM, DEVICE).against_unrolling[method]
    benchmark.group = f"memory of {length} products or steps, {UNROLLED_PROBLEM}"
    benchmark.extra_info["peak_bytes"] = memory.peak_of(run, length, DEVICE)
    benchmark.pedantic(run, args=(length,), rounds=2)
