"""Run tests of the ops on the CUDA kernels, compiled for a CPU over the stand-in of cuda_on_cpu/.

    python tests/run_cuda_on_cpu.py build checked|address|races FILE
    python tests/run_cuda_on_cpu.py in-order|reversed|shuffled FILE [arguments for pytest]

The kernels take the place of the C++ backend; what they cannot read where it is, is copied first, as on a GPU.
"""

from __future__ import annotations

import ctypes
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from torch import Tensor

if TYPE_CHECKING:
    from hvp_engine.ops.backend import Binding

TESTS = Path(__file__).parent
ORDERS = ("in-order", "reversed", "shuffled")
WIDTHS = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
"""The dtypes as csrc/dtypes.h numbers them."""

KINDS = {
    # A vector read at an address that a GPU would refuse ends the program.
    "checked": ("runtime.cpp", "-O2", "-shared", "-fsanitize=alignment", "-fsanitize-undefined-trap-on-error"),
    "address": ("runtime.cpp", "-O1", "-shared", "-fno-omit-frame-pointer", "-fsanitize=address,undefined",
                "-fno-sanitize-recover=undefined"),
    "races": ("races.cpp", "-O1", "-DSYSTEM_THREADS", "-fsanitize=thread", "-pthread"),
}  # fmt: skip
"""The libraries, and a program, that can be built."""


def build(kind: str, file: str | Path, *flags: str) -> None:
    """Compile `csrc/cuda.cu`, as it is, as C++ with the stand-in for the CUDA runtime."""
    here, sources = TESTS / "cuda_on_cpu", TESTS.parent / "csrc"
    main_file, *options = KINDS[kind]
    command = [
        *("g++", "-std=c++20", "-g1", "-fPIC", "-Wall", "-Wextra", "-Wno-unknown-pragmas", f"-I{here}", f"-I{sources}"),
        *(f'-DCUDA_SOURCE="{sources / "cuda.cu"}"', *options, *flags, str(here / main_file), "-o", str(file)),
    ]
    subprocess.run(command, check=True)


class Library:
    """The compiled kernels."""

    def __init__(self, file: str | Path):
        self._library = ctypes.CDLL(str(file))

    def order(self, name: str) -> None:
        """Say in which order threads and blocks run."""
        self._library.cuda_on_cpu_order(ORDERS.index(name))

    @property
    def launches(self) -> int:
        """Kernels launched so far."""
        return int(self._library.cuda_on_cpu_launches())

    def bind(self, binding: Binding) -> Callable[[Sequence[Tensor]], None]:
        """What a backend's `bind` gives."""
        from hvp_engine._support.pytree import check_like
        from hvp_engine.errors import BackendError
        from hvp_engine.ops import OPS

        name, states, layout, partials = binding.name, binding.states, binding.layout, binding.partials
        kept = (*states, partials)
        parts = [layout.views(state) for state in states]
        count = len(layout.shapes)
        error = ctypes.create_string_buffer(300)

        def readable(product: Tensor, index: int) -> bool:
            """Whether it is a state's own part, each element of which is read before it is written."""
            return product.stride() == layout.strides[index] and any(
                product.data_ptr() == views[index].data_ptr() and product.dtype == views[index].dtype for views in parts
            )

        def run(products: Sequence[Tensor]) -> None:
            check_like(products, layout, f"{name}: {OPS[name].product}", "weights", states[0].dtype)
            copied = layout.rows(products, apart_from=kept)
            read = [p if readable(p, i) else row for i, (p, row) in enumerate(zip(products, copied, strict=True))]
            self._library.cuda_on_cpu_run(
                list(OPS).index(name),
                int(states[0].dtype == torch.float64),
                _addresses(states),
                _addresses(binding.scalars),
                ctypes.c_double(binding.damping),
                ctypes.c_void_p(partials.data_ptr()),
                ctypes.c_int64(count),
                (ctypes.c_int64 * count)(*layout.numels),
                (ctypes.c_int64 * count)(*layout.offsets),
                _addresses(read),
                (ctypes.c_int * count)(*(WIDTHS[product.dtype] for product in read)),
                ctypes.c_void_p(layout.slices.data_ptr()),
                error,
                ctypes.c_size_t(len(error)),
            )
            if error.value:
                raise BackendError(error.value.decode())

        return run

    def bind_recurrence(self, name: str, state: Tensor) -> Callable[[], None]:
        """What a backend's `bind_recurrence` gives."""
        from hvp_engine.ops import RECURRENCES

        code, numbers = list(RECURRENCES).index(name), ctypes.c_void_p(state.data_ptr())

        def run(kept: Tensor = state) -> None:
            self._library.cuda_on_cpu_run_recurrence(code, numbers)

        return run


def _addresses(tensors: Sequence[Tensor]) -> ctypes.Array[ctypes.c_void_p]:
    return (ctypes.c_void_p * len(tensors))(*(tensor.data_ptr() for tensor in tensors))


def main(order: str, file: str, *arguments: str) -> int:
    from hvp_engine.ops import cpp

    library = Library(file)
    library.order(order)
    cpp.bind, cpp.bind_recurrence = library.bind, library.bind_recurrence  # type: ignore[assignment]
    found = pytest.main(["-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-W", "ignore", *arguments])
    return found if library.launches else 1


if __name__ == "__main__":
    if sys.argv[1] == "build":
        build(*sys.argv[2:])
    else:
        sys.exit(main(*sys.argv[1:]))
