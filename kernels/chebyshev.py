"""A step of the Chebyshev iteration; see `chebyshev_step` in hvp_engine.ops.reference."""

import triton
import triton.language as tl

from hvp_engine.kernels.rows import elements, is_wide, open_row, record


@triton.jit
def chebyshev_step(
    x, r, d, rows, addresses, alpha, beta, damping, partials, PRODUCT: tl.constexpr, CHUNK: tl.constexpr
):
    """r <- r - (Ad + damping d); d <- beta d + alpha r; x <- x + d."""
    address, chunk, start, length, row = open_row(rows, addresses)
    if is_wide(address, length):
        _chebyshev_step(
            x, r, d, address, chunk, start, length, row, alpha, beta, damping, partials, PRODUCT, CHUNK, True
        )
    else:
        _chebyshev_step(
            x, r, d, address, chunk, start, length, row, alpha, beta, damping, partials, PRODUCT, CHUNK, False
        )


@triton.jit
def _chebyshev_step(
    x, r, d, address, chunk, start, length, row, alpha, beta, damping, partials,
    PRODUCT: tl.constexpr, CHUNK: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    source, here, inside = elements(address, chunk, start, length, PRODUCT, CHUNK, WIDE)
    state = x.dtype.element_ty
    product = tl.load(source, mask=inside, other=0.0).to(state)
    solution = tl.load(x + here, mask=inside, other=0.0)
    residual = tl.load(r + here, mask=inside, other=0.0)
    direction = tl.load(d + here, mask=inside, other=0.0)
    residual -= product + tl.load(damping).to(state) * direction
    direction = tl.load(beta).to(state) * direction + tl.load(alpha).to(state) * residual
    solution += direction
    tl.store(x + here, solution, mask=inside)
    tl.store(r + here, residual, mask=inside)
    tl.store(d + here, direction, mask=inside)
    record(partials, row, residual, solution)
