"""Normalizations and their two derivatives in plain torch: what the kernels compute.

In a group of numbers, with x' = (x - mean) r, r = 1 / sqrt(variance + eps), <a> for the mean of a over the group and
h = weight g, the derivative for a cotangent g is r (h - <h> - x' <h x'>) for the input, sum g x' for the weight and
sum g for the bias. Root-mean-square normalization has no means of x, h, t and tw g; its "variance" is <x^2>.
"""

from __future__ import annotations

import torch
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

_GROUP = (1, 3, 4)
"""Dimensions of a group, among (samples, images, groups, members, points)."""


class _Numbers:
    """Tensors as (samples, images, groups, members, points) in the dtype of the arithmetic."""

    def __init__(self, kind: Kind, input: Tensor, size: int):
        self.shape: NormalizedShape = normalized_shape(kind, input.contiguous(), size)
        self.dtype = accumulated(input.dtype)
        self.like = input
        self.last = keeps_channels_last(kind, input)
        self.columns = kind == "batch_norm" and input.dim() == 2

    def whole(self, tensor: Tensor) -> Tensor:
        s, tensor = self.shape, tensor.to(self.dtype)
        if self.columns:  # points are the first dimension
            return tensor.t().reshape(1, 1, s.groups, 1, s.points)
        return tensor.reshape(s.samples, s.images, s.groups, s.channels // s.groups, s.points)

    def back(self, tensor: Tensor) -> Tensor:
        if self.columns:
            return tensor.reshape(self.shape.channels, self.shape.points).t().contiguous().to(self.like.dtype)
        return laid_out(tensor.reshape(self.like.shape).to(self.like.dtype), self.last)

    def channels(self, tensor: Tensor | None, otherwise: float) -> Tensor:
        s = self.shape
        if tensor is None:
            return torch.full((), otherwise, dtype=self.dtype, device=self.like.device)
        return tensor.to(self.dtype).reshape(1, 1, s.groups, s.channels // s.groups, 1)

    def of_channels(self, terms: Tensor) -> Tensor:
        """The sums for each channel."""
        return terms.sum((0, 1, 4)).reshape(self.shape.channels)

    def mean(self, tensor: Tensor) -> Tensor:
        return tensor.mean(_GROUP, keepdim=True)

    def centre(self, tensor: Tensor) -> Tensor:
        """The mean that is subtracted, if one is."""
        mean = self.mean(tensor)
        return mean if self.shape.centred else torch.zeros_like(mean)

    def statistics(self, x: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(x', r, mean, variance)."""
        mean = self.centre(x)
        variance = self.mean((x - mean).square())
        r = (variance + eps).rsqrt()
        return (x - mean) * r, r, mean, variance


def normalize(
    kind: Kind, input: Tensor, weight: Tensor | None, bias: Tensor | None, size: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(weight x' + bias, mean, variance); the last two in float64, (samples, groups)."""
    n = _Numbers(kind, input, size)
    normal, _, mean, variance = n.statistics(n.whole(input), eps)
    output = normal * n.channels(weight, 1) + n.channels(bias, 0)
    samples, groups = n.shape.samples, n.shape.groups
    return n.back(output), mean.double().reshape(samples, groups), variance.double().reshape(samples, groups)


def normalize_backward(kind: Kind, grad: Tensor, known: Known) -> tuple[Tensor, Tensor, Tensor]:
    """For input, weight and bias; the last two flat."""
    n = _Numbers(kind, known.input, known.size)
    normal, r, _, _ = n.statistics(n.whole(known.input), known.eps)
    g = n.whole(grad)
    h = g * n.channels(known.weight, 1)
    product = r * (h - n.centre(h) - normal * n.mean(h * normal))
    return n.back(product), n.of_channels(g * normal), n.of_channels(g)


def normalize_double_backward(
    kind: Kind, tangents: Tangents, grad: Tensor, known: Known
) -> tuple[Tensor, Tensor, Tensor]:
    """The derivatives of sum tangents normalize_backward for grad, input and weight (flat)."""
    n = _Numbers(kind, known.input, known.size)
    x, r, _, _ = n.statistics(n.whole(known.input), known.eps)
    t, g, w = n.whole(tangents.input), n.whole(grad), n.channels(known.weight, 1)
    tw, tb = n.channels(tangents.weight, 0), n.channels(tangents.bias, 0)
    h, k = g * w, g * tw
    h_mean, t_mean, k_mean = n.centre(h), n.centre(t), n.centre(k)
    hx, tx, kx = (n.mean(a * x) for a in (h, t, k))
    projected = r * (t - t_mean - x * tx)
    for_grad = w * projected + tw * x + tb
    for_input = (
        r * (k - k_mean)
        - r.square() * (hx * (t - t_mean) + tx * (h - h_mean))
        - x * (r * kx + r.square() * (n.mean(t * h) - h_mean * t_mean - 3 * hx * tx))
    )
    return n.back(for_grad), n.back(for_input), n.of_channels(g * projected)
