"""The direct form of a linear model's series, in one launch; see linear_model.py beside this file."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hvp_engine.kernels.linear_model import (
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
from hvp_engine.linear_model import reference as linear_model_reference
from hvp_engine.linear_model.reference import Factors


@triton.jit(do_not_specialize=["iterations"])
def linear_model_direct_terms(
    v, p, inputs, curvature, probabilities, decay, alpha, damping, figures,
    group, rows, outputs, samples, padded, features, stride, size, bias, iterations,
    ROWS: tl.constexpr, SAMPLES: tl.constexpr, FEATURES: tl.constexpr, HORNER: tl.constexpr,
):  # fmt: skip
    """All terms, at least one; p is alpha times the sum at the end."""
    row, output, inside = group_rows(group, rows, outputs, ROWS)
    sample = tl.arange(0, SAMPLES)
    known = sample < samples
    here = inside[:, None] & known[None, :]
    factor = output[:, None] * padded + sample[None, :]
    state = v.dtype.element_ty
    curvature = tl.load(curvature + factor, mask=here, other=0.0)
    if probabilities is not None:
        probabilities = tl.load(probabilities + factor, mask=here, other=0.0)
    step = tl.load(alpha).to(state)
    damped = tl.load(damping).to(state)
    lane = tl.arange(0, FEATURES)
    x_place = inputs + sample.to(tl.int64)[:, None] * stride + lane[None, :]
    row_place = row // outputs * size + output * features
    u = tl.zeros((ROWS, SAMPLES), state)
    squared_start = tl.zeros((ROWS,), tl.float64)
    bad_start = tl.zeros((ROWS,), tl.int32)
    begin = 0
    while begin < features:
        there = inside[:, None] & (begin + lane < features)[None, :]
        place = row_place[:, None] + (begin + lane)[None, :]
        x = tl.load(x_place + begin, mask=known[:, None] & (begin + lane < features)[None, :], other=0.0).to(state)
        start = tl.load(v + place, mask=there, other=0.0)
        tl.store(p + place, start, mask=there)
        squared, wrong = measure(start)
        squared_start += squared
        bad_start = tl.maximum(bad_start, wrong)
        u = tl.dot(start, tl.trans(x), u, input_precision="ieee", out_dtype=state)
        begin += FEATURES
    start_bias = tl.zeros((ROWS,), state)
    bias_shift = start_bias
    if bias is not None:
        start_bias, bias_shift = open_bias(v, decay, damped, row, output, outputs, size, bias, inside)
        squared_start, bad_start = add_each(start_bias, squared_start, bad_start)
    term_bias = start_bias
    sum_bias = start_bias
    squared_term = tl.zeros((ROWS,), tl.float64)
    squared_sum = tl.zeros((ROWS,), tl.float64)
    bad = tl.zeros((ROWS,), tl.int32)
    done = 0
    while done < iterations:
        done += 1
        source_bias = sum_bias if HORNER else term_bias
        curved = curve(u + source_bias[:, None], curvature, probabilities)
        u = tl.zeros((ROWS, SAMPLES), state)
        tl.debug_barrier()  # the last sweep's stores may be read by other threads in this one
        begin = 0
        while begin < features:
            there = inside[:, None] & (begin + lane < features)[None, :]
            place = row_place[:, None] + (begin + lane)[None, :]
            x = tl.load(x_place + begin, mask=known[:, None] & (begin + lane < features)[None, :], other=0.0).to(state)
            total = tl.load(p + place, mask=there, other=0.0)
            term = tl.load(v + place, mask=there, other=0.0)  # in the Horner form the start
            source = total if HORNER else term
            shift = tl.load(decay + output[:, None] * features + (begin + lane)[None, :], mask=there, other=0.0)
            product = tl.dot(curved, x, input_precision="ieee", out_dtype=state)
            term -= step * tl.fma(source, shift + damped, product)
            total += term
            source = total if HORNER else term
            u = tl.dot(source, tl.trans(x), u, input_precision="ieee", out_dtype=state)
            if not HORNER:
                tl.store(v + place, term, mask=there)
            if done == iterations:
                squared, wrong = measure(term)
                squared_term += squared
                bad = tl.maximum(bad, wrong)
                squared, wrong = measure(total)
                squared_sum += squared
                bad = tl.maximum(bad, wrong)
                total *= step
            tl.store(p + place, total, mask=there)
            begin += FEATURES
        if bias is not None:
            term_bias, sum_bias = step_bias(curved, bias_shift, start_bias, term_bias, sum_bias, step, HORNER)
    if bias is not None:
        place_bias = row // outputs * size + bias + output
        squared_term, squared_sum, bad = close_bias(
            v, p, place_bias, inside, term_bias, sum_bias, step, squared_term, squared_sum, bad, HORNER
        )
    record(figures, row, inside, squared_start, bad_start, squared_term, squared_sum, bad)


def linear_model_direct(
    v: Tensor, p: Tensor, factors: Factors, alpha: float, damping: float, iterations: int, horner: bool
) -> Tensor:
    """As the function of this name in hvp_engine.linear_model.reference."""
    if iterations == 0:
        return linear_model_reference.linear_model_direct(v, p, factors, alpha, damping, iterations, horner)
    tiling, layout = Tiling.of(factors), factors.layout
    samples, features = factors.inputs.shape
    rows = len(v) * factors.outputs
    figures = v.new_empty(rows, 6, dtype=torch.float64)
    p.zero_()  # the gaps
    with device_of(v):
        linear_model_direct_terms[(tiling.programs(rows),)](
            v, p, factors.inputs, factors.curvature, factors.probabilities, factors.decay, *numbers(v, alpha, damping),
            figures, tiling.group, rows, factors.outputs, samples, factors.curvature.shape[1], features,
            factors.inputs.stride(0), layout.size, layout.offsets[1] if factors.biased else None, iterations,
            ROWS=tiling.rows, SAMPLES=tiling.samples, FEATURES=tiling.features, HORNER=horner,
            num_warps=tiling.direct_warps,
        )  # fmt: skip
    return figures.view(len(v), -1, 6).sum(1)
