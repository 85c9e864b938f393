"""Attention and its two derivatives on a GPU; see :mod:`hvp_engine.differentiable.attention.reference` for what each
computes, and attention_kernels.py beside this file for how."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hvp_engine.differentiable.attention.dropout import threshold
from hvp_engine.differentiable.attention.reference import Known, Settings, Tangents
from hvp_engine.kernels.attention_kernels import (
    attention_key_curvatures,
    attention_key_gradients,
    attention_moved_rows,
    attention_query_curvature,
    attention_query_gradient,
    attention_rows,
)
from hvp_engine.kernels.launch import device_of

WARPS = 4

NARROW = 64
"""Width up to which a tile of 16-bit numbers has 64 rows; wider ones, and those of float32, have 32."""


def attention(query: Tensor, key: Tensor, value: Tensor, settings: Settings) -> tuple[Tensor, Tensor]:
    q, k, v = _contiguous(query, key, value)
    output = q.new_empty((*q.shape[:3], v.shape[3]))
    logsumexp = q.new_empty(q.shape[:3], dtype=torch.float32)
    _launch(attention_rows, _Shapes(q, k, v), (q, k, v, output, logsumexp), settings)
    return output, logsumexp


def attention_backward(grad_output: Tensor, known: Known, settings: Settings) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v, o, logarithms, g = _contiguous(*known, grad_output)
    results = tuple(x.new_empty(x.shape) for x in (q, k, v))
    corrections = q.new_empty(q.shape[:3], dtype=torch.float32)
    shapes, given = _Shapes(q, k, v), (q, k, v, g.to(q.dtype), o, logarithms, corrections)
    _launch(attention_query_gradient, shapes, (*given, results[0]), settings)
    _launch(attention_key_gradients, shapes, (*given, *results[1:]), settings)
    return results


def attention_backward_backward(
    tangents: Tangents, grad_output: Tensor, known: Known, settings: Settings
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    q, k, v, o, logarithms, g = _contiguous(*known, grad_output)
    g = g.to(q.dtype)
    moved = [
        torch.zeros_like(x) if tangent is None else tangent.contiguous().to(x.dtype)
        for tangent, x in zip(tangents, (q, k, v), strict=True)
    ]
    results = tuple(x.new_empty(x.shape) for x in (g, q, k, v))
    sums = q.new_empty((*q.shape[:2], 4, q.shape[2]), dtype=torch.float32)
    shapes = _Shapes(q, k, v)
    _launch(attention_moved_rows, shapes, (q, k, v, *moved, g, o, logarithms, results[0], sums), settings)
    given = (q, k, v, *moved, g, logarithms, sums)
    _launch(attention_query_curvature, shapes, (*given, results[1]), settings)
    _launch(attention_key_curvatures, shapes, (*given, *results[2:]), settings)
    return results


def _contiguous(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(x.resolve_neg().contiguous() for x in tensors)


class _Shapes:
    """The extents of a call, and the tiles that they are cut into."""

    def __init__(self, query: Tensor, key: Tensor, value: Tensor):
        self.batch, self.heads, self.queries, self.width = query.shape
        _, self.key_heads, self.keys, self.value_width = value.shape
        self.wide = max(16, _power_of_two(self.width)), max(16, _power_of_two(self.value_width))
        self.block = 64 if query.dtype.itemsize == 2 and max(self.wide) <= NARROW else 32
        self.arguments = (self.heads, self.key_heads, self.queries, self.keys, self.width, self.value_width)

    def grid(self, kernel: Any) -> tuple[int, int]:
        by_keys = kernel in (attention_key_gradients, attention_key_curvatures)
        rows, heads = (self.keys, self.key_heads) if by_keys else (self.queries, self.heads)
        return -(-rows // self.block), self.batch * heads


def _power_of_two(count: int) -> int:
    return 1 << max(count - 1, 0).bit_length()


def _launch(kernel: Any, shapes: _Shapes, tensors: Sequence[Tensor], settings: Settings) -> None:
    grid = shapes.grid(kernel)
    if 0 in grid:
        return
    query, mask, p = tensors[0], settings.mask, settings.dropout_p
    if mask is None:
        masked, strides, kind = query, [0] * 4, 0
    else:
        kind = 1 if mask.dtype == torch.bool else 2
        masked = mask.view(torch.uint8) if kind == 1 else mask.resolve_neg()
        strides = [0 if size == 1 else stride for size, stride in zip(mask.shape, mask.stride(), strict=True)]
    with device_of(query):
        kernel[grid](
            *tensors,
            masked,
            *strides,
            query if settings.seed is None else settings.seed,
            threshold(p),
            0.0 if p == 1 else 1 / (1 - p),
            settings.scale,
            *shapes.arguments,
            CAUSAL=settings.is_causal,
            MASK=kind,
            DROPOUT=settings.seed is not None,
            BLOCK=shapes.block,
            WIDTH=shapes.wide[0],
            VALUE_WIDTH=shapes.wide[1],
            num_warps=WARPS,
        )
