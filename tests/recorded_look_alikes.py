"""Losses that look alike: of a 4 x 4 matrix x and a parameter, each with parameters that share one library."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

LOOK_ALIKES: dict[str, tuple[Callable[[Tensor, Any], Tensor], Sequence[Any]]] = {
    "scale": (lambda x, p: p * x.tanh(), [2.0, 3.0]),
    "scale from the right": (lambda x, p: x.tanh() * p, [2.0, 3.0]),
    "add, alpha": (lambda x, p: torch.add(x.sin(), x, alpha=p), [2, 3]),
    "div": (lambda x, p: x.sin() / p, [2.0, 3.0]),
    "number / x": (lambda x, p: p / (x.exp() + 1), [2.0, 3.0]),
    "pow": (lambda x, p: x**p, [3, 4]),
    "power, fraction": (lambda x, p: (x * x + 1) ** p, [1.5, 2.5]),
    "number ** x": (lambda x, p: p**x, [2.0, 3.0]),
    "plus a number": (lambda x, p: (x + p) ** 3, [1.0, 2.0]),
    "number - x": (lambda x, p: (p - x) ** 3, [1.0, 2.0]),
    "sum, dim": (lambda x, p: x.sin().sum(p).exp(), [0, 1]),
    "mean, dim": (lambda x, p: x.sin().mean(p).exp(), [0, 1]),
    "softmax, dim": (lambda x, p: x.softmax(p) ** 2, [0, 1]),
    "log_softmax": (lambda x, p: x.log_softmax(p) ** 2, [0, 1]),
    "logsumexp": (lambda x, p: x.logsumexp(p) ** 2, [0, 1]),
    "cumsum": (lambda x, p: x.cumsum(p).sin(), [0, 1]),
    "prod": (lambda x, p: x.prod(p), [0, 1]),
    "max, dim": (lambda x, p: x.max(p).values.exp(), [0, 1]),
    "norm": (lambda x, p: x.norm(p) ** 3, [2.0, 3.0]),
    "norm, dim": (lambda x, p: x.norm(dim=p) ** 3, [0, 1]),
    "var": (lambda x, p: x.var(p).exp(), [0, 1]),
    "variance, correction": (lambda x, p: x.var(0, correction=p).exp(), [0, 1]),
    "std": (lambda x, p: x.std(0, correction=p).exp(), [0, 1]),
    "transpose": (lambda x, p: (x.t() if p else x).sin() * torch.arange(16.0).view(4, 4) * x, [0, 1]),
    "permute": (lambda x, p: x.view(2, 2, 4).permute(p).reshape(-1).sin()[:5] * x.view(-1)[:5], [(0, 1, 2), (1, 0, 2)]),
    "narrow": (lambda x, p: x.narrow(0, p, 2).exp(), [0, 1, 2]),
    "select": (lambda x, p: x.select(0, p).exp(), [0, 1]),
    "slice": (lambda x, p: x[:, p : p + 2].exp() ** 2, [0, 1]),
    "slice, step": (lambda x, p: x.view(-1)[::p][:4].exp(), [1, 2]),
    "flip": (lambda x, p: (x.flip(p) * x).exp(), [0, 1]),
    "roll": (lambda x, p: (x.roll(p, 0) * x).exp(), [1, 2]),
    "rot90": (lambda x, p: (x.rot90(p) * x).exp(), [1, 3]),
    "diagonal": (lambda x, p: x.diagonal(p).exp()[:1], [0, 1]),
    "tril": (lambda x, p: x.tril(p).exp(), [0, 1]),
    "triu": (lambda x, p: x.triu(p).sin(), [0, 1]),
    "index": (lambda x, p: x[torch.tensor(p)].exp(), [[0, 1], [2, 3]]),
    "gather": (lambda x, p: x.gather(0, torch.tensor([p])).exp(), [[0, 1, 2, 3], [1, 1, 1, 1]]),
    "index_select": (lambda x, p: x.index_select(0, torch.tensor(p)).exp(), [[0, 1], [1, 3]]),
    "clamp": (lambda x, p: x.clamp(-p, p) ** 3, [0.5, 1.0]),
    "clamp_min": (lambda x, p: x.clamp_min(p) ** 3, [-0.5, 0.1]),
    "leaky_relu": (lambda x, p: F.leaky_relu(x, p) ** 3, [0.1, 0.3]),
    "elu": (lambda x, p: F.elu(x, p) ** 2, [1.0, 2.0]),
    "celu": (lambda x, p: F.celu(x, p) ** 2, [1.0, 2.0]),
    "softplus": (lambda x, p: F.softplus(x, beta=p), [1.0, 2.0]),
    "hardtanh": (lambda x, p: F.hardtanh(x, -p, p) ** 3, [0.5, 1.0]),
    "threshold": (lambda x, p: F.threshold(x, p, 0.0) ** 3, [0.1, 0.5]),
    "gelu": (lambda x, p: F.gelu(x, approximate=p), ["none", "tanh"]),
    "softshrink": (lambda x, p: F.softshrink(x, p) ** 3, [0.1, 0.5]),
    "rrelu": (lambda x, p: F.rrelu(x, p, p) ** 3, [0.1, 0.5]),
}
