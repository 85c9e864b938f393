"""The functions of :mod:`hvp_engine.differentiable.attention.reference` in C++, blockwise: import it where the backend
"cpp" runs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hvp_engine.differentiable.attention.dropout import threshold
from hvp_engine.differentiable.attention.reference import Known, Settings, Tangents
from hvp_engine.ops.cpp import _C, find_blas

find_blas()


def attention(query: Tensor, key: Tensor, value: Tensor, settings: Settings) -> tuple[Tensor, Tensor]:
    q, k, v = _operands(query, key, value)
    output, logsumexp = q.new_empty((*q.shape[:3], v.shape[3])), q.new_empty(q.shape[:3])
    _run(0, (q, k, v), [output, logsumexp], settings)
    return output.to(query.dtype), logsumexp


def attention_backward(grad_output: Tensor, known: Known, settings: Settings) -> tuple[Tensor, Tensor, Tensor]:
    g, q, k, v = _operands(grad_output, known.query, known.key, known.value)
    results = [q.new_empty(q.shape), k.new_zeros(k.shape), v.new_zeros(v.shape)]
    _run(1, (q, k, v), results, settings, g)
    grad_query, grad_key, grad_value = (x.to(known.query.dtype) for x in results)
    return grad_query, grad_key, grad_value


def attention_backward_backward(
    tangents: Tangents, grad_output: Tensor, known: Known, settings: Settings
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    g, q, k, v = _operands(grad_output, known.query, known.key, known.value)
    results = [g.new_empty(g.shape), q.new_empty(q.shape), k.new_zeros(k.shape), v.new_zeros(v.shape)]
    _run(2, (q, k, v), results, settings, g, [None if x is None else _rows(x) for x in tangents])
    grad_grad_output, grad_query, grad_key, grad_value = (x.to(known.query.dtype) for x in results)
    return grad_grad_output, grad_query, grad_key, grad_value


def _operands(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(map(_rows, tensors))


def _rows(x: Tensor) -> Tensor:
    """In the dtype of the arithmetic, with contiguous rows that do not overlap."""
    x = (x if x.dtype == torch.float64 else x.float()).resolve_neg()
    readable = x.stride(3) == 1 and x.stride(2) >= x.shape[3]
    return x if readable or x.numel() == 0 else x.contiguous()


def _run(
    level: int,
    operands: tuple[Tensor, ...],
    results: Sequence[Tensor],
    settings: Settings,
    grad_output: Tensor | None = None,
    tangents: Sequence[Tensor | None] = (None, None, None),
) -> None:
    query, key, value = operands
    _C.attention(
        level=level,
        query=query,
        key=key,
        value=value,
        grad_output=grad_output,
        grad_grad_query=tangents[0],
        grad_grad_key=tangents[1],
        grad_grad_value=tangents[2],
        results=results,
        mask=None if settings.mask is None else _mask(settings.mask, query.dtype),
        seed=settings.seed,
        dropout_p=settings.dropout_p,
        threshold=threshold(settings.dropout_p),
        is_causal=settings.is_causal,
        scale=settings.scale,
    )


def _mask(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """As bytes, or in the dtype of the arithmetic; what repeats in memory stays as it is."""
    if mask.dtype == torch.bool:
        return mask.view(torch.uint8)
    for dim, (stride, size) in enumerate(zip(mask.stride(), mask.shape, strict=True)):
        if stride == 0 and size > 1:
            mask = mask.narrow(dim, 0, 1)
    return mask.resolve_neg().to(dtype)
