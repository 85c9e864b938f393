"""The Triton kernels of attention without a GPU: the tests of every backend in the interpreter, and machine code."""

from __future__ import annotations

import re

import pytest
import torch
from test_kernels import TESTS, compiled_only, run_interpreted

triton = pytest.importorskip("triton", reason="Triton is optional, and not installed here")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from hvp_engine.kernels import attention_kernels  # noqa: E402
from hvp_engine.kernels.attention import WARPS  # noqa: E402
from hvp_engine.kernels.launch import TYPES  # noqa: E402

KERNELS = (
    "attention_rows",
    "attention_query_gradient",
    "attention_key_gradients",
    "attention_moved_rows",
    "attention_query_curvature",
    "attention_key_curvatures",
)
NUMBERS = {
    **dict.fromkeys(("logsumexp", "corrections", "sums"), "*fp32"),
    **dict.fromkeys(("mask_batch", "mask_head", "mask_query", "mask_key"), "i32"),
    **dict.fromkeys(("heads", "key_heads", "queries", "keys", "width", "value_width"), "i32"),
    **{"seed": "*i64", "threshold": "i64", "kept": "fp32", "scale": "fp32"},
}
SHARED = {80: 163, 90: 227, 100: 227}
"""KiB of shared memory that a block may use."""

# The interpreter multiplies the bits of bfloat16 as if they were integers, in `tl.dot`.
INTERPRETED_TESTS = (
    "cpu-triton and not gradcheck and not bfloat16 and (three_levels and (float32 or (float16 and (plain or dropout))) "
    "or rows_that_see or formats or constants or empty or dropout_follows)"
)


def test_in_the_interpreter() -> None:
    done = run_interpreted(
        *("-m", "pytest", "-q", "-p", "no:cacheprovider", str(TESTS / "test_attention.py"), "-k", INTERPRETED_TESTS)
    )
    assert done.returncode == 0, done.stdout + done.stderr
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed and int(passed[1]) >= 35, done.stdout


@compiled_only
@pytest.mark.parametrize(
    ("dtype", "width", "block", "capability"),
    [
        (torch.float32, 64, 32, 90),  # ten seconds each: without tensor cores every product is written out
        (torch.bfloat16, 64, 64, 80),
        (torch.float16, 128, 32, 100),
    ],
    ids=str,
)
@pytest.mark.parametrize("name", KERNELS)
def test_compiles_for_gpus(name: str, dtype: torch.dtype, width: int, block: int, capability: int) -> None:
    """With everything that costs registers: a mask, the causal one beside it, and dropout."""
    kernel = getattr(attention_kernels, name)
    constants = {"CAUSAL": True, "MASK": 1, "DROPOUT": True, "BLOCK": block, "WIDTH": width, "VALUE_WIDTH": width}
    kinds = NUMBERS | {"mask": "*u8"} | dict.fromkeys(constants, "constexpr")
    signature = {argument: kinds.get(argument, f"*{TYPES[dtype]}") for argument in kernel.arg_names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, kind in enumerate(signature.values()) if kind.startswith("*")}
    compiled = triton.compile(
        ASTSource(kernel, signature, constexprs=constants, attrs=aligned),
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": WARPS},
    )
    assert len(compiled.asm["cubin"]) > 1000
    assert compiled.metadata.shared <= SHARED[capability] * 1024
    products = re.findall(r"(?:mma\.sync|wgmma\.mma_async|tcgen05\.mma)\S*", compiled.asm["ptx"])
    if dtype == torch.float32:
        assert not products, "TensorFloat-32 would lose digits"
    else:
        assert products and all("f32" in one or "tcgen05" in one for one in products)
