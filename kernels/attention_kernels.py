"""Attention and its two derivatives; see :mod:`hvp_engine.differentiable.attention.reference` for what each computes.

One program has a block of queries and goes through all keys, or a block of keys and goes through all queries that see
them; what a program adds up it keeps in registers, so nothing is added in memory by two programs.

* `attention_rows`: the value, by online softmax.
* `attention_query_gradient`, `attention_key_gradients`: the first derivative. r, the sum of P * dP along a row, is the
  inner product of the gradient and the output.
* `attention_moved_rows`: o' and m along each row in one pass, since o' = sum of (P * D) (s' v + c) - m o; and
  n = <g, o'>.
* `attention_query_curvature`, `attention_key_curvatures`: the rest of the derivative of the derivative, given r, m, n.

A logarithm of 8 in float32 is wrong by up to 5e-7, and with it every weight of its row. What goes through the keys
first therefore adds up exp(s - logsumexp) too, and hands 1 / that sum on as the row's `correction`: the weights sum to
1 again.
"""

import triton
import triton.language as tl

from hvp_engine.kernels.attention_tiles import (
    correction_of,
    dropout_factors,
    last_key,
    load_numbers,
    load_rows,
    open_keys,
    open_queries,
    product,
    scores,
    store_rows,
    weights,
)


@triton.jit
def attention_rows(
    q, k, v, output, logsumexp,
    mask, mask_batch, mask_head, mask_query, mask_key, seed, threshold, kept, scale,
    heads, key_heads, queries, keys, width, value_width,
    CAUSAL: tl.constexpr, MASK: tl.constexpr, DROPOUT: tl.constexpr,
    BLOCK: tl.constexpr, WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr,
):  # fmt: skip
    index, query, batch, head, key_index = open_queries(heads, key_heads, BLOCK)
    q = load_rows(q, index, query, queries, width, WIDTH)
    largest = tl.full((BLOCK,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    sums = tl.zeros((BLOCK, VALUE_WIDTH), tl.float32)
    for start in range(0, last_key(query, keys, CAUSAL, BLOCK), BLOCK):
        key = start + tl.arange(0, BLOCK).to(tl.int64)
        tile = load_rows(k, key_index, key, keys, width, WIDTH)
        pairs = scores(
            q, tile, query, key, batch, head, mask, mask_batch, mask_head, mask_query, mask_key, scale, queries, keys,
            CAUSAL, MASK,
        )  # fmt: skip
        higher = tl.maximum(largest, tl.max(pairs, 1))
        shift = tl.where(higher == float("-inf"), 0.0, higher)
        here = tl.exp(pairs - shift[:, None])
        shrink = tl.exp(largest - shift)
        total = total * shrink + tl.sum(here, 1)
        here *= dropout_factors(query, key, index, seed, threshold, kept, BLOCK, BLOCK, DROPOUT)
        tile = load_rows(v, key_index, key, keys, value_width, VALUE_WIDTH)
        sums = sums * shrink[:, None] + product(here, tile)
        largest = higher
    something = total > 0
    sums /= tl.where(something, total, 1.0)[:, None]
    store_rows(output, sums, index, query, queries, value_width, VALUE_WIDTH)
    logarithm = tl.where(something, largest + tl.log(tl.where(something, total, 1.0)), float("-inf"))
    tl.store(logsumexp + index * queries + query, logarithm, mask=query < queries)


@triton.jit
def attention_query_gradient(
    q, k, v, grad_output, output, logsumexp, corrections, grad_query,
    mask, mask_batch, mask_head, mask_query, mask_key, seed, threshold, kept, scale,
    heads, key_heads, queries, keys, width, value_width,
    CAUSAL: tl.constexpr, MASK: tl.constexpr, DROPOUT: tl.constexpr,
    BLOCK: tl.constexpr, WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr,
):  # fmt: skip
    index, query, batch, head, key_index = open_queries(heads, key_heads, BLOCK)
    q = load_rows(q, index, query, queries, width, WIDTH)
    g = load_rows(grad_output, index, query, queries, value_width, VALUE_WIDTH)
    o = load_rows(output, index, query, queries, value_width, VALUE_WIDTH)
    mean = tl.sum(g.to(tl.float32) * o.to(tl.float32), 1)
    shift = load_numbers(logsumexp, index, query, queries)
    total = tl.zeros((BLOCK,), tl.float32)
    sums = tl.zeros((BLOCK, WIDTH), tl.float32)
    for start in range(0, last_key(query, keys, CAUSAL, BLOCK), BLOCK):
        key = start + tl.arange(0, BLOCK).to(tl.int64)
        tile = load_rows(k, key_index, key, keys, width, WIDTH)
        weight = weights(
            scores(
                q, tile, query, key, batch, head, mask, mask_batch, mask_head, mask_query, mask_key, scale, queries,
                keys, CAUSAL, MASK,
            ),
            shift,
        )  # fmt: skip
        total += tl.sum(weight, 1)
        grad_weight = product(g, tl.trans(load_rows(v, key_index, key, keys, value_width, VALUE_WIDTH)))
        grad_weight *= dropout_factors(query, key, index, seed, threshold, kept, BLOCK, BLOCK, DROPOUT)
        sums += product(weight * (grad_weight - mean[:, None]), tile)
    correction = correction_of(total)
    tl.store(corrections + index * queries + query, correction, mask=query < queries)
    store_rows(grad_query, sums * (correction * scale)[:, None], index, query, queries, width, WIDTH)


@triton.jit
def attention_key_gradients(
    q, k, v, grad_output, output, logsumexp, corrections, grad_key, grad_value,
    mask, mask_batch, mask_head, mask_query, mask_key, seed, threshold, kept, scale,
    heads, key_heads, queries, keys, width, value_width,
    CAUSAL: tl.constexpr, MASK: tl.constexpr, DROPOUT: tl.constexpr,
    BLOCK: tl.constexpr, WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr,
):  # fmt: skip
    key_index, key, batch, first_head, group, first = open_keys(heads, key_heads, CAUSAL, BLOCK)
    k = load_rows(k, key_index, key, keys, width, WIDTH)
    v = load_rows(v, key_index, key, keys, value_width, VALUE_WIDTH)
    key_sums = tl.zeros((BLOCK, WIDTH), tl.float32)
    value_sums = tl.zeros((BLOCK, VALUE_WIDTH), tl.float32)
    for head in range(first_head, first_head + group):
        index = batch * heads + head
        for start in range(first, queries, BLOCK):
            query = start + tl.arange(0, BLOCK).to(tl.int64)
            tile = load_rows(q, index, query, queries, width, WIDTH)
            g = load_rows(grad_output, index, query, queries, value_width, VALUE_WIDTH)
            o = load_rows(output, index, query, queries, value_width, VALUE_WIDTH)
            mean = tl.sum(g.to(tl.float32) * o.to(tl.float32), 1)
            weight = weights(
                scores(
                    tile, k, query, key, batch, head, mask, mask_batch, mask_head, mask_query, mask_key, scale,
                    queries, keys, CAUSAL, MASK,
                ),
                load_numbers(logsumexp, index, query, queries),
            )  # fmt: skip
            weight *= load_numbers(corrections, index, query, queries)[:, None]
            factors = dropout_factors(query, key, index, seed, threshold, kept, BLOCK, BLOCK, DROPOUT)
            grad_weight = product(g, tl.trans(v)) * factors
            key_sums += product(tl.trans(weight * (grad_weight - mean[:, None])), tile)
            value_sums += product(tl.trans(weight * factors), g)
    store_rows(grad_key, key_sums * scale, key_index, key, keys, width, WIDTH)
    store_rows(grad_value, value_sums, key_index, key, keys, value_width, VALUE_WIDTH)


@triton.jit
def attention_moved_rows(
    q, k, v, a, b, c, grad_output, output, logsumexp, grad_grad_output, sums,
    mask, mask_batch, mask_head, mask_query, mask_key, seed, threshold, kept, scale,
    heads, key_heads, queries, keys, width, value_width,
    CAUSAL: tl.constexpr, MASK: tl.constexpr, DROPOUT: tl.constexpr,
    BLOCK: tl.constexpr, WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr,
):  # fmt: skip
    """`sums` gets r, m, n and the correction of each row, one after the other."""
    index, query, batch, head, key_index = open_queries(heads, key_heads, BLOCK)
    q = load_rows(q, index, query, queries, width, WIDTH)
    a = load_rows(a, index, query, queries, width, WIDTH)
    shift = load_numbers(logsumexp, index, query, queries)
    total = tl.zeros((BLOCK,), tl.float32)
    mean_moved = tl.zeros((BLOCK,), tl.float32)
    moved_output = tl.zeros((BLOCK, VALUE_WIDTH), tl.float32)
    for start in range(0, last_key(query, keys, CAUSAL, BLOCK), BLOCK):
        key = start + tl.arange(0, BLOCK).to(tl.int64)
        tile = load_rows(k, key_index, key, keys, width, WIDTH)
        weight = weights(
            scores(
                q, tile, query, key, batch, head, mask, mask_batch, mask_head, mask_query, mask_key, scale, queries,
                keys, CAUSAL, MASK,
            ),
            shift,
        )  # fmt: skip
        total += tl.sum(weight, 1)
        moved = product(a, tl.trans(tile)) + product(q, tl.trans(load_rows(b, key_index, key, keys, width, WIDTH)))
        moved *= weight * scale
        mean_moved += tl.sum(moved, 1)
        factors = dropout_factors(query, key, index, seed, threshold, kept, BLOCK, BLOCK, DROPOUT)
        moved_output += product(moved * factors, load_rows(v, key_index, key, keys, value_width, VALUE_WIDTH))
        moved_output += product(weight * factors, load_rows(c, key_index, key, keys, value_width, VALUE_WIDTH))
    o = load_rows(output, index, query, queries, value_width, VALUE_WIDTH).to(tl.float32)
    g = load_rows(grad_output, index, query, queries, value_width, VALUE_WIDTH).to(tl.float32)
    correction = correction_of(total)
    mean_moved *= correction
    moved_output = moved_output * correction[:, None] - mean_moved[:, None] * o
    store_rows(grad_grad_output, moved_output, index, query, queries, value_width, VALUE_WIDTH)
    place = sums + index * 4 * queries + query
    tl.store(place, tl.sum(g * o, 1), mask=query < queries)
    tl.store(place + queries, mean_moved, mask=query < queries)
    tl.store(place + 2 * queries, tl.sum(g * moved_output, 1), mask=query < queries)
    tl.store(place + 3 * queries, correction, mask=query < queries)


@triton.jit
def attention_query_curvature(
    q, k, v, a, b, c, grad_output, logsumexp, sums, grad_query,
    mask, mask_batch, mask_head, mask_query, mask_key, seed, threshold, kept, scale,
    heads, key_heads, queries, keys, width, value_width,
    CAUSAL: tl.constexpr, MASK: tl.constexpr, DROPOUT: tl.constexpr,
    BLOCK: tl.constexpr, WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr,
):  # fmt: skip
    index, query, batch, head, key_index = open_queries(heads, key_heads, BLOCK)
    q = load_rows(q, index, query, queries, width, WIDTH)
    a = load_rows(a, index, query, queries, width, WIDTH)
    g = load_rows(grad_output, index, query, queries, value_width, VALUE_WIDTH)
    shift = load_numbers(logsumexp, index, query, queries)
    total = tl.zeros((BLOCK, WIDTH), tl.float32)
    for start in range(0, last_key(query, keys, CAUSAL, BLOCK), BLOCK):
        key = start + tl.arange(0, BLOCK).to(tl.int64)
        tile = load_rows(k, key_index, key, keys, width, WIDTH)
        b_tile = load_rows(b, key_index, key, keys, width, WIDTH)
        weight = weights(
            scores(
                q, tile, query, key, batch, head, mask, mask_batch, mask_head, mask_query, mask_key, scale, queries,
                keys, CAUSAL, MASK,
            ),
            shift,
        )  # fmt: skip
        _, grad_moved, grad_scores = moved_tile(
            q, tile, load_rows(v, key_index, key, keys, value_width, VALUE_WIDTH), a, b_tile,
            load_rows(c, key_index, key, keys, value_width, VALUE_WIDTH), g, weight, sums, index, query, queries,
            dropout_factors(query, key, index, seed, threshold, kept, BLOCK, BLOCK, DROPOUT), scale,
        )  # fmt: skip
        total += product(grad_scores, tile) + product(grad_moved, b_tile)
    store_rows(grad_query, total * scale, index, query, queries, width, WIDTH)


@triton.jit
def attention_key_curvatures(
    q, k, v, a, b, c, grad_output, logsumexp, sums, grad_key, grad_value,
    mask, mask_batch, mask_head, mask_query, mask_key, seed, threshold, kept, scale,
    heads, key_heads, queries, keys, width, value_width,
    CAUSAL: tl.constexpr, MASK: tl.constexpr, DROPOUT: tl.constexpr,
    BLOCK: tl.constexpr, WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr,
):  # fmt: skip
    key_index, key, batch, first_head, group, first = open_keys(heads, key_heads, CAUSAL, BLOCK)
    k = load_rows(k, key_index, key, keys, width, WIDTH)
    v = load_rows(v, key_index, key, keys, value_width, VALUE_WIDTH)
    b = load_rows(b, key_index, key, keys, width, WIDTH)
    c = load_rows(c, key_index, key, keys, value_width, VALUE_WIDTH)
    key_total = tl.zeros((BLOCK, WIDTH), tl.float32)
    value_total = tl.zeros((BLOCK, VALUE_WIDTH), tl.float32)
    for head in range(first_head, first_head + group):
        index = batch * heads + head
        for start in range(first, queries, BLOCK):
            query = start + tl.arange(0, BLOCK).to(tl.int64)
            tile = load_rows(q, index, query, queries, width, WIDTH)
            a_tile = load_rows(a, index, query, queries, width, WIDTH)
            g = load_rows(grad_output, index, query, queries, value_width, VALUE_WIDTH)
            weight = weights(
                scores(
                    tile, k, query, key, batch, head, mask, mask_batch, mask_head, mask_query, mask_key, scale,
                    queries, keys, CAUSAL, MASK,
                ),
                load_numbers(logsumexp, index, query, queries),
            )  # fmt: skip
            moved, grad_moved, grad_scores = moved_tile(
                tile, k, v, a_tile, b, c, g, weight, sums, index, query, queries,
                dropout_factors(query, key, index, seed, threshold, kept, BLOCK, BLOCK, DROPOUT), scale,
            )  # fmt: skip
            key_total += product(tl.trans(grad_scores), tile) + product(tl.trans(grad_moved), a_tile)
            value_total += product(tl.trans(moved), g)
    store_rows(grad_key, key_total * scale, key_index, key, keys, width, WIDTH)
    store_rows(grad_value, value_total, key_index, key, keys, value_width, VALUE_WIDTH)


@triton.jit
def moved_tile(q, k, v, a, b, c, g, weight, sums, index, query, queries, factors, scale):
    """P' * D and the gradients of s' and of s, for a block of queries and keys."""
    place = sums + index * 4 * queries + query
    inside = query < queries
    mean, mean_moved, last = (
        tl.load(place, mask=inside, other=0.0),
        tl.load(place + queries, mask=inside, other=0.0),
        tl.load(place + 2 * queries, mask=inside, other=0.0),
    )
    weight *= tl.load(place + 3 * queries, mask=inside, other=0.0)[:, None]
    step = (product(a, tl.trans(k)) + product(q, tl.trans(b))) * scale - mean_moved[:, None]
    centred = product(g, tl.trans(v)) * factors - mean[:, None]
    grad_scores = weight * (step * centred + product(g, tl.trans(c)) * factors - last[:, None])
    return weight * step * factors, weight * centred, grad_scores
