"""Rewrites of a trace: what does nothing goes, and only that."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import hvp_engine as hvp
from hvp_engine.differentiation.trace.rewriting import dependents
from hvp_engine.engines.functions import TracedLinearization
from hvp_engine.engines.traced import LinearizedEngine

aten = torch.ops.aten


def linearization_of(loss: Callable[[Tensor], Tensor], w: Tensor) -> TracedLinearization:
    linearization = hvp.HessianOperator(loss, w, engine=LinearizedEngine()).linear_map
    assert isinstance(linearization, TracedLinearization)
    return linearization


def test_derivatives_of_powers_leave_no_powers_of_zero_and_one():
    decay = torch.rand(3, 2)
    w = torch.randn(3, 2)
    linearization = linearization_of(lambda w: (decay * w**2).sum() / 2, w)
    torch.testing.assert_close(linearization.gradient[0], decay * w)
    torch.testing.assert_close(linearization.product([w])[0], decay * w)
    powers = [
        n.args[1] for n in linearization.functions.partition.primal.graph.nodes if n.target is aten.pow.Tensor_Scalar
    ]
    assert powers == [2]


@pytest.mark.parametrize(
    "loss",
    [
        pytest.param(lambda w: (w * torch.ones(3, 2)).pow(2).sum(), id="one-that-broadcasts"),
        pytest.param(lambda w: (w + torch.zeros(3, 2)).pow(2).sum(), id="zero-that-broadcasts"),
        pytest.param(lambda w: (w * torch.ones(2, dtype=torch.float64)).pow(3).sum().float(), id="one-that-promotes"),
        pytest.param(lambda w: (w**0 * w**1 * w**2).sum(), id="powers-of-zero-and-one"),
        pytest.param(lambda w: ((w * 1).exp() * torch.full((2,), 2.0)).sum(), id="other-constants-stay"),
    ],
)
def test_neutral_operands_go_and_the_rest_stays(loss):
    w, t = torch.tensor([0.7, -1.2]), torch.tensor([0.3, 0.4])
    here = w.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(here), here, create_graph=True)
    (expected,) = torch.autograd.grad(gradient, here, t)
    linearization = linearization_of(loss, w)
    torch.testing.assert_close(linearization.gradient[0], gradient.detach())
    torch.testing.assert_close(linearization.product([t])[0], expected)


def test_sums_with_sparse_gradients():
    tokens = torch.randint(0, 7, (4, 3))
    w, t = torch.randn(7, 3), torch.randn(7, 3)

    def loss(w: Tensor, sparse: bool = True) -> Tensor:
        return F.embedding(tokens, w, sparse=sparse).tanh().square().mean() + w.square().sum()

    here = w.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(here, sparse=False), here, create_graph=True)
    (expected,) = torch.autograd.grad(gradient, here, t)
    torch.testing.assert_close(linearization_of(loss, w).product([t])[0], expected)


def test_large_results_of_cheap_operations_are_not_held():
    x, v, k, row = (torch.randn(s, dtype=torch.float64) for s in ((64, 8), (8, 2048), (2048, 4), (2048,)))

    def loss(w: Tensor) -> Tensor:
        outputs, scale = x @ w, torch.exp(x @ v / 4)  # 1 MiB
        return ((outputs * scale) @ k).square().sum() + (outputs.square() * scale * row).sum()

    w, t = torch.rand_like(v), torch.randn_like(v)
    here = w.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(here), here, create_graph=True)
    (expected,) = torch.autograd.grad(gradient, here, t)
    linearization = linearization_of(loss, w)
    torch.testing.assert_close(linearization.product([t])[0], expected)
    graph = linearization.functions.partition.tangent.module.graph
    tangents = [node for node in graph.nodes if node.op == "placeholder"][-1:]
    again = set(graph.nodes) - dependents(graph, set(tangents))
    cheap = (aten.mul.Tensor, aten.mul.Scalar)
    assert any(node.target in cheap and node.meta["val"].shape == (64, 2048) for node in again)
