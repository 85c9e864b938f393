"""Our functions with second derivatives under transforms of `torch.func` and in forward mode, on their own and in
losses of our calls: a transform does not see the derivatives of an operation, and must not take them for zero."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from problems_with_known_answers import DTYPE, randn, relative_error
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.autograd.functional import hessian, jacobian
from torch.nn import functional as F

import hvp_engine as hvp
from hvp_engine import differentiable
from hvp_engine.engines.traced import TracedLinearization

Function = Callable[[Tensor], Tensor]

LABELS = torch.tensor([0, 4, -100, 2])
CLASS_WEIGHTS = torch.tensor([0.5, 1.0, 2.0, 0.1, 0.7], dtype=DTYPE)
OUTPUT_LAYER = randn(5, 3, seed=1)
OPTIONS = {"label_smoothing": 0.1}

LAYER = [randn(*shape, seed=5) for shape in ((8, 3), (8, 2), (8,), (8,))]


def recurrent(function: Callable[..., tuple[Tensor, ...]], gates: int) -> Function:
    """Outputs of a layer of two units; a GRU has fewer gates, and one state."""
    parameters, state = [p[: 2 * gates] for p in LAYER], torch.zeros(1, 2, 2, dtype=DTYPE)
    states = (state, state) if gates == 4 else state
    return lambda x: function(x, states, parameters, True, 1, 0.0, True, False, False)[0].square().sum()


FUNCTIONS: dict[str, tuple[Function, tuple[int, ...]]] = {
    "attention": (lambda x: differentiable.scaled_dot_product_attention(x, x, x).square().sum(), (1, 4, 3)),
    "causal attention": (
        lambda x: differentiable.scaled_dot_product_attention(x, x, x, is_causal=True, scale=0.3).square().sum(),
        (1, 2, 3, 2),
    ),
    "cross_entropy": (lambda x: differentiable.cross_entropy(x, LABELS, CLASS_WEIGHTS, **OPTIONS), (4, 5)),
    "linear_cross_entropy": (lambda x: differentiable.linear_cross_entropy(x, OUTPUT_LAYER, LABELS), (4, 3)),
    "log_softmax": (lambda x: differentiable.log_softmax(x, 0).square().sum(), (3, 4)),
    "batch_norm": (lambda x: differentiable.batch_norm(x, training=True).pow(3).sum(), (4, 2, 2)),
    "group_norm": (lambda x: differentiable.group_norm(x, 2).pow(3).sum(), (2, 6)),
    "layer_norm": (lambda x: differentiable.layer_norm(x, (4,)).pow(3).sum(), (3, 4)),
    "lstm": (recurrent(differentiable.lstm, 4), (4, 2, 3)),
    "gru": (recurrent(differentiable.gru, 3), (4, 2, 3)),
    "rms_norm": (lambda x: differentiable.rms_norm(x, 4, eps=0.1).pow(3).sum(), (3, 4)),
}


def along(function: Function, x: Tensor, tangent: Tensor) -> Tensor:
    return torch.func.jvp(function, (x,), (tangent,))[1]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_transforms_see_every_derivative(name: str) -> None:
    function, shape = FUNCTIONS[name]
    x, tangent = randn(*shape, seed=2), randn(*shape, seed=3)
    gradient, second = jacobian(function, x), hessian(function, x)
    product = (second.reshape(x.numel(), -1) @ tangent.flatten()).view(shape)
    both = torch.stack([x, 2 * x])
    with forward_ad.dual_level():
        dual = forward_ad.unpack_dual(function(forward_ad.make_dual(x, tangent))).tangent
    found = {
        "grad": (torch.func.grad(function)(x), gradient),
        "jvp": (along(function, x, tangent), (gradient * tangent).sum()),
        "forward mode": (dual, (gradient * tangent).sum()),
        "jvp of grad": (along(torch.func.grad(function), x, tangent), product),
        "grad of jvp": (torch.func.grad(lambda y: along(function, y, tangent))(x), product),
        "hessian": (torch.func.hessian(function)(x), second),
        "jacrev of jacrev": (torch.func.jacrev(torch.func.jacrev(function))(x), second),
        "vmap": (torch.vmap(function)(both), torch.stack([function(x), function(2 * x)])),
        "vmap of grad": (torch.vmap(torch.func.grad(function))(both)[0], gradient),
    }
    for transform, (ours, true) in found.items():
        assert ours is not None and relative_error(ours, true) < 1e-10, transform


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_compile_without_graph_breaks(name: str) -> None:
    function, shape = FUNCTIONS[name]
    x = randn(*shape, seed=2)
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    try:
        assert relative_error(compiled(x), function(x)) < 1e-12
    finally:
        torch._dynamo.reset()


def images(norm: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Conv2d(2, 4, 3), norm, nn.Softplus())


class Scores(nn.Linear):
    """Enough classes for our cross-entropy."""

    def forward(self, x: Tensor) -> Tensor:
        return F.cross_entropy(super().forward(x), torch.arange(len(x)))


class States(nn.Sequential):
    """Outputs of a recurrent layer, without its last state."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)[0]


MODULES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "GroupNorm": (lambda: images(nn.GroupNorm(2, 4)), (2, 2, 5, 5)),
    "BatchNorm2d": (lambda: images(nn.BatchNorm2d(4, track_running_stats=False)), (2, 2, 5, 5)),
    "InstanceNorm2d": (lambda: images(nn.InstanceNorm2d(4, affine=True)), (2, 2, 5, 5)),
    "RMSNorm": (lambda: nn.Sequential(nn.Linear(3, 512), nn.RMSNorm(512)), (128, 3)),
    "LSTM": (lambda: States(nn.LSTM(3, 2)), (3, 2, 3)),
    "cross-entropy": (lambda: Scores(3, 512), (128, 3)),
}


@pytest.mark.parametrize("transform", ["grad", "jvp"])
@pytest.mark.parametrize("name", MODULES)
@pytest.mark.filterwarnings("error:.*is replaced by")
def test_losses_of_traces_that_transform(name: str, transform: str) -> None:
    """Traces put our functions in torch's place, and not where a transform looks on."""
    make, shape = MODULES[name]
    torch.manual_seed(0)
    module = make().to(DTYPE)
    net, x, direction = hvp.functional(module), randn(*shape, seed=2), randn(*shape, seed=3)

    def loss(w: dict[str, Tensor], x: Tensor) -> Tensor:
        def outputs(x: Tensor) -> Tensor:
            return net(w, x)

        if transform == "grad":
            return torch.func.grad(lambda x: outputs(x).sin().sum())(x).square().mean()
        return along(outputs, x, direction).square().mean()

    weights = {key: p.detach() for key, p in module.named_parameters()}
    tangents = {key: randn(*p.shape, seed=4) for key, p in weights.items()}
    found = {}
    for engine in ("eager", "linearized"):
        operator = hvp.HessianOperator(loss, weights, x, engine=engine)
        found[engine] = torch.cat([p.flatten() for p in (operator @ tangents).values()])
        assert isinstance(operator.linear_map, TracedLinearization) == (engine == "linearized")
    assert relative_error(found["linearized"], found["eager"]) < 1e-9
