"""The linear model's Triton kernels against plain torch, in the interpreter or on a GPU; and compiled without one."""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
from dataclasses import replace
from itertools import product
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from linear_models_and_losses import Model, joined, likewise, model_of
from problems_with_known_answers import randn
from torch import Tensor

import hvp_engine as hvp
from hvp_engine.linear_model import engine
from hvp_engine.linear_model import reference as linear_model_reference
from hvp_engine.linear_model.operator import LinearModelProducts
from hvp_engine.linear_model.reference import Factors

triton = pytest.importorskip("triton", reason="Triton is optional, and not installed here")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from hvp_engine import kernels  # noqa: E402
from hvp_engine.kernels.launch import TYPES  # noqa: E402
from hvp_engine.kernels.linear_direct import linear_model_direct_terms  # noqa: E402
from hvp_engine.kernels.linear_dual import EXPAND_WARPS, EXPANDED, linear_model_dual_terms, linear_model_expand  # noqa: E402
from hvp_engine.kernels.linear_model import LEAST, Tiling  # noqa: E402

TESTS = Path(__file__).parent
runs = pytest.mark.parametrize("where", ["cpu" if kernels.INTERPRETED else pytest.param("cuda", marks=pytest.mark.gpu)])
compiled_only = pytest.mark.skipif(kernels.INTERPRETED, reason="TRITON_INTERPRET=1 is set: nothing is compiled")

# Each pair of loss and algorithm; more outputs, samples and features than one tile has, and fewer.
MODELS = {
    "softmax": model_of("softmax", 3, "leaves", samples=7, features=37),
    "softmax of 17": model_of("softmax", 17, "scalar", bias=False, samples=20, features=33),
    "logistic": model_of("logistic", "vector", "scalar", samples=5, features=70),
    "squared": model_of("squared", 7, "leaves", bias=False, samples=18, features=19),
}


def factors_of(model: Model) -> Factors:
    linearization = model.operator.linear_map
    assert isinstance(linearization, LinearModelProducts)
    return linearization.factors


def moved(model: Model, where: str) -> Model:
    return Model(
        model.inputs.to(where),
        [w.to(where) for w in model.weights],
        model.targets.to(where),
        model.loss,
        [d.to(where) for d in model.decay],
    )


def vectors_of(factors: Factors, count: int) -> Tensor:
    """Random rows with zeros in the gaps."""
    rows = torch.zeros(count, factors.layout.size, dtype=factors.curvature.dtype, device=factors.curvature.device)
    for index, row in enumerate(rows):
        for view in factors.layout.views(row):
            view.copy_(randn(view.numel(), seed=60 + index).view_as(view))
    return rows


def call(module: ModuleType, name: str, start: Tensor, factors: Factors, iterations: int, horner: bool) -> list[Tensor]:
    v, p = start.clone(), torch.full_like(start, math.nan)
    figures = getattr(module, f"linear_model_{name}")(v, p, factors, 0.1, 0.2, iterations, horner)
    return [v, p, figures]


def test_in_the_interpreter() -> None:
    """Tests of this file and of the C++ kernels, in a process of its own: it has to be chosen before the import."""
    wanted = "(cpu or triton) and (meaning or bad or narrow) or triton and (batched and horner or leaves_v)"
    wanted += " or triton and (truncated_sum and 0.4 and not 50 or agree and softmax-horner)"
    files = ("test_kernels_linear_model.py", "test_linear_model_series.py")
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            *(str(TESTS / f) for f in files),
            "-k",
            wanted,
        ],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        cwd=TESTS.parent,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed and int(passed[1]) >= 30, done.stdout


@runs
@pytest.mark.parametrize("name, horner", list(product(["direct", "dual"], [False, True])))
@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_meaning(model: Model, name: str, horner: bool, where: str) -> None:
    """v, p and figures after a call as the reference has them, for several right-hand sides."""
    factors = factors_of(moved(model, where))
    start = vectors_of(factors, 3)
    for iterations in (0, 1, 3):
        ours = call(kernels, name, start, factors, iterations, horner)
        theirs = call(linear_model_reference, name, start, factors, iterations, horner)
        for mine, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-12, atol=1e-14)
        assert torch.equal(ours[0], start) == (horner or iterations == 0)


@runs
@pytest.mark.parametrize("horner", [False, True])
def test_meaning_with_a_decay_for_each_weight(horner: bool, where: str) -> None:
    for model in (model_of("softmax", 3, "per weight"), model_of("squared", 2, "per weight", bias=False)):
        factors = factors_of(moved(model, where))
        start = vectors_of(factors, 2)
        results = [call(module, "direct", start, factors, 4, horner) for module in (kernels, linear_model_reference)]
        for mine, other in zip(*results, strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-12, atol=1e-14)


@runs
@pytest.mark.parametrize("name, horner", list(product(["direct", "dual"], [False, True])))
def test_bad_values_stay_in_their_right_hand_side(name: str, horner: bool, where: str) -> None:
    """One NaN among the weights, one infinity in a bias; rows of the clean one share programs with theirs."""
    factors = factors_of(moved(model_of("logistic", 3), where))
    start = vectors_of(factors, 3)
    clean = call(kernels, name, start[1:2], factors, 3, horner)
    start[0, 4] = math.nan
    start[2, factors.layout.offsets[1]] = math.inf
    v, p, figures = call(kernels, name, start, factors, 3, horner)
    assert [bool(flag) for flag in figures[:, 2]] == [True, False, True]
    assert [bool(flag) for flag in figures[:, 5]] == [True, False, True]
    for mine, alone in zip((v[1], p[1], figures[1]), clean, strict=True):
        torch.testing.assert_close(mine, alone[0], rtol=1e-13, atol=1e-15)


@pytest.mark.gpu
@runs
@pytest.mark.parametrize("decay", ["scalar", "per weight"])
@pytest.mark.parametrize("loss", ["logistic", "softmax"])
def test_full_size(loss: str, decay: str, where: str) -> None:
    """The paper's distillation, as `solve` runs it: 784 x 10 weights, 50 samples, 20 terms in float32."""
    model = model_of(loss, 10, decay, samples=50, features=784)
    v = likewise(model, randn(7850, seed=64))
    solver = hvp.Neumann(20, alpha=0.01)
    with hvp.use_backend("reference"):
        truth = joined(model.operator.solve(v, solver).value)
    operator = moved(model.to(torch.float32), where).operator
    solution = operator.solve(tuple(part.float().to(where) for part in v), solver)
    torch.testing.assert_close(joined(solution.value).cpu(), truth, rtol=1e-4, atol=1e-6)
    assert operator.engine.report() == f"{'dual' if decay == 'scalar' else 'direct'} form in Triton"


def test_limits_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    limit = kernels.linear_model_limit
    small, tall = factors_of(model_of("softmax", 10)), factors_of(model_of("softmax", 10, samples=129))
    assert limit(small, True) is None and limit(small, False) is None
    assert re.fullmatch(
        r"the Gram matrix and 10 outputs together and 129 samples .* do not fit on chip", limit(tall, True)
    )
    assert re.fullmatch(r"10 outputs together and 129 samples in torch.float64 do not fit on chip", limit(tall, False))
    assert "1025 features are more than 1024" in limit(factors_of(model_of("squared", features=1025)), False)
    assert limit(factors_of(model_of("squared", 500, samples=64)), True) is None, "outputs that are not coupled"
    monkeypatch.setattr(engine.backend, "select", lambda *_, **__: ("triton", kernels))
    module, where = engine.kernels_for(tall, True)
    assert module is linear_model_reference and where == f"plain torch: {limit(tall, True)}"
    assert engine.kernels_for(small, True) == (kernels, "Triton")


@pytest.mark.parametrize("decay", ["scalar", "per weight"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_narrow_inputs(dtype: torch.dtype, decay: str, backend: str) -> None:
    """As the same numbers in the weights' dtype."""
    model = model_of("softmax", 3, decay, samples=7, features=37)
    model = replace(model, inputs=model.inputs.to(dtype).to(model.inputs.dtype))
    state = torch.float64 if dtype == torch.float32 else torch.float32
    wide = model.to(state)
    narrow = replace(wide, inputs=model.inputs.to(dtype))
    v = likewise(wide, randn(114, seed=65).to(state))
    results = []
    for each in (narrow, wide):
        operator = each.operator
        results.append([joined(operator.solve(v, hvp.Neumann(3, alpha=0.1)).value), joined(operator.gradient)])
    for mine, other in zip(*results, strict=True):
        assert torch.equal(mine, other)


# (kernel, outputs, samples, state, inputs, compute capability, (outputs coupled, with a bias, Horner form)); every pair
# of the last three occurs for each kernel, and the largest sizes that fit.
F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
DUAL, EXPAND, DIRECT = linear_model_dual_terms, linear_model_expand, linear_model_direct_terms
MODES = [(True, True, True), (True, False, False), (False, True, False), (False, False, True)]
VARIANTS = [
    *(
        (k, 10, 50, F32, F32, c, mode)
        for k in (DUAL, EXPAND, DIRECT)
        for c, mode in zip((80, 90, 90, 80), MODES, strict=True)
    ),
    *(
        (k, 10, 50, F64, F64, c, mode)
        for k in (DUAL, EXPAND, DIRECT)
        for c, mode in zip((80, 90), MODES[:2], strict=True)
    ),
    *((k, 10, 50, F32, inputs, 90, MODES[0]) for k in (EXPAND, DIRECT) for inputs in (BF16, F16)),
    *((DUAL, k, n, F32, F32, 90, MODES[1]) for k, n in ((10, 128), (64, 60), (128, 30))),
    (DUAL, 10, 128, F64, F64, 80, MODES[1]),
    *((DIRECT, k, n, F32, F32, 90, MODES[1]) for k, n in ((10, 128), (20, 64), (128, 16))),
]


@compiled_only
@pytest.mark.parametrize("kernel, outputs, samples, state, inputs, capability, mode", VARIANTS)
def test_compiles_for_gpus(
    kernel: Any,
    outputs: int,
    samples: int,
    state: torch.dtype,
    inputs: torch.dtype,
    capability: int,
    mode: tuple[bool, bool, bool],
    tmp_path: Path,
) -> None:
    """Machine code without a GPU, whose state finds room in registers and shared memory."""
    coupled, biased, horner = mode
    factors = factors_of(model_of("softmax" if coupled else "squared", outputs, samples=samples).to(state))
    tiling = Tiling.of(factors)
    assert kernels.linear_model_limit(factors, dual=kernel is not DIRECT) is None
    sizes = {"ROWS": tiling.rows, "SAMPLES": tiling.samples, "FEATURES": tiling.features}
    warps = tiling.dual_warps if kernel is DUAL else tiling.direct_warps
    if kernel is EXPAND:
        sizes, warps = {"ROWS": LEAST, "SAMPLES": LEAST, "FEATURES": EXPANDED}, EXPAND_WARPS
    constants: dict[str, Any] = {name: size for name, size in sizes.items() if name in kernel.arg_names}
    constants["HORNER"] = horner
    absent = [*(["bias", "biases"] if not biased else []), *(["probabilities"] if not coupled else [])]
    constants |= {name: None for name in absent if name in kernel.arg_names}
    kinds = dict.fromkeys(("alpha", "damping", "coefficients", "figures"), "*fp64") | {"inputs": f"*{TYPES[inputs]}"}
    integers = ["group", "rows", "outputs", "samples", "padded", "features", "stride", "size", "bias", "iterations"]
    kinds |= dict.fromkeys(integers, "i32") | dict.fromkeys(constants, "constexpr")
    signature = {name: kinds.get(name, f"*{TYPES[state]}") for name in kernel.arg_names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, kind in enumerate(signature.values()) if kind.startswith("*")}
    compiled = triton.compile(
        ASTSource(kernel, signature, constexprs=constants, attrs=aligned),
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": warps},
    )
    assert "tf32" not in compiled.asm["ptx"]
    assert compiled.metadata.shared <= (64 + 8 if state == F32 else 128 + 16) * 1024
    if kernel is DUAL:
        assert compiled.metadata.shared <= tiling.dual_shared_bytes
    (tmp_path / "cubin").write_bytes(compiled.asm["cubin"])
    dump = subprocess.run(
        [triton.knobs.nvidia.cuobjdump.path, "-res-usage", str(tmp_path / "cubin")], capture_output=True, text=True
    )
    usage = re.search(r"STACK:(\d+)", dump.stdout + dump.stderr)
    spilled = 72 if (outputs, samples) != (10, 50) else 8  # bytes of each thread
    assert usage and int(usage[1]) <= spilled, dump.stdout + dump.stderr
