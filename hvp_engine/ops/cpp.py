"""The cpp and cuda backends: the ops of the compiled extension."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache

import torch  # before the extension, which then shares torch's OpenMP runtime
from torch import Tensor

from hvp_engine._support.flat_vector import Layout
from hvp_engine._support.pytree import check_leaf_like
from hvp_engine._support.torch_compat import loaded_library
from hvp_engine.errors import BackendError
from hvp_engine.ops.backend import Binding, Bound
from hvp_engine.ops.schemas import OPS

try:
    from hvp_engine import _C
except ImportError as error:
    raise ImportError(
        f"{error}: the C++ extension was not built for this installation; "
        "install again with a C++ compiler (pip install -v shows what the build found)"
    ) from error

CPU_VARIANT: str = _C.cpu_variant
"""The instruction set of the CPU kernels in use: "avx2", or "baseline" (also if ATEN_CPU_CAPABILITY asks for it)."""


@cache
def find_blas() -> str:
    """Let the extension look for the matrix product of torch's own BLAS; why it cannot be called, empty if it can."""
    _C.find_blas(loaded_library("torch_cpu"))
    return _C.blas_problem()


def missing(device_type: str) -> str | None:
    """Why the extension cannot run on a device of this type, or None if it can."""
    if device_type == "cpu":
        return None
    if device_type == "cuda":
        if not _C.has_cuda:
            return "the extension was built without CUDA; install again where nvcc is, with HVP_ENGINE_CUDA=ON"
        return _C.cuda_problem() or None
    return f"the extension does not run on device type {device_type!r}"


def bind(given: Binding) -> Bound:
    """The op `given.name`, bound."""
    name, states, layout, scalars, damping, partials = given
    states = [_kept(state) for state in states]
    partials = _kept(partials)
    examples = {dtype: torch.empty(0, dtype=dtype, device=layout.device) for dtype in set(layout.dtypes)}
    return _C.Plan(
        op=name,
        states=states,
        shapes=layout.shapes,
        strides=layout.strides,
        orders=layout.orders,
        examples=[examples[dtype] for dtype in layout.dtypes],
        offsets=layout.offsets,
        scalars=[_kept(scalar) for scalar in scalars],
        damping=damping,
        partials=partials,
        slices=_slices(name, layout),
        conform=_conform(name, layout, states, partials),
    )


def bind_recurrence(name: str, state: Tensor) -> Callable[[], None]:
    """The recurrence `name`, bound."""
    return _C.Recurrence(name, _kept(state))


_CAPTURED: dict[int, Tensor] = {}
"""Tables that CUDA graphs may read, by address: a graph does not keep alive what it reads."""


def _slices(name: str, layout: Layout) -> Tensor | None:
    """The layout's slices where a kernel reads them, which is on a GPU."""
    if layout.device.type != "cuda" or not any(layout.numels):
        return None
    with torch.cuda.device(layout.device):
        if not torch.cuda.is_current_stream_capturing():
            return layout.slices
    if "slices" not in vars(layout):
        raise BackendError(
            f"{name}: {OPS[name].product}: expected sizes that an op has met before a CUDA graph is captured; got new "
            "ones, of which nothing can be copied to the device now: call the op once before the capture"
        )
    return _CAPTURED.setdefault(layout.slices.data_ptr(), layout.slices)


def _kept(tensor: Tensor) -> Tensor:
    """An alias that keeps the memory alive and in place, whatever happens to the caller's tensor."""
    alias = tensor.detach()
    if alias.device.type == "cpu":
        alias.numpy()  # from now on torch refuses to resize this storage, which would free the memory of every alias
    return alias


def _conform(name: str, layout: Layout, states: Sequence[Tensor], partials: Tensor) -> Callable[[int, object], Tensor]:
    """A function that a plan calls for a product that it cannot read where it is.

    It raises an error, or returns a copy in the state's dtype, in the layout's storage order and apart from the memory
    that the plan writes.
    """
    state = states[0]
    taken = {tensor.untyped_storage().data_ptr() for tensor in (*states, partials)}

    def conform(index: int, product: object) -> Tensor:
        check_leaf_like(product, index, layout, f"{name}: {OPS[name].product}", "weights", state.dtype)
        assert isinstance(product, Tensor)
        row = product.detach().resolve_neg().permute(layout.orders[index]).contiguous().to(state.dtype)
        return row.clone() if row.untyped_storage().data_ptr() in taken else row

    return conform
