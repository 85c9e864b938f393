"""Models with functions of their own: in torch, in numpy, with sparse gradients, of Fourier transforms."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from recorded_models import Problem, classes, leaves, model, rows
from torch import Tensor, nn
from torch.nn import functional as F


class Cube(torch.autograd.Function):
    """scale x^3; the scale is an attribute of its context."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: float = 1.0) -> Tensor:
        ctx.scale = scale
        ctx.save_for_backward(x)
        return scale * x**3

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        (x,) = ctx.saved_tensors
        return 3 * ctx.scale * x**2 * g, None


class NumpySin(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return torch.from_numpy(np.sin(x.detach().numpy()))

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        return NumpyTimesCos.apply(g, ctx.saved_tensors[0])


class NumpyTimesCos(torch.autograd.Function):
    """g cos(x), and its derivatives, outside torch: a dispatch mode does not see them."""

    @staticmethod
    def forward(ctx: Any, g: Tensor, x: Tensor) -> Tensor:
        ctx.save_for_backward(g, x)
        return torch.from_numpy(g.detach().numpy() * np.cos(x.detach().numpy()))

    @staticmethod
    def backward(ctx: Any, u: Tensor) -> Any:
        g, x = (t.detach().numpy() for t in ctx.saved_tensors)
        return torch.from_numpy(u.numpy() * np.cos(x)), torch.from_numpy(-u.numpy() * g * np.sin(x))


def applied(function: Any) -> Problem:
    net = nn.Linear(20, 10)
    return list(net.parameters()), lambda: F.cross_entropy(function(net(torch.randn(6, 20))), classes())


@model("a function of one's own", level=2)
def _own() -> Problem:
    return applied(Cube.apply)


@model("a function of one's own, in numpy", level=3)
def _numpy() -> Problem:
    return applied(NumpySin.apply)


@model("sparse embedding", level=3)
def _sparse() -> Problem:
    table, dense = nn.Embedding(30, 8, sparse=True), nn.Linear(8, 10)
    w = [*table.parameters(), *dense.parameters()]
    return w, lambda: F.cross_entropy(dense(table(torch.randint(30, (6, 5))).tanh().mean(1)), classes())


@model("Fourier transform, matrix norm", level=2)
def _fourier() -> Problem:
    (a,) = w = leaves((8,))
    return (
        w,
        lambda: (
            (torch.fft.rfft(a * torch.randn(8)).abs() ** 3).sum()
            + torch.linalg.matrix_norm(torch.outer(a, a) + torch.eye(8)) ** 3
        ),
    )


@model("several losses")
def _several() -> Problem:
    net = nn.Linear(20, 10)

    def loss() -> Tensor:
        h = net(rows()())
        return (
            F.binary_cross_entropy_with_logits(h, torch.rand(6, 10))
            + F.kl_div(h.log_softmax(1), torch.rand(6, 10).softmax(1))
            + F.smooth_l1_loss(h, torch.randn(6, 10))
            + F.cross_entropy(h, torch.rand(6, 10).softmax(1), label_smoothing=0.1)
        )

    return list(net.parameters()), loss


@model("vmap over rows")
def _per_row() -> Problem:
    net = nn.Sequential(nn.Linear(20, 8), nn.Tanh(), nn.Linear(8, 10))

    def loss() -> Tensor:
        p = dict(net.named_parameters())

        def one(x: Tensor, y: Tensor) -> Tensor:
            return F.cross_entropy(torch.func.functional_call(net, p, (x[None],)), y[None])

        return (torch.func.vmap(one)(rows()(), classes()) * torch.arange(6.0)).sum()

    return list(net.parameters()), loss


@model("jacrev inside")
def _jacobian() -> Problem:
    net = nn.Sequential(nn.Linear(20, 8), nn.Tanh(), nn.Linear(8, 10))

    def loss() -> Tensor:
        p = dict(net.named_parameters())
        jacobian = torch.func.jacrev(lambda x: torch.func.functional_call(net, p, (x,)))(rows()()[:2])
        return jacobian.square().sum() + sum(q.sum() for q in p.values()) ** 2

    return list(net.parameters()), loss


@model("jvp inside", level=2)
def _tangent() -> Problem:
    net = nn.Sequential(nn.Linear(20, 8), nn.Tanh(), nn.Linear(8, 10))

    def loss() -> Tensor:
        p, x = dict(net.named_parameters()), rows()()
        out, t = torch.func.jvp(lambda x: torch.func.functional_call(net, p, (x,)), (x,), (torch.ones_like(x),))
        return t.square().sum() + out.pow(3).sum()

    return list(net.parameters()), loss


@model("reverse mode inside forward mode", level=2)
def _laplacian() -> Problem:
    """Its graph has zero tensors without memory, which crash a process under a dispatch mode."""
    (a,) = w = leaves((5,))

    def loss() -> Tensor:
        def laplacian(row: Tensor) -> Tensor:
            return torch.trace(torch.func.hessian(lambda r: torch.tanh(r @ a))(row))

        return torch.func.vmap(laplacian)(torch.randn(3, 5)).square().sum()

    return w, loss
