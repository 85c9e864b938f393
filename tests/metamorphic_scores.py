"""Ends of a loss and penalties of its weights, each written in many ways.

An end maps activations (batch, time, features), targets of that shape and labels (batch, time) to a scalar; a penalty
maps the list of weights, and for each of them the logarithm of a decay, to a scalar.
"""

from __future__ import annotations

import math

import torch
from metamorphic_layers import Kind
from torch import Tensor
from torch.nn import functional as F


def _square_in_place(x: Tensor, y: Tensor, _: Tensor) -> Tensor:
    d = x.clone()
    d -= y
    return d.square().mean()


def _loop_over_batch(x: Tensor, y: Tensor, _: Tensor) -> Tensor:
    total = 0.0
    for one, target in zip(x, y, strict=True):
        total = total + F.mse_loss(one, target, reduction="sum")
    return total / x.numel()


def _summed_in_place(x: Tensor, y: Tensor, _: Tensor) -> Tensor:
    total = torch.zeros(())
    for one, target in zip(x, y, strict=True):
        total += ((one - target) ** 2).sum()
    return total / x.numel()


SQUARED_ERROR = Kind(
    {
        "F.mse_loss": lambda x, y, _: F.mse_loss(x, y),
        "d**2": lambda x, y, _: ((x - y) ** 2).mean(),
        "d * d": lambda x, y, _: ((d := x - y) * d).mean(),
        "(x - y) * (x - y)": lambda x, y, _: ((x - y) * (x - y)).mean(),
        "pow": lambda x, y, _: (x - y).pow(2).sum() / x.numel(),
        "square": lambda x, y, _: torch.square(x - y).mean(dim=(0, 1, 2)),
        "norm**2": lambda x, y, _: (x - y).norm() ** 2 / x.numel(),
        "vector_norm": lambda x, y, _: torch.linalg.vector_norm(x - y).square() / x.numel(),
        "dist": lambda x, y, _: torch.dist(x, y) ** 2 / x.numel(),
        "dot": lambda x, y, _: torch.dot((d := (x - y).flatten()), d) / len(d),
        "inner": lambda x, y, _: torch.inner((d := (x - y).reshape(-1)), d) / len(d),
        "vdot": lambda x, y, _: torch.vdot((d := (x - y).ravel()), d) / d.numel(),
        "matmul": lambda x, y, _: (d := (x - y).flatten()) @ d / len(d),
        "einsum": lambda x, y, _: torch.einsum("bti,bti->", d := x - y, d) / d.numel(),
        "not reduced": lambda x, y, _: F.mse_loss(x, y, reduction="none").mean(-1).mean(),
        "expanded": lambda x, y, _: (x * x - 2 * x * y + y * y).mean(),
        "-=": _square_in_place,
        "loop": _loop_over_batch,
        "+=": _summed_in_place,
        "pairwise_distance": lambda x, y, _: F.pairwise_distance(x, y, eps=0.0).square().sum() / x.numel(),
        "abs**2": lambda x, y, _: (x - y).abs().pow(2.0).mean(),
        "huber": lambda x, y, _: 2 * F.huber_loss(x, y, delta=1e6),
        "vmap": lambda x, y, _: torch.vmap(lambda a, b: ((a - b) ** 2).mean())(x, y).mean(),
        "double().mean()": lambda x, y, _: (x - y).to(torch.float64).pow(2).mean().to(x.dtype),
        "mean of a list": lambda x, y, _: sum(F.mse_loss(a, b) for a, b in zip(x, y, strict=True)) / len(x),
        "stack of a list": lambda x, y, _: torch.stack([F.mse_loss(a, b) for a, b in zip(x, y, strict=True)]).mean(),
    }
)


def _entropy_loop(x: Tensor, _: Tensor, c: Tensor) -> Tensor:
    total = 0
    for scores, label in zip(x.flatten(0, 1), c.flatten(), strict=True):
        total -= scores.log_softmax(-1).index_select(0, label[None]).sum()
    return total / c.numel()


def _entropy_by_hand(x: Tensor, _: Tensor, c: Tensor) -> Tensor:
    x = x - x.max(-1, keepdim=True).values
    e = x.exp()
    p = e / e.sum(-1, keepdim=True)
    return -torch.log(p.gather(-1, c[..., None])).mean()


def _entropy_indexed(x: Tensor, _: Tensor, c: Tensor) -> Tensor:
    scores = x.reshape(-1, x.shape[-1])
    return -scores.log_softmax(1)[torch.arange(len(scores)), c.flatten()].mean()


def _entropy_masked(x: Tensor, _: Tensor, c: Tensor) -> Tensor:
    labels = torch.cat([c, torch.full_like(c[:1], -100)])
    return F.cross_entropy(torch.cat([x, x[:1]]).flatten(0, 1), labels.flatten(), ignore_index=-100)


def _entropy_mask_mean(x: Tensor, _: Tensor, c: Tensor) -> Tensor:
    mask = (c >= 0).double()
    losses = F.cross_entropy(x.flatten(0, 1), c.flatten(), reduction="none").view(c.shape)
    return (losses * mask).sum() / mask.sum().clamp(min=1)


CROSS_ENTROPY = Kind(
    {
        "F.cross_entropy": lambda x, _, c: F.cross_entropy(x.view(-1, x.shape[-1]), c.view(-1)),
        "classes second": lambda x, _, c: F.cross_entropy(x.transpose(1, 2), c),
        "nll_loss": lambda x, _, c: F.nll_loss(F.log_softmax(x.flatten(0, 1), -1), c.flatten()),
        "logsumexp": lambda x, _, c: (x.logsumexp(-1) - x.gather(-1, c.unsqueeze(-1)).squeeze(-1)).mean(),
        "by hand": _entropy_by_hand,
        "indexed": _entropy_indexed,
        "loop": _entropy_loop,
        "one-hot": lambda x, _, c: -(x.log_softmax(-1) * F.one_hot(c, x.shape[-1])).sum(-1).mean(),
        "einsum": lambda x, _, c: (
            -torch.einsum("btk,btk->", x.log_softmax(-1), F.one_hot(c, x.shape[-1]).double()) / c.numel()
        ),
        "soft labels": lambda x, _, c: F.cross_entropy(
            x.flatten(0, 1), F.one_hot(c, x.shape[-1]).flatten(0, 1).double()
        ),
        "log of softmax": lambda x, _, c: -torch.softmax(x, -1).gather(-1, c[..., None]).log().sum() / c.numel(),
        "kl_div": lambda x, _, c: (
            F.kl_div(F.log_softmax(x, -1), F.one_hot(c, x.shape[-1]).double(), reduction="sum") / c.numel()
        ),
        "ignore_index": _entropy_masked,
        "masked mean": _entropy_mask_mean,
        "Categorical": lambda x, _, c: (
            -torch.distributions.Categorical(logits=x, validate_args=False).log_prob(c).mean()
        ),
        "margin": lambda x, _, c: torch.log(torch.exp(x - x.gather(-1, c[..., None])).sum(-1)).mean(),
        "vmap": lambda x, _, c: torch.vmap(F.cross_entropy)(x, c).mean(),
    }
)

BINARY = Kind(
    {
        "with_logits": lambda x, y, _: F.binary_cross_entropy_with_logits(x, (y > 0).double()),
        "softplus": lambda x, y, _: (F.softplus(x) - x * (y > 0)).mean(),
        "logsigmoid": lambda x, y, _: -torch.where(y > 0, F.logsigmoid(x), F.logsigmoid(-x)).mean(),
        "of sigmoid": lambda x, y, _: F.binary_cross_entropy(torch.sigmoid(x), (y > 0).double()),
        "logs": lambda x, y, _: -((t := (y > 0).double()) * (p := x.sigmoid()).log() + (1 - t) * (1 - p).log()).mean(),
        "stable": lambda x, y, _: (x.clamp(min=0) - x * (y > 0) + torch.log1p(torch.exp(-x.abs()))).mean(),
        "soft margin": lambda x, y, _: F.soft_margin_loss(x, y.sign()),
        "signs": lambda x, y, _: torch.log1p(torch.exp(-x * torch.sign(y))).mean(),
    }
)


def _huber_clamped(x: Tensor, y: Tensor, _: Tensor) -> Tensor:
    size = (x - y).abs()
    quadratic = size.clamp(max=1.0)
    return (0.5 * quadratic * quadratic + (size - quadratic)).mean()


HUBER = Kind(
    {
        "F.huber_loss": lambda x, y, _: F.huber_loss(x, y),
        "F.smooth_l1_loss": lambda x, y, _: F.smooth_l1_loss(x, y, beta=1.0),
        "where": lambda x, y, _: torch.where((d := x - y).abs() < 1, 0.5 * d * d, d.abs() - 0.5).mean(),
        "clamp": _huber_clamped,
        "mask": lambda x, y, _: ((m := (a := (x - y).abs()) <= 1) * 0.5 * a**2 + m.logical_not() * (a - 0.5)).mean(),
    }
)

COSINE = Kind(
    {
        "F.cosine_similarity": lambda x, y, _: 1 - F.cosine_similarity(x, y, dim=-1).mean(),
        "F.normalize": lambda x, y, _: 1 - (F.normalize(x, dim=-1) * F.normalize(y, dim=-1)).sum(-1).mean(),
        "norms": lambda x, y, _: (1 - (x * y).sum(-1) / (x.norm(dim=-1) * y.norm(dim=-1))).mean(),
        "einsum": lambda x, y, _: (
            1 - torch.einsum("bti,bti->bt", x / x.norm(dim=-1, keepdim=True), F.normalize(y, dim=-1)).mean()
        ),
        "half squared distance": lambda x, y, _: (
            0.5 * (F.normalize(x, dim=-1) - F.normalize(y, dim=-1)).square().sum(-1).mean()
        ),
        "rsqrt": lambda x, y, _: 1 - ((x * y).sum(-1) * ((x * x).sum(-1) * (y * y).sum(-1)).rsqrt()).mean(),
        "cosine_embedding": lambda x, y, _: F.cosine_embedding_loss(
            x.flatten(0, 1), y.flatten(0, 1), torch.ones(y.shape[:-1].numel())
        ),
    }
)


def _means(x: Tensor) -> Tensor:
    """The first half of the features."""
    return x[..., : x.shape[-1] // 2]


def _logs(x: Tensor) -> Tensor:
    """The other half, as logarithms of variances."""
    return x[..., x.shape[-1] // 2 :]


GAUSSIAN = Kind(
    {
        "gaussian_nll_loss": lambda x, y, _: F.gaussian_nll_loss(_means(x), _means(y), _logs(x).exp()),
        "by hand": lambda x, y, _: 0.5 * (_logs(x) + (_means(x) - _means(y)) ** 2 * torch.exp(-_logs(x))).mean(),
        "chunk": lambda x, y, _: 0.5 * ((c := x.chunk(2, -1))[1] + (_means(y) - c[0]).pow(2) / c[1].exp()).mean(),
        "Normal": lambda x, y, _: (
            -(
                torch.distributions.Normal(_means(x), (0.5 * _logs(x)).exp(), validate_args=False).log_prob(_means(y))
            ).mean()
            - 0.5 * math.log(2 * math.pi)
        ),
    }
)


def _total_in_place(ws: list[Tensor], hs: list[Tensor]) -> Tensor:
    total = torch.zeros(())
    for w, h in zip(ws, hs, strict=True):
        total += h.exp() * w.square().sum()
    return total


def _total_add_(ws: list[Tensor], hs: list[Tensor]) -> Tensor:
    total = ws[0].new_zeros(1)
    for w, h in zip(ws, hs, strict=True):
        total.add_((w * w).sum() * torch.exp(h))
    return total.squeeze()


def _foreach_squares(ws: list[Tensor], hs: list[Tensor]) -> Tensor:
    return sum(h.exp() * square.sum() for h, square in zip(hs, torch._foreach_mul(ws, ws), strict=True))


def _foreach_norms(ws: list[Tensor], hs: list[Tensor]) -> Tensor:
    return (torch.stack(hs).exp() * torch.stack(torch._foreach_norm(ws)) ** 2).sum()


def _scaled_flat(ws: list[Tensor], hs: list[Tensor]) -> Tensor:
    flat = torch.cat([w.flatten() for w in ws])
    decays = torch.cat([h.exp().expand(w.numel()) for w, h in zip(ws, hs, strict=True)])
    return torch.dot(decays * flat, flat)


def _from_vector(ws: list[Tensor], hs: list[Tensor]) -> Tensor:
    vector = torch.nn.utils.parameters_to_vector([w * (h / 2).exp() for w, h in zip(ws, hs, strict=True)])
    return vector.pow(2).sum()


def _mul_in_place(ws: list[Tensor], hs: list[Tensor]) -> Tensor:
    parts = []
    for w, h in zip(ws, hs, strict=True):
        square = w.clone()
        square.mul_(w)
        square.mul_(h.exp())
        parts.append(square.sum())
    return torch.stack(parts).sum()


def each(square: object) -> object:
    """The sum over the weights of exp(h) * square(w)."""
    return lambda ws, hs: sum(h.exp() * square(w) for w, h in zip(ws, hs, strict=True))  # type: ignore[operator]


DECAY = Kind(
    {
        "w**2": each(lambda w: (w**2).sum()),
        "w * w": each(lambda w: (w * w).sum()),
        "pow": each(lambda w: w.pow(2).sum()),
        "pow(2.0)": each(lambda w: torch.pow(w, 2.0).sum()),
        "square": each(lambda w: w.square().sum()),
        "norm**2": each(lambda w: w.norm() ** 2),
        "norm * norm": each(lambda w: w.norm() * w.norm()),
        "norm(p=2).pow(2)": each(lambda w: torch.norm(w, p=2).pow(2)),
        "vector_norm": each(lambda w: torch.linalg.vector_norm(w).square()),
        "dot": each(lambda w: torch.dot(w.flatten(), w.flatten())),
        "vdot": each(lambda w: torch.vdot(w.ravel(), w.ravel())),
        "inner": each(lambda w: torch.inner(w.view(-1), w.view(-1))),
        "matmul": each(lambda w: w.reshape(-1) @ w.reshape(-1)),
        "einsum": each(lambda w: torch.einsum("i,i->", w.flatten(), w.flatten())),
        "tensordot": each(lambda w: torch.tensordot(w, w, w.dim())),
        "trace": each(lambda w: torch.trace(w.view(len(w), -1) @ w.view(len(w), -1).T)),
        "outer": each(lambda w: torch.outer(w.flatten(), w.flatten()).diagonal().sum()),
        "mse_loss": each(lambda w: F.mse_loss(w, torch.zeros_like(w), reduction="sum")),
        "abs**2": each(lambda w: w.abs().pow(2).sum()),
        "mul_": each(lambda w: w.clone().mul_(w).sum()),
        "pow_": each(lambda w: (w + 0).pow_(2).sum()),
        "square_": each(lambda w: w.clone().square_().sum()),
        "addcmul": each(lambda w: torch.addcmul(torch.zeros_like(w), w, w).sum()),
        "mean": each(lambda w: w.numel() * (w * w).mean()),
        "decay * (w * w)": lambda ws, hs: sum((h.exp() * (w * w)).sum() for w, h in zip(ws, hs, strict=True)),
        "decay * w * w": lambda ws, hs: sum((h.exp() * w * w).sum() for w, h in zip(ws, hs, strict=True)),
        "decay * w**2": lambda ws, hs: sum((torch.exp(h) * w**2).sum() for w, h in zip(ws, hs, strict=True)),
        "broadcast decay": lambda ws, hs: sum(
            (h.exp().expand_as(w) * w * w).sum() for w, h in zip(ws, hs, strict=True)
        ),
        "total +=": _total_in_place,
        "total.add_": _total_add_,
        "_foreach_mul": _foreach_squares,
        "_foreach_norm": _foreach_norms,
        "cat": _scaled_flat,
        "parameters_to_vector": _from_vector,
        "in place": _mul_in_place,
        "stack": lambda ws, hs: torch.stack([h.exp() * w.pow(2).sum() for w, h in zip(ws, hs, strict=True)]).sum(),
        "dot of stacks": lambda ws, hs: torch.dot(torch.stack(hs).exp(), torch.stack([(w * w).sum() for w in ws])),
    }
)

SMOOTH_L1 = Kind(
    {
        "sqrt(w * w + e)": each(lambda w: torch.sqrt(w * w + 1e-3).sum()),
        "sqrt(w**2 + e)": each(lambda w: (w**2 + 1e-3).sqrt().sum()),
        "**0.5": each(lambda w: ((w.pow(2) + 1e-3) ** 0.5).sum()),
        "hypot": each(lambda w: torch.hypot(w, torch.full_like(w, math.sqrt(1e-3))).sum()),
        "norm of a stack": each(lambda w: torch.stack([w, torch.full_like(w, 1e-3**0.5)]).norm(dim=0).sum()),
        "sqrt_": each(lambda w: (w * w).add_(1e-3).sqrt_().sum()),
        "exp(log / 2)": each(lambda w: torch.exp(0.5 * torch.log(w * w + 1e-3)).sum()),
    }
)
