"""Tiles of attention, for the kernels in attention.py: operands, weights, and dropout's factors.

A tile has BLOCK queries or keys and all of the width, padded with zeros to a power of two. Operands are contiguous,
batch x heads x length x width; `head` counts the heads of the whole batch. Products of float32 are in float32, never in
TensorFloat-32; those of bfloat16 and float16 round what they take to these, and add up in float32.
"""

import triton
import triton.language as tl


@triton.jit
def load_rows(operand, head, row, count, width, WIDTH: tl.constexpr):
    """The rows `row` of a head; zeros beyond its `count` rows and its width."""
    column = tl.arange(0, WIDTH)
    at = (head * count + row)[:, None] * width + column[None, :]
    return tl.load(operand + at, mask=(row < count)[:, None] & (column < width)[None, :], other=0.0)


@triton.jit
def store_rows(operand, tile, head, row, count, width, WIDTH: tl.constexpr):
    column = tl.arange(0, WIDTH)
    at = (head * count + row)[:, None] * width + column[None, :]
    tl.store(operand + at, tile.to(operand.dtype.element_ty), mask=(row < count)[:, None] & (column < width)[None, :])


@triton.jit
def load_numbers(operand, head, row, count):
    """One number for each row of a head."""
    return tl.load(operand + head * count + row, mask=row < count, other=0.0)


@triton.jit
def product(left, right):
    """left right, in the precision of `right` where that is the lower one."""
    return tl.dot(left.to(right.dtype), right, input_precision="ieee")


@triton.jit
def scores(
    q, k, query, key, batch, head, mask, mask_batch, mask_head, mask_query, mask_key, scale, queries, keys,
    CAUSAL: tl.constexpr, MASK: tl.constexpr,
):  # fmt: skip
    """scale q k^T + mask; -inf where nothing is seen. MASK is 0 for none, 1 for a boolean one, 2 for an added one."""
    pairs = product(q, tl.trans(k)) * scale
    seen = (query < queries)[:, None] & (key < keys)[None, :]
    if MASK > 0:
        at = batch * mask_batch + head * mask_head + query[:, None] * mask_query + key[None, :] * mask_key
        given = tl.load(mask + at, mask=seen, other=0)
        if MASK == 1:
            seen = seen & (given != 0)
        else:
            pairs += given.to(tl.float32)
    if CAUSAL:
        seen = seen & (query[:, None] >= key[None, :])
    return tl.where(seen, pairs, float("-inf"))


@triton.jit
def weights(pairs, logsumexp):
    """exp(scores - logsumexp); zeros in a row that sees nothing."""
    return tl.exp(pairs - tl.where(logsumexp == float("-inf"), 0.0, logsumexp)[:, None])


@triton.jit
def correction_of(total):
    """What makes weights that sum to `total` sum to 1; 1 where nothing is seen."""
    return 1.0 / tl.where(total > 0, total, 1.0)


@triton.jit
def dropout_factors(
    query, key, head, seed, threshold, kept, QUERIES: tl.constexpr, KEYS: tl.constexpr, DROPOUT: tl.constexpr
):
    """0 for what is dropped, `kept` for the rest; see hvp_engine/differentiable/attention/dropout.py."""
    if DROPOUT:
        like = tl.zeros((QUERIES, KEYS), tl.uint32)
        quarter = like + (key // 4).to(tl.uint32)[None, :]
        counter = like + query.to(tl.uint32)[:, None]
        first, second, third, fourth = tl.philox(tl.load(seed), quarter, counter, like + head.to(tl.uint32), like)
        place = (key % 4)[None, :]
        word = tl.where(place == 0, first, tl.where(place == 1, second, tl.where(place == 2, third, fourth)))
        return tl.where(word.to(tl.int64) >= threshold, kept, 0.0)
    else:
        return tl.full((QUERIES, KEYS), 1.0, tl.float32)


@triton.jit
def open_queries(heads, key_heads, BLOCK: tl.constexpr):
    """This program's head, its queries, its batch and its head there, and its head of keys."""
    index = tl.program_id(1).to(tl.int64)
    query = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    batch, head = index // heads, index % heads
    return index, query, batch, head, batch * key_heads + head // (heads // key_heads)


@triton.jit
def last_key(query, keys, CAUSAL: tl.constexpr, BLOCK: tl.constexpr):
    """How many keys this program's queries see at most."""
    if CAUSAL:
        return tl.minimum(keys, (tl.program_id(0) + 1) * BLOCK)
    else:
        return keys


@triton.jit
def open_keys(heads, key_heads, CAUSAL: tl.constexpr, BLOCK: tl.constexpr):
    """This program's head of keys, its keys, its batch, the first of the heads of queries that share the keys, how many
    there are, and the first query that sees one of the keys."""
    index = tl.program_id(1).to(tl.int64)
    start = tl.program_id(0) * BLOCK
    key = start.to(tl.int64) + tl.arange(0, BLOCK)
    group = heads // key_heads
    first = start if CAUSAL else 0
    return index, key, index // key_heads, index % key_heads * group, group, first
