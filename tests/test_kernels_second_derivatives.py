"""The Triton kernels of `hvp_engine.differentiable`: in the interpreter, as the tests of the others; and compiled."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton", reason="Triton is optional, and not installed here")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from hvp_engine import differentiable, kernels, use_backend  # noqa: E402
from hvp_engine.kernels import cross_entropy, normalization, normalization_rows  # noqa: E402
from hvp_engine.kernels.launch import TYPES  # noqa: E402

TESTS = Path(__file__).parent
compiled_only = pytest.mark.skipif(kernels.INTERPRETED, reason="TRITON_INTERPRET=1 is set: nothing is compiled")
interpreted_only = pytest.mark.skipif(not kernels.INTERPRETED, reason="without TRITON_INTERPRET=1 only GPUs run it")


def test_in_the_interpreter() -> None:
    """In a process of its own: it has to be chosen before the import."""
    wanted = "no_class or triton and (all_levels and (mean or weights or smoothing or none or batch_norm-image"
    wanted += " or group_norm-image or layer_norm-sound-first or rms_norm-sound-first) or infinite or test_log_softmax"
    wanted += " or all_rows_ignored or empty)"
    files = ("test_kernels_second_derivatives.py", "test_cross_entropy.py", "test_normalization.py")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *(str(TESTS / f) for f in files)]
    done = subprocess.run(
        [*command, "-k", wanted],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        cwd=TESTS.parent,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed and int(passed[1]) == 17, done.stdout


@interpreted_only
def test_a_label_that_is_no_class_makes_its_row_nan() -> None:
    logits, target = torch.zeros(4, 3, requires_grad=True), torch.tensor([0, 3, -1, -100])
    with use_backend("triton"):
        losses = differentiable.cross_entropy(logits, target, reduction="none")
        (gradient,) = torch.autograd.grad(losses.sum(), logits)
    assert losses.isnan().tolist() == [False, True, True, False]
    assert gradient.isnan().any(1).tolist() == [False, True, True, False]


F32, F64, BF16 = torch.float32, torch.float64, torch.bfloat16
ROWS: dict[str, tuple[Any, ...]] = {
    "cross_entropy": (cross_entropy.cross_entropy_rows, cross_entropy.BLOCK, cross_entropy.WARPS),
    "cross_entropy_backward": (cross_entropy.cross_entropy_backward_rows, cross_entropy.BLOCK, cross_entropy.WARPS),
    "cross_entropy_double_backward": (
        cross_entropy.cross_entropy_double_backward_rows,
        cross_entropy.BLOCK,
        cross_entropy.WARPS,
    ),
    "log_softmax": (cross_entropy.log_softmax_rows, cross_entropy.BLOCK, cross_entropy.WARPS),
    "log_softmax_backward": (cross_entropy.log_softmax_backward_rows, cross_entropy.BLOCK, cross_entropy.WARPS),
    "log_softmax_double_backward": (
        cross_entropy.log_softmax_double_backward_rows,
        cross_entropy.BLOCK,
        cross_entropy.WARPS,
    ),
    "layer_norm": (normalization_rows.row_value, normalization_rows.BLOCK, normalization_rows.WARPS),
    "layer_norm_backward": (normalization_rows.row_backward, normalization_rows.BLOCK, normalization_rows.WARPS),
    "layer_norm_double_backward": (
        normalization_rows.row_double_backward,
        normalization_rows.BLOCK,
        normalization_rows.WARPS,
    ),
    "column_sums": (normalization_rows.column_sums, None, normalization_rows.WARPS),
    "image_sums": (normalization.image_sums, None, normalization.WARPS),
    "image_results": (normalization.image_results, None, normalization.WARPS),
}
WIDE = {"settings", "mean", "variance", "means", "eps", "partial"}
INTEGERS = {
    *("classes", "ignored", "columns", "rows", "samples", "images", "points", "channels", "image_stride"),
    *("point_stride", "channel_stride", "splits"),
}
ACCUMULATED = {"losses", "log_sum_exp", "weight", "for_weight", "for_bias", "shift", "scale", "coefficients"}


def signature_of(
    name: str, kernel: Any, dtype: torch.dtype, block: int | None
) -> tuple[dict[str, str], dict[str, Any]]:
    state = F64 if dtype == F64 else F32
    constants: dict[str, Any] = {
        "BLOCK": block, "WIDE": dtype == F64, "CENTRED": True, "SECOND": True, "LEVEL": 2,
        "ROWS": normalization_rows.ROWS, "COLUMNS": normalization_rows.COLUMNS,
        "POINTS": normalization.POINTS, "CHANNELS": normalization.CHANNELS,
    }  # fmt: skip
    constants = {key: value for key, value in constants.items() if key in kernel.arg_names}
    signature = {}
    of_rows = name.startswith("cross_entropy")
    for argument in kernel.arg_names:
        if argument in constants:
            signature[argument] = "constexpr"
        elif argument == "for_bias":
            signature[argument], constants[argument] = "constexpr", None
        elif argument in INTEGERS:
            signature[argument] = "i32"
        elif argument == "target":
            signature[argument] = "*i64"
        elif argument in WIDE and not (argument == "mean" and name == "image_results"):
            signature[argument] = "*fp64"
        elif argument in ACCUMULATED or argument == "mean" or of_rows and argument in ("grad", "for_grad"):
            signature[argument] = f"*{TYPES[state]}"
        else:
            signature[argument] = f"*{TYPES[dtype]}"
    return signature, constants


@compiled_only
@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("dtype", [F32, F64, BF16], ids=str)
@pytest.mark.parametrize("name", ROWS)
def test_compiles_for_gpus(name: str, dtype: torch.dtype, capability: int) -> None:
    """Machine code without a GPU, and no registers in local memory."""
    kernel, block, warps = ROWS[name]
    if capability != 90 and dtype != F32:
        pytest.skip("every kernel for every GPU, and every dtype for one")
    signature, constants = signature_of(name, kernel, dtype, block)
    aligned = {(i,): [["tt.divisibility", 16]] for i, kind in enumerate(signature.values()) if kind.startswith("*")}
    compiled = triton.compile(
        ASTSource(kernel, signature, constexprs=constants, attrs=aligned),
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": warps},
    )
    assert len(compiled.asm["cubin"]) > 1000
    if dtype != F64:
        assert ".local" not in compiled.asm["ptx"]
