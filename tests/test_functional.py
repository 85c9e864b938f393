"""A module as a pure function of some of its parameters."""

from __future__ import annotations

import pytest
import torch
from cases import DTYPE, NETWORKS, Tied, randn
from torch import nn

import hvp_engine as hvp
from hvp_engine.isolation import isolated

CPU = torch.device("cpu")


@pytest.mark.parametrize("name", NETWORKS)
def test_same_output_as_the_module(name: str) -> None:
    network = NETWORKS[name]()
    net = hvp.functional(network.module)
    with isolated(1, CPU):
        found = net(dict(network.module.named_parameters()), network.x)
    torch.testing.assert_close(found, network.module(network.x), rtol=0, atol=0)


def test_weights_replace_parameters_and_the_rest_stay() -> None:
    module = nn.Linear(3, 2, dtype=DTYPE)
    net, x = hvp.functional(module), randn(4, 3, seed=1)
    weight = randn(2, 3, seed=2)
    before = [parameter.detach().clone() for parameter in module.parameters()]
    torch.testing.assert_close(net({"weight": weight}, x), x @ weight.T + module.bias)
    torch.testing.assert_close(net({}, x), module(x))
    assert all(torch.equal(a, b) for a, b in zip(before, module.parameters(), strict=True))


def test_keyword_arguments_pass() -> None:
    module = nn.MultiheadAttention(4, 2, batch_first=True, dtype=DTYPE)
    x = randn(2, 3, 4, seed=3)
    _, weights = hvp.functional(module)(dict(module.named_parameters()), x, x, x, need_weights=False)
    assert weights is None


def test_mode_is_read_at_every_call() -> None:
    module = nn.Dropout(0.5)
    net, x = hvp.functional(module), torch.ones(100)
    assert not torch.equal(net({}, x), x)
    module.eval()
    assert torch.equal(net({}, x), x)


def test_buffers_move_outside_our_calls_and_not_inside() -> None:
    module = nn.BatchNorm1d(3, dtype=DTYPE)
    net, x = hvp.functional(module), randn(8, 3, seed=4) + 5
    weights = dict(module.named_parameters())
    kept = {name: buffer.clone() for name, buffer in module.named_buffers()}
    with isolated(1, CPU):
        inside = net(weights, x)
        net(weights, x)
    assert all(torch.equal(buffer, kept[name]) for name, buffer in module.named_buffers())
    outside = net(weights, x)
    torch.testing.assert_close(inside, outside)
    assert int(module.num_batches_tracked) == 1
    assert not torch.equal(module.running_mean, kept["running_mean"])


@pytest.mark.parametrize("name", ["first.weight", "second.weight"])
def test_tied_parameters_under_either_name(name: str) -> None:
    module = Tied().to(DTYPE)
    net, x = hvp.functional(module), randn(5, 4, seed=5)
    weight = randn(4, 4, seed=6)
    with torch.no_grad():
        found = net({name: weight}, x)
        module.first.weight.copy_(weight)
        torch.testing.assert_close(found, module(x))


def test_gradient_of_a_tied_parameter_is_the_sum_of_its_uses() -> None:
    module = Tied().to(DTYPE)
    x = randn(5, 4, seed=7)
    weights = {name: p.detach().clone().requires_grad_() for name, p in module.named_parameters()}
    assert list(weights) == ["first.weight", "first.bias", "second.bias"]
    found = torch.autograd.grad(hvp.functional(module)(weights, x).square().sum(), list(weights.values()))
    expected = torch.autograd.grad(module(x).square().sum(), list(module.parameters()))
    torch.testing.assert_close(found, expected)


def test_repr() -> None:
    assert repr(hvp.functional(nn.Linear(2, 2))) == "functional(Linear)"
