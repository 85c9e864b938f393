"""A module as a pure function of some of its parameters."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from problems_with_known_answers import DTYPE, NETWORKS, Tied, randn
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import hvp_engine as hvp
from hvp_engine._support.isolation import isolated

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


class UsedTwice(nn.Module):
    """Modules that are known by two names."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 3)
        self.norm = nn.BatchNorm1d(3)
        self.second, self.norm_again = self.first, self.norm

    def forward(self, x: Tensor) -> Tensor:
        return self.norm_again(self.second(self.norm(self.first(x))))


def test_a_module_under_two_names_is_left_as_it_was() -> None:
    module, x = UsedTwice(), torch.randn(5, 3)
    state = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    held = [module.first.weight, module.first.bias, module.norm.running_mean, module.norm.num_batches_tracked]
    weights = {name: 2 * w.detach() for name, w in module.named_parameters()}
    twin = UsedTwice()
    with torch.no_grad():
        for name, parameter in twin.named_parameters():
            parameter.copy_(weights[name])
    torch.testing.assert_close(hvp.functional(module)(weights, x), twin(x))

    module.load_state_dict(state)
    hvp.Hypergradient(
        lambda w, decay, batch: (
            hvp.functional(module)(w, batch).square().mean() + decay * sum(p.square().sum() for p in w.values())
        ),
        lambda w, decay, batch: hvp.functional(module)(w, batch).sum(),
        hvp.Neumann(2, alpha=0.01),
    )(dict(module.named_parameters()), torch.tensor(0.1), x, x)
    now = [module.first.weight, module.first.bias, module.norm.running_mean, module.norm.num_batches_tracked]
    assert all(a is b for a, b in zip(now, held, strict=True))
    assert all(torch.equal(tensor, state[name]) for name, tensor in module.state_dict().items())


def test_two_tensors_for_tied_parameters_are_refused() -> None:
    module = UsedTwice()
    with pytest.raises(ValueError, match="weights: expected one tensor for tied parameters; got two, one as 'second.w"):
        hvp.functional(module)({"first.weight": torch.ones(3, 3), "second.weight": torch.ones(3, 3)}, torch.ones(2, 3))


def test_repr() -> None:
    assert repr(hvp.functional(nn.Linear(2, 2))) == "functional(Linear)"


def test_of_a_compiled_module_the_original_is_called_under_either_name() -> None:
    module = nn.Linear(3, 2, dtype=DTYPE)
    compiled: Any = torch.compile(module, backend="aot_eager")
    net, x = hvp.functional(compiled), randn(4, 3, seed=8)
    assert net.module is module
    for names in (module, compiled):
        torch.testing.assert_close(net(dict(names.named_parameters()), x), module(x))


class Remembered(nn.Module):
    """Computes its only layer again in the backward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3, dtype=DTYPE)

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(lambda x: torch.tanh(self.layer(x)).square(), x, use_reentrant=False)


def test_checkpoints_are_differentiated_at_the_modules_own_weights_alone() -> None:
    """torch computes with the module's weights again, and the gradient at others would be wrong without a word."""
    module, x = Remembered(), randn(4, 3, seed=9)
    net = hvp.functional(module)
    own = dict(module.named_parameters())
    other = {name: weight.detach() + 0.1 for name, weight in own.items()}
    loss, v = (lambda w: net(w, x).sum()), {name: torch.ones_like(w) for name, w in own.items()}
    with pytest.raises(ValueError, match="weights: expected the module's own.*'layer.weight'"):
        hvp.HessianOperator(loss, other, engine="eager")
    outside = hvp.HessianOperator(
        lambda w: checkpoint(
            lambda x: torch.tanh(x @ w["layer.weight"].T + w["layer.bias"]).square(), x, use_reentrant=False
        ).sum(),
        other,
        engine="eager",
    )
    with torch.no_grad():
        for name, weight in own.items():
            weight.copy_(other[name])
    torch.testing.assert_close(hvp.HessianOperator(loss, own, engine="eager") @ v, outside @ v)
