"""The Triton kernels of LSTM and GRU without a GPU: the tests of every backend in the interpreter, machine code, and
what a time launches."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from recurrences import BATCHES, arguments
from test_kernels import TESTS, compiled_only, run_interpreted
from torch.utils._python_dispatch import TorchDispatchMode

from hvp_engine.differentiable.recurrent.signatures import OPS

triton = pytest.importorskip("triton", reason="Triton is optional, and not installed here")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from hvp_engine.kernels import recurrent, recurrent_gates  # noqa: E402
from hvp_engine.kernels.launch import TYPES  # noqa: E402

INTERPRETED_TESTS = (
    "triton and not cuda and (values_are_those and (not float32 and not end and (number or packed or unit "
    "or blocks and gru and double) or float32 and packed and end) or missing or nothing_is_kept or saturated "
    "or activations)"
)
VIEWS = ("slice", "transpose", "t", "detach", "alias", "view")


def test_in_the_interpreter() -> None:
    done = run_interpreted(
        *("-m", "pytest", "-q", "-p", "no:cacheprovider", str(TESTS / "test_recurrent.py"), "-k", INTERPRETED_TESTS)
    )
    assert done.returncode == 0, done.stdout + done.stderr
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed and int(passed[1]) == 32, done.stdout


@compiled_only
@pytest.mark.parametrize(
    ("dtype", "capability", "bare"),
    [(torch.float32, capability, False) for capability in (80, 90, 100)]
    + [(torch.float64, 90, False), (torch.float32, 90, True)],
    ids=str,
)
@pytest.mark.parametrize("name", OPS)
def test_compiles_for_gpus(name: str, dtype: torch.dtype, capability: int, bare: bool) -> None:
    """With everything that may be missing, or with nothing of it and one unit; nothing of a thread's is in local
    memory."""
    kernel = getattr(recurrent_gates, name.replace("recurrence", "gates"))
    constants: dict[str, Any] = {"ROWS": recurrent.ROWS, "UNITS": recurrent.UNITS}
    if bare:
        codes = OPS[name].arguments | OPS[name].results
        constants |= {"units": 1} | {x: None for x in kernel.arg_names if codes.get(x, "").endswith("?")}
    kinds = dict.fromkeys(("first", "count", "units"), "i32") | dict.fromkeys(constants, "constexpr")
    signature = {argument: kinds.get(argument, f"*{TYPES[dtype]}") for argument in kernel.arg_names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, kind in enumerate(signature.values()) if kind.startswith("*")}
    compiled = triton.compile(
        ASTSource(kernel, signature, constexprs=constants, attrs=aligned),
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": recurrent.WARPS},
    )
    assert len(compiled.asm["cubin"]) > 1000
    assert ".local" not in compiled.asm["ptx"]


class Launches(TorchDispatchMode):
    """The operations of torch that compute or allocate, and in place of a kernel its name."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.overloadpacket.__name__
        if name not in VIEWS:
            self.found.append(name)
        return function(*args, **(kwargs or {}))

    def __getitem__(self, grid: tuple[int, int]) -> Callable[..., None]:
        return lambda *_, **__: self.found.append("kernel")


@pytest.mark.parametrize("name", OPS)
def test_a_time_is_one_product_and_one_kernel(name: str) -> None:
    """And nothing is allocated from the first time on."""
    given, launches = arguments(name, *BATCHES["packed"]), Launches()
    with launches:
        recurrent.time_by_time(name, launches)(*given)
    one = ["kernel", "addmm"] if OPS[name].keeps else ["mm", "kernel"]
    assert launches.found[launches.found.index(one[0]) :] == one * len(given[len(OPS[name].arguments)])
