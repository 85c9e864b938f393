"""The fused vector ops: one list of schemas, with their checks, fakes and registration.

Each op updates flat state vectors in place from the list of tensors that autograd returned, and writes the norms of
the new state and a non-finite flag into `partials`. What an op computes is its function in
:mod:`hvp_engine.ops.reference`. There are two ways to call one:

* :func:`bind` checks the arguments once and returns a callable for the loop, which the eager engine uses;
* ``torch.ops.hvp_engine.<name>`` checks on every call and works under torch.compile and in `opcheck`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor

from hvp_engine._support.flat_vector import INPUT_DTYPES, STATE_DTYPES, Layout, partial_rows
from hvp_engine.errors import BackendError
from hvp_engine.ops import backend, recurrences


@dataclass(frozen=True)
class Op:
    """The signature of one op: (states..., product list, scalars..., [damping], partials)."""

    name: str
    states: tuple[str, ...]
    mutated: tuple[str, ...]
    product: str
    scalars: tuple[str, ...]
    damped: bool

    @property
    def schema(self) -> str:
        """The torch.library schema; mutated arguments carry an alias annotation each."""
        names = iter("abcdefgh")
        states = [
            f"Tensor({next(names)}!) {state}" if state in self.mutated else f"Tensor {state}" for state in self.states
        ]
        scalars = [f"Tensor {scalar}" for scalar in self.scalars]
        damping = ["float damping"] if self.damped else []
        arguments = [*states, f"Tensor[] {self.product}", *scalars, *damping, f"Tensor({next(names)}!) partials"]
        return f"{self.name}({', '.join(arguments)}) -> ()"


OPS = {
    op.name: op
    for op in (
        Op("neumann_step", ("v", "p"), ("v", "p"), "hv", ("alpha",), damped=True),
        Op("neumann_step_horner", ("p", "v"), ("p",), "hp", ("alpha",), damped=True),
        Op("scale_accumulate", ("p",), ("p",), "x", ("alpha", "beta"), damped=False),
        Op("cg_step", ("x", "r", "d"), ("x", "r"), "ad", ("rho",), damped=True),
        Op("chebyshev_step", ("x", "r", "d"), ("x", "r", "d"), "ad", ("alpha", "beta"), damped=True),
    )
}


def check(op: Op, states: Sequence[Tensor], layout: Layout, scalars: Sequence[Tensor], partials: Tensor) -> None:
    """Raise `ValueError` or `TypeError`, naming the argument, unless the arguments fit together."""
    size = layout.size
    minimum = layout.offsets[-1] + layout.numels[-1] if layout.numels else 0
    first = states[0]
    for name, state in zip(op.states, states, strict=True):
        where = f"{op.name}: {name}"
        if state.dtype not in STATE_DTYPES or state.dtype != first.dtype:
            raise TypeError(f"{where}: expected dtype float32 or float64, the same for all states; got {state.dtype}")
        if state.dim() != 1 or not state.is_contiguous() or not minimum <= state.numel() <= size:
            raise ValueError(
                f"{where}: expected a contiguous 1-d tensor of {minimum} to {size} elements; "
                f"got shape {tuple(state.shape)}, strides {state.stride()}"
            )
        if state.device != layout.device and layout.numels:
            raise ValueError(f"{where}: expected device {layout.device} as {op.product}; got {state.device}")
    for index, dtype in enumerate(layout.dtypes):
        if dtype not in INPUT_DTYPES or (dtype == torch.float64 and first.dtype != torch.float64):
            raise TypeError(
                f"{op.name}: {op.product}[{index}]: expected a floating dtype no wider than the "
                f"state's {first.dtype}; got {dtype}"
            )
    for name, scalar in zip(op.scalars, scalars, strict=True):
        if scalar.dim() != 0 or scalar.dtype != torch.float64 or scalar.device != first.device:
            raise ValueError(
                f"{op.name}: {name}: expected a 0-dim float64 tensor on {first.device}; "
                f"got shape {tuple(scalar.shape)}, {scalar.dtype}, {scalar.device}"
            )
    rows = partial_rows(layout.numels)
    if (
        tuple(partials.shape) != (rows, 3)
        or partials.dtype != torch.float64
        or partials.device != first.device
        or not partials.is_contiguous()
    ):
        raise ValueError(
            f"{op.name}: partials: expected a contiguous float64 tensor of shape ({rows}, 3) on {first.device}; "
            f"got shape {tuple(partials.shape)}, {partials.dtype}, {partials.device}"
        )


def _check_overlap(op: Op, states: Sequence[Tensor], scalars: Sequence[Tensor], partials: Tensor) -> None:
    """Raise unless every tensor that the op writes is apart in memory from all its other arguments."""
    names = (*op.states, *op.scalars, "partials")
    spans = [
        (name, tensor.data_ptr(), tensor.data_ptr() + tensor.numel() * tensor.element_size())
        for name, tensor in zip(names, (*states, *scalars, partials), strict=True)
    ]
    for (left, start, end), (right, other_start, other_end) in combinations(spans, 2):
        written = {left, right} & {*op.mutated, "partials"}
        if written and max(start, other_start) < min(end, other_end):
            raise ValueError(
                f"{op.name}: {left} and {right}: expected tensors that do not share memory; they overlap: pass a clone"
            )


def bind(
    name: str,
    states: Sequence[Tensor],
    layout: Layout,
    scalars: Sequence[Tensor],
    damping: float,
    partials: Tensor,
) -> backend.Bound:
    """Op `name`, checked and bound to its state on the selected backend.

    Arguments:
        name: a key of :data:`OPS`.
        states: the op's flat state vectors, of `layout`'s size and state dtype.
        layout: shapes, strides and dtypes of the products to come. A product with other strides or in another dtype
            (no wider than the state's), or one that shares memory with a state or `partials`, is copied first.
        scalars: the op's 0-dim float64 tensors, read at every call, so they may change between calls.
        damping: added to the diagonal of the operator (0.0 for ops without damping).
        partials: from :meth:`Layout.empty_partials`, overwritten at every call.

    Returns a callable that takes the list of products. It holds references to all tensors it needs; on a CPU their
    storages cannot be resized from then on.
    """
    op = OPS[name]
    check(op, states, layout, scalars, partials)
    _check_overlap(op, states, scalars, partials)
    _, module = backend.select(states[0].device)
    return module.bind(backend.Binding(name, states, layout, scalars, damping, partials))


def _check_no_capture(name: str, device: torch.device) -> None:
    """Raise where a CUDA graph would read what ends with the call: Triton's tables of addresses are the bound op's."""
    if device.type != "cuda" or backend.select(device)[0] != "triton":
        return
    with torch.cuda.device(device):
        if torch.cuda.is_current_stream_capturing():
            raise BackendError(
                f"{name}: backend 'triton' cannot be captured through torch.ops.hvp_engine, as the graph would read "
                "tables that end with the call: bind the op with hvp_engine.ops.bind and keep it as long as the graph, "
                "or choose use_backend('cuda')"
            )


def _register(library: torch.library.Library, op: Op) -> None:
    library.define(op.schema)
    count = len(op.states)

    def split(arguments: tuple) -> tuple[tuple, Layout, list[Tensor], tuple, float, Tensor]:
        states, product, rest = arguments[:count], arguments[count], arguments[count + 1 :]
        product = [tensor.contiguous() for tensor in product]
        layout = Layout.of(product) if product else Layout((), (), (), states[0].device)
        damping = rest[-2] if op.damped else 0.0
        return states, layout, product, rest[: len(op.scalars)], damping, rest[-1]

    def run(*arguments: object) -> None:
        states, layout, product, scalars, damping, partials = split(arguments)
        _check_no_capture(op.name, states[0].device)
        bind(op.name, states, layout, scalars, damping, partials)(product)

    def fake(*arguments: object) -> None:
        states, layout, _, scalars, _, partials = split(arguments)
        check(op, states, layout, scalars, partials)

    library.impl(op.name, run, "CPU")
    library.impl(op.name, run, "CUDA")
    torch.library.register_fake(f"hvp_engine::{op.name}", fake, lib=library)


_LIBRARY = torch.library.Library("hvp_engine", "DEF")
for _op in OPS.values():
    _register(_LIBRARY, _op)
recurrences.register(_LIBRARY)
