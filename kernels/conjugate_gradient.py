"""A step of conjugate gradients; see `cg_step` in hvp_engine.ops.reference.

The step's length depends on a sum over everything, so it takes three launches: `cg_curvature` writes each row's
share of d . (Ad + damping d), `spread_total` of hvp_engine.kernels.rows adds them up, and `cg_step` moves.
"""

import triton
import triton.language as tl

from hvp_engine.kernels.rows import elements, is_wide, open_row, record_products


@triton.jit
def cg_curvature(x, r, d, rows, addresses, rho, damping, partials, PRODUCT: tl.constexpr, CHUNK: tl.constexpr):
    """The second column of partials: the row's share of d . (Ad + damping d)."""
    address, chunk, start, length, row = open_row(rows, addresses)
    if is_wide(address, length):
        _cg_curvature(d, address, chunk, start, length, row, damping, partials, PRODUCT, CHUNK, True)
    else:
        _cg_curvature(d, address, chunk, start, length, row, damping, partials, PRODUCT, CHUNK, False)


@triton.jit
def _cg_curvature(
    d, address, chunk, start, length, row, damping, partials,
    PRODUCT: tl.constexpr, CHUNK: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    source, here, inside = elements(address, chunk, start, length, PRODUCT, CHUNK, WIDE)
    state = d.dtype.element_ty
    product = tl.load(source, mask=inside, other=0.0).to(state)
    direction = tl.load(d + here, mask=inside, other=0.0)
    curved = product + tl.load(damping).to(state) * direction
    tl.store(partials + 3 * row + 1, tl.sum(direction.to(tl.float64) * curved.to(tl.float64)))


@triton.jit
def cg_step(x, r, d, rows, addresses, rho, damping, partials, PRODUCT: tl.constexpr, CHUNK: tl.constexpr):
    """x <- x + a d; r <- r - a (Ad + damping d) with a = rho / curvature, or 0 unless the curvature is positive."""
    address, chunk, start, length, row = open_row(rows, addresses)
    if is_wide(address, length):
        _cg_step(x, r, d, address, chunk, start, length, row, rho, damping, partials, PRODUCT, CHUNK, True)
    else:
        _cg_step(x, r, d, address, chunk, start, length, row, rho, damping, partials, PRODUCT, CHUNK, False)


@triton.jit
def _cg_step(
    x, r, d, address, chunk, start, length, row, rho, damping, partials,
    PRODUCT: tl.constexpr, CHUNK: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    source, here, inside = elements(address, chunk, start, length, PRODUCT, CHUNK, WIDE)
    state = x.dtype.element_ty
    curvature = tl.load(partials + 3 * row)
    positive = curvature > 0
    step = tl.where(positive, tl.load(rho) / tl.where(positive, curvature, 1.0), 0.0).to(state)
    product = tl.load(source, mask=inside, other=0.0).to(state)
    solution = tl.load(x + here, mask=inside, other=0.0)
    residual = tl.load(r + here, mask=inside, other=0.0)
    direction = tl.load(d + here, mask=inside, other=0.0)
    curved = product + tl.load(damping).to(state) * direction
    solution += step * direction
    residual -= step * curved
    tl.store(x + here, solution, mask=inside)
    tl.store(r + here, residual, mask=inside)
    record_products(partials, row, residual, residual, direction, curved)
