"""The Triton backend: one multi-tensor kernel for each op of :mod:`hvp_engine.ops.schemas`.

Adding an op takes its kernel, with the signature (states..., rows, addresses, scalars..., [damping], partials,
PRODUCT, CHUNK), and its entry in :data:`KERNELS`. An op that first needs a sum over all elements has another kernel of
the same signature in :data:`MEASURES`, which runs before it.

The scalar recurrences between two passes are in :mod:`hvp_engine.kernels.recurrences`.
"""

from __future__ import annotations

import torch
import triton

from hvp_engine.kernels.accumulate import scale_accumulate
from hvp_engine.kernels.chebyshev import chebyshev_step
from hvp_engine.kernels.conjugate_gradient import cg_curvature, cg_step
from hvp_engine.kernels.launch import MultiTensorLaunch
from hvp_engine.kernels.neumann import neumann_step, neumann_step_horner
from hvp_engine.kernels.recurrences import RECURRENCE_KERNELS, bind_recurrence
from hvp_engine.ops import OPS
from hvp_engine.ops.backend import Binding, Bound

__all__ = ["INTERPRETED", "KERNELS", "MEASURES", "RECURRENCE_KERNELS", "bind", "bind_recurrence", "missing"]

KERNELS = {
    kernel.__name__: kernel for kernel in (neumann_step, neumann_step_horner, scale_accumulate, cg_step, chebyshev_step)
}
MEASURES = {"cg_step": cg_curvature}

INTERPRETED = not isinstance(neumann_step, triton.JITFunction)
"""Whether the kernels were imported with TRITON_INTERPRET=1."""


def missing(device_type: str) -> str | None:
    """Why the Triton kernels cannot run on a device of this type, or None if they can."""
    if device_type == "cpu":
        if INTERPRETED:
            return None
        return "on a CPU Triton runs only interpreted: set TRITON_INTERPRET=1 before the program starts"
    if device_type != "cuda":
        return f"the Triton kernels do not run on device type {device_type!r}"
    if INTERPRETED:
        return "the kernels were imported with TRITON_INTERPRET=1 and so run on a CPU only: unset it"
    return None if torch.cuda.is_available() else "torch finds no CUDA device"


def bind(given: Binding) -> Bound:
    """The op `given.name`, bound."""
    name, states, layout, scalars, damping, partials = given
    op, arguments = OPS[name], list(scalars)
    if op.damped:
        # In device memory, since Triton passes a Python float in 32 bits.
        arguments.append(torch.full((), damping, dtype=torch.float64, device=partials.device))
    return MultiTensorLaunch(op, KERNELS[name], MEASURES.get(name), states, layout, arguments, partials)
