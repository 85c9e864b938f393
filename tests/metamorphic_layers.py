"""Layers of a network, each written in the many ways that people write it: all of one layer are the same function.

Every layer maps activations of shape (batch, time, features) to the same shape, whatever the sizes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class Kind:
    """A function, as `writings` of it by name; its own weights, which follow its input, are `shapes` in features."""

    writings: Mapping[str, Callable[..., Tensor]]
    shapes: tuple[tuple[int, ...], ...] = field(default=())


def by_slices(x: Tensor, value: Callable[[Tensor], Tensor]) -> Tensor:
    """Written into a buffer, one batch element at a time."""
    out = torch.empty_like(x)
    for index in range(len(x)):
        out[index] = value(x[index])
    return out


def _linear_in_place(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    out = x @ w.t()
    out += b
    return out


LINEAR = Kind(
    {
        "x @ w.T + b": lambda x, w, b: x @ w.T + b,
        "F.linear": lambda x, w, b: F.linear(x, w, b),
        "addmm": lambda x, w, b: torch.addmm(b, x.reshape(-1, x.shape[-1]), w.t()).view(x.shape),
        "einsum": lambda x, w, b: torch.einsum("bti,oi->bto", x, w) + b,
        "broadcast": lambda x, w, b: (x.unsqueeze(-2) * w).sum(-1) + b,
        "comprehension": lambda x, w, b: torch.stack([(x * row).sum(-1) for row in w], -1) + b,
        "tensordot": lambda x, w, b: torch.tensordot(x, w, dims=([2], [1])) + b,
        "add_": lambda x, w, b: x.matmul(w.t()).add_(b),
        "+=": _linear_in_place,
        "bmm": lambda x, w, b: torch.bmm(x, w.t().expand(len(x), *w.shape)).add(b),
        "baddbmm": lambda x, w, b: torch.baddbmm(b.expand_as(x), x, w.t().expand(len(x), -1, -1)),
        "conv1d": lambda x, w, b: F.conv1d(x.transpose(1, 2), w[:, :, None], b).transpose(1, 2),
        "conv2d": lambda x, w, b: F.conv2d(x.permute(0, 2, 1)[..., None], w[..., None, None], b)[..., 0].mT,
        "mv": lambda x, w, b: torch.stack([w.mv(row) + b for row in x.flatten(0, 1)]).reshape(x.shape),
        "vmap": lambda x, w, b: torch.vmap(torch.vmap(lambda row: w @ row + b))(x),
        "matmul of columns": lambda x, w, b: (w @ x.unsqueeze(-1)).squeeze(-1) + b,
        "buffer": lambda x, w, b: by_slices(x, lambda part: part @ w.t() + b),
        "cat with ones": lambda x, w, b: (
            torch.cat([x, torch.ones_like(x[..., :1])], -1) @ torch.cat([w, b[:, None]], 1).T
        ),
        "lerp of two": lambda x, w, b: torch.lerp(F.linear(x, w, b), x @ w.mT + b, 0.25),
    },
    ((1, 1), (1,)),
)


def _gelu_in_place(x: Tensor) -> Tensor:
    gate = torch.erf(x / math.sqrt(2))
    return gate.add_(1).mul_(0.5).mul(x)


GELU = Kind(
    {
        "F.gelu": lambda x: F.gelu(x),
        "erf": lambda x: 0.5 * x * (1 + torch.erf(x / math.sqrt(2))),
        "ndtr": lambda x: x * torch.special.ndtr(x),
        "erfc": lambda x: x * 0.5 * torch.erfc(-x * math.sqrt(0.5)),
        "in place": _gelu_in_place,
        "normal.cdf": lambda x: x * torch.distributions.Normal(0.0, 1.0, validate_args=False).cdf(x),
        "addcmul": lambda x: torch.addcmul(0.5 * x, x, torch.erf(x * 2**-0.5), value=0.5),
    }
)

_C = math.sqrt(2 / math.pi)
GELU_TANH = Kind(
    {
        "F.gelu": lambda x: F.gelu(x, approximate="tanh"),
        "x * x * x": lambda x: 0.5 * x * (1 + torch.tanh(_C * (x + 0.044715 * x * x * x))),
        "x**3": lambda x: 0.5 * x * (1.0 + torch.tanh(_C * (x + 0.044715 * x**3))),
        "pow": lambda x: 0.5 * x * (1.0 + torch.tanh(_C * (x + 0.044715 * torch.pow(x, 3.0)))),
        "factored": lambda x: 0.5 * x * (1 + torch.tanh(_C * x * (1 + 0.044715 * (x * x)))),
        "sigmoid": lambda x: x * torch.sigmoid(2 * _C * (x + 0.044715 * x.pow(3))),
    }
)


def _swiglu_in_place(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    z = x @ a.T
    out = torch.sigmoid(z).clone()
    out.mul_(z)
    out *= x @ b.T
    return out


def _swiglu_chunk(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    gate, value = F.linear(x, torch.cat([a, b])).chunk(2, dim=-1)
    return F.silu(gate) * value


def _swiglu_glu(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    z = F.linear(x, a)
    return F.glu(torch.cat([z * F.linear(x, b), z], -1), dim=-1)


def _swiglu_logistic(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    z = x.matmul(a.mT)
    return z / (1 + (-z).exp()) * x.matmul(b.mT)


SWIGLU = Kind(
    {
        "F.silu": lambda x, a, b: F.silu(F.linear(x, a)) * F.linear(x, b),
        "z * sigmoid(z)": lambda x, a, b: (z := x @ a.T) * torch.sigmoid(z) * (x @ b.T),
        "logistic": _swiglu_logistic,
        "chunk": _swiglu_chunk,
        "glu": _swiglu_glu,
        "in place": _swiglu_in_place,
        "silu in place": lambda x, a, b: F.silu(x @ a.T, inplace=True) * (x @ b.T),
        "einsum": lambda x, a, b: torch.einsum("bto,bto->bto", F.silu(torch.einsum("bti,oi->bto", x, a)), x @ b.mT),
    },
    ((1, 1), (1, 1)),
)


def _layer_norm_by_hand(x: Tensor, g: Tensor, b: Tensor) -> Tensor:
    mean = x.mean(-1, keepdim=True)
    var = ((x - mean) ** 2).mean(-1, keepdim=True)
    return g * (x - mean) / torch.sqrt(var + 1e-5) + b


def _layer_norm_product(x: Tensor, g: Tensor, b: Tensor) -> Tensor:
    d = x - x.mean(-1, keepdim=True)
    return d * torch.rsqrt((d * d).mean(-1, keepdim=True) + 1e-5) * g + b


def _layer_norm_moments(x: Tensor, g: Tensor, b: Tensor) -> Tensor:
    mean = x.mean(dim=-1, keepdim=True)
    var = (x * x).mean(dim=-1, keepdim=True) - mean * mean
    return (x - mean).mul((var + 1e-5).pow(-0.5)).mul(g).add(b)


def _layer_norm_in_place(x: Tensor, g: Tensor, b: Tensor) -> Tensor:
    var, mean = torch.var_mean(x, dim=-1, correction=0, keepdim=True)
    out = x - mean
    out /= var.add(1e-5).sqrt_()
    out = out * g
    out += b
    return out


LAYER_NORM = Kind(
    {
        "F.layer_norm": lambda x, g, b: F.layer_norm(x, g.shape, g, b, 1e-5),
        "without affine": lambda x, g, b: F.layer_norm(x, g.shape) * g + b,
        "by hand": _layer_norm_by_hand,
        "d * d": _layer_norm_product,
        "moments": _layer_norm_moments,
        "in place": _layer_norm_in_place,
        "std": lambda x, g, b: (x - x.mean(-1, True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt() * g + b,
        "group_norm": lambda x, g, b: F.group_norm(x.reshape(-1, len(g)), 1, g, b, 1e-5).reshape(x.shape),
        "buffer": lambda x, g, b: by_slices(x, lambda part: F.layer_norm(part, g.shape, g, b)),
    },
    ((1,), (1,)),
)


def _rms_norm_in_place(x: Tensor, g: Tensor) -> Tensor:
    scale = x.pow(2).mean(-1, keepdim=True).add_(1e-6).rsqrt_()
    return x.mul(scale).mul_(g)


RMS_NORM = Kind(
    {
        "F.rms_norm": lambda x, g: F.rms_norm(x, g.shape, g, 1e-6),
        "x * x": lambda x, g: x * torch.rsqrt((x * x).mean(-1, keepdim=True) + 1e-6) * g,
        "x**2": lambda x, g: g * (x / torch.sqrt(torch.mean(x**2, dim=-1, keepdim=True) + 1e-6)),
        "norm": lambda x, g: x / (x.norm(dim=-1, keepdim=True) ** 2 / len(g) + 1e-6).sqrt() * g,
        "einsum": lambda x, g: x * (torch.einsum("bti,bti->bt", x, x)[..., None] / len(g) + 1e-6).rsqrt() * g,
        "in place": _rms_norm_in_place,
        "cast": lambda x, g: g * (x.double() * torch.rsqrt(x.double().square().mean(-1, True) + 1e-6)).type_as(x),
        "matmul": lambda x, g: x * g / torch.sqrt((x.unsqueeze(-2) @ x.unsqueeze(-1))[..., 0] / len(g) + 1e-6),
        "vmap": lambda x, g: torch.vmap(lambda s: s * torch.rsqrt((s * s).mean(-1, keepdim=True) + 1e-6) * g)(x),
    },
    ((1,),),
)

HEADS = 2


def heads(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of shape (batch, heads, time, width)."""
    q, k, v = F.linear(x, w).split(x.shape[-1], -1)
    return tuple(t.view(*t.shape[:2], HEADS, -1).transpose(1, 2) for t in (q, k, v))  # type: ignore[return-value]


def joined(x: Tensor) -> Tensor:
    return x.transpose(1, 2).flatten(2)


def causal(x: Tensor) -> Tensor:
    """True where attention may not look; the dimension before the last one of `x` is that of time."""
    return torch.ones(x.shape[-2], x.shape[-2], dtype=torch.bool).triu(1)


def by_scores(normalize: Callable[[Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    """Attention whose weights are `normalize` of the scores."""

    def attention(x: Tensor, w: Tensor) -> Tensor:
        q, k, v = heads(x, w)
        return joined(normalize(q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])) @ v)

    return attention


def _softmax_by_hand(scores: Tensor) -> Tensor:
    scores = scores.masked_fill(causal(scores), float("-inf"))
    e = torch.exp(scores - scores.amax(-1, keepdim=True))
    return e / e.sum(-1, keepdim=True)


def _renormalized(scores: Tensor) -> Tensor:
    weights = torch.softmax(scores, -1) * causal(scores).logical_not()
    return weights / weights.sum(-1, keepdim=True)


def _in_place_mask(scores: Tensor) -> Tensor:
    scores.masked_fill_(causal(scores), torch.finfo(scores.dtype).min)
    return scores.softmax(dim=-1)


def _assigned_mask(scores: Tensor) -> Tensor:
    scores = scores.clone()
    scores[:, :, causal(scores)] = float("-inf")
    return F.softmax(scores, -1)


def _loop_over_heads(x: Tensor, w: Tensor) -> Tensor:
    q, k, v = heads(x, w)
    outputs = []
    for head in range(HEADS):
        scores = torch.einsum("bqd,bkd->bqk", q[:, head], k[:, head]) * q.shape[-1] ** -0.5
        outputs.append(torch.where(causal(scores), -torch.inf, scores).softmax(-1) @ v[:, head])
    return torch.cat(outputs, -1)


def _loop_over_time(x: Tensor, w: Tensor) -> Tensor:
    q, k, v = heads(x, w)
    outputs = []
    for t in range(x.shape[1]):
        scores = (q[:, :, t : t + 1] * k[:, :, : t + 1]).sum(-1) / math.sqrt(q.shape[-1])
        outputs.append((scores.softmax(-1)[..., None] * v[:, :, : t + 1]).sum(2))
    return torch.stack(outputs, 1).flatten(2)


ATTENTION = Kind(
    {
        "is_causal": lambda x, w: joined(F.scaled_dot_product_attention(*heads(x, w), is_causal=True)),
        "attn_mask": lambda x, w: joined(F.scaled_dot_product_attention(*heads(x, w), attn_mask=~causal(x))),
        "masked_fill": by_scores(lambda s: s.masked_fill(causal(s), float("-inf")).softmax(-1)),
        "where": by_scores(lambda s: torch.softmax(torch.where(causal(s), s.new_tensor(-1e9), s), dim=-1)),
        "added mask": by_scores(lambda s: F.softmax(s + torch.full(s.shape[-2:], -torch.inf).triu(1), dim=-1)),
        "masked_fill_": by_scores(_in_place_mask),
        "assigned mask": by_scores(_assigned_mask),
        "softmax by hand": by_scores(_softmax_by_hand),
        "exp of log_softmax": by_scores(lambda s: F.log_softmax(s.masked_fill(causal(s), -torch.inf), -1).exp()),
        "renormalized": by_scores(_renormalized),
        "loop over heads": _loop_over_heads,
        "loop over time": _loop_over_time,
    },
    ((3, 1),),
)
