"""Attention by the textbook, and calls of it that differ in everything that a caller can choose."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from hvp_engine.differentiable.attention.dropout import dropout_factors

Function = Callable[..., Tensor]


def by_hand(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    factors: Tensor | float = 1.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """softmax(scale Q K^T + mask) V in the dtype of its arguments, with dropout's factors given; autograd
    differentiates it as often as one likes. Rows that see nothing are zeros."""
    if enable_gqa:
        key, value = (x.repeat_interleave(query.shape[-3] // x.shape[-3], -3) for x in (key, value))
    scores = query @ key.mT * (1 / math.sqrt(query.shape[-1]) if scale is None else scale)
    if is_causal:
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if attn_mask is not None:
        scores = scores.masked_fill(~attn_mask, -math.inf) if attn_mask.dtype == torch.bool else scores + attn_mask
    seen = (scores > -math.inf).any(-1, keepdim=True)
    exponentials = (scores - scores.detach().amax(-1, keepdim=True)).where(seen, -math.inf).exp()
    weights = exponentials / exponentials.sum(-1, keepdim=True).where(seen, 1.0)
    return (weights * factors) @ value


def derivatives(function: Function, inputs: Sequence[Tensor], cotangents: Sequence[Tensor]) -> list[Tensor]:
    """Value, first derivative, and the derivative of that: at the first cotangent, then along the others; with the
    first cotangent among what the last ones are taken for."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    value = function(*leaves)
    grad_output = cotangents[0].detach().requires_grad_()
    first = torch.autograd.grad(value, leaves, grad_output, create_graph=True)
    second = torch.autograd.grad(first, [grad_output, *leaves], list(cotangents[1:]))
    return [x.detach() for x in (value, *first, *second)]


@dataclass(frozen=True)
class Case:
    """Shapes of query, key and value, and how attention is called on them."""

    query: tuple[int, ...]
    key: tuple[int, ...]
    value: tuple[int, ...]
    options: dict[str, Any] = field(default_factory=dict)
    mask: Callable[[], Tensor] | None = None
    dropout_p: float = 0.0

    def tensors(self, dtype: torch.dtype, device: torch.device) -> tuple[list[Tensor], list[Tensor], dict[str, Any]]:
        """Inputs, cotangents (of the output and of the three gradients), and keyword arguments."""
        generator = torch.Generator().manual_seed(1)

        def draw(shape: tuple[int, ...]) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).to(device)

        inputs = [draw(shape) for shape in (self.query, self.key, self.value)]
        output = (*self.query[:-1], self.value[-1])
        cotangents = [draw(shape) for shape in (output, self.query, self.key, self.value)]
        options = dict(self.options)
        if self.mask is not None:
            mask = self.mask().to(device)
            options["attn_mask"] = mask if mask.dtype == torch.bool else mask.to(dtype)
        return inputs, cotangents, options

    def truth(self, inputs: Sequence[Tensor], cotangents: Sequence[Tensor], options: dict[str, Any]) -> list[Tensor]:
        """What :func:`derivatives` should be, in float64, with the masks that the present random state gives."""
        wide = {name: _wide(option) for name, option in options.items()}
        if self.dropout_p:
            seed = torch.randint(torch.iinfo(torch.int64).max, (), device=inputs[0].device)
            shape = (*self.query[:-1], self.key[-2])
            four = (math.prod(shape[:-3]), *((1, 1, 1, *shape)[-3:]))
            wide["factors"] = dropout_factors(seed, four, self.dropout_p, torch.float64).reshape(shape)
        return derivatives(lambda *x: by_hand(*x, **wide), [*map(_wide, inputs)], [*map(_wide, cotangents)])


def _wide(x: Any) -> Any:
    return x.double() if isinstance(x, Tensor) and x.is_floating_point() else x


def _shown(*shape: int) -> Callable[[], Tensor]:
    return lambda: torch.rand(shape, generator=torch.Generator().manual_seed(2)) > 0.3


def _added(*shape: int) -> Callable[[], Tensor]:
    return lambda: torch.randn(shape, generator=torch.Generator().manual_seed(3))


def _hidden_rows() -> Tensor:
    """A query that sees nothing, one that sees one key, and one that sees all."""
    mask = torch.ones(7, 9, dtype=torch.bool)
    mask[0] = mask[4] = mask[2, 1:] = False
    return mask


def _no_penalty_is_infinite() -> Tensor:
    mask = torch.zeros(7, 9)
    mask[0] = mask[3, 2:] = -math.inf
    return mask


_Q, _K, _V = (2, 3, 7, 5), (2, 3, 9, 5), (2, 3, 9, 6)

CASES = {
    "plain": Case(_Q, _K, _V),
    "longer than a block, wide": Case((1, 2, 101, 64), (1, 2, 67, 64), (1, 2, 67, 64)),
    "causal": Case((2, 2, 60, 8), (2, 2, 60, 8), (2, 2, 60, 16), {"is_causal": True}),
    "causal, fewer keys than queries": Case((1, 1, 70, 4), (1, 1, 30, 4), (1, 1, 30, 4), {"is_causal": True}),
    "causal, more keys than queries": Case((1, 2, 5, 4), (1, 2, 70, 4), (1, 2, 70, 4), {"is_causal": True}),
    "scale": Case(_Q, _K, _V, {"scale": 1.7}),
    "grouped queries": Case((2, 6, 7, 5), (2, 2, 9, 5), (2, 2, 9, 6), {"enable_gqa": True}),
    "one head of keys, causal": Case(
        (1, 4, 50, 8), (1, 1, 50, 8), (1, 1, 50, 8), {"enable_gqa": True, "is_causal": True}
    ),
    "boolean mask": Case(_Q, _K, _V, mask=_shown(2, 3, 7, 9)),
    "boolean mask of each batch, long": Case((2, 2, 50, 16), (2, 2, 70, 16), (2, 2, 70, 16), mask=_shown(2, 1, 50, 70)),
    "key padding": Case(_Q, _K, _V, mask=_shown(2, 1, 1, 9)),
    "added mask of each head": Case(_Q, _K, _V, mask=_added(3, 7, 9)),
    "added mask, transposed": Case((1, 1, 50, 4), (1, 1, 33, 4), (1, 1, 33, 4), mask=lambda: _added(33, 50)().T),
    "one number for each query": Case(_Q, _K, _V, mask=_added(1, 3, 7, 1)),
    "rows that see nothing": Case(_Q, _K, _V, mask=_hidden_rows),
    "rows that see nothing, added": Case(_Q, _K, _V, mask=_no_penalty_is_infinite),
    "dropout": Case(_Q, _K, _V, dropout_p=0.3),
    "dropout, long, causal": Case((2, 2, 60, 8), (2, 2, 61, 8), (2, 2, 61, 8), {"is_causal": True}, dropout_p=0.5),
    "everything dropped": Case(_Q, _K, _V, dropout_p=1.0),
    "one of everything": Case((1, 1, 1, 1), (1, 1, 1, 1), (1, 1, 1, 1)),
    "no heads": Case((7, 5), (9, 5), (9, 6)),
    "three extents": Case((3, 7, 5), (3, 9, 5), (3, 9, 6), mask=_shown(3, 7, 9)),
    "five extents, dropout": Case(
        (2, 2, 3, 7, 5), (2, 2, 3, 9, 5), (2, 2, 3, 9, 6), mask=_shown(2, 1, 3, 7, 9), dropout_p=0.2
    ),
}  # fmt: skip
