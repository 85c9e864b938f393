"""Cross-entropy and log-softmax of rows, and their two derivatives: one program for each row.

A row is read once for the value, and once or twice for a derivative. A label that is no class makes its row NaN, since
nothing on a device can raise.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from hvp_engine.differentiable.cross_entropy_reference import Labels
from hvp_engine.differentiable.registration import accumulated
from hvp_engine.kernels.launch import device_of

BLOCK, WARPS = 4096, 8


@triton.jit
def _labelled(target, weight, settings, row, classes, ignored):
    """(label, whether it counts, (1 - smoothing) w_y, smoothing / classes, a); NaN for a label that is no class."""
    label = tl.load(target + row)
    kept = label != ignored
    good = (label >= 0) & (label < classes)
    at_label = tl.load(settings)
    if weight is not None:
        at_label *= tl.load(weight + tl.where(good, label, 0)).to(tl.float64)
    at_label = tl.where(good, at_label, float("nan"))
    spread = tl.load(settings + 1)
    return label, kept, at_label, spread, at_label + spread * tl.load(settings + 2)


@triton.jit
def cross_entropy_rows(logits, target, weight, settings, losses, log_sum_exp, classes, ignored, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    state = losses.dtype.element_ty
    label, kept, at_label, spread, total = _labelled(target, weight, settings, row, classes, ignored)
    lane = tl.arange(0, BLOCK)
    most = tl.full((), float("-inf"), state)
    sum = tl.zeros((), tl.float64)
    smooth = tl.zeros((), tl.float64)
    begin = 0
    while begin < classes:
        inside = begin + lane < classes
        z = tl.load(logits + row * classes + begin + lane, mask=inside, other=float("-inf")).to(state)
        above = tl.maximum(most, tl.max(z, 0))
        shift = tl.where(above == float("-inf"), 0.0, above)
        sum = sum * tl.exp(most - shift).to(tl.float64) + tl.sum(tl.exp(z - shift), 0).to(tl.float64)
        w = 1.0
        if weight is not None:
            w = tl.load(weight + begin + lane, mask=inside, other=0.0).to(state)
        smooth += tl.sum(tl.where(inside, z * w, 0.0), 0).to(tl.float64)
        most = above
        begin += BLOCK
    lse = most.to(tl.float64) + tl.log(sum)
    there = kept & (label >= 0) & (label < classes)
    picked = tl.load(logits + row * classes + label, mask=there, other=0.0).to(tl.float64)
    value = total * lse - at_label * picked
    if tl.load(settings + 1) != 0:
        value -= spread * smooth
    tl.store(losses + row, tl.where(kept, value, 0.0).to(state))
    tl.store(log_sum_exp + row, lse.to(state))


@triton.jit
def cross_entropy_backward_rows(
    grad, logits, log_sum_exp, target, weight, settings, gradient, classes, ignored, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    state = grad.dtype.element_ty
    label, kept, at_label, spread, total = _labelled(target, weight, settings, row, classes, ignored)
    g = tl.load(grad + row)
    lse = tl.load(log_sum_exp + row)
    factor = (g.to(tl.float64) * total).to(state)
    lane = tl.arange(0, BLOCK)
    begin = 0
    while begin < classes:
        column = begin + lane
        inside = column < classes
        z = tl.load(logits + row * classes + column, mask=inside, other=0.0).to(state)
        q = tl.where(column == label, at_label, 0.0).to(state)
        if weight is None:
            q += spread.to(state)
        else:
            q += spread.to(state) * tl.load(weight + column, mask=inside, other=0.0).to(state)
        value = tl.where(kept, factor * tl.exp(z - lse) - g * q, 0.0)
        tl.store(gradient + row * classes + column, value, mask=inside)
        begin += BLOCK


@triton.jit
def cross_entropy_double_backward_rows(
    tangent, grad, logits, log_sum_exp, target, weight, settings, for_grad, product, classes, ignored,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    state = grad.dtype.element_ty
    label, kept, at_label, spread, total = _labelled(target, weight, settings, row, classes, ignored)
    lse = tl.load(log_sum_exp + row)
    factor = (tl.load(grad + row).to(tl.float64) * total).to(state)
    lane = tl.arange(0, BLOCK)
    mean = tl.zeros((), tl.float64)
    smooth = tl.zeros((), tl.float64)
    begin = 0
    while begin < classes:
        column = begin + lane
        inside = column < classes
        z = tl.load(logits + row * classes + column, mask=inside, other=float("-inf")).to(state)
        t = tl.load(tangent + row * classes + column, mask=inside, other=0.0).to(state)
        mean += tl.sum(tl.exp(z - lse) * t, 0).to(tl.float64)
        if weight is None:
            smooth += tl.sum(t, 0).to(tl.float64)
        else:
            w = tl.load(weight + column, mask=inside, other=0.0).to(state)
            smooth += tl.sum(w * t, 0).to(tl.float64)
        begin += BLOCK
    there = kept & (label >= 0) & (label < classes)
    picked = tl.load(tangent + row * classes + label, mask=there, other=0.0).to(tl.float64)
    value = total * mean - at_label * picked - spread * smooth
    tl.store(for_grad + row, tl.where(kept, value, 0.0).to(state))
    shift = mean.to(state)
    begin = 0
    while begin < classes:
        column = begin + lane
        inside = column < classes
        z = tl.load(logits + row * classes + column, mask=inside, other=float("-inf")).to(state)
        t = tl.load(tangent + row * classes + column, mask=inside, other=0.0).to(state)
        result = tl.where(kept, factor * tl.exp(z - lse) * (t - shift), 0.0)
        tl.store(product + row * classes + column, result, mask=inside)
        begin += BLOCK


@triton.jit
def log_softmax_rows(input, output, classes, WIDE: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    state = tl.float64 if WIDE else tl.float32
    lane = tl.arange(0, BLOCK)
    most = tl.full((), float("-inf"), state)
    sum = tl.zeros((), tl.float64)
    begin = 0
    while begin < classes:
        inside = begin + lane < classes
        z = tl.load(input + row * classes + begin + lane, mask=inside, other=float("-inf")).to(state)
        above = tl.maximum(most, tl.max(z, 0))
        shift = tl.where(above == float("-inf"), 0.0, above)
        sum = sum * tl.exp(most - shift).to(tl.float64) + tl.sum(tl.exp(z - shift), 0).to(tl.float64)
        most = above
        begin += BLOCK
    rest = tl.log(sum).to(state)
    begin = 0
    while begin < classes:
        inside = begin + lane < classes
        z = tl.load(input + row * classes + begin + lane, mask=inside, other=0.0).to(state)
        tl.store(output + row * classes + begin + lane, (z - most) - rest, mask=inside)
        begin += BLOCK


@triton.jit
def log_softmax_backward_rows(grad, output, gradient, classes, WIDE: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    state = tl.float64 if WIDE else tl.float32
    lane = tl.arange(0, BLOCK)
    total = tl.zeros((), tl.float64)
    begin = 0
    while begin < classes:
        inside = begin + lane < classes
        g = tl.load(grad + row * classes + begin + lane, mask=inside, other=0.0).to(state)
        total += tl.sum(g, 0).to(tl.float64)
        begin += BLOCK
    sum = total.to(state)
    begin = 0
    while begin < classes:
        inside = begin + lane < classes
        g = tl.load(grad + row * classes + begin + lane, mask=inside, other=0.0).to(state)
        y = tl.load(output + row * classes + begin + lane, mask=inside, other=0.0).to(state)
        tl.store(gradient + row * classes + begin + lane, g - tl.exp(y) * sum, mask=inside)
        begin += BLOCK


@triton.jit
def log_softmax_double_backward_rows(
    tangent, grad, output, for_grad, product, classes, WIDE: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    state = tl.float64 if WIDE else tl.float32
    lane = tl.arange(0, BLOCK)
    total = tl.zeros((), tl.float64)
    mean = tl.zeros((), tl.float64)
    begin = 0
    while begin < classes:
        inside = begin + lane < classes
        place = row * classes + begin + lane
        total += tl.sum(tl.load(grad + place, mask=inside, other=0.0).to(state), 0).to(tl.float64)
        y = tl.load(output + place, mask=inside, other=float("-inf")).to(state)
        t = tl.load(tangent + place, mask=inside, other=0.0).to(state)
        mean += tl.sum(tl.exp(y) * t, 0).to(tl.float64)
        begin += BLOCK
    sum = total.to(state)
    shift = mean.to(state)
    begin = 0
    while begin < classes:
        inside = begin + lane < classes
        place = row * classes + begin + lane
        y = tl.load(output + place, mask=inside, other=0.0).to(state)
        t = tl.load(tangent + place, mask=inside, other=0.0).to(state)
        tl.store(for_grad + place, t - shift, mask=inside)
        tl.store(product + place, -sum * tl.exp(y) * t, mask=inside)
        begin += BLOCK


def cross_entropy(input: Tensor, labels: Labels) -> tuple[Tensor, Tensor]:
    z, *given = _given(input, labels)
    losses, lse = (z.new_empty(len(z), dtype=accumulated(z.dtype)) for _ in range(2))
    _launch(cross_entropy_rows, z, *given, losses, lse, z.shape[1], labels.ignore_index)
    return losses, lse


def cross_entropy_backward(grad: Tensor, input: Tensor, log_sum_exp: Tensor, labels: Labels) -> Tensor:
    z, *given = _given(input, labels)
    gradient, known = torch.empty_like(z), (grad.contiguous(), z, log_sum_exp.contiguous(), *given)
    _launch(cross_entropy_backward_rows, *known, gradient, z.shape[1], labels.ignore_index, rows=len(z))
    return gradient


def cross_entropy_double_backward(
    tangent: Tensor, grad: Tensor, input: Tensor, log_sum_exp: Tensor, labels: Labels
) -> tuple[Tensor, Tensor]:
    z, *given = _given(input, labels)
    g = grad.contiguous()
    results, known = (torch.empty_like(g), torch.empty_like(z)), (tangent.contiguous(), g, z, log_sum_exp.contiguous())
    _launch(cross_entropy_double_backward_rows, *known, *given, *results, z.shape[1], labels.ignore_index, rows=len(z))
    return results


def log_softmax(input: Tensor) -> Tensor:
    z = input.contiguous()
    output = torch.empty_like(z)
    _launch(log_softmax_rows, z, output, z.shape[1], WIDE=z.dtype == torch.float64)
    return output


def log_softmax_backward(grad: Tensor, output: Tensor) -> Tensor:
    y = output.contiguous()
    gradient = torch.empty_like(y)
    _launch(log_softmax_backward_rows, grad.contiguous(), y, gradient, y.shape[1], WIDE=y.dtype == torch.float64)
    return gradient


def log_softmax_double_backward(tangent: Tensor, grad: Tensor, output: Tensor) -> tuple[Tensor, Tensor]:
    y = output.contiguous()
    results, wide = (torch.empty_like(y), torch.empty_like(y)), y.dtype == torch.float64
    given = tangent.contiguous(), grad.contiguous(), y
    _launch(log_softmax_double_backward_rows, *given, *results, y.shape[1], WIDE=wide)
    return results


def _given(input: Tensor, labels: Labels) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """Dense tensors; and 1 - smoothing, smoothing / classes and the sum of the weights, in memory and in float64."""
    target, weight, _, label_smoothing = labels
    classes = input.shape[1]
    weights = None if weight is None else weight.to(accumulated(input.dtype)).contiguous()
    numbers = [1 - label_smoothing, label_smoothing / classes, float(classes)]
    settings = torch.tensor(numbers, dtype=torch.float64, device=input.device)
    if weights is not None:
        settings[2] = weights.sum(dtype=torch.float64)
    return input.contiguous(), target.contiguous(), weights, settings


def _launch(kernel: Any, *arguments: Any, rows: int | None = None, **constants: Any) -> None:
    first = arguments[0]
    programs = len(first) if rows is None else rows
    if programs:
        with device_of(first):
            kernel[(programs,)](*arguments, BLOCK=BLOCK, num_warps=WARPS, **constants)
