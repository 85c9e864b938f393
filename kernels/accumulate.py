"""A scaled sum into the flat state; see `scale_accumulate` in hvp_engine.ops.reference."""

import triton
import triton.language as tl

from hvp_engine.kernels.rows import elements, is_wide, open_row, record


@triton.jit
def scale_accumulate(p, rows, addresses, alpha, beta, partials, PRODUCT: tl.constexpr, CHUNK: tl.constexpr):
    """p <- alpha x + beta p; p is not read where beta is 0."""
    address, chunk, start, length, row = open_row(rows, addresses)
    if is_wide(address, length):
        _scale_accumulate(p, address, chunk, start, length, row, alpha, beta, partials, PRODUCT, CHUNK, True)
    else:
        _scale_accumulate(p, address, chunk, start, length, row, alpha, beta, partials, PRODUCT, CHUNK, False)


@triton.jit
def _scale_accumulate(
    p, address, chunk, start, length, row, alpha, beta, partials,
    PRODUCT: tl.constexpr, CHUNK: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    source, here, inside = elements(address, chunk, start, length, PRODUCT, CHUNK, WIDE)
    state = p.dtype.element_ty
    keep = tl.load(beta).to(state)
    x = tl.load(source, mask=inside, other=0.0).to(state)
    kept = tl.load(p + here, mask=tl.where(keep != 0, inside, False), other=0.0)
    total = tl.load(alpha).to(state) * x + keep * kept
    tl.store(p + here, total, mask=inside)
    record(partials, row, x, total)
