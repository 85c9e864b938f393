"""The two forms of the Neumann recurrence; see `neumann_step` and `neumann_step_horner` in hvp_engine.ops.reference."""

import triton
import triton.language as tl

from hvp_engine.kernels.rows import elements, is_wide, open_row, record


@triton.jit
def neumann_step(v, p, rows, addresses, alpha, damping, partials, PRODUCT: tl.constexpr, CHUNK: tl.constexpr):
    """v <- v - alpha (Hv + damping v); p <- p + v."""
    address, chunk, start, length, row = open_row(rows, addresses)
    if is_wide(address, length):
        _neumann_step(v, p, address, chunk, start, length, row, alpha, damping, partials, PRODUCT, CHUNK, True)
    else:
        _neumann_step(v, p, address, chunk, start, length, row, alpha, damping, partials, PRODUCT, CHUNK, False)


@triton.jit
def _neumann_step(
    v, p, address, chunk, start, length, row, alpha, damping, partials,
    PRODUCT: tl.constexpr, CHUNK: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    source, here, inside = elements(address, chunk, start, length, PRODUCT, CHUNK, WIDE)
    state = v.dtype.element_ty
    product = tl.load(source, mask=inside, other=0.0).to(state)
    residual = tl.load(v + here, mask=inside, other=0.0)
    total = tl.load(p + here, mask=inside, other=0.0)
    residual -= tl.load(alpha).to(state) * (product + tl.load(damping).to(state) * residual)
    total += residual
    tl.store(v + here, residual, mask=inside)
    tl.store(p + here, total, mask=inside)
    record(partials, row, residual, total)


@triton.jit
def neumann_step_horner(p, v, rows, addresses, alpha, damping, partials, PRODUCT: tl.constexpr, CHUNK: tl.constexpr):
    """p <- p + v - alpha (Hp + damping p), v constant."""
    address, chunk, start, length, row = open_row(rows, addresses)
    if is_wide(address, length):
        _neumann_step_horner(p, v, address, chunk, start, length, row, alpha, damping, partials, PRODUCT, CHUNK, True)
    else:
        _neumann_step_horner(p, v, address, chunk, start, length, row, alpha, damping, partials, PRODUCT, CHUNK, False)


@triton.jit
def _neumann_step_horner(
    p, v, address, chunk, start, length, row, alpha, damping, partials,
    PRODUCT: tl.constexpr, CHUNK: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    source, here, inside = elements(address, chunk, start, length, PRODUCT, CHUNK, WIDE)
    state = p.dtype.element_ty
    product = tl.load(source, mask=inside, other=0.0).to(state)
    first = tl.load(v + here, mask=inside, other=0.0)
    total = tl.load(p + here, mask=inside, other=0.0)
    increment = first - tl.load(alpha).to(state) * (product + tl.load(damping).to(state) * total)
    total += increment
    tl.store(p + here, total, mask=inside)
    record(partials, row, increment, total)
