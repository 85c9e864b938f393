"""The Triton kernels without a GPU: the matrix of test_ops.py in the interpreter, and compilation for real GPUs."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest
import torch

from hvp_engine._support.flat_vector import CHUNK, INPUT_DTYPES, STATE_DTYPES, Layout
from hvp_engine.ops import OPS, RECURRENCES
from hvp_engine.ops.backend import why_not

triton = pytest.importorskip("triton", reason="Triton is optional, and not installed here")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from hvp_engine import kernels  # noqa: E402
from hvp_engine.kernels.launch import TYPES, WARPS, row_tables  # noqa: E402
from hvp_engine.kernels.rows import spread_total  # noqa: E402

TESTS = Path(__file__).parent
compiled_only = pytest.mark.skipif(kernels.INTERPRETED, reason="TRITON_INTERPRET=1 is set: nothing is compiled")

# The interpreter takes some 10 ms for each row, so long lists run there with mixed dtypes only.
INTERPRETED_TESTS = (
    "cpu-triton and not ((-200] or -all] or -100003] or beta_zero) and not mixed) and not f64-mixed-200] "
    "and not (bad_product and 16) and not longer_than_the_parameters"
)


def run_interpreted(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Python in a process of its own: the interpreter has to be chosen before the kernels are imported."""
    return subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        cwd=TESTS.parent,
        capture_output=True,
        text=True,
    )


def test_tables_of_rows_are_made_once_for_a_layout() -> None:
    """A table has five numbers for every 4,096 weights: too long to make for every solve."""
    first, second = ([torch.empty(5000), torch.empty(3)] for _ in range(2))
    tables = [row_tables(Layout.of(tensors), [torch.float32, torch.bfloat16]) for tensors in (first, second)]
    assert all(one is other for one, other in zip(*tables, strict=True))
    ((_, wide), (_, low)) = tables[0]
    assert wide.tolist() == [[0, 0, 0, 4096, 0], [0, 1, 256, 904, 1]] and low.tolist() == [[1, 0, 313, 3, 2]]


def test_every_op_has_its_kernel() -> None:
    assert kernels.KERNELS.keys() == OPS.keys() and kernels.RECURRENCE_KERNELS.keys() == RECURRENCES.keys()


def test_ops_in_the_interpreter() -> None:
    done = run_interpreted(
        *("-m", "pytest", "-q", "-p", "no:cacheprovider"),
        *(str(TESTS / "test_ops.py"), str(TESTS / "test_ops_registered.py"), "-k", INTERPRETED_TESTS),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed and int(passed[1]) > 300, done.stdout


def test_recurrences_in_the_interpreter() -> None:
    done = run_interpreted(
        *("-m", "pytest", "-q", "-p", "no:cacheprovider"),
        *(str(TESTS / "test_recurrences.py"), "-k", "backend and cpu-triton"),
    )
    assert done.returncode == 0 and f"{len(RECURRENCES)} passed" in done.stdout, done.stdout + done.stderr


def test_totals_of_more_rows_than_one_block_takes() -> None:
    code = """
import torch
from hvp_engine.kernels.rows import spread_total
partials = torch.rand(2500, 3, dtype=torch.float64)
before = partials.clone()
spread_total[(1,)](partials, 2500, BLOCK=1024)
torch.testing.assert_close(partials[:, 0], before[:, 1].sum().expand(2500), rtol=1e-13, atol=0)
assert torch.equal(partials[:, 1:], before[:, 1:])
"""
    done = run_interpreted("-c", code)
    assert done.returncode == 0, done.stderr


@compiled_only
def test_a_backend_that_cannot_run_says_why() -> None:
    assert "TRITON_INTERPRET=1" in (why_not("triton", "cpu") or "")
    assert "'mps'" in (why_not("triton", "mps") or "")
    if not torch.cuda.is_available():
        assert "no CUDA device" in (why_not("triton", "cuda") or "")


def test_the_interpreter_runs_on_a_cpu_only() -> None:
    code = "from hvp_engine.ops.backend import why_not; print(why_not('triton', 'cpu'), '|', why_not('triton', 'cuda'))"
    done = run_interpreted("-c", code)
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(r"None \| .*TRITON_INTERPRET=1.*unset.*\n", done.stdout)


def test_rows_cover_every_element_once() -> None:
    tensors = [torch.empty(n, dtype=dtype) for n in (0, 1, CHUNK, 2 * CHUNK + 7, 5) for dtype in INPUT_DTYPES[2:]]
    layout = Layout.of(tensors)
    covered = torch.zeros(layout.size, dtype=torch.int64)
    rows = []
    for dtype, table in row_tables(layout, layout.dtypes):
        for tensor, chunk, start, length, row in table.tolist():
            assert TYPES[layout.dtypes[tensor]] == dtype
            assert start * 16 == layout.offsets[tensor] + chunk * CHUNK
            assert 0 < length <= CHUNK
            covered[start * 16 : start * 16 + length] += 1
            rows.append(row)
    for view in layout.views(covered):
        assert (view == 1).all()
    assert covered.sum() == sum(layout.numels)
    assert sorted(rows) == list(range(layout.partial_rows))


@compiled_only
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize(
    "state, dtype",
    [pair for pair in product(STATE_DTYPES, INPUT_DTYPES) if pair != (torch.float32, torch.float64)],
    ids=str,
)
@pytest.mark.parametrize("name", [*OPS, *(kernel.__name__ for kernel in kernels.MEASURES.values())])
def test_compiles_for_gpus(name: str, state: torch.dtype, dtype: torch.dtype, capability: int) -> None:
    """Machine code without a GPU; and in the code, state and products are read 16 bytes at a time."""
    kernel = {**kernels.KERNELS, **{k.__name__: k for k in kernels.MEASURES.values()}}[name]
    op = OPS["cg_step" if name == "cg_curvature" else name]
    states_read, states_written = (1, 0) if name == "cg_curvature" else (len(op.states), len(op.mutated))
    pointers = dict.fromkeys((*op.scalars, "damping", "partials"), "*fp64")
    pointers |= dict.fromkeys(("rows", "addresses"), "*i64")
    pointers |= dict.fromkeys(op.states, f"*{TYPES[state]}")
    constants = {"PRODUCT": TYPES[dtype], "CHUNK": CHUNK}
    signature = {argument: pointers.get(argument, "constexpr") for argument in kernel.arg_names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, kind in enumerate(signature.values()) if kind != "constexpr"}
    compiled = triton.compile(
        ASTSource(kernel, signature, constexprs=constants, attrs=aligned),
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": WARPS},
    )
    assert len(compiled.asm["cubin"]) > 1000
    code = compiled.asm["ptx"]
    elements = CHUNK // (32 * WARPS)  # of each thread, all of them by wide accesses in the wide body
    read = 16 * len(re.findall(r"ld\.global\.(?:v4\.b32|v2\.b64)", code))
    written = 16 * len(re.findall(r"st\.global\.(?:v4\.b32|v2\.b64)", code))
    assert read == elements * (states_read * state.itemsize + dtype.itemsize)
    assert written == elements * states_written * state.itemsize


@compiled_only
@pytest.mark.parametrize("capability", [80, 90])
def test_totals_compile_for_gpus(capability: int) -> None:
    signature = {"partials": "*fp64", "rows": "i32", "BLOCK": "constexpr"}
    compiled = triton.compile(
        ASTSource(spread_total, signature, constexprs={"BLOCK": 1024}), target=GPUTarget("cuda", capability, 32)
    )
    assert len(compiled.asm["cubin"]) > 1000


@compiled_only
@pytest.mark.parametrize("name", RECURRENCES)
def test_recurrences_compile_for_gpus(name: str) -> None:
    for capability in (80, 90):
        compiled = triton.compile(
            ASTSource(kernels.RECURRENCE_KERNELS[name], {"state": "*fp64"}), target=GPUTarget("cuda", capability, 32)
        )
        assert len(compiled.asm["cubin"]) > 1000
