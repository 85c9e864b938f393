"""Losses that write into tensors (buffers in part, views, `out=`, statistics): traced, they are as eager runs them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import hvp_engine as hvp
from hvp_engine.differentiation.trace.functionalize import _RANDOM, out_of_place
from hvp_engine.engines.functions import TracedLinearization
from hvp_engine.engines.traced import LinearizedEngine

aten = torch.ops.aten
DTYPE = torch.float64
pytestmark = pytest.mark.filterwarnings("ignore:the weights are far from a minimum")


class Memory(nn.Module):
    """Keeps some activations in a buffer, and reads it back; `write` does the keeping."""

    def __init__(self, write: Callable[[Tensor, Tensor], None]):
        super().__init__()
        self.linear, self.write = nn.Linear(6, 4), write
        self.register_buffer("memory", torch.arange(20.0).view(5, 4))

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.linear(x))
        self.write(self.memory, hidden)
        return hidden * self.memory.sum(0) / 10 + hidden


def slices(memory: Tensor, hidden: Tensor) -> None:
    memory[1:3] = hidden[:2]


def detached(memory: Tensor, hidden: Tensor) -> None:
    memory[1:3] = hidden[:2].detach()
    memory[0].add_(1.0)


def view(memory: Tensor, hidden: Tensor) -> None:
    memory.view(-1)[:4].mul_(hidden.mean())
    memory.t()[2].copy_(hidden[:5, 2])


def out(memory: Tensor, hidden: Tensor) -> None:
    torch.mul(hidden[:5].detach(), 2.0, out=memory)


def instance_norm() -> nn.Module:
    norm = nn.InstanceNorm1d(2, affine=True, track_running_stats=True)
    return nn.Sequential(nn.Unflatten(1, (2, 3)), norm, nn.Flatten(), nn.Linear(6, 4))


def normalized(by: Callable[[nn.Module], nn.Module]) -> nn.Module:
    return nn.Sequential(by(nn.Linear(6, 4)), nn.Tanh(), nn.Linear(4, 4))


MODULES: dict[str, Callable[[], nn.Module]] = {
    "slice assignment": lambda: Memory(slices),
    "detached": lambda: Memory(detached),
    "views": lambda: Memory(view),
    "out=": lambda: Memory(out),
    "instance norm with statistics": instance_norm,
    "spectral norm": lambda: normalized(nn.utils.spectral_norm),
    "parametrized spectral norm": lambda: normalized(nn.utils.parametrizations.spectral_norm),
}


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("name", MODULES)
def test_traced_as_eager(name: str, training: bool) -> None:
    torch.manual_seed(0)
    module = MODULES[name]().to(DTYPE).train(training)
    net, x, y = hvp.functional(module), torch.randn(7, 6, dtype=DTYPE), torch.randint(4, (7,))
    weights = {key: parameter.detach().clone() for key, parameter in module.named_parameters()}

    def train(weights: dict[str, Tensor], hyper: Tensor, batch: Any) -> Tensor:
        return F.cross_entropy(net(weights, x), y) + hyper.exp() * sum(w.square().sum() for w in weights.values())

    def val(weights: dict[str, Tensor], hyper: Tensor, batch: Any) -> Tensor:
        return F.cross_entropy(net(weights, x), y)

    ours, theirs = (
        hvp.Hypergradient(train, val, hvp.Neumann(4, 0.05), engine=engine) for engine in ("linearized", "eager")
    )
    assert isinstance(ours.engine, LinearizedEngine)
    hyper = torch.tensor(-3.0, dtype=DTYPE)
    for scale in (1.0, 0.7):
        here = {key: scale * weight for key, weight in weights.items()}
        for buffer in filter(torch.is_floating_point, module.buffers()):
            buffer.mul_(scale)  # read by reference
        kept = [buffer.clone() for buffer in module.buffers()]
        found, expected = ours(here, hyper, None, None), theirs(here, hyper, None, None)
        torch.testing.assert_close(found.grads, expected.grads, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(found.solution.value, expected.solution.value, rtol=1e-9, atol=1e-12)
        assert all(map(torch.equal, module.buffers(), kept))
    assert ours.engine.traces == 1
    assert not any(functions.distrust for functions in ours.engine._cache.values())


@pytest.mark.parametrize("engine", ["linearized", "compiled"])
def test_a_change_of_a_tensor_from_outside_is_refused(engine: str) -> None:
    log = torch.zeros(2, 3, dtype=DTYPE)

    def train(w: Tensor, h: Tensor, batch: Any) -> Tensor:
        log[0] = w.detach()
        return w.pow(4).sum() * h + log.sum()

    w, h = torch.ones(3, dtype=DTYPE), torch.tensor(1.0, dtype=DTYPE)
    with pytest.raises(hvp.TraceError, match="engine='eager'"):
        hvp.Hypergradient(train, lambda w, h, b: w.sum(), hvp.Neumann(2, 0.01), engine)(w, h, None, None)
    automatic = hvp.Hypergradient(train, lambda w, h, b: w.sum(), hvp.Neumann(2, 0.01), "auto")
    eager = hvp.Hypergradient(train, lambda w, h, b: w.sum(), hvp.Neumann(2, 0.01), "eager")
    expected = eager(w, h, None, None)
    torch.testing.assert_close(automatic(w, h, None, None).grads, expected.grads)
    assert "the loss cannot be traced: TraceError" in automatic.report()


def in_place_operations() -> list[Any]:
    """All of aten that write to their first argument, and to nothing else."""
    found = {}
    for schema in torch._C._jit_get_all_schemas():
        name = schema.name.removeprefix("aten::")
        if schema.name.startswith("aten::") and name.endswith("_") and not name.endswith("__"):
            written = [
                argument.alias_info is not None and argument.alias_info.is_write for argument in schema.arguments
            ]
            if written[:1] == [True] and not any(written[1:]) and str(schema.arguments[0].type) == "Tensor":
                found[f"{name}.{schema.overload_name or 'default'}"] = getattr(
                    getattr(aten, name), schema.overload_name or "default"
                )
    return [found[name] for name in sorted(found)]


def is_composite(name: str) -> bool:
    """Whether the operation is made of others, which are what a trace records, or of TorchScript alone."""
    try:
        return torch._C._dispatch_has_kernel_for_dispatch_key(name, "CompositeImplicitAutograd")
    except RuntimeError:  # the dispatcher does not know it
        return True


EXAMPLES: dict[str, Callable[[], Any]] = {
    "Tensor": lambda: torch.tensor([[2.0, 1.0], [1.0, 3.0]], dtype=DTYPE),
    "number": lambda: 2,
    "int": lambda: 0,
    "float": lambda: 0.5,
    "bool": lambda: False,
}


def test_every_in_place_operation_has_the_functional_one_of_its_types() -> None:
    """Where there is one, it computes what is stored, in whatever dtype; where there is none, torch is asked."""
    operations = in_place_operations()
    assert len(operations) > 250
    without, compared = [], 0
    for operation in operations:
        pure = out_of_place(operation)
        name, overload = operation._schema.name, operation._schema.overload_name
        if pure is None:
            if hasattr(aten, name.removeprefix("aten::").removesuffix("_")) and not is_random_operation(operation):
                without.append(f"{name}.{overload}" if overload else name)
            continue
        required = [a for a in operation._schema.arguments if not a.has_default_value()]
        taken = {a.name: str(a.type) for a in pure._schema.arguments if not a.has_default_value()}
        assert taken == {a.name: str(a.type) for a in required}
        if is_random_operation(operation) or any(str(a.type) not in EXAMPLES for a in required):
            continue
        for dtype in (DTYPE, torch.float32, torch.int64, torch.bool):
            target, *others = (EXAMPLES[str(a.type)]() for a in required)
            target = target.to(dtype)
            try:
                stored = operation(target.clone(), *others)
            except (RuntimeError, IndexError, TypeError, NotImplementedError):
                continue  # torch refuses this dtype or these shapes
            given = dict(zip((a.name for a in required), (target, *others), strict=True))
            computed = pure(*(given[name] for name in taken))
            torch.testing.assert_close(computed.to(dtype), stored.to(dtype), equal_nan=True)
            compared += 1
    assert compared > 300
    recorded = {name for name in without if not is_composite(name)}
    assert recorded <= {"aten::_amp_update_scale_", "aten::rrelu_with_noise_"}


def is_random_operation(operation: Any) -> bool:
    return torch.Tag.nondeterministic_seeded in operation.tags or operation in _RANDOM


X = torch.tensor([4.0, -4.0, 9.0], dtype=DTYPE)
IN_PLACE: dict[str, Callable[[Tensor], Tensor]] = {
    "pow_ with a number": lambda w: (w * 1).pow_(3).sum(),
    "pow_ with a tensor": lambda w: (w * 1).pow_(X.abs()).sum(),
    "pow_ of data": lambda w: (w**2 * X.abs().pow_(-0.5)).sum(),
    "float_power_": lambda w: (w * 1).float_power_(3).sum(),
    "ldexp_": lambda w: (w**3).ldexp_(torch.tensor([1, 2, 3])).sum(),
    "polygamma_": lambda w: (w**2 * X.abs().polygamma_(1)).sum(),
    "gt_ as numbers": lambda w: (w**3 * (1 - X.clone().gt_(0.0))).sum(),
    "lt_ summed": lambda w: (w**3).sum() * X.clone().lt_(0.0).mean(),
    "eq_ with a tensor": lambda w: (w**3 * X.clone().eq_(X.abs())).sum(),
    "logical_not_": lambda w: (w**3 * X.clone().logical_not_().add_(1)).sum(),
    "add_ of a wider dtype": lambda w: (w**3 * X.float().add_(X)).sum(),
    "floor_divide_": lambda w: (w**3 * X.clone().floor_divide_(3)).sum(),
    "a chain": lambda w: (w * 2).sin().add_(w).square_().mul_(3).sum(),
    "in part": lambda w: ((h := torch.zeros(3, dtype=DTYPE)).__setitem__(slice(0, 2), w[:2] ** 2), h * w)[1].sum(),
    "transpose_": lambda w: ((w[:, None] * X).transpose_(0, 1) @ w).square().sum(),
    "in another layout": lambda w: ((w[:, None] * X[None]).t().contiguous().add_(w[:, None] * X)).square().sum(),
    "mask": lambda w: (w**3).masked_fill_(X < 0, 0.0).sum(),
}


@pytest.mark.parametrize("name", IN_PLACE)
def test_products_of_losses_with_in_place_operations(name: str) -> None:
    w = torch.tensor([1.0, 2.0, 3.0], dtype=DTYPE)
    v = torch.tensor([0.5, -1.0, 2.0], dtype=DTYPE)
    operator = hvp.HessianOperator(IN_PLACE[name], w, engine="linearized")
    assert isinstance(operator.linear_map, TracedLinearization)
    torch.testing.assert_close(operator @ v, torch.autograd.functional.hvp(IN_PLACE[name], w, v)[1])
