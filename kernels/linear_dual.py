"""The dual form of a linear model's series, in one launch; see linear_model.py beside this file."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hvp_engine.kernels.linear_model import (
    LEAST,
    Tiling,
    add_each,
    close_bias,
    curve,
    device_of,
    group_rows,
    measure,
    numbers,
    open_bias,
    record,
    step_bias,
)
from hvp_engine.linear_model.reference import Factors

EXPANDED = 64
"""Features of one program of `linear_model_expand`."""
EXPAND_WARPS = 4


@triton.jit(do_not_specialize=["iterations"])
def linear_model_dual_terms(
    v, initial, gram, curvature, probabilities, decay, alpha, damping, sums, terms, biases, coefficients,
    group, rows, outputs, samples, padded, size, bias, iterations,
    ROWS: tl.constexpr, SAMPLES: tl.constexpr, HORNER: tl.constexpr,
):  # fmt: skip
    """S of the last term and of the sum; with `biases` (sum, term) of each row and `coefficients` (sum, term)."""
    row, output, inside = group_rows(group, rows, outputs, ROWS)
    sample = tl.arange(0, SAMPLES)
    known = sample < samples
    here = inside[:, None] & known[None, :]
    at = row[:, None] * samples + sample[None, :]
    factor = output[:, None] * padded + sample[None, :]
    state = initial.dtype.element_ty
    products = tl.load(
        gram + sample[:, None] * padded + sample[None, :], mask=known[:, None] & known[None, :], other=0.0
    )
    first = tl.load(initial + at, mask=here, other=0.0)
    curvature = tl.load(curvature + factor, mask=here, other=0.0)
    if probabilities is not None:
        probabilities = tl.load(probabilities + factor, mask=here, other=0.0)
    step = tl.load(alpha).to(state)
    damped = tl.load(damping).to(state)
    shift = tl.load(decay).to(state) + damped
    start_bias = tl.zeros((ROWS,), state)
    bias_shift = start_bias
    if bias is not None:
        start_bias, bias_shift = open_bias(v, decay, damped, row, output, outputs, size, bias, inside)
    term_bias = start_bias
    sum_bias = start_bias
    term = tl.zeros((ROWS, SAMPLES), state)
    total = term
    shrink = tl.load(alpha) * (tl.load(decay).to(tl.float64) + tl.load(damping))
    term_c = shrink * 0 + 1  # powers of one factor in float64: its rounding adds up
    sum_c = term_c
    done = 0
    while done < iterations:
        done += 1
        source = total if HORNER else term
        source_bias = sum_bias if HORNER else term_bias
        source_c = sum_c if HORNER else term_c
        u = tl.dot(source, products, input_precision="ieee", out_dtype=state)
        u = tl.fma(first, source_c.to(state), u)  # a sum would become the initial accumulator, in the wrong layout
        curved = curve(u + source_bias[:, None], curvature, probabilities)
        change = -step * (curved + shift * source)
        if HORNER:
            term = change
            term_c = 1 - shrink * sum_c
        else:
            term += change
            term_c -= shrink * term_c
        total += term
        sum_c += term_c
        if bias is not None:
            term_bias, sum_bias = step_bias(curved, bias_shift, start_bias, term_bias, sum_bias, step, HORNER)
    tl.store(sums + at, total, mask=here)
    tl.store(terms + at, term, mask=here)
    if bias is not None:
        tl.store(biases + 2 * row, sum_bias, mask=inside)
        tl.store(biases + 2 * row + 1, term_bias, mask=inside)
    tl.store(coefficients, sum_c)
    tl.store(coefficients + 1, term_c)


@triton.jit
def linear_model_expand(
    v, p, inputs, alpha, sums, terms, biases, coefficients, figures,
    group, rows, outputs, samples, features, stride, size, bias,
    ROWS: tl.constexpr, SAMPLES: tl.constexpr, FEATURES: tl.constexpr, HORNER: tl.constexpr,
):  # fmt: skip
    """p <- alpha (c v + S X) of the sum; v <- c v + S X of the last term, unless HORNER; one tile of the features."""
    row, output, inside = group_rows(group, rows, outputs, ROWS)
    state = v.dtype.element_ty
    column = tl.program_id(1) * FEATURES + tl.arange(0, FEATURES)
    place = (row // outputs * size + output * features)[:, None] + column[None, :]
    there = inside[:, None] & (column < features)[None, :]
    total = tl.zeros((ROWS, FEATURES), state)
    term = total
    begin = 0
    while begin < samples:
        sample = begin + tl.arange(0, SAMPLES)
        known = sample < samples
        x = tl.load(
            inputs + sample.to(tl.int64)[:, None] * stride + column[None, :],
            mask=known[:, None] & (column < features)[None, :], other=0.0,
        ).to(state)  # fmt: skip
        at = row[:, None] * samples + sample[None, :]
        here = inside[:, None] & known[None, :]
        total = tl.dot(tl.load(sums + at, mask=here, other=0.0), x, total, input_precision="ieee", out_dtype=state)
        term = tl.dot(tl.load(terms + at, mask=here, other=0.0), x, term, input_precision="ieee", out_dtype=state)
        begin += SAMPLES
    start = tl.load(v + place, mask=there, other=0.0)
    step = tl.load(alpha).to(state)
    total = tl.fma(start, tl.load(coefficients).to(state), total)
    term = tl.fma(start, tl.load(coefficients + 1).to(state), term)
    tl.store(p + place, step * total, mask=there)
    if not HORNER:
        tl.store(v + place, term, mask=there)
    squared_start, bad_start = measure(start)
    squared_term, bad_term = measure(term)
    squared_sum, bad_sum = measure(total)
    bad = tl.maximum(bad_term, bad_sum)
    if bias is not None:  # by the first program along the features alone
        first = inside & (tl.program_id(1) == 0)
        place_bias = row // outputs * size + bias + output
        start_bias = tl.load(v + place_bias, mask=first, other=0.0)
        total_bias = tl.load(biases + 2 * row, mask=first, other=0.0)
        term_bias = tl.load(biases + 2 * row + 1, mask=first, other=0.0)
        squared_start, bad_start = add_each(start_bias, squared_start, bad_start)
        squared_term, squared_sum, bad = close_bias(
            v, p, place_bias, first, term_bias, total_bias, step, squared_term, squared_sum, bad, HORNER
        )
    record(
        figures + tl.program_id(1).to(tl.int64) * 6 * rows,
        row,
        inside,
        squared_start,
        bad_start,
        squared_term,
        squared_sum,
        bad,
    )


def linear_model_dual(
    v: Tensor, p: Tensor, factors: Factors, alpha: float, damping: float, iterations: int, horner: bool
) -> Tensor:
    """As the function of this name in hvp_engine.linear_model.reference."""
    tiling, layout = Tiling.of(factors), factors.layout
    samples, features = factors.inputs.shape
    rows = len(v) * factors.outputs
    tiles = triton.cdiv(features, EXPANDED)
    initial = (factors.split(v)[0] @ factors.wide_inputs.T).contiguous()
    sums, terms = torch.empty_like(initial), torch.empty_like(initial)
    biases = v.new_empty(rows, 2) if factors.biased else None
    coefficients = v.new_empty(2, dtype=torch.float64)
    figures = v.new_empty(tiles, rows, 6, dtype=torch.float64)
    bias = layout.offsets[1] if factors.biased else None
    step, damped = numbers(v, alpha, damping)
    p.zero_()  # the gaps
    with device_of(v):
        linear_model_dual_terms[(tiling.programs(rows),)](
            v, initial, factors.gram, factors.curvature, factors.probabilities, factors.decay, step, damped,
            sums, terms, biases, coefficients, tiling.group, rows, factors.outputs, samples,
            factors.curvature.shape[1], layout.size, bias, iterations,
            ROWS=tiling.rows, SAMPLES=tiling.samples, HORNER=horner, num_warps=tiling.dual_warps,
        )  # fmt: skip
        keep = horner or iterations == 0
        linear_model_expand[(triton.cdiv(rows, LEAST), tiles)](
            v, p, factors.inputs, step, sums, terms, biases, coefficients, figures, LEAST, rows, factors.outputs,
            samples, features, factors.inputs.stride(0), layout.size, bias,
            ROWS=LEAST, SAMPLES=LEAST, FEATURES=EXPANDED, HORNER=keep, num_warps=EXPAND_WARPS,
        )  # fmt: skip
    return figures.view(tiles, len(v), -1, 6).sum((0, 2))
