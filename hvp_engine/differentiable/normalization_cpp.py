"""Normalizations on a CPU, by the extension; see `csrc/normalization.h`. Half precision is widened to float32 first."""

from __future__ import annotations

from dataclasses import asdict
from functools import lru_cache

import torch
from torch import Tensor

from hvp_engine import _C
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


def normalize(
    kind: Kind, input: Tensor, weight: Tensor | None, bias: Tensor | None, size: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    shape, x = _numbers(kind, input, size)
    output = torch.empty_like(x)
    mean, variance = (x.new_empty(shape.samples, shape.groups, dtype=torch.float64) for _ in range(2))
    known = Known(x, weight, mean, variance, size, eps)
    _run(0, shape, x, known, bias=_channels(bias, x), output=output)
    return output.to(input.dtype), mean, variance


def normalize_backward(kind: Kind, grad: Tensor, known: Known) -> tuple[Tensor, Tensor, Tensor]:
    shape, x = _numbers(kind, known.input, known.size)
    product = torch.empty_like(x)
    for_weight, for_bias = x.new_empty(shape.channels), x.new_empty(shape.channels)
    results = {"input_product": product, "weight_product": for_weight, "bias_product": for_bias}
    _run(1, shape, x, known, grad=_like(grad, x, kind), **results)
    return product.to(known.input.dtype), for_weight, for_bias


def normalize_double_backward(
    kind: Kind, tangents: Tangents, grad: Tensor, known: Known
) -> tuple[Tensor, Tensor, Tensor]:
    shape, x = _numbers(kind, known.input, known.size)
    for_grad, for_input, for_weight = torch.empty_like(x), torch.empty_like(x), x.new_empty(shape.channels)
    given = {
        "grad": _like(grad, x, kind),
        "tangent": _like(tangents.input, x, kind),
        "tangent_weight": _channels(tangents.weight, x),
        "tangent_bias": _channels(tangents.bias, x),
    }
    _run(2, shape, x, known, **given, output=for_grad, input_product=for_input, weight_product=for_weight)
    return for_grad.to(grad.dtype), for_input.to(known.input.dtype), for_weight


def _run(level: int, shape: NormalizedShape, x: Tensor, known: Known, **tensors: Tensor | None) -> None:
    _C.normalize(
        _native(shape),
        level=level,
        eps=known.eps,
        input=x,
        weight=_channels(known.weight, x),
        mean=known.mean.contiguous(),
        variance=known.variance.contiguous(),
        **tensors,
    )


def _numbers(kind: Kind, input: Tensor, size: int) -> tuple[NormalizedShape, Tensor]:
    shape = normalized_shape(kind, input, size)
    x = input.detach().resolve_neg()
    x = laid_out(x.to(accumulated(input.dtype)), keeps_channels_last(kind, input))
    return shape, x


@lru_cache(maxsize=256)
def _native(shape: NormalizedShape) -> _C.NormalizedShape:
    return _C.NormalizedShape(**asdict(shape))


def _like(tensor: Tensor, x: Tensor, kind: Kind) -> Tensor:
    return laid_out(tensor.detach().resolve_neg().to(x.dtype), keeps_channels_last(kind, x))


def _channels(tensor: Tensor | None, x: Tensor) -> Tensor | None:
    return None if tensor is None else tensor.detach().resolve_neg().to(x.dtype).contiguous()
