"""The function that is called as torch's own."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from hvp_engine._support.torch_compat import broadcast_shapes, in_transform
from hvp_engine.differentiable.attention import operators
from hvp_engine.differentiable.registration import autocast, check_tensor


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """softmax(scale Q K^T + mask) V, as `torch.nn.functional.scaled_dot_product_attention`, with a first and a second
    derivative whose memory grows with the length, not with its square.

    Arguments:
        query: ... x heads x queries x width, in float32, float64, bfloat16 or float16; at least 2-d.
        key: ... x heads x keys x width.
        value: ... x heads x keys x its own width.
        attn_mask: boolean (True where a query sees a key) or floating (added to the scores); any shape that broadcasts
            to ... x heads x queries x keys. It must not require grad.
        dropout_p: probability with which a weight is dropped, always: pass 0.0 in evaluation. The masks follow from
            one number that is drawn from torch's generator, and are made again where they are needed.
        is_causal: query i sees the keys 0 to i; not beside a mask.
        scale: factor of the scores; 1 / sqrt(width) if None.
        enable_gqa: let each head of keys and values serve as many neighbouring heads of queries as there are more of
            those.

    Returns the output, ... x heads x queries x the value's width. A query that sees no key gets zeros, and gives no
    gradient.

    Under transforms of `torch.func` and in forward mode it is torch's own function, on its math kernel.

    Cost: in multiplications of queries x keys x width for each head: 2 for the value, 5 for the first derivative, 12
    for the derivative of that. Memory beside the outputs: a block of rows for each thread on a CPU. Sums are in float32
    (float64 for float64). Third and higher derivatives exist and need whole matrices of queries x keys.

    Errors: `TypeError` and `ValueError` that name the argument, for dtypes and shapes that do not fit and for a mask
    that requires grad.

    Source: Dao et al., FlashAttention: fast and memory-efficient exact attention with IO-awareness, NeurIPS 2022, for
    value and first derivative; the second is derived in the documentation.

    >>> import torch, hvp_engine
    >>> q, k, v = (torch.randn(2, 8, 100, 64, requires_grad=True) for _ in range(3))
    >>> loss = hvp_engine.differentiable.scaled_dot_product_attention(q, k, v, is_causal=True).square().sum()
    >>> (gradient,) = torch.autograd.grad(loss, q, create_graph=True)
    >>> (product,) = torch.autograd.grad(gradient, q, torch.ones_like(gradient))
    >>> product.shape
    torch.Size([2, 8, 100, 64])
    """
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        check_tensor(tensor, name)
        if tensor.dim() < 2:
            raise ValueError(f"{name}: expected ... x length x width; got shape {tuple(tensor.shape)}")
    if is_causal and attn_mask is not None:
        raise ValueError("is_causal: expected False beside attn_mask; got True: put the causal mask into attn_mask")
    if in_transform():  # which would not see the operators' derivatives
        with sdpa_kernel(SDPBackend.MATH):
            return functional.scaled_dot_product_attention(
                query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
            )
    if _is_learned(attn_mask):
        raise ValueError(
            "attn_mask: expected one that does not require grad, since its gradient has a number for each query and "
            "key; got one that does: run this attention under torch.nn.attention.sdpa_kernel(SDPBackend.MATH)"
        )
    (q, k, v), mask, leading = _prepared(query, key, value, attn_mask, dropout_p, enable_gqa)
    seed = None
    if dropout_p > 0:
        seed = torch.randint(torch.iinfo(torch.int64).max, (), device=query.device)
    if scale is None:
        scale = 1 / math.sqrt(query.shape[-1]) if query.shape[-1] else 1.0
    output, _ = torch.ops.hvp_engine.attention(q, k, v, mask, seed, float(dropout_p), is_causal, float(scale))
    return output.reshape(*leading, *output.shape[-2:])


WORTHWHILE = 64 * 64
"""Pairs of a query and a key in one head from which our operators are faster than torch's products of matrices."""


def is_worthwhile(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> bool:
    """Whether :func:`scaled_dot_product_attention` serves here, and is faster or smaller than torch's kernel.

    It is not for masks that require grad, under transforms of `torch.func` and in forward mode, or for arguments that
    are invalid, about which torch's own function says what is wrong.
    """
    tensors = [query, key, value] + ([] if attn_mask is None else [attn_mask])
    if (
        not all(type(x) in (Tensor, torch.nn.Parameter) and x.layout is torch.strided for x in tensors)
        or in_transform()
    ):
        return False
    if any(x.is_nested or x.dim() < 2 for x in tensors) or (is_causal and attn_mask is not None):
        return False
    if _is_learned(attn_mask):
        return False
    if query.shape[-2] * key.shape[-2] < WORTHWHILE or operators.runs_on(query.device) == "reference":
        return False
    try:
        _prepared(query, key, value, attn_mask, dropout_p, enable_gqa)
    except (TypeError, ValueError):
        return False
    return True


def _is_learned(mask: Tensor | None) -> bool:
    return mask is not None and mask.requires_grad and torch.is_grad_enabled()


def _prepared(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, dropout_p: float, enable_gqa: bool
) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor | None, tuple[int, ...]]:
    """Operands and mask as the operators take them, checked, and the output's extents before length and width."""
    query, key, value = autocast(query, key, value)
    leading = _leading(query, key, value, enable_gqa)
    q, k, v = (_in_four(x, lead) for x, lead in zip((query, key, value), leading, strict=True))
    full = (*leading[0], query.shape[-2], key.shape[-2])
    mask = None if attn_mask is None else _mask_in_four(attn_mask, full)
    operators.check(q, k, v, mask, dropout_p)
    return (q, k, v), mask, leading[0]


def _leading(query: Tensor, key: Tensor, value: Tensor, grouped: bool) -> list[tuple[int, ...]]:
    """The extents before length and width of each: broadcast against each other, but for the heads of groups."""
    leads = [tuple(x.shape[:-2]) for x in (query, key, value)]
    kept = 1 if grouped else 0
    if grouped and not all(leads):
        raise ValueError("enable_gqa: expected tensors with heads, at least 3-d; got one without")
    try:
        batch = broadcast_shapes(*(lead[: len(lead) - kept] for lead in leads))
    except RuntimeError as error:
        raise ValueError(
            "query, key, value: expected extents before length and width that broadcast; got shapes "
            f"{tuple(query.shape)}, {tuple(key.shape)}, {tuple(value.shape)}"
            + ("" if grouped else ": pass enable_gqa=True where several heads of queries share one of keys")
        ) from error
    return [(*batch, *lead[len(lead) - kept :]) for lead in leads]


def _in_four(x: Tensor, leading: tuple[int, ...]) -> Tensor:
    """As batch x heads x length x width."""
    x = x.expand(*leading, *x.shape[-2:])
    if len(leading) == 2:
        return x
    heads = leading[-1] if leading else 1
    return x.reshape(math.prod(leading[:-1]), heads, *x.shape[-2:])


def _mask_in_four(mask: Tensor, full: tuple[int, ...]) -> Tensor:
    """As batch x heads x queries x keys, where 1 stands for any number."""
    if mask.dim() > len(full) or any(
        size not in (1, whole) for size, whole in zip(reversed(mask.shape), reversed(full), strict=False)
    ):
        raise ValueError(f"attn_mask: expected a shape that broadcasts to {full}; got shape {tuple(mask.shape)}")
    mask = mask.reshape((1,) * (max(len(full), 4) - mask.dim()) + mask.shape)
    batch = mask.shape[:-3]
    if any(size != 1 for size in batch):
        mask = mask.expand(*full[:-3], *mask.shape[-3:])
    return mask.reshape(math.prod(mask.shape[:-3]), *mask.shape[-3:])
