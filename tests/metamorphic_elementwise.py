"""Elementwise layers, gates and rearrangements, each written in many ways."""

from __future__ import annotations

import torch
from metamorphic_layers import Kind, by_slices
from torch import Tensor
from torch.nn import functional as F


def _masked_in_place(x: Tensor) -> Tensor:
    out = x * 1
    out[out < 0] = 0
    return out


RELU = Kind(
    {
        "F.relu": lambda x: F.relu(x),
        "relu_": lambda x: (x + 0).relu_(),
        "clamp": lambda x: x.clamp(min=0),
        "clamp_min_": lambda x: x.clone().clamp_min_(0),
        "where": lambda x: torch.where(x > 0, x, torch.zeros_like(x)),
        "where a number": lambda x: torch.where(x > 0, x, 0.0),
        "x * (x > 0)": lambda x: x * (x > 0),
        "mask as dtype": lambda x: x * (x > 0).to(x.dtype),
        "maximum": lambda x: torch.maximum(x, x.new_zeros(())),
        "masked_fill": lambda x: x.masked_fill(x < 0, 0.0),
        "masked_fill_": lambda x: x.clone().masked_fill_(x < 0, 0.0),
        "assigned mask": _masked_in_place,
        "threshold": lambda x: F.threshold(x, 0.0, 0.0),
        "abs": lambda x: (x + x.abs()) / 2,
        "gt_": lambda x: x * x.detach().clone().gt_(0),
        "1 - le_": lambda x: x * (1 - x.detach().clone().le_(0)),
        "heaviside": lambda x: x * torch.heaviside(x.detach(), x.new_zeros(())),
        "leaky_relu(0)": lambda x: F.leaky_relu(x, 0.0),
        "hardtanh": lambda x: F.hardtanh(x, 0.0, 1e9),
        "max of a stack": lambda x: torch.stack([x, torch.zeros_like(x)]).max(0).values,
    }
)

TANH = Kind(
    {
        "tanh": lambda x: torch.tanh(x),
        "tanh_": lambda x: (x * 1.0).tanh_(),
        "sigmoid": lambda x: 2 * torch.sigmoid(2 * x) - 1,
        "exp(2x)": lambda x: (torch.exp(2 * x) - 1) / (torch.exp(2 * x) + 1),
        "sinh / cosh": lambda x: x.sinh() / x.cosh(),
        "1 - 2 / (1 + exp)": lambda x: 1 - 2 / (1 + x.mul(2).exp_()),
        "expm1": lambda x: torch.expm1(2 * x) / (torch.expm1(2 * x) + 2),
        "vmap": lambda x: torch.vmap(torch.tanh)(x),
        "buffer": lambda x: by_slices(x, torch.tanh),
    }
)

SOFTPLUS = Kind(
    {
        "F.softplus": lambda x: F.softplus(x),
        "log1p(exp)": lambda x: torch.log1p(torch.exp(x)),
        "log(1 + exp)": lambda x: (1 + x.exp()).log(),
        "logaddexp": lambda x: torch.logaddexp(x, torch.zeros_like(x)),
        "logsigmoid": lambda x: -F.logsigmoid(-x),
        "stable": lambda x: F.relu(x) + torch.log1p(torch.exp(-x.abs())),
        "in place": lambda x: x.exp().add(1).log_(),
        "logsumexp": lambda x: torch.logsumexp(torch.stack([x, torch.zeros_like(x)]), 0),
    }
)


def _gate_in_place(x: Tensor, g: Tensor) -> Tensor:
    out = x.clone()
    out.mul_(g)
    out.mul_(g)
    return out


def _gate_pow_(x: Tensor, g: Tensor) -> Tensor:
    square = g.clone()
    square.pow_(2)
    return x * square


def _gate_float_power_(x: Tensor, g: Tensor) -> Tensor:
    square = g * 1
    square.float_power_(2)
    return x * square


def _gate_square_(x: Tensor, g: Tensor) -> Tensor:
    square = g.clone()
    square.square_()
    return square.mul(x)


GATE = Kind(
    {
        "x * (g * g)": lambda x, g: x * (g * g),
        "(x * g) * g": lambda x, g: x * g * g,
        "g**2": lambda x, g: x * g**2,
        "pow": lambda x, g: x * torch.pow(g, 2),
        "pow(2.0)": lambda x, g: x.mul(g.pow(2.0)),
        "square": lambda x, g: x * g.square(),
        "float_power": lambda x, g: x * torch.float_power(g, 2),
        "pow of a tensor": lambda x, g: x * torch.pow(g.abs(), torch.tensor(2.0)),
        "abs**2": lambda x, g: x * g.abs() ** 2,
        "einsum": lambda x, g: torch.einsum("bti,i,i->bti", x, g, g),
        "in place": _gate_in_place,
        "pow_": _gate_pow_,
        "float_power_": _gate_float_power_,
        "square_": _gate_square_,
        "diag": lambda x, g: x @ torch.diag(g) @ torch.diag(g),
        "outer": lambda x, g: x * torch.outer(g, g).diagonal(),
        "exp(2 log)": lambda x, g: x * torch.exp(2 * torch.log(g.abs())),
        "_foreach_mul": lambda x, g: x * torch._foreach_mul([g], [g])[0],
        "g / (1 / g)": lambda x, g: x * g / g.reciprocal(),
        "addcmul": lambda x, g: torch.addcmul(torch.zeros_like(x), x * g, g),
    },
    ((1,),),
)


def _order(x: Tensor) -> list[int]:
    """2, 0, 1, 5, 4, 3 for six features."""
    return [2, 0, 1, *range(x.shape[-1] - 1, 2, -1)]


def _one_hot(x: Tensor) -> Tensor:
    return F.one_hot(torch.tensor(_order(x)), x.shape[-1]).to(x.dtype)


def _scattered(x: Tensor) -> Tensor:
    index = torch.tensor(_order(x)).argsort().expand(x.shape)
    return torch.zeros_like(x).scatter(-1, index, x)


def _index_copied(x: Tensor) -> Tensor:
    return torch.zeros_like(x).index_copy_(-1, torch.tensor(_order(x)).argsort(), x)


def _index_added(x: Tensor) -> Tensor:
    return torch.zeros_like(x).index_add(2, torch.tensor(_order(x)).argsort(), x)


def _assigned(x: Tensor) -> Tensor:
    out = torch.zeros_like(x)
    for new, old in enumerate(_order(x)):
        out[..., new] = x[..., old]
    return out


REARRANGE = Kind(
    {
        "x[..., list]": lambda x: x[..., _order(x)],
        "index_select": lambda x: x.index_select(-1, torch.tensor(_order(x))),
        "gather": lambda x: x.gather(-1, torch.tensor(_order(x)).expand(x.shape)),
        "take_along_dim": lambda x: torch.take_along_dim(x, torch.tensor(_order(x))[None, None], dim=-1),
        "one-hot": lambda x: x @ _one_hot(x).T,
        "cat of slices": lambda x: torch.cat([x[..., 2:3], x[..., :2], x[..., 3:].flip(-1)], -1),
        "unbind": lambda x: torch.stack([x.unbind(-1)[old] for old in _order(x)], -1),
        "scatter": _scattered,
        "index_copy_": _index_copied,
        "index_add": _index_added,
        "assigned": _assigned,
        "embedding": lambda x: (
            F.embedding(torch.tensor(_order(x)), x.permute(2, 0, 1).flatten(1))
            .unflatten(1, x.shape[:2])
            .permute(1, 2, 0)
        ),
        "roll": lambda x: torch.cat([x[..., :3].roll(1, -1), x[..., 3:].flip(-1)], -1),
    }
)


def _shift_assigned(x: Tensor) -> Tensor:
    out = torch.zeros_like(x)
    out[:, 1:] = x[:, :-1]
    return out


def _shift_in_place(x: Tensor) -> Tensor:
    out = x.roll(1, dims=1)
    out[:, 0].zero_()
    return out


SHIFT = Kind(
    {
        "F.pad": lambda x: F.pad(x, (0, 0, 1, 0))[:, :-1],
        "cat": lambda x: torch.cat([torch.zeros_like(x[:, :1]), x[:, :-1]], dim=1),
        "roll and mask": lambda x: x.roll(1, 1) * (torch.arange(x.shape[1]) > 0)[:, None],
        "assigned": _shift_assigned,
        "roll and zero_": _shift_in_place,
        "narrow": lambda x: torch.cat([x.new_zeros(len(x), 1, x.shape[2]), x.narrow(1, 0, x.shape[1] - 1)], 1),
        "matmul": lambda x: torch.diag(torch.ones(x.shape[1] - 1), -1) @ x,
        "stack": lambda x: torch.stack([torch.zeros_like(x[:, 0])] + list(x.unbind(1)[:-1]), 1),
        "slice_scatter": lambda x: torch.slice_scatter(torch.zeros_like(x), x[:, :-1], 1, 1),
        "diff of cumsum": lambda x: x.cumsum(1) - x.cumsum(1) + F.pad(x[:, :-1], (0, 0, 1, 0)),
    }
)


def _running_mean(x: Tensor) -> Tensor:
    total, means = torch.zeros_like(x[:, 0]), []
    for t in range(x.shape[1]):
        total = total + x[:, t]
        means.append(total / (t + 1))
    return torch.stack(means, 1)


def _running_mean_in_place(x: Tensor) -> Tensor:
    total, means = torch.zeros_like(x[:, 0]), []
    for t in range(x.shape[1]):
        total += x[:, t]
        means.append(total.div(t + 1))
    return torch.stack(means, dim=1)


def _counts(x: Tensor) -> Tensor:
    """1, 2, ..., as a column."""
    return torch.arange(1, x.shape[1] + 1)[:, None]


RUNNING_MEAN = Kind(
    {
        "cumsum": lambda x: x.cumsum(1) / _counts(x),
        "cumsum, arange": lambda x: torch.cumsum(x, dim=1) / torch.arange(1.0, x.shape[1] + 1).view(1, -1, 1),
        "tril": lambda x: torch.ones(x.shape[1], x.shape[1]).tril() @ x / _counts(x),
        "means of slices": lambda x: torch.stack([x[:, :t].mean(1) for t in range(1, x.shape[1] + 1)], 1),
        "loop": _running_mean,
        "loop in place": _running_mean_in_place,
        "unfold": lambda x: F.pad(x, (0, 0, x.shape[1] - 1, 0)).unfold(1, x.shape[1], 1).sum(-1) / _counts(x),
    }
)
