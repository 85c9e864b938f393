"""The scalar recurrences of Krylov methods, each one op on a vector of named float64 numbers.

Between two passes over the weights, conjugate gradients and MINRES work with a few numbers that never leave the device.
In plain torch each `+` is a launch of its own, some twenty a step for one and ninety for the other; here they are one
launch each. What an op computes is its function in :mod:`hvp_engine.ops.reference`.

There are two ways to call one, as for the vector ops: :func:`bind_recurrence` for the loop, and
``torch.ops.hvp_engine.<name>(state)`` under torch.compile and in `opcheck`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from hvp_engine.ops import backend

CG = (
    # what the pass over the weights found
    *("squared", "curvature", "nonfinite", "metric"),
    # what was decided at the start
    *("preconditioned", "enough"),
    *("rho", "beta", "size", "negative", "bad", "bad_metric"),
)
"""The numbers of conjugate gradients; flags are 0 or 1."""

MINRES = (
    *("alpha", "nonfinite", "norm", "scale", "search_norm", "value_norm", "residual_norm"),
    *("epsilon", "flat", "preconditioned", "enough"),
    # the reflections and the Lanczos recurrence
    *("cosine", "sine", "delta_bar", "epsilon_k", "size", "beta", "minus_beta"),
    *("gamma_bar", "phi", "phi_bar", "slope", "squared", "lowest", "moving", "least", "bad", "bad_metric"),
    # coefficients of the next pass
    *("minus_alpha", "minus_delta", "minus_epsilon", "inverse", "inverse_gamma", "step", "keep", "minus_shift"),
)
"""The numbers of MINRES; flags are 0 or 1."""

RECURRENCES: dict[str, tuple[str, ...]] = {
    "cg_recurrence": CG,
    "minres_lanczos": MINRES,
    "minres_reflection": MINRES,
    "minres_update": MINRES,
    "minres_residual": MINRES,
}
"""Every recurrence with the names of its numbers, in their order in the state."""


class Scalars:
    """Float64 numbers on one device, by name; `data` holds all of them, and each name is a 0-dim view of it."""

    def __init__(self, names: Sequence[str], device: torch.device):
        self.data = torch.zeros(len(names), dtype=torch.float64, device=device)
        self._views = dict(zip(names, self.data.unbind(), strict=True))

    def __getitem__(self, name: str) -> Tensor:
        return self._views[name]

    def first(self, count: int) -> Tensor:
        """A view of the first `count` numbers."""
        return self.data[:count]


def check_recurrence(name: str, state: Tensor) -> None:
    """Raise `TypeError` or `ValueError`, naming the argument, unless `state` holds the numbers of the recurrence."""
    expected = f"expected a contiguous float64 tensor of shape ({len(RECURRENCES[name])},)"
    if state.dtype != torch.float64:
        raise TypeError(f"{name}: state: {expected}; got {state.dtype}")
    if tuple(state.shape) != (len(RECURRENCES[name]),) or not state.is_contiguous():
        raise ValueError(f"{name}: state: {expected}; got shape {tuple(state.shape)}, strides {state.stride()}")


def bind_recurrence(name: str, state: Tensor) -> Callable[[], None]:
    """Recurrence `name`, checked and bound to its state on the selected backend; each call advances it."""
    check_recurrence(name, state)
    _, module = backend.select(state.device)
    return module.bind_recurrence(name, state)


def register(library: torch.library.Library) -> None:
    """Define every recurrence in `library`."""
    for name in RECURRENCES:
        library.define(f"{name}(Tensor(a!) state) -> ()")

        def run(state: Tensor, name: str = name) -> None:
            bind_recurrence(name, state)()

        def fake(state: Tensor, name: str = name) -> None:
            check_recurrence(name, state)

        library.impl(name, run, "CPU")
        library.impl(name, run, "CUDA")
        torch.library.register_fake(f"hvp_engine::{name}", fake, lib=library)
