"""The beginning and the end of every kernel: find the row to work on, and write its partial sums.

One program handles one row: a chunk of one tensor. The row table has five int64 columns: the index of the tensor, the
index of the chunk in it, the start of the chunk in the flat state in units of 16 elements, the number of elements in
the chunk, and the row of `partials` to write. For tensors of 5,000 and 3 elements and chunks of 4,096, the rows are
(0, 0, 0, 4096, 0), (0, 1, 256, 904, 1) and (1, 0, 313, 3, 2). The address table has the address of each product.

Every kernel has two bodies. The wide one is for rows whose product is 16-byte aligned and whose length is a multiple
of 16: the compiler can then prove that whole vectors are in bounds, and loads and stores 16 bytes at a time. The narrow
one is for any address and length. Each row chooses at run time.
"""

import triton
import triton.language as tl


@triton.jit
def open_row(rows, addresses):
    """This program's entry of the row table: product address, chunk, start / 16, length, row of partials."""
    entry = rows + 5 * tl.program_id(0)
    address = tl.load(addresses + tl.load(entry))
    return address, tl.load(entry + 1), tl.load(entry + 2), tl.load(entry + 3), tl.load(entry + 4)


@triton.jit
def is_wide(address, length):
    return (address % 16 == 0) & (length % 16 == 0)


@triton.jit
def elements(address, chunk, start, length, PRODUCT: tl.constexpr, CHUNK: tl.constexpr, WIDE: tl.constexpr):
    """Pointers into the product, offsets into the flat state, and which of them are inside the chunk."""
    lane = tl.arange(0, CHUNK)
    source = address.to(tl.pointer_type(PRODUCT))
    if WIDE:
        # The hint is on the pointer because both bodies share `address`; for the same reason the length is rounded
        # instead of hinted.
        source = tl.multiple_of(source, 16)
        inside = lane < length // 16 * 16
    else:
        inside = lane < length
    return source + chunk * CHUNK + lane, start * 16 + lane, inside


@triton.jit
def record(partials, row, first, second):
    """Write one row of partials: two squared norms in float64, and whether a value is NaN or infinite."""
    record_products(partials, row, first, first, second, second)


@triton.jit
def record_products(partials, row, a, b, c, d):
    """Write one row of partials: a . b and c . d in float64, and whether a value is NaN or infinite."""
    finite = (tl.abs(a) < float("inf")) & (tl.abs(b) < float("inf"))
    finite = finite & (tl.abs(c) < float("inf")) & (tl.abs(d) < float("inf"))
    cell = partials + 3 * row
    tl.store(cell, tl.sum(a.to(tl.float64) * b.to(tl.float64)))
    tl.store(cell + 1, tl.sum(c.to(tl.float64) * d.to(tl.float64)))
    tl.store(cell + 2, tl.max(1 - finite.to(tl.int32)).to(tl.float64))


@triton.jit
def spread_total(partials, rows, BLOCK: tl.constexpr):
    """Add up the second column of all `rows` of partials, in one program, and write the total into the first column of
    each row, where the program of the row finds it, which is the only one that overwrites it."""
    lane = tl.arange(0, BLOCK).to(tl.int64)
    total = tl.zeros((BLOCK,), tl.float64)
    begin = 0
    while begin < rows:  # a range over a run-time number does not work in the interpreter
        total += tl.load(partials + 3 * (begin + lane) + 1, mask=begin + lane < rows, other=0.0)
        begin += BLOCK
    total = tl.zeros((BLOCK,), tl.float64) + tl.sum(total)
    begin = 0
    while begin < rows:
        tl.store(partials + 3 * (begin + lane), total, mask=begin + lane < rows)
        begin += BLOCK
