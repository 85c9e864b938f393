"""Plain torch for every op: the executable specification.

Each function here has the name, the arguments and the meaning of the op in :mod:`hvp_engine.ops`; the C++,
CUDA and Triton versions are tested against it. State vectors are flat (see :mod:`hvp_engine.vectors`); the
product is the list of tensors that autograd returned, each read in row-major order.

`partials` receives one row for each chunk of each tensor: two squared norms and a flag that is 1 where the
chunk holds a NaN or an infinity. `partials.sum(0)` gives the totals: because the rows do not depend on the
number of threads or the launch, neither do the totals.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from hvp_engine.vectors import CHUNK, offsets_of


def _parts(tensors: Sequence[Tensor], *states: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """For each tensor: itself, flattened in the state's dtype, and its part of every state vector."""
    offsets = offsets_of([t.numel() for t in tensors])
    for tensor, start in zip(tensors, offsets, strict=False):
        part = slice(start, start + tensor.numel())
        yield tensor.reshape(-1).to(states[0].dtype), *(state[part] for state in states)


def _record(partials: Tensor, row: int, first: Tensor, second: Tensor) -> int:
    """Write the rows of one tensor's chunks, beginning at `row`; return the next free row."""
    for a, b in zip(first.split(CHUNK), second.split(CHUNK), strict=True):
        if a.numel() == 0:
            continue
        finite = torch.isfinite(a).all() & torch.isfinite(b).all()
        partials[row, 0] = a.double().square().sum()
        partials[row, 1] = b.double().square().sum()
        partials[row, 2] = (~finite).double()
        row += 1
    return row


def neumann_step(v: Tensor, p: Tensor, hv: Sequence[Tensor], alpha: Tensor, damping: float, partials: Tensor) -> None:
    """v <- v - alpha (Hv + damping v); p <- p + v. Partials: ||v||^2, ||p||^2 of the new v and p, non-finite."""
    step = alpha.to(v.dtype)
    partials.zero_()
    row = 0
    for product, residual, total in _parts(hv, v, p):
        residual.sub_(step * (product + damping * residual))
        total.add_(residual)
        row = _record(partials, row, residual, total)


def neumann_step_horner(
    p: Tensor, v: Tensor, hp: Sequence[Tensor], alpha: Tensor, damping: float, partials: Tensor
) -> None:
    """p <- p + v - alpha (Hp + damping p), v constant. Partials: ||increment||^2, ||p||^2, non-finite."""
    step = alpha.to(p.dtype)
    partials.zero_()
    row = 0
    for product, total, start in _parts(hp, p, v):
        increment = start - step * (product + damping * total)
        total.add_(increment)
        row = _record(partials, row, increment, total)


def scale_accumulate(p: Tensor, x: Sequence[Tensor], alpha: Tensor, beta: Tensor, partials: Tensor) -> None:
    """p <- alpha x + beta p; p is not read where beta is 0. Partials: ||x||^2, ||p||^2 of the new p, non-finite."""
    scale, keep = alpha.to(p.dtype), beta.to(p.dtype)
    partials.zero_()
    row = 0
    for source, target in _parts(x, p):
        target.copy_(torch.where(keep == 0, scale * source, scale * source + keep * target))
        row = _record(partials, row, source, target)
