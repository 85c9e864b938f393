"""Cross-entropy of a linear layer's outputs, chunk by chunk of rows, so that the whole matrix of them never exists.

With logits z = h W^T + b and d = d loss / d z, the first derivative is (d W, d^T h, sum d). Its derivative for tangents
(s, S, u) goes through d, with the cotangent t = s W^T + h S^T + u, and through W and h:
(d S + e W, d^T s + e^T h, sum e), where e is the derivative of the loss's for the tangent t. Each chunk takes 1, 3 and
7 products of matrices at the three levels, of which one makes the logits.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from hvp_engine.differentiable.cross_entropy_reference import Labels
from hvp_engine.differentiable.registration import accumulated, implementation

_MODULES = {
    "reference": "hvp_engine.differentiable.cross_entropy_reference",
    "cpp": "hvp_engine.differentiable.cross_entropy_cpp",
    "triton": "hvp_engine.kernels.cross_entropy",
}

CHUNK_BYTES = 1 << 25
"""Logits of one chunk. With fewer rows, products of matrices are slower and the weight's derivative is read and written
more often."""

LEAST_ROWS = 32


def rows_on(device: torch.device) -> Any:
    """The module whose functions compute rows on `device`."""
    return implementation(device, _MODULES)


def chunks(rows: int, classes: int, dtype: torch.dtype) -> Iterator[slice]:
    """Rows whose logits exist at the same time."""
    step = max(LEAST_ROWS, CHUNK_BYTES // max(1, classes * accumulated(dtype).itemsize))
    return (slice(first, min(first + step, rows)) for first in range(0, rows, step))


def linear_cross_entropy(
    input: Tensor, linear_weight: Tensor, bias: Tensor | None, labels: Labels
) -> tuple[Tensor, Tensor]:
    """(losses, logsumexp)."""
    rows = rows_on(input.device)
    losses, lse = (input.new_empty(len(input), dtype=accumulated(input.dtype)) for _ in range(2))
    for part in chunks(len(input), len(linear_weight), input.dtype):
        z = _logits(input[part], linear_weight, bias)
        losses[part], lse[part] = rows.cross_entropy(z, labels.of_rows(part))
    return losses, lse


def linear_cross_entropy_backward(
    grad: Tensor, input: Tensor, linear_weight: Tensor, bias: Tensor | None, log_sum_exp: Tensor, labels: Labels
) -> tuple[Tensor, Tensor, Tensor]:
    """The derivatives for input, linear_weight and bias."""
    rows = rows_on(input.device)
    for_input, totals = torch.empty_like(input), _Totals(linear_weight)
    for part in chunks(len(input), len(linear_weight), input.dtype):
        h = input[part]
        z = _logits(h, linear_weight, bias)
        d = rows.cross_entropy_backward(grad[part], z, log_sum_exp[part], labels.of_rows(part))
        del z
        for_input[part] = d.to(input.dtype) @ linear_weight
        totals.add(d, h)
        totals.add_bias(d)
    return for_input, *totals.results()


def linear_cross_entropy_double_backward(
    input_tangent: Tensor | None,
    weight_tangent: Tensor | None,
    bias_tangent: Tensor | None,
    grad: Tensor,
    input: Tensor,
    linear_weight: Tensor,
    bias: Tensor | None,
    log_sum_exp: Tensor,
    labels: Labels,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The derivatives for grad, input, linear_weight and bias."""
    rows = rows_on(input.device)
    for_grad, for_input, totals = torch.empty_like(grad), torch.empty_like(input), _Totals(linear_weight)
    for part in chunks(len(input), len(linear_weight), input.dtype):
        h, g, lse, y = input[part], grad[part], log_sum_exp[part], labels.of_rows(part)
        s = None if input_tangent is None else input_tangent[part]
        z = _logits(h, linear_weight, bias)
        t = _tangent(s, weight_tangent, bias_tangent, h, linear_weight, z.dtype)
        for_grad[part], e = rows.cross_entropy_double_backward(t, g, z, lse, y)
        del t
        product = e.to(input.dtype) @ linear_weight
        totals.add(e, h)
        totals.add_bias(e)
        del e
        if s is not None or weight_tangent is not None:
            d = rows.cross_entropy_backward(g, z, lse, y)
            if weight_tangent is not None:
                product.addmm_(d.to(input.dtype), weight_tangent)
            if s is not None:
                totals.add(d, s)
            del d
        for_input[part] = product
    return for_grad, for_input, *totals.results()


def _logits(h: Tensor, linear_weight: Tensor, bias: Tensor | None) -> Tensor:
    z = (h @ linear_weight.T).to(accumulated(h.dtype))
    return z if bias is None else z.add_(bias)


def _tangent(
    s: Tensor | None,
    weight_tangent: Tensor | None,
    bias_tangent: Tensor | None,
    h: Tensor,
    w: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    """s W^T + h S^T + u."""
    t = h.new_zeros(len(h), len(w)) if s is None else s @ w.T
    if weight_tangent is not None:
        t.addmm_(h, weight_tangent.T)
    t = t.to(dtype)
    return t if bias_tangent is None else t.add_(bias_tangent)


class _Totals:
    """The derivatives for a layer's weight and bias, added up over chunks in float32 at least."""

    def __init__(self, linear_weight: Tensor):
        self._dtype = linear_weight.dtype
        self._weight = torch.zeros_like(
            linear_weight, dtype=accumulated(self._dtype), memory_format=torch.contiguous_format
        )
        self._bias = self._weight.new_zeros(len(linear_weight))

    def add(self, d: Tensor, h: Tensor) -> None:
        """d^T h, for the weight."""
        self._weight.addmm_(d.T, h.to(d.dtype))

    def add_bias(self, d: Tensor) -> None:
        self._bias += d.sum(0)

    def results(self) -> tuple[Tensor, Tensor]:
        return self._weight.to(self._dtype), self._bias.to(self._dtype)
