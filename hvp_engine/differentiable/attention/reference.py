"""Attention and its two derivatives in plain torch, the executable specification: it holds whole n x n matrices.

For one head, with s = scale q k^T + mask, the weights are P = softmax(s) along each row; dropout multiplies them by
factors D, so that the output is o = (P * D) v. Products with * are elementwise. All is computed in float32, or in
float64 for float64 inputs; the outputs have the inputs' dtype.

**First derivative.** With g the gradient of o and dP = (g v^T) * D: the gradient of s is dS = P * (dP - r), where r is
the sum of P * dP along each row. Then dv = (P * D)^T g, dq = scale dS k, dk = scale dS^T q.

**Derivative of the first.** Let a, b, c be the gradients of dq, dk, dv. What they are contracted with is
<a, dq> + <b, dk> + <c, dv> = <g, o'>, where o' is the derivative of o along (a, b, c). So all that is needed is the
gradient of <g, o'>. Along (a, b, c) the scores move by s' = scale (a k^T + q b^T), the weights by P' = P * (s' - m),
where m is the sum of P * s' along each row. Then

    gradient of g:  o' = (P' * D) v + (P * D) c
    gradient of v:  (P' * D)^T g
    gradient of s': dS, as above
    gradient of s:  Z = P * (w - n),  w = (s' - m) * (dP - r) + (g c^T) * D,  n the sum of P * w along each row
    gradient of q:  scale (Z k + dS b)
    gradient of k:  scale (Z^T q + dS^T a)

Source for the first derivative: Dao et al., FlashAttention: fast and memory-efficient exact attention, NeurIPS 2022.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from hvp_engine.differentiable.attention.dropout import dropout_factors


class Settings(NamedTuple):
    """What the three operations share: which weights there are, apart from the operands.

    Attributes:
        mask: added to the scores, or, if boolean, True where a query sees a key; batch x heads x queries x keys, where
            1 stands for any number.
        seed: of the dropout masks, a 0-dim int64 tensor; None without dropout.
        dropout_p: probability with which a weight is dropped.
        is_causal: whether query i sees the keys up to i only.
        scale: factor of the scores.
    """

    mask: Tensor | None = None
    seed: Tensor | None = None
    dropout_p: float = 0.0
    is_causal: bool = False
    scale: float = 1.0


class Known(NamedTuple):
    """The operands of attention and its results: what the derivatives take beside gradients."""

    query: Tensor
    key: Tensor
    value: Tensor
    output: Tensor
    logsumexp: Tensor


Tangents = tuple[Tensor | None, Tensor | None, Tensor | None]
"""The gradients of those of query, key and value; None stands for zeros."""


def attention(query: Tensor, key: Tensor, value: Tensor, settings: Settings) -> tuple[Tensor, Tensor]:
    """The output, and the logarithm of each row's sum of exponentials; zeros and -inf for a row that sees nothing."""
    q, k, v = _operands(query, key, value)
    scores = _scores(q, k, settings)
    logsumexp = scores.logsumexp(-1) if scores.shape[-1] else scores.new_full(scores.shape[:-1], -math.inf)
    output = (_weights(scores) * _factors(scores, settings)) @ v
    return output.to(query.dtype), logsumexp


def attention_backward(grad_output: Tensor, known: Known, settings: Settings) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of query, key and value."""
    query, key, value, *_ = known
    q, k, v = _operands(query, key, value)
    g = grad_output.to(q.dtype)
    scores = _scores(q, k, settings)
    weights, factors = _weights(scores), _factors(scores, settings)
    grad_scores = _through_softmax(weights, (g @ v.mT) * factors)
    grad_query = settings.scale * (grad_scores @ k)
    grad_key = settings.scale * (grad_scores.mT @ q)
    grad_value = (weights * factors).mT @ g
    return grad_query.to(query.dtype), _grouped(grad_key, key), _grouped(grad_value, value)


def attention_backward_backward(
    tangents: Tangents, grad_output: Tensor, known: Known, settings: Settings
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of grad_output, query, key and value."""
    query, key, value, *_ = known
    q, k, v = _operands(query, key, value)
    g = grad_output.to(q.dtype)
    a, b, c = (
        torch.zeros_like(x) if tangent is None else _repeated(tangent, query).to(q.dtype)
        for tangent, x in zip(tangents, (q, k, v), strict=True)
    )
    scores = _scores(q, k, settings)
    weights, factors = _weights(scores), _factors(scores, settings)
    moved = settings.scale * (a @ k.mT + q @ b.mT)
    moved = moved - (weights * moved).sum(-1, keepdim=True)
    moved_weights = weights * moved * factors
    grad_weights = (g @ v.mT) * factors
    centred = grad_weights - (weights * grad_weights).sum(-1, keepdim=True)
    grad_moved = weights * centred
    grad_scores = _through_softmax(weights, moved * centred + (g @ c.mT) * factors)
    grad_grad_output = moved_weights @ v + (weights * factors) @ c
    grad_query = settings.scale * (grad_scores @ k + grad_moved @ b)
    grad_key = settings.scale * (grad_scores.mT @ q + grad_moved.mT @ a)
    grad_value = moved_weights.mT @ g
    return (
        grad_grad_output.to(grad_output.dtype),
        grad_query.to(query.dtype),
        _grouped(grad_key, key),
        _grouped(grad_value, value),
    )


def _operands(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """In the dtype of the arithmetic, with keys and values repeated for each query head of their group."""
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    return query.to(dtype), _repeated(key, query).to(dtype), _repeated(value, query).to(dtype)


def _repeated(x: Tensor, query: Tensor) -> Tensor:
    """Head h of the result is head h // group of `x`."""
    group = query.shape[1] // x.shape[1] if x.shape[1] else 1
    return x if group == 1 else x.repeat_interleave(group, 1)


def _grouped(gradient: Tensor, like: Tensor) -> Tensor:
    """The sum over the query heads of each group."""
    batch, heads, length, width = like.shape
    group = gradient.shape[1] // heads if heads else 1
    return gradient.reshape(batch, heads, group, length, width).sum(2).to(like.dtype)


def _scores(q: Tensor, k: Tensor, settings: Settings) -> Tensor:
    scores = settings.scale * (q @ k.mT)
    if settings.is_causal:
        seen = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
        scores = scores.where(seen, -math.inf)
    mask = settings.mask
    if mask is None:
        return scores
    return scores.where(mask, -math.inf) if mask.dtype == torch.bool else scores + mask.to(scores.dtype)


def _weights(scores: Tensor) -> Tensor:
    """softmax(scores); zeros in a row that sees nothing."""
    seen = (scores > -math.inf).any(-1, keepdim=True)
    return scores.where(seen, 0.0).softmax(-1).where(seen, 0.0)


def _factors(scores: Tensor, settings: Settings) -> Tensor | float:
    """Dropout's factors: 0 for what is dropped, 1 / (1 - p) for the rest."""
    if settings.seed is None:
        return 1.0
    batch, heads, queries, keys = scores.shape
    return dropout_factors(settings.seed, (batch, heads, queries, keys), settings.dropout_p, scores.dtype)


def _through_softmax(weights: Tensor, gradient: Tensor) -> Tensor:
    """P * (x - n), with n the sum of P * x along each row."""
    return weights * (gradient - (weights * gradient).sum(-1, keepdim=True))
