"""Which implementations of the fused ops exist, why one is missing, and which one runs.

Four backends implement every op of :mod:`hvp_engine.ops.schemas` and :mod:`hvp_engine.ops.recurrences`:

| name      | devices | what it is                                                     |
|-----------|---------|----------------------------------------------------------------|
| reference | any     | plain torch, the executable specification                      |
| cpp       | cpu     | the C++ extension (OpenMP, vectorized)                         |
| cuda      | cuda    | the CUDA part of the extension: lowest launch cost, addresses may change in a CUDA graph |
| triton    | cuda    | Triton kernels (on a CPU only through Triton's interpreter)    |

A backend is imported on first use; if the import fails, :func:`why_not` shows the original error. Where "auto" finds
nothing faster than the reference, a warning says so once.
"""

from __future__ import annotations

import contextlib
import importlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from functools import cache
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from hvp_engine._support.flat_vector import Layout
from hvp_engine.errors import BackendError

Bound = Callable[[Sequence[Tensor]], None]
"""A bound op: takes the list of products that autograd returned and updates the state to which it is bound."""


class Binding(NamedTuple):
    """What an op is bound to, checked already; see :func:`hvp_engine.ops.schemas.bind`."""

    name: str
    states: Sequence[Tensor]
    layout: Layout
    scalars: Sequence[Tensor]
    damping: float
    partials: Tensor


class Backend(Protocol):
    """The functions of a backend's module."""

    def missing(self, device_type: str) -> str | None:
        """Why this backend cannot run on a device of this type, or None if it can."""

    def bind(self, given: Binding) -> Bound:
        """The op `given.name`, bound."""

    def bind_recurrence(self, name: str, state: Tensor) -> Callable[[], None]:
        """The recurrence `name` of :mod:`hvp_engine.ops.recurrences`, bound."""


_MODULES = {
    "reference": "hvp_engine.ops.reference",
    "cpp": "hvp_engine.ops.cpp",
    "cuda": "hvp_engine.ops.cpp",
    "triton": "hvp_engine.kernels",
}
BACKENDS = tuple(_MODULES)
_PREFERENCE = {"cpu": ("cpp", "reference"), "cuda": ("cuda", "triton", "reference")}

CHOICE: ContextVar[str] = ContextVar("hvp_engine_backend", default="auto")
"""The name that :func:`use_backend` has set."""


@cache
def _load(name: str) -> tuple[Backend | None, str | None]:
    try:
        return importlib.import_module(_MODULES[name]), None
    except Exception as error:  # an extension can fail to load in many ways; users see the reason
        return None, f"{type(error).__name__}: {error}"


def why_not(name: str, device_type: str) -> str | None:
    """Why backend `name` cannot run on `device_type` ("cpu" or "cuda"), or None if it can.

    >>> why_not("reference", "cpu") is None
    True
    >>> why_not("cuda", "cpu")
    "backend 'cuda' does not run on device type 'cpu'"
    """
    devices = {"cpp": ("cpu",), "cuda": ("cuda",)}.get(name)
    if devices and device_type not in devices:
        return f"backend {name!r} does not run on device type {device_type!r}"
    module, reason = _load(name)
    return reason if module is None else module.missing(device_type)


def fastest(device_type: str, among: Sequence[str] = BACKENDS) -> str:
    """The first of `among` in the order of preference for this type of device that can run there."""
    preferred = _PREFERENCE.get(device_type, ("reference",))
    return next(name for name in preferred if name in among and why_not(name, device_type) is None)


def select(device: torch.device, name: str | None = None, among: Sequence[str] = BACKENDS) -> tuple[str, Backend]:
    """The backend to use on `device`: `name`, or the one chosen by :func:`use_backend`, or the fastest of `among`."""
    name = CHOICE.get() if name is None else name
    if name == "auto":
        name = fastest(device.type, among)
        if name == "reference" and device.type in _PREFERENCE and fastest(device.type) == "reference":
            _warn_slow(device.type)
    elif reason := why_not(name, device.type):
        raise BackendError(
            f"backend {name!r} is not available on device {device}: {reason}. "
            "`python -m hvp_engine doctor` shows what is; backend 'auto' takes the fastest that works."
        )
    module, _ = _load(name)
    assert module is not None
    return name, module


@cache
def _warn_slow(device_type: str) -> None:
    """Say once per process that only the reference runs on this type of device, and why."""
    faster = _PREFERENCE[device_type][:-1]
    warnings.warn(
        f"backend 'auto' runs the slower 'reference' on {device_type}, with the same results to rounding: "
        + "; ".join(f"{name!r} is not available, {why_not(name, device_type)}" for name in faster)
        + ". use_backend('reference') chooses it without a warning",
        stacklevel=3,
    )


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run the fused ops on backend `name` inside the `with` block (per thread and per task).

    Arguments:
        name: "auto" (the default: the fastest available on the tensors' device), "reference", "cpp", "cuda" or
            "triton".

    Cost: none by itself. A backend is imported at its first use, and engines that keep prepared solves keep one for
    each backend.

    Errors: `ValueError` for an unknown name, here; :class:`BackendError`, with the original reason, at the first op if
    the backend cannot run on the tensors' device.

    >>> import torch, hvp_engine as hvp
    >>> w = torch.ones(3, requires_grad=True)
    >>> with hvp.use_backend("reference"):
    ...     hvp.approx_inverse_hvp(torch.ones(3), (w ** 2).sum(), w, 50, 0.25)
    (tensor([0.5000, 0.5000, 0.5000]),)
    """
    if name != "auto" and name not in BACKENDS:
        raise ValueError(f"backend: expected 'auto' or one of {', '.join(map(repr, BACKENDS))}; got {name!r}")
    token = CHOICE.set(name)
    try:
        yield
    finally:
        CHOICE.reset(token)
