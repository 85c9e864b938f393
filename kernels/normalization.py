"""Normalizations and their two derivatives: a pass of sums and a pass of results, as `csrc/normalization.h` has them.

Images: sums for each channel of a sample, split over its points; then, for each number, a linear combination of input,
gradient and tangent with coefficients for its channel, which a few small operations make of the sums in between. Rows:
:mod:`hvp_engine.kernels.normalization_rows`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from hvp_engine.differentiable.normalization_shapes import (
    Kind,
    Known,
    NormalizedShape,
    Tangents,
    keeps_channels_last,
    laid_out,
    normalized_shape,
)
from hvp_engine.differentiable.registration import accumulated
from hvp_engine.kernels.launch import device_of
from hvp_engine.kernels.normalization_rows import rows_backward, rows_double_backward, rows_value

POINTS, CHANNELS, SPLITS, WARPS = 64, 16, 32, 4
"""Points and channels of a tile; parts into which a sample's points are divided for sums; warps of a program."""

VALUE, BACKWARD, DOUBLE_BACKWARD = 0, 1, 2


@triton.jit
def _tile(sample, block, first, lines, images, points, channels, image_stride, point_stride, channel_stride,
          POINTS: tl.constexpr, CHANNELS: tl.constexpr):  # fmt: skip
    """(places, whether they exist, channels) of the points from `first` on and a block of channels."""
    line = first + tl.arange(0, POINTS).to(tl.int64)
    channel = block * CHANNELS + tl.arange(0, CHANNELS)
    inside = (line < lines)[:, None] & (channel < channels)[None, :]
    at_line = (sample * images + line // points) * image_stride + line % points * point_stride
    return at_line[:, None] + channel.to(tl.int64)[None, :] * channel_stride, inside, channel


@triton.jit
def image_sums(
    input, grad, tangent, shift, scale, partial, samples, images, points, channels, image_stride, point_stride,
    channel_stride, splits, LEVEL: tl.constexpr, POINTS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """For each sample, block of channels and part of the points: sums of (x - shift) scale = x' and its square; or of
    g and g x'; and of t, t x' and t g."""
    blocks = tl.cdiv(channels, CHANNELS)
    sample, block = (tl.program_id(0) // blocks).to(tl.int64), tl.program_id(0) % blocks
    split = tl.program_id(1)
    lines = images * points
    state = shift.dtype.element_ty
    channel = block * CHANNELS + tl.arange(0, CHANNELS)
    known = channel < channels
    away = tl.load(shift + sample * channels + channel, mask=known, other=0.0)
    factor = tl.load(scale + sample * channels + channel, mask=known, other=0.0)
    one = tl.zeros((CHANNELS,), tl.float64)
    two = tl.zeros((CHANNELS,), tl.float64)
    three = tl.zeros((CHANNELS,), tl.float64)
    four = tl.zeros((CHANNELS,), tl.float64)
    five = tl.zeros((CHANNELS,), tl.float64)
    first = split * POINTS
    while first < lines:
        place, inside, _ = _tile(
            sample, block, first, lines, images, points, channels, image_stride, point_stride, channel_stride,
            POINTS, CHANNELS,
        )  # fmt: skip
        x = tl.load(input + place, mask=inside, other=0.0).to(state)
        normal = tl.where(inside, (x - away[None, :]) * factor[None, :], 0.0)
        if LEVEL == 0:
            one += tl.sum(normal, 0).to(tl.float64)
            two += tl.sum(normal * normal, 0).to(tl.float64)
        else:
            g = tl.load(grad + place, mask=inside, other=0.0).to(state)
            one += tl.sum(g, 0).to(tl.float64)
            two += tl.sum(g * normal, 0).to(tl.float64)
            if LEVEL == 2:
                t = tl.load(tangent + place, mask=inside, other=0.0).to(state)
                three += tl.sum(t, 0).to(tl.float64)
                four += tl.sum(t * normal, 0).to(tl.float64)
                five += tl.sum(t * g, 0).to(tl.float64)
        first += splits * POINTS
    size = samples * channels * splits
    place = (sample * channels + channel) * splits + split
    tl.store(partial + place, one, mask=known)
    tl.store(partial + size + place, two, mask=known)
    if LEVEL == 2:
        tl.store(partial + 2 * size + place, three, mask=known)
        tl.store(partial + 3 * size + place, four, mask=known)
        tl.store(partial + 4 * size + place, five, mask=known)


@triton.jit
def _coefficient(coefficients, index, cells, place, known):
    return tl.load(coefficients + index * cells + place, mask=known, other=0.0)[None, :]


@triton.jit
def image_results(
    input, grad, tangent, mean, coefficients, first_result, second_result, samples, images, points, channels,
    image_stride, point_stride, channel_stride, LEVEL: tl.constexpr, POINTS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """For each number: k0 (x - mean) + k1; or k0 g + k1 (x - mean) + k2; or k0 t + k1 (x - mean) + k2 and
    k3 g + k4 t + k5 (x - mean) + k6."""
    blocks = tl.cdiv(channels, CHANNELS)
    sample, block = (tl.program_id(0) // blocks).to(tl.int64), tl.program_id(0) % blocks
    state = mean.dtype.element_ty
    place, inside, channel = _tile(
        sample, block, tl.program_id(1).to(tl.int64) * POINTS, images * points, images, points, channels,
        image_stride, point_stride, channel_stride, POINTS, CHANNELS,
    )  # fmt: skip
    known, cell, cells = channel < channels, sample * channels + channel, samples * channels
    x = tl.load(input + place, mask=inside, other=0.0).to(state)
    x -= tl.load(mean + cell, mask=known, other=0.0)[None, :]
    k = coefficients
    if LEVEL == 0:
        value = _coefficient(k, 0, cells, cell, known) * x + _coefficient(k, 1, cells, cell, known)
        tl.store(first_result + place, value, mask=inside)
    else:
        g = tl.load(grad + place, mask=inside, other=0.0).to(state)
        if LEVEL == 1:
            value = _coefficient(k, 0, cells, cell, known) * g + _coefficient(k, 1, cells, cell, known) * x
            tl.store(first_result + place, value + _coefficient(k, 2, cells, cell, known), mask=inside)
        else:
            t = tl.load(tangent + place, mask=inside, other=0.0).to(state)
            value = _coefficient(k, 0, cells, cell, known) * t + _coefficient(k, 1, cells, cell, known) * x
            tl.store(first_result + place, value + _coefficient(k, 2, cells, cell, known), mask=inside)
            value = _coefficient(k, 3, cells, cell, known) * g + _coefficient(k, 4, cells, cell, known) * t
            value += _coefficient(k, 5, cells, cell, known) * x + _coefficient(k, 6, cells, cell, known)
            tl.store(second_result + place, value, mask=inside)


@dataclass
class _Images:
    """Images to normalize, and the launches on them; numbers for each channel of a sample are (samples, channels)."""

    kind: Kind
    input: Tensor
    size: int
    eps: float

    def __post_init__(self) -> None:
        self.last = keeps_channels_last(self.kind, self.input)
        self.shape: NormalizedShape = normalized_shape(self.kind, self.input, self.size)
        self.x, self.dtype = laid_out(self.input, self.last), accumulated(self.input.dtype)
        s = self.shape
        strides = (s.channels, 1) if s.channels_last else (1, s.points)
        self.sizes = s.samples, s.images, s.points, s.channels, s.channels * s.points, *strides
        self.blocks = s.samples * triton.cdiv(s.channels, CHANNELS)

    def like(self, tensor: Tensor) -> Tensor:
        return laid_out(tensor, self.last)

    def of_groups(self, per_group: Tensor) -> Tensor:
        return per_group.repeat_interleave(self.shape.channels // self.shape.groups, 1)

    def means(self, per_channel: Tensor) -> Tensor:
        """Over each group of what has been added up for each channel, for each channel."""
        s = self.shape
        return self.of_groups(per_channel.view(s.samples, s.groups, s.channels // s.groups).sum(2) / s.count)

    def weights(self, tensor: Tensor | None, otherwise: float) -> Tensor | float:
        return otherwise if tensor is None else tensor.double().reshape(1, -1)

    def sums(self, level: int, shift: Tensor, scale: Tensor, *others: Tensor) -> list[Tensor]:
        lines = self.shape.images * self.shape.points
        splits = max(1, min(SPLITS, triton.cdiv(lines, POINTS)))
        partial = self.x.new_empty(5 if level == 2 else 2, *shift.shape, splits, dtype=torch.float64)
        grad, tangent = (*others, None, None)[:2]
        constants: dict[str, Any] = {"LEVEL": level, "POINTS": POINTS, "CHANNELS": CHANNELS, "num_warps": WARPS}
        if self.blocks:
            with device_of(self.x):
                image_sums[(self.blocks, splits)](
                    self.x, grad, tangent, shift, scale, partial, *self.sizes, splits, **constants
                )
        return list(partial.sum(3))

    def results(self, level: int, mean: Tensor, coefficients: list[Tensor], *others: Tensor) -> list[Tensor]:
        found = [torch.empty_like(self.x) for _ in range(2 if level == 2 else 1)]
        first, second = (*found, None)[:2]
        grad, tangent = (*others, None, None)[:2]
        k = torch.stack([c.expand(mean.shape) for c in coefficients]).to(self.dtype)
        constants: dict[str, Any] = {"LEVEL": level, "POINTS": POINTS, "CHANNELS": CHANNELS, "num_warps": WARPS}
        if self.blocks:
            grid = (self.blocks, triton.cdiv(self.shape.images * self.shape.points, POINTS))
            with device_of(self.x):
                image_results[grid](self.x, grad, tangent, mean, k, first, second, *self.sizes, **constants)
        return found

    def normalized_sums(self, level: int, mean: Tensor, variance: Tensor, *others: Tensor) -> tuple[Any, ...]:
        """(rounded mean, what the rounding left out, 1 / standard deviation, sums of the exactly normalized)."""
        exact, r = self.of_groups(mean), self.of_groups((variance + self.eps).rsqrt())
        rounded = exact.to(self.dtype)
        away = exact - rounded
        sums = self.sums(level, rounded, r.to(self.dtype), *others)
        for index in range(0, len(sums) - 1, 2):
            sums[index + 1] = sums[index + 1] - away * r * sums[index]
        return rounded, away, r, sums


def normalize(
    kind: Kind, input: Tensor, weight: Tensor | None, bias: Tensor | None, size: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    if kind in ("layer_norm", "rms_norm"):
        return rows_value(normalized_shape(kind, input, size), input.contiguous(), weight, bias, eps)
    images = _Images(kind, input, size, eps)
    s, x = images.shape, images.x
    in_order = x.movedim(1, -1) if s.channels_last and x.dim() > 2 else x
    first = in_order.reshape(s.samples, s.images * s.points, s.channels)[:, 0] if s.channels_last else in_order.reshape(
        s.samples, s.images, s.channels, s.points
    )[:, 0, :, 0]  # fmt: skip
    shift = first.to(images.dtype).contiguous()
    sums, squares = images.sums(VALUE, shift, torch.ones_like(shift))
    count = s.images * s.points
    own = shift.double() + sums / count
    mean = own.view(s.samples, s.groups, s.channels // s.groups).mean(2)
    spread = (squares / count - (sums / count).square()).clamp_min(0) + (own - images.of_groups(mean)).square()
    variance = spread.view(s.samples, s.groups, s.channels // s.groups).mean(2)
    exact = images.of_groups(mean)
    rounded = exact.to(images.dtype)
    slope = images.of_groups((variance + eps).rsqrt()) * images.weights(weight, 1.0)
    coefficients = [slope, images.weights(bias, 0.0) - slope * (exact - rounded)]
    (output,) = images.results(VALUE, rounded, coefficients)
    return output, mean, variance


def normalize_backward(kind: Kind, grad: Tensor, known: Known) -> tuple[Tensor, Tensor, Tensor]:
    input, weight, mean, variance, size, eps = known
    if kind in ("layer_norm", "rms_norm"):
        return rows_backward(normalized_shape(kind, input, size), grad, known)
    images = _Images(kind, input, size, eps)
    g, w = images.like(grad), images.weights(weight, 1.0)
    rounded, away, r, (s1, s2) = images.normalized_sums(BACKWARD, mean, variance, g)
    h, slope = images.means(w * s1), -r * r * images.means(w * s2)
    (product,) = images.results(BACKWARD, rounded, [w * r, slope, -r * h - slope * away], g)
    return product, s2.sum(0).to(images.dtype), s1.sum(0).to(images.dtype)


def normalize_double_backward(
    kind: Kind, tangents: Tangents, grad: Tensor, known: Known
) -> tuple[Tensor, Tensor, Tensor]:
    input, weight, mean, variance, size, eps = known
    if kind in ("layer_norm", "rms_norm"):
        return rows_double_backward(normalized_shape(kind, input, size), tangents, grad, known)
    images = _Images(kind, input, size, eps)
    g, t, w = images.like(grad), images.like(tangents.input), images.weights(weight, 1.0)
    tw, tb = images.weights(tangents.weight, 0.0), images.weights(tangents.bias, 0.0)
    rounded, away, r, (s1, s2, s3, s4, s5) = images.normalized_sums(DOUBLE_BACKWARD, mean, variance, g, t)
    h, hx, t_mean, tx, th = (images.means(x) for x in (w * s1, w * s2, s3, s4, w * s5))
    k, kx = images.means(tw * s1), images.means(tw * s2)
    first = r * (tw - w * r * tx)
    second = -r * (r * kx + r * r * (th - h * t_mean - 3 * hx * tx))
    coefficients = [
        w * r, first, tb - w * r * t_mean - first * away,
        r * tw - r * r * tx * w, -r * r * hx, second, r * r * (hx * t_mean + tx * h) - r * k - second * away,
    ]  # fmt: skip
    for_grad, for_input = images.results(DOUBLE_BACKWARD, rounded, coefficients, g, t)
    return for_grad, for_input, (r * (s5 - t_mean * s1 - tx * s2)).sum(0).to(images.dtype)
