"""Layer and root-mean-square normalization of rows: one program for each row, and one for each block of columns where
rows are added up."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from hvp_engine.differentiable.normalization_shapes import Known, NormalizedShape, Tangents
from hvp_engine.differentiable.registration import accumulated
from hvp_engine.kernels.launch import device_of

BLOCK, ROWS, COLUMNS, WARPS = 1024, 32, 64, 4
"""Numbers of a row that are read at once; the tile where rows are added up; warps of one program."""


@triton.jit
def _weights(weight, column, inside, otherwise, state: tl.constexpr):
    found = tl.full(column.shape, otherwise, state)
    if weight is not None:
        found = tl.load(weight + column, mask=inside, other=0.0).to(state)
    return found


@triton.jit
def row_value(
    input, weight, bias, output, mean, variance, eps, columns, CENTRED: tl.constexpr, WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    state = tl.float64 if WIDE else tl.float32
    lane = tl.arange(0, BLOCK)
    centre = tl.zeros((), tl.float64)
    if CENTRED:
        begin = 0
        while begin < columns:
            x = tl.load(input + row * columns + begin + lane, mask=begin + lane < columns, other=0.0).to(state)
            centre += tl.sum(x, 0).to(tl.float64)
            begin += BLOCK
        centre /= columns
    shift = centre.to(state)
    rest = (centre - shift.to(tl.float64)).to(state)
    squares = tl.zeros((), tl.float64)
    begin = 0
    while begin < columns:
        inside = begin + lane < columns
        x = tl.load(input + row * columns + begin + lane, mask=inside, other=0.0).to(state)
        away = tl.where(inside, x - shift - rest, 0.0)
        squares += tl.sum(away * away, 0).to(tl.float64)
        begin += BLOCK
    squares /= columns
    tl.store(mean + row, centre)
    tl.store(variance + row, squares)
    root = (1 / tl.sqrt(squares + tl.load(eps))).to(state)
    begin = 0
    while begin < columns:
        column = begin + lane
        inside = column < columns
        x = tl.load(input + row * columns + column, mask=inside, other=0.0).to(state)
        w = _weights(weight, column, inside, 1.0, state)
        b = _weights(bias, column, inside, 0.0, state)
        tl.store(output + row * columns + column, (x - shift - rest) * root * w + b, mask=inside)
        begin += BLOCK


@triton.jit
def _statistics(mean, variance, eps, row, state: tl.constexpr):
    centre = tl.load(mean + row)
    shift = centre.to(state)
    root = (1 / tl.sqrt(tl.load(variance + row) + tl.load(eps))).to(state)
    return shift, (centre - shift.to(tl.float64)).to(state), root


@triton.jit
def row_backward(
    grad, input, weight, mean, variance, eps, product, columns, CENTRED: tl.constexpr, WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    state = tl.float64 if WIDE else tl.float32
    shift, rest, root = _statistics(mean, variance, eps, row, state)
    lane = tl.arange(0, BLOCK)
    h_sum = tl.zeros((), tl.float64)
    hx_sum = tl.zeros((), tl.float64)
    begin = 0
    while begin < columns:
        column = begin + lane
        inside = column < columns
        x = tl.load(input + row * columns + column, mask=inside, other=0.0).to(state)
        h = tl.load(grad + row * columns + column, mask=inside, other=0.0).to(state)
        h *= _weights(weight, column, inside, 1.0, state)
        h_sum += tl.sum(h, 0).to(tl.float64)
        hx_sum += tl.sum(h * (x - shift - rest) * root, 0).to(tl.float64)
        begin += BLOCK
    h_mean = (h_sum / columns).to(state) if CENTRED else tl.zeros((), state)
    hx = (hx_sum / columns).to(state)
    begin = 0
    while begin < columns:
        column = begin + lane
        inside = column < columns
        x = tl.load(input + row * columns + column, mask=inside, other=0.0).to(state)
        h = tl.load(grad + row * columns + column, mask=inside, other=0.0).to(state)
        h *= _weights(weight, column, inside, 1.0, state)
        value = root * (h - h_mean - (x - shift - rest) * root * hx)
        tl.store(product + row * columns + column, value, mask=inside)
        begin += BLOCK


@triton.jit
def row_double_backward(
    tangent, tangent_weight, tangent_bias, grad, input, weight, mean, variance, eps, for_grad, for_input, means,
    columns, CENTRED: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """`means` get <t> and <t x'>."""
    row = tl.program_id(0).to(tl.int64)
    state = tl.float64 if WIDE else tl.float32
    shift, rest, root = _statistics(mean, variance, eps, row, state)
    lane = tl.arange(0, BLOCK)
    h_mean = tl.zeros((), tl.float64)
    hx = tl.zeros((), tl.float64)
    t_mean = tl.zeros((), tl.float64)
    tx = tl.zeros((), tl.float64)
    th = tl.zeros((), tl.float64)
    k_mean = tl.zeros((), tl.float64)
    kx = tl.zeros((), tl.float64)
    begin = 0
    while begin < columns:
        column = begin + lane
        inside = column < columns
        place = row * columns + column
        x = (tl.load(input + place, mask=inside, other=0.0).to(state) - shift - rest) * root
        g = tl.load(grad + place, mask=inside, other=0.0).to(state)
        t = tl.load(tangent + place, mask=inside, other=0.0).to(state)
        h = g * _weights(weight, column, inside, 1.0, state)
        k = g * _weights(tangent_weight, column, inside, 0.0, state)
        if CENTRED:
            h_mean += tl.sum(h, 0).to(tl.float64)
            t_mean += tl.sum(t, 0).to(tl.float64)
            k_mean += tl.sum(k, 0).to(tl.float64)
        hx += tl.sum(h * x, 0).to(tl.float64)
        tx += tl.sum(t * x, 0).to(tl.float64)
        th += tl.sum(t * h, 0).to(tl.float64)
        kx += tl.sum(k * x, 0).to(tl.float64)
        begin += BLOCK
    h_mean /= columns
    hx /= columns
    t_mean /= columns
    tx /= columns
    th /= columns
    k_mean /= columns
    kx /= columns
    tl.store(means + 2 * row, t_mean)
    tl.store(means + 2 * row + 1, tx)
    wide = root.to(tl.float64)
    of_normal = (-(wide * kx + wide * wide * (th - h_mean * t_mean - 3 * hx * tx))).to(state)
    constant = (wide * wide * (hx * t_mean + tx * h_mean) - wide * k_mean).to(state)
    of_tangent = (-wide * wide * hx).to(state)
    of_h = (-wide * wide * tx).to(state)
    begin = 0
    while begin < columns:
        column = begin + lane
        inside = column < columns
        place = row * columns + column
        x = (tl.load(input + place, mask=inside, other=0.0).to(state) - shift - rest) * root
        g = tl.load(grad + place, mask=inside, other=0.0).to(state)
        t = tl.load(tangent + place, mask=inside, other=0.0).to(state)
        w = _weights(weight, column, inside, 1.0, state)
        tw = _weights(tangent_weight, column, inside, 0.0, state)
        tb = _weights(tangent_bias, column, inside, 0.0, state)
        projected = root * (t - t_mean.to(state) - x * tx.to(state))
        tl.store(for_grad + place, w * projected + tw * x + tb, mask=inside)
        value = root * tw * g + of_tangent * t + of_h * (w * g) + of_normal * x + constant
        tl.store(for_input + place, value, mask=inside)
        begin += BLOCK


@triton.jit
def column_sums(
    grad, input, tangent, mean, variance, eps, means, for_weight, for_bias, rows, columns, SECOND: tl.constexpr,
    WIDE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Over the rows: sums of g x' and g; or of g r (t - <t> - x' <t x'>)."""
    state = tl.float64 if WIDE else tl.float32
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    one = tl.zeros((COLUMNS,), tl.float64)
    two = tl.zeros((COLUMNS,), tl.float64)
    first = 0
    while first < rows:
        row = (first + tl.arange(0, ROWS)).to(tl.int64)
        there = row < rows
        inside = there[:, None] & (column < columns)[None, :]
        place = row[:, None] * columns + column[None, :]
        centre = tl.load(mean + row, mask=there, other=0.0)
        shift = centre.to(state)
        rest = (centre - shift.to(tl.float64)).to(state)
        root = (1 / tl.sqrt(tl.load(variance + row, mask=there, other=1.0) + tl.load(eps))).to(state)
        x = tl.load(input + place, mask=inside, other=0.0).to(state)
        x = (x - shift[:, None] - rest[:, None]) * root[:, None]
        g = tl.load(grad + place, mask=inside, other=0.0).to(state)
        if SECOND:
            t_mean = tl.load(means + 2 * row, mask=there, other=0.0).to(state)
            tx = tl.load(means + 2 * row + 1, mask=there, other=0.0).to(state)
            t = tl.load(tangent + place, mask=inside, other=0.0).to(state)
            x = root[:, None] * (t - t_mean[:, None] - x * tx[:, None])
        else:
            two += tl.sum(g, 0).to(tl.float64)
        one += tl.sum(g * x, 0).to(tl.float64)
        first += ROWS
    tl.store(for_weight + column, one.to(state), mask=column < columns)
    if not SECOND:
        tl.store(for_bias + column, two.to(state), mask=column < columns)


def rows_value(
    shape: NormalizedShape, input: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    output = torch.empty_like(input)
    mean, variance = (input.new_empty(shape.samples, 1, dtype=torch.float64) for _ in range(2))
    given = input, _dense(weight), _dense(bias), output, mean, variance, _number(eps, input)
    _launch(row_value, shape, *given)
    return output, mean, variance


def rows_backward(shape: NormalizedShape, grad: Tensor, known: Known) -> tuple[Tensor, Tensor, Tensor]:
    given, statistics = (grad.contiguous(), known.input.contiguous()), _known_statistics(known)
    product = torch.empty_like(given[1])
    _launch(row_backward, shape, *given, _dense(known.weight), *statistics, product)
    for_weight, for_bias = (product.new_empty(shape.channels, dtype=accumulated(product.dtype)) for _ in range(2))
    _add_rows(shape, False, *given, None, *statistics, None, for_weight, for_bias)
    return product, for_weight, for_bias


def rows_double_backward(
    shape: NormalizedShape, tangents: Tangents, grad: Tensor, known: Known
) -> tuple[Tensor, Tensor, Tensor]:
    given, statistics = (grad.contiguous(), known.input.contiguous()), _known_statistics(known)
    tangent = tangents.input.contiguous()
    for_grad, for_input = (torch.empty_like(given[1]) for _ in range(2))
    means = for_input.new_empty(shape.samples, 2, dtype=torch.float64)
    moved = tangent, _dense(tangents.weight), _dense(tangents.bias)
    _launch(row_double_backward, shape, *moved, *given, _dense(known.weight), *statistics, for_grad, for_input, means)
    for_weight = for_input.new_empty(shape.channels, dtype=accumulated(for_input.dtype))
    _add_rows(shape, True, *given, tangent, *statistics, means, for_weight, None)
    return for_grad, for_input, for_weight


def _known_statistics(known: Known) -> tuple[Tensor, Tensor, Tensor]:
    return known.mean.contiguous(), known.variance.contiguous(), _number(known.eps, known.input)


def _dense(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _number(eps: float, input: Tensor) -> Tensor:
    """In device memory, since Triton passes a Python float in 32 bits."""
    return torch.full((), eps, dtype=torch.float64, device=input.device)


def _launch(kernel: Any, shape: NormalizedShape, *arguments: Any) -> None:
    first = next(argument for argument in arguments if isinstance(argument, Tensor))
    wide, settings = first.dtype == torch.float64, {"BLOCK": BLOCK, "num_warps": WARPS}
    if shape.samples:
        with device_of(first):
            kernel[(shape.samples,)](*arguments, shape.channels, CENTRED=shape.centred, WIDE=wide, **settings)


def _add_rows(shape: NormalizedShape, second: bool, *arguments: Any) -> None:
    wide, tile = arguments[0].dtype == torch.float64, {"ROWS": ROWS, "COLUMNS": COLUMNS, "num_warps": WARPS}
    with device_of(arguments[0]):
        column_sums[(triton.cdiv(shape.channels, COLUMNS),)](
            *arguments, shape.samples, shape.channels, SECOND=second, WIDE=wide, **tile
        )
