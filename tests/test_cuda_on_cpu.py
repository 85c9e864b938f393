"""The CUDA kernels without a GPU: csrc/cuda.cu on a CPU, its threads in any order."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import run_cuda_on_cpu
import torch
from fused_op_oracles import BF16, F16, F32, F64, Case, products_like

import hvp_engine as hvp
from hvp_engine.ops import OPS, RECURRENCES, cpp

pytestmark = pytest.mark.skipif(
    shutil.which("g++") is None or platform.machine() != "x86_64", reason="fibers switch by assembly for x86-64, in g++"
)
TESTS = Path(__file__).parent
OP_TESTS = str(TESTS / "test_ops.py")
# Without what the backend copies first, as on a GPU, and without a size that is in a list too.
ON_THIS_BACKEND = "cpu-cpp and not threads and not 100003 and (not formats or unaligned)"
CPU = torch.device("cpu")
ENVIRONMENT = os.environ | {"PYTHONPATH": str(TESTS.parent)}
SMALL, LARGE = 440, 3600
"""Tensors in one launch: in 4 KB of parameters, the most before CUDA 12.1, and in 32 KB."""


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("cuda") / "kernels.so"
    run_cuda_on_cpu.build("checked", file)
    return file


def run_ops(library: Path, order: str, which: str, tests: str = "test_ops.py") -> int:
    """Run tests of the ops in a process of its own, which a kernel's fault may end; how many passed."""
    command = [
        sys.executable,
        str(TESTS / "run_cuda_on_cpu.py"),
        order,
        str(library),
        str(TESTS / tests),
        "-k",
        which,
    ]
    done = subprocess.run(command, cwd=TESTS.parent, capture_output=True, text=True, env=ENVIRONMENT)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is not None, done.stdout
    return int(passed[1])


def test_all_op_tests_with_threads_and_blocks_shuffled(library: Path) -> None:
    assert run_ops(library, "shuffled", f"{ON_THIS_BACKEND} and not longer_than_the_parameters") > 600


def test_recurrences(library: Path) -> None:
    assert run_ops(library, "in-order", "backend and cpu-cpp", "test_recurrences.py") == len(RECURRENCES)


def test_with_threads_and_blocks_reversed(library: Path) -> None:
    assert (
        run_ops(library, "reversed", f"{ON_THIS_BACKEND} and (f32-mixed-all or (longer_than_the_parameters and f64))")
        == 10
    )


@pytest.mark.parametrize("flags", [(), ("-DCUDART_VERSION=12000",)], ids=["", "before CUDA 12.1"])
def test_lists_longer_than_the_parameters_take_several_launches(
    library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: tuple[str, ...]
) -> None:
    if flags:
        library = tmp_path / "kernels.so"
        run_cuda_on_cpu.build("checked", library, *flags)
    capacity = SMALL if flags else LARGE
    counts = [(name, 500) for name in OPS] + [("cg_step", 4100)]  # a total of more rows than its blocks have threads
    counts += [("neumann_step", n) for n in {1, SMALL, SMALL + 1, capacity, capacity + 1}]
    kernels = run_cuda_on_cpu.Library(library)
    monkeypatch.setattr(cpp, "bind", kernels.bind)
    with hvp.use_backend("cpp"):
        for name, count in counts:
            torch.manual_seed(0)
            products = products_like([(1 + 5000 * (i % 61 == 0),) for i in range(count)], [F32, BF16, F16], CPU)
            before = kernels.launches
            Case.of(name, products, F64).run_and_check(products)
            passes = -(-count // capacity)
            assert kernels.launches - before == (2 * passes + 1 if name == "cg_step" else passes)


def test_nothing_to_update_zeroes_the_sums(library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = run_cuda_on_cpu.Library(library)
    monkeypatch.setattr(cpp, "bind", kernels.bind)
    with hvp.use_backend("cpp"):
        case = Case.of("neumann_step", products_like([(0,), (2, 0)], [F32], CPU), F32)
        case.partials.fill_(3.0)
        before = kernels.launches
        case.bind()(products_like([(0,), (2, 0)], [F32], CPU))
    assert case.partials.tolist() == [[0.0, 0.0, 0.0]] and kernels.launches == before
