"""What is particular to the compiled backend: its memory checks, its threads, its flag, its lifetime.

That it computes the right numbers is tested for all backends alike in test_ops.py.
"""

from __future__ import annotations

import contextlib
import gc
import os
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from hvp_engine._support.flat_vector import FlatVector, Layout
from hvp_engine.errors import BackendError
from hvp_engine.ops import cpp as native
from hvp_engine.ops import reference
from hvp_engine.ops.backend import Binding

TESTS = Path(__file__).parent
F64 = torch.float64
ALPHA, DAMPING = 0.3, 0.1


def scalar(value: float) -> Tensor:
    return torch.tensor(value, dtype=F64)


class Neumann:
    """neumann_step on copies of the same random state, by the extension or by plain torch."""

    def __init__(self, weights: Sequence[Tensor], backend=native, dtype: torch.dtype = torch.float32):
        torch.manual_seed(3)
        self.layout = Layout.of(weights)
        self.v, self.p = (FlatVector(self.layout, torch.zeros(self.layout.size, dtype=dtype)) for _ in range(2))
        for vector in (self.v, self.p):
            vector.copy_([torch.randn(shape, dtype=F64) for shape in self.layout.shapes])
        self.partials = self.layout.empty_partials()
        self.step = backend.bind(
            Binding("neumann_step", [self.v.data, self.p.data], self.layout, [scalar(ALPHA)], DAMPING, self.partials)
        )

    def assert_close(self, other: Neumann) -> None:
        for mine, theirs in ((self.v, other.v), (self.p, other.p)):
            torch.testing.assert_close(mine.data, theirs.data, rtol=2e-6, atol=2e-6)
        torch.testing.assert_close(self.partials, other.partials, rtol=2e-6, atol=1e-12)


def compare(weights: Sequence[Tensor], products_of) -> None:
    """The extension and plain torch must agree; `products_of` makes the products from a `Neumann`."""
    ours, theirs = Neumann(weights), Neumann(weights, reference)
    for _ in range(2):
        torch.manual_seed(5)
        ours.step(products_of(ours))
        torch.manual_seed(5)
        theirs.step(products_of(theirs))
    ours.assert_close(theirs)


def test_extension_is_built_and_runs_on_a_cpu():
    assert native.missing("cpu") is None
    assert native.CPU_VARIANT in ("avx2", "baseline")
    assert "xpu" in native.missing("xpu")


def test_kernels_for_a_cpu_without_avx2():
    """Torch's own setting chooses them, so that they can be tried on any machine."""
    script = """
import sys, pytest
from hvp_engine.ops import cpp as native
assert native.CPU_VARIANT == "baseline", native.CPU_VARIANT
sys.exit(pytest.main([*sys.argv[1:], "-q", "-p", "no:cacheprovider", "-k", "cpu-cpp and mixed and all or float32"]))
"""
    tests = [str(TESTS / name) for name in ("test_ops.py", "test_engines_native.py")]
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": "default"}
    done = subprocess.run([sys.executable, "-c", script, *tests], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    "products_of",
    [
        pytest.param(lambda n: [n.v.views[1], n.v.views[0]], id="swapped-views-of-v"),
        pytest.param(lambda n: [n.p.views[1], n.p.views[0]], id="swapped-views-of-p"),
        pytest.param(lambda n: [n.v.views[0], n.p.views[1]], id="in-their-own-place"),
        pytest.param(lambda n: [n.v.views[0], n.v.views[0]], id="twice-the-same-view"),
        pytest.param(lambda n: [n.v.views[0].t(), n.p.views[1].t()], id="transposed-in-their-own-place"),
        pytest.param(lambda n: [n.v.data[1:101].view(10, 10), n.v.data[3:103].view(10, 10)], id="shifted"),
        pytest.param(lambda n: [n.v.data[:1].expand(10, 10), n.p.data[-1:].expand(10, 10)], id="expanded-state"),
    ],
)
def test_products_that_share_memory_with_the_state(products_of):
    # For a loss like (w1 * w2).sum() autograd returns views of the tangent itself as the product.
    compare([torch.empty(10, 10), torch.empty(10, 10)], products_of)


@pytest.mark.parametrize(
    ("weight", "product_of"),
    [
        pytest.param(torch.empty(6, 5), lambda: torch.randn(5, 6).t(), id="transposed"),
        pytest.param(torch.empty(6, 5).t(), lambda: torch.randn(5, 6), id="transposed-weight"),
        pytest.param(torch.empty(6, 5), lambda: torch.randn(6, 1).expand(6, 5), id="expanded"),
        pytest.param(torch.empty(6, 5), lambda: torch.randn(12, 5)[::2], id="every-second-row"),
        pytest.param(torch.empty(6, 5), lambda: torch.randn(31)[1:].view(6, 5), id="offset"),
        pytest.param(torch.empty(6, 5), lambda: torch.randn(6, 5, dtype=torch.cfloat).conj().imag, id="negated"),
        pytest.param(torch.empty(6, 5), lambda: torch.randn(6, 5).bfloat16(), id="narrower-than-the-weight"),
        pytest.param(torch.empty(6, 5), lambda: torch.nn.Parameter(torch.randn(6, 5)), id="parameter"),
        pytest.param(
            torch.empty(2, 3, 4, 5).to(memory_format=torch.channels_last),
            lambda: torch.randn(2, 3, 4, 5),
            id="channels-last-weight",
        ),
        pytest.param(
            torch.empty(2, 3, 4, 5),
            lambda: torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
            id="channels-last-product",
        ),
        pytest.param(
            torch.empty(4, 3, 1, 1).to(memory_format=torch.channels_last),
            lambda: torch.randn(4, 3, 1, 1),
            id="strides-of-single-elements-do-not-matter",
        ),
        pytest.param(torch.empty(()), lambda: torch.randn(4)[2], id="0-dim"),
        pytest.param(
            torch.empty(16, 6, 5, 5),
            lambda: torch.randn(6, 16, 5, 5).transpose(0, 1),
            id="convolution-product",
        ),
        pytest.param(torch.empty(100, 90), lambda: torch.randn(90, 100).t(), id="transposed-over-chunks"),
        pytest.param(torch.empty(90, 100), lambda: torch.randn(()).expand(90, 100), id="one-number-expanded"),
        pytest.param(
            torch.empty(30, 20, 3, 7).to(memory_format=torch.channels_last),
            lambda: torch.randn(7, 20, 30, 3).permute(2, 1, 3, 0),
            id="permuted-over-chunks",
        ),
    ],
)
def test_products_of_any_layout(weight, product_of):
    compare([weight, weight], lambda n: [product_of(), product_of()])


@pytest.mark.parametrize(
    ("products", "error", "message"),
    [
        ([torch.ones(3)], ValueError, "expected 2 tensors; got 1"),
        (
            [torch.ones(3), torch.ones(2, 3)],
            ValueError,
            r"hv\[1\]: expected shape \(4,\) as weights\[1\]; got \(2, 3\)",
        ),
        (
            [torch.ones(3), torch.ones(2, 2)],
            ValueError,
            r"hv\[1\]: expected shape \(4,\) as weights\[1\]; got \(2, 2\)",
        ),
        ([torch.ones(3, dtype=F64), torch.ones(4)], TypeError, r"hv\[0\]: .*float32; got torch.float64"),
        ([torch.ones(3), torch.ones(4, dtype=torch.int32)], TypeError, r"hv\[1\]: .*got torch.int32"),
        ([torch.ones(3), None], TypeError, r"hv\[1\]: expected a tensor; got NoneType"),
        (
            [torch.ones(3), torch.ones(4, device="meta")],
            ValueError,
            r"hv\[1\]: expected device cpu .*got meta",
        ),
        (None, TypeError, "expected a list or tuple"),
    ],
)
def test_bad_products_are_named_and_change_nothing(products, error, message):
    ours = Neumann([torch.empty(3), torch.empty(4)])
    before = ours.v.data.clone(), ours.p.data.clone()
    with pytest.raises(error, match=message):
        ours.step(products)
    assert torch.equal(ours.v.data, before[0])
    assert torch.equal(ours.p.data, before[1])


def test_result_does_not_depend_on_the_number_of_threads():
    sizes = [1 << 20, 1, 4096, 5000, 77_777, 0, 300_000, 12_289]
    products = [torch.randn(size) for size in sizes]
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3, 7):
            torch.set_num_threads(count)
            ours = Neumann(products)
            ours.step(products)
            results.append(ours)
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert torch.equal(results[0].v.data, other.v.data)
        assert torch.equal(results[0].p.data, other.p.data)
        assert torch.equal(results[0].partials, other.partials)
    theirs = Neumann(products, reference)
    theirs.step(products)
    results[0].assert_close(theirs)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_flag_sees_a_non_finite_number_at_any_position(dtype, value):
    size = 75  # several vectors and a tail, whatever their width
    ours = Neumann([torch.empty(size, dtype=dtype)], dtype=dtype)
    for position in range(size):
        ours.v.data.fill_(1.0)
        ours.p.data.fill_(1.0)
        product = torch.ones(size, dtype=dtype)
        ours.step([product])
        assert ours.partials[0, 2] == 0
        product[position] = value
        ours.step([product])
        assert ours.partials[0, 2] == 1


@pytest.mark.parametrize(("dtype", "value"), [(torch.float32, 1e30), (F64, 1e200)])
def test_flag_ignores_large_finite_numbers(dtype, value):
    ours = Neumann([torch.empty(100, dtype=dtype)], dtype=dtype)
    ours.step([torch.full((100,), value, dtype=dtype)])
    assert ours.partials[0, 2] == 0
    assert torch.isfinite(ours.partials[0, 0]) == (dtype == torch.float32)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (F64, 1e-12)])
def test_norms_are_sums_in_double(dtype, tolerance):
    weights = [torch.empty(100_003, dtype=dtype)]
    ours = Neumann(weights, dtype=dtype)
    ours.step([torch.randn(100_003, dtype=dtype) * 1e-20])
    exact = [vector.data[:100_003].double().square().sum() for vector in (ours.v, ours.p)]
    torch.testing.assert_close(ours.partials.sum(0)[:2], torch.stack(exact), rtol=tolerance, atol=0)


@pytest.mark.parametrize("exponent", [-40, -30, -25, -20, -16, -15, -14, 0, 15, 18, 19, 20, 30, 37])
def test_norms_keep_their_accuracy_at_every_scale(exponent):
    """Squares of float32 are summed by block in float32 only where that neither overflows nor underflows."""
    ours = Neumann([torch.empty(4096) for _ in range(3)])
    for vector in (ours.v, ours.p):
        vector.data.zero_()
    even, spread = torch.randn(4096), torch.randn(4096) * 10 ** torch.empty(4096).uniform_(-8, 0)
    spread[256:512] = 0
    ours.step([part * 10.0**exponent for part in (even, spread, torch.zeros(4096))])
    squares = [torch.stack([view.double().square().sum() for view in vector.views]) for vector in (ours.v, ours.p)]
    torch.testing.assert_close(ours.partials, torch.stack([*squares, torch.zeros(3)], 1), rtol=5e-7, atol=0)


@pytest.mark.parametrize("sizes", [[], [0], [0, 0]])
def test_no_elements_give_one_row_of_zeros(sizes):
    ours = Neumann([torch.empty(size) for size in sizes])
    ours.partials.fill_(float("nan"))
    ours.step([torch.empty(size) for size in sizes])
    assert torch.equal(ours.partials, torch.zeros(1, 3, dtype=F64))


def test_a_plan_keeps_its_memory_whatever_happens_to_the_tensors():
    weights = [torch.empty(1000)]
    layout = Layout.of(weights)
    v, p, partials = FlatVector(layout), FlatVector(layout), layout.empty_partials()
    step = native.bind(Binding("neumann_step", [v.data, p.data], layout, [scalar(-1.0)], 0.0, partials))
    view = v.views[0]
    v.data.set_(torch.zeros(1))
    p.data.set_(torch.zeros(1))
    step([torch.ones(1000)])
    assert torch.equal(view, torch.ones(1000))


@pytest.mark.parametrize("size", [0, 10**6])
def test_bound_memory_cannot_be_resized(size: int):
    """Which would free it, whoever else shares it."""
    layout = Layout.of([torch.empty(1000)])
    v, p, alpha, partials = FlatVector(layout).data, FlatVector(layout).data, scalar(-1.0), layout.empty_partials()
    step = native.bind(Binding("neumann_step", [v, p], layout, [alpha], 0.0, partials))
    for tensor in (v, p, alpha, partials):
        with pytest.raises(RuntimeError, match="resize"):
            tensor.untyped_storage().resize_(size)
    step([torch.ones(1000)])
    assert torch.equal(v[:1000], torch.ones(1000))


def test_a_plan_after_everything_else_is_gone():
    class Watched(FlatVector):
        """One that a weak reference can be taken of."""

    layout = Layout.of([torch.empty(5000)])
    vectors = [Watched(layout), Watched(layout)]
    watch = weakref.ref(vectors[0])
    step = native.bind(
        Binding("neumann_step", [x.data for x in vectors], layout, [scalar(-1.0)], 0.0, layout.empty_partials())
    )
    del vectors, layout
    gc.collect()
    assert watch() is None
    others = [torch.full((5000,), 7.0) for _ in range(20)]
    for _ in range(3):
        step([torch.ones(5000)])
    assert all((other == 7).all() for other in others)


def test_alpha_is_read_at_every_call():
    weights = [torch.empty(3)]
    layout = Layout.of(weights)
    p, alpha, beta = FlatVector(layout), scalar(2.0), scalar(0.0)
    step = native.bind(Binding("scale_accumulate", [p.data], layout, [alpha, beta], 0.0, layout.empty_partials()))
    step([torch.ones(3)])
    alpha.fill_(5.0)
    beta.fill_(1.0)
    step([torch.ones(3)])
    assert torch.equal(p.views[0], torch.full((3,), 7.0))


def test_other_threads_run_during_a_step():
    weights = [torch.empty(8_000_000)]
    ours = Neumann(weights)
    products = [torch.zeros(8_000_000)]

    def longest_silence() -> float:
        """The longest time without a sign of life of this thread during a step, as a share of the step."""
        span = []

        def work() -> None:
            begin = time.perf_counter()
            for _ in range(3):
                ours.step(products)
            span.extend((begin, time.perf_counter()))

        worker = threading.Thread(target=work)
        stamps = []
        worker.start()
        while worker.is_alive():
            stamps.append(time.perf_counter())
        begin, end = span
        stamps = [begin, *(stamp for stamp in stamps if begin < stamp < end), end]
        return max(b - a for a, b in zip(stamps, stamps[1:], strict=False)) / (end - begin)

    # With the lock held through a step the silence would be a third of the time, or more, in every trial.
    assert min(longest_silence() for _ in range(20)) < 0.2


def test_one_openmp_runtime_is_loaded():
    code = """
import re, torch, hvp_engine.ops.cpp
names = re.findall(r"\\S+/(lib(?:gomp|omp|iomp5)[^/\\s]*)$", open("/proc/self/maps").read(), re.M)
print(len(set(names)), set(names))
"""
    if not sys.platform.startswith("linux"):
        pytest.skip("reads /proc/self/maps")
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert output.startswith("1 "), output


def test_a_cuda_graph_reads_slices_that_are_there_and_stay(monkeypatch: pytest.MonkeyPatch):
    """Without a GPU: only the answers of torch.cuda are made up."""
    monkeypatch.setattr(torch.cuda, "device", contextlib.nullcontext)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    monkeypatch.setattr(native, "_CAPTURED", kept := {})
    layout = Layout((torch.Size([5000]),), ((1,),), (torch.float32,), torch.device("cuda", 0))
    with pytest.raises(BackendError, match="neumann_step: hv: expected sizes .* got new .* before the capture"):
        native._slices("neumann_step", layout)
    slices = vars(layout)["slices"] = Layout.of([torch.empty(5000)]).slices
    assert native._slices("neumann_step", layout) is native._slices("cg_step", layout) is slices
    assert list(kept) == [slices.data_ptr()] and kept[slices.data_ptr()] is slices
    kept.clear()
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert native._slices("neumann_step", layout) is slices and not kept
    nothing = Layout((torch.Size([0]),), ((1,),), (torch.float32,), torch.device("cuda", 0))
    assert native._slices("neumann_step", nothing) is native._slices("neumann_step", Layout.of([torch.ones(3)])) is None
