"""A minute of checks and measurements that tell whether the GPU code works at all, the most telling first; no pytest.

    python -m tools.gpu_smoke [--device cuda|cpu] [--only NAME]

`tools/gpu_hour.sh` runs it. On a CPU it goes through the same motions, without what only a GPU has.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

import hvp_engine as hvp
from bench.problems import build
from hvp_engine import engines, ops
from hvp_engine._support.flat_vector import FlatVector, Layout, norm_of
from hvp_engine._support.precision import float32_arithmetic
from hvp_engine._support.pytree import flatten
from hvp_engine.diagnostics import peak_memory
from hvp_engine.differentiation.problem import Problem
from hvp_engine.differentiation.self_check import probe
from hvp_engine.engines.cudagraph import CudaGraphEngine
from hvp_engine.engines.recording import CaptureError, CudaRecorder
from hvp_engine.ops.backend import BACKENDS, use_backend, why_not
from hvp_engine.solvers.iteration import scalar

SOLVERS = {
    "Neumann, automatic": hvp.Neumann(20),
    "Neumann, accumulate": hvp.Neumann(20, 0.05, form="accumulate"),
    "conjugate gradient": hvp.ConjugateGradient(20, tol=0.0),
    "Chebyshev": hvp.Chebyshev(20),
    "MINRES": hvp.MINRES(10, tol=0.0),
}
WORDS = {"neumann_step_horner": 4, "neumann_step": 5, "cg_step": 8, "chebyshev_step": 7, "scale_accumulate": 3}
"""Numbers that each weight makes an op read and write."""


# --- what the checks share ------------------------------------------------------------------------------------------


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def median(call: Callable[[], object], device: torch.device, repeats: int = 15, inner: int = 10) -> float:
    """Seconds of one call on the device: by events on a GPU, so that launching is not counted while it keeps up."""
    for _ in range(3):
        call()
    synchronize(device)
    times = []
    for _ in range(repeats):
        if device.type == "cuda":
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            for _ in range(inner):
                call()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end) / 1e3 / inner)
        else:
            start = time.perf_counter()
            for _ in range(inner):
                call()
            times.append((time.perf_counter() - start) / inner)
    return statistics.median(times)


def fast_backends(device: torch.device) -> list[str]:
    return [name for name in BACKENDS if name != "reference" and why_not(name, device.type) is None]


class Bound:
    """One op on random numbers."""

    def __init__(self, name: str, sizes: Sequence[int], device: torch.device, dtype: torch.dtype, product: torch.dtype):
        self.products = [torch.randn(size, device=device).to(product) for size in sizes]
        layout = Layout.of([torch.empty(size, dtype=dtype, device=device) for size in sizes])
        op = ops.OPS[name]
        self.states = [FlatVector.of(layout, [torch.randn(n, device=device) for n in sizes]) for _ in op.states]
        self.partials = layout.empty_partials()
        scalars = [scalar(0.1, device) for _ in op.scalars]
        damping = 0.2 if op.damped else 0.0
        self.step = ops.bind(name, [s.data for s in self.states], layout, scalars, damping, self.partials)


def losses() -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    def train(w: Any, h: Any, x: Tensor) -> Tensor:
        outputs = torch.tanh(torch.relu(x @ w["a"]) @ w["b"])
        return outputs.square().mean() + (h["d"].exp() * w["a"].square()).sum() + w["b"].square().sum()

    def val(w: Any, h: Any, x: Tensor) -> Tensor:
        return (torch.relu(x @ w["a"]) @ w["b"] - 1).square().mean()

    return train, val


def point(device: torch.device, n: int = 200, dtype: torch.dtype = torch.float64) -> tuple[Any, Any, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=dtype).to(device)

    return {"a": 0.1 * normal(n, n), "b": 0.1 * normal(n, 7)}, {"d": 0.1 * normal(n, n)}, normal(64, n), normal(64, n)


def hypergradient(solver: Any, engine: Any) -> hvp.Hypergradient:
    """With the same random draws for every engine."""
    made = hvp.Hypergradient(*losses(), solver, engine=engine)
    made.draws.base = 1
    return made


def third(made: hvp.Hypergradient, device: torch.device, dtype: torch.dtype = torch.float64) -> Tensor:
    """The result of the third call: by then every engine has what it makes once."""
    for _ in range(3):
        found = made(*point(device, dtype=dtype)).grads["d"]
    return found


def names(device: torch.device) -> list[str]:
    return ["eager", "recorded", "linearized", *(["cudagraph"] if device.type == "cuda" else [])]


# --- the checks -----------------------------------------------------------------------------------------------------


def check_ops(device: torch.device) -> None:
    """Every op of every backend against the reference: sizes, dtypes, more tensors than a launch takes."""
    for backend in fast_backends(device):
        for name in ops.OPS:
            for dtype, product in ((torch.float32,) * 2, (torch.float32, torch.bfloat16), (torch.float64,) * 2):
                for sizes in ((5000,), (1, 4096, 100_003), (37,) * 200, (11,) * 4000):
                    found = []
                    for which in ("reference", backend):
                        torch.manual_seed(0)
                        with use_backend(which):
                            one = Bound(name, sizes, device, dtype, product)
                            one.step(one.products)
                        found.append([*(state.data for state in one.states), one.partials.sum(0)])
                    rough = dtype == torch.float32
                    for ours, theirs in zip(*found, strict=True):
                        close = {"rtol": 1e-5 if rough else 1e-12, "atol": 1e-5 if rough else 1e-11}
                        torch.testing.assert_close(ours, theirs, **close)
        print(f"ops on {backend}: right")


def check_engines(device: torch.device) -> None:
    """Whole hypergradients by every engine and solver, three calls each, against eager."""
    for title, solver in SOLVERS.items():
        expected = third(hypergradient(solver, "eager"), device)
        for name in names(device)[1:]:
            one = hypergradient(solver, name)
            found = third(one, device)
            distance = float((found - expected).norm() / expected.norm())
            print(f"{title}, {name}: relative difference to eager {distance:.2g}")
            if name == "cudagraph":
                print("  ", one.report().replace("\n", " | ")[:300])
            assert distance < 1e-8, (title, name)


def check_capture(device: torch.device) -> None:
    """Every backend recorded by hand, with products at other addresses in every step, and replayed."""
    if device.type != "cuda":
        return
    for backend in fast_backends(device):
        with use_backend(backend):
            one = Bound("cg_step", (5000, 37, 4096), device, torch.float32, torch.float32)
            recorder = CudaRecorder(device)

            def body(one: Bound = one) -> list[Tensor]:
                for _ in range(30):
                    one.step([product.clone() for product in one.products])
                return []

            recording = recorder.record(body)
            before = [state.data.clone() for state in one.states]
            for _ in range(3):
                recording.replay()
            after = [state.data.clone() for state in one.states]
            for state, data in zip(one.states, before, strict=True):
                state.data.copy_(data)
            for _ in range(90):
                one.step(one.products)
            same = all(torch.equal(a, state.data) for a, state in zip(after, one.states, strict=True))
            print(f"replays with {backend}: the same bits as without a graph: {same}")
            assert same


def check_failures(device: torch.device) -> None:
    """A capture that fails leaves torch as it was, and no memory behind."""
    if device.type != "cuda":
        return

    def waiting() -> list[Tensor]:
        large = torch.ones(10_000_000, device=device)
        torch.cuda.synchronize(device)  # no operation, so that only the capture itself notices
        return [large]

    held = []
    for _ in range(3):
        try:
            CudaRecorder(device).record(waiting)
            raise AssertionError("a body that waits was recorded")
        except CaptureError as error:
            print(f"  {error}")
        torch.cuda.empty_cache()
        held.append(torch.cuda.memory_reserved(device))
    recording = CudaRecorder(device).record(lambda: [torch.rand(5, device=device)])
    recording.replay()
    assert bool(torch.isfinite(torch.rand(100, device=device)).all())
    sizes = ", ".join(f"{size / 1e6:.0f}" for size in held)
    print(f"MB reserved after each failure: {sizes} (40 more each time would be a leak)")


def check_streams(device: torch.device) -> None:
    """One engine used from two streams, without a wait of the caller's between."""
    if device.type != "cuda":
        return
    engine = CudaGraphEngine()
    arguments = [point(device), point(device)]
    arguments[1][0]["a"].mul_(2)
    one = hypergradient(hvp.Neumann(20, 0.05), engine)
    expected = [hypergradient(hvp.Neumann(20, 0.05), "eager")(*a).grads["d"] for a in arguments]
    streams = [torch.cuda.Stream(device) for _ in arguments]
    synchronize(device)
    found = []
    for index in [0, 1] * 10:
        with torch.cuda.stream(streams[index]):
            found.append((index, one(*arguments[index]).grads["d"]))
    synchronize(device)
    worst = max(float((grads - expected[i]).norm() / expected[i].norm()) for i, grads in found)
    print(f"two streams in turns: largest relative difference {worst:.2g}")
    assert worst < 1e-8


def measure_launches(device: torch.device) -> None:
    """The host's time for a call, which a small model waits for; and the set-up of a solve."""
    for backend in [*fast_backends(device), "reference"]:
        for name, count in itertools.product(("neumann_step_horner", "cg_step"), (1, 50, 500, 1500, 5000)):
            if backend == "reference" and count > 500:  # seconds for each call
                continue
            with use_backend(backend):
                one = Bound(name, (64,) * count, device, torch.float32, torch.float32)
                for _ in range(5):
                    one.step(one.products)
                synchronize(device)
                start = time.perf_counter()
                for _ in range(100):
                    one.step(one.products)
                host = (time.perf_counter() - start) / 100
                on_device = median(lambda one=one: one.step(one.products), device)  # type: ignore[misc]
                layout = one.states[0].layout
                start = time.perf_counter()
                for _ in range(10):
                    hvp.Neumann(20, 0.05).allocate(layout)
                synchronize(device)
                setup = (time.perf_counter() - start) / 10
                print(
                    f"{backend} {name}, {count} tensors: a call takes the host {1e6 * host:.1f} us, the device "
                    f"{1e6 * on_device:.1f} us; setting up a solve {1e3 * setup:.2f} ms"
                )


def measure_bandwidth(device: torch.device) -> None:
    """Bytes per second of every op, and as a share of a copy's."""
    n = 50_000_000 if device.type == "cuda" else 1_000_000
    x, y = torch.randn(n, device=device), torch.empty(n, device=device)
    copy = 8 * n / median(lambda: y.copy_(x), device, 10, 5)
    print(f"copy: {copy / 1e12:.3f} TB/s")
    for backend in fast_backends(device):
        with use_backend(backend):
            for name, words in WORDS.items():
                for count in (1, 200):
                    one = Bound(name, (n // count,) * count, device, torch.float32, torch.float32)
                    seconds = median(lambda one=one: one.step(one.products), device, 10, 5)  # type: ignore[misc]
                    speed = 4 * words * n / seconds
                    print(
                        f"{backend} {name}, {n:,} weights in {count}: {1e6 * seconds:.0f} us, {speed / 1e12:.3f} TB/s, "
                        f"{100 * speed / copy:.0f}% of copy"
                    )


def check_repeatability(device: torch.device) -> None:
    """Whether four runs give the same bits."""
    for name in names(device):
        grads = [third(hypergradient(hvp.Neumann(30, 0.05), name), device, torch.float32) for _ in range(4)]
        print(f"{name}: the same bits in four runs: {all(torch.equal(grads[0], other) for other in grads)}")


def measure_memory(device: torch.device) -> None:
    """The peak of a call, and what torch holds of the device, by engine."""
    if device.type != "cuda":
        return
    for name in [*names(device), "auto"]:
        torch.cuda.empty_cache()
        before = torch.cuda.memory_reserved(device)
        one, arguments = hypergradient(hvp.Neumann(20, 0.05), name), point(device, 2000, torch.float32)
        for _ in range(3):
            one(*arguments)
        torch.cuda.empty_cache()
        with peak_memory(device) as meter:
            one(*arguments)
        assert meter.reserved_bytes is not None
        held = meter.reserved_bytes - before
        print(f"{name}: peak {meter.peak_bytes / 1e6:.1f} MB, reserved {held / 1e6:.1f} MB more than before")


def measure_tf32(device: torch.device) -> None:
    """How far two evaluations of a float32 product lie apart, against the tolerance of the engines' check."""
    for name in ("lenet", "resnet20") if device.type == "cuda" else ("lenet",):
        problem = build(name, device)
        (weights, structure), (hypers, hyper_structure) = flatten(problem.weights, "w"), flatten(problem.hyper, "h")
        made = Problem(problem.train_loss, weights, structure, hypers, hyper_structure, (problem.train,), "train")
        for allowed in (True, False):
            torch.backends.cudnn.allow_tf32 = allowed
            eager, traced = engines.EagerEngine().linearize(made), engines.LinearizedEngine().linearize(made)
            tangents = probe(eager.layout)
            ours, theirs = traced.product(tangents), eager.product(tangents)
            distance = norm_of([a - b for a, b in zip(ours, theirs, strict=True)]) / norm_of(list(theirs))
            print(f"{name}, {float32_arithmetic(device.type)}: {float(distance):.2g} ({type(traced).__name__})")


CHECKS: dict[str, Callable[[torch.device], None]] = {
    "ops": check_ops,
    "engines": check_engines,
    "capture": check_capture,
    "failures": check_failures,
    "streams": check_streams,
    "launches": measure_launches,
    "bandwidth": measure_bandwidth,
    "repeatability": check_repeatability,
    "memory": measure_memory,
    "tf32": measure_tf32,
}


def main() -> int:
    """Run the checks; 1 if one fails."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", type=torch.device, default=torch.device("cuda"))
    parser.add_argument("--only", choices=CHECKS, nargs="+", default=list(CHECKS))
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    failed = []
    for name in options.only:
        start = time.perf_counter()
        try:
            CHECKS[name](options.device)
            print(f"-- {name}: done in {time.perf_counter() - start:.1f} s", flush=True)
        except Exception:  # the others may tell more
            traceback.print_exc()
            failed.append(name)
            print(f"-- {name}: FAILED", flush=True)
    print("FAILED: " + ", ".join(failed) if failed else "all checks passed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
