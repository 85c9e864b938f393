"""What low precision does to a hypergradient, and how precise float32 is on a device.

* **bfloat16 and float16 weights.** Solvers keep their vectors in float32; the weights' precision limits each product,
  which is evaluated in it, and the result, which is rounded to it once. Errors are tabulated by
  `python -m bench.precision`.
* **Autocast.** Write it into the losses, around the forward pass; products then run in the precisions that the
  forward chose, and weights, vectors and results stay float32.
* **Loss scaling.** A training loss scaled by s has the Hessian s H and the mixed derivative s d2L_T/dlambda dw, so
  that s cancels: the hypergradient needs no unscaling, and alpha="auto" adapts. A fixed alpha is divided by s, damping
  and the values of :func:`hvp_engine.approx_inverse_hvp` and :func:`hvp_engine.solve` multiplied by it. A validation
  loss scaled by s scales the hypergradient: divide by s. float16 ends at 65,504, so that s has a limit too.
* **TF32.** float32 products on a GPU may round their inputs to 10 bits: :func:`float32_arithmetic` tells.
"""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager
from typing import Any

import torch


def float32_settings(device_type: str) -> dict[str, str]:
    """What float32 is reduced to, "tf32" or "bf16", for each kind of operation on a "cpu" or "cuda" that reduces it."""
    backends: Any = torch.backends  # its settings are made at run time, unseen by type checkers
    library = backends.cudnn if device_type == "cuda" else backends.mkldnn
    products = backends.cuda.matmul if device_type == "cuda" else backends.mkldnn.matmul
    settings = {
        "matrix products": products.fp32_precision,
        "convolutions": library.conv.fp32_precision,
        "recurrent layers": library.rnn.fp32_precision,
    }
    return {what: setting for what, setting in settings.items() if setting not in ("none", "ieee")}


def float32_arithmetic(device_type: str) -> str:
    """How float32 matrix products, convolutions and recurrent layers are computed: "full precision", or which are not.

    Arguments:
        device_type: "cpu" or "cuda"; torch's settings are read, nothing is run.

    >>> float32_arithmetic("cpu")
    'full precision'
    """
    reduced = [f"{what} in {setting}" for what, setting in float32_settings(device_type).items()]
    if not reduced:
        return "full precision"
    return f'{", ".join(reduced)} (torch.backends.fp32_precision = "ieee" makes it full precision)'


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Operations on `device` keep the dtypes of their arguments; where autocast is off anyway, this takes 0.2 us."""
    if torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return _NOTHING


_NOTHING = contextlib.nullcontext()
