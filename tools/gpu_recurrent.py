"""Recurrent layers on a GPU: gradient and product of each recurrence by every backend, eagerly and in a CUDA graph,
against the formulas in float64; then their times in turns, and how many kernels they run.

    python -m tools.gpu_recurrent [--device cuda|cpu]

There is nothing of torch's to compare with: cuDNN's layers have no second derivative.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

import hvp_engine.differentiable  # noqa: F401  registers the recurrences
from hvp_engine.engines.recording import CudaRecorder
from hvp_engine.ops.backend import use_backend, why_not
from tools.gpu_graphs import compare


def gradient_and_product(kind: str, given: Sequence[Tensor], sequences: int, dtype: torch.dtype) -> list[Tensor]:
    """Of the sum of squares of all outputs, in the projected input and the weight of the state."""
    projected, weight, tangent = (x.to(dtype, copy=True) for x in given)
    leaves = [projected.requires_grad_(), weight.requires_grad_()]
    zeros = projected.new_zeros(sequences, weight.shape[1])
    states = [zeros, zeros] if kind == "lstm" else [None, zeros]
    recurrence = getattr(torch.ops.hvp_engine, f"{kind}_recurrence")
    output = recurrence(projected, weight, *states, [sequences] * (len(projected) // sequences), False)[0]
    gradient = torch.autograd.grad(output.square().sum(), leaves, create_graph=True)
    return [x.detach() for x in (*gradient, *torch.autograd.grad(gradient[0], leaves, tangent))]


def on_backend(name: str, work: Callable[[], list[Tensor]]) -> Callable[[], list[Tensor]]:
    """The work, on the backend `name`."""

    def run() -> list[Tensor]:
        with use_backend(name):
            return work()

    return run


def measure(kind: str, times: int, sequences: int, units: int, device: torch.device) -> None:
    """Compare, then time."""
    torch.manual_seed(0)
    width = (4 if kind == "lstm" else 3) * units
    rows = [torch.randn(times * sequences, width, dtype=torch.float64, device=device) for _ in range(2)]
    given = rows[0], torch.randn(width, units, dtype=torch.float64, device=device) / units**0.5, rows[1]
    exact = on_backend("reference", partial(gradient_and_product, kind, given, sequences, torch.float64))()
    works: dict[str, Callable[[], object]] = {}
    for backend in ("triton", "cpp", "reference"):
        if why_not(backend, device.type):
            continue
        eager = on_backend(backend, partial(gradient_and_product, kind, given, sequences, torch.float32))
        works[backend] = eager
        check(f"{kind} on {backend}", eager(), exact)
        if device.type == "cuda":
            recording = CudaRecorder(device).record(eager)
            recording.replay()
            check(f"{kind} on {backend}, in a graph", recording.outputs, exact)
            works[f"{backend}, in a graph"] = recording.replay
    compare(f"{kind}, {times} times, {sequences} sequences, {units} units", works, device)


def check(title: str, found: Sequence[Tensor], exact: Sequence[Tensor]) -> None:
    """Print the largest relative error; `AssertionError` if it is more than rounding."""
    error = max(float((x - y).norm() / y.norm()) for x, y in zip(found, exact, strict=True))
    print(f"{title}: relative error {error:.1e}")
    assert error < 1e-4, title


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", type=torch.device, default=torch.device("cuda"))
    device = parser.parse_args().device
    for kind in ("lstm", "gru"):
        for size in ((35, 20, 650), (70, 128, 256)) if device.type == "cuda" else ((5, 3, 16),):
            measure(kind, *size, device)


if __name__ == "__main__":
    main()
