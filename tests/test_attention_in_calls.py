"""Attention inside our calls: where it is put in, that every engine has the same products, and what stays torch's."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from problems_with_known_answers import DTYPE, randn, relative_error
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

import hvp_engine as hvp
from hvp_engine._support.torch_compat import DispatchMode
from hvp_engine.differentiation.differentiable_kernels import own_kernels, plain_kernels
from hvp_engine.differentiation.recorded.library import Library
from hvp_engine.differentiation.recorded.owned import OwnedLinearization
from hvp_engine.differentiation.self_check import difference_of_products
from hvp_engine.engines import EagerEngine
from hvp_engine.engines.traced import LinearizedEngine
from hvp_engine.ops.backend import why_not

pytestmark = pytest.mark.skipif(why_not("cpp", "cpu") is not None, reason="the extension is not built")

LENGTH = 66


class Calls(DispatchMode):
    """The operators that run inside."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


class Grouped(nn.Module):
    """As HF's `sdpa` path calls it: grouped heads, an additive mask with -inf, a scale."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(8, 8), nn.Linear(8, 4), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part(x).unflatten(-1, (-1, 2)).transpose(1, 2) for part in (self.q, self.k, self.v))
        mask = torch.zeros(len(x), 1, LENGTH, LENGTH, dtype=x.dtype).masked_fill(
            torch.ones(LENGTH, LENGTH).triu(1) > 0, -math.inf
        )
        return (
            F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=0.3, enable_gqa=True)
            .transpose(1, 2)
            .flatten(2)
        )


class MultiHead(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True, **options)
        self.padding = torch.arange(LENGTH) > torch.tensor([[40], [LENGTH]])

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, key_padding_mask=self.padding, need_weights=False)[0]


class Checkpointed(Grouped):
    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(super().forward, x, use_reentrant=False)


def encoder(dropout: float) -> nn.Module:
    layer = nn.TransformerEncoderLayer(8, 2, 12, dropout, "gelu", batch_first=True)
    return nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "grouped, as HF": Grouped,
    "nn.MultiheadAttention": MultiHead,
    "nn.MultiheadAttention, dropout": lambda: MultiHead(dropout=0.4),
    "nn.TransformerEncoder, dropout": lambda: encoder(0.2),
}


def losses(module: nn.Module) -> tuple[Callable[..., Tensor], dict[str, Tensor], Tensor]:
    net = hvp.functional(module)

    def loss(w: Any, h: Tensor, x: Tensor) -> Tensor:
        return net(w, x).sin().square().mean() + h.exp() * sum(p.square().sum() for p in w.values())

    return loss, {name: p.detach() for name, p in module.named_parameters()}, randn(2, LENGTH, 8, seed=1)


@pytest.mark.parametrize("name", MODELS)
def test_every_engine_has_the_same_products_and_masks(name: str) -> None:
    torch.manual_seed(0)
    loss, weights, x = losses(MODELS[name]().double())
    results: dict[str, Any] = {}
    for engine in (EagerEngine(), LinearizedEngine(), "recorded"):
        torch.manual_seed(1)
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            warnings.filterwarnings("ignore", ".*far from a minimum")
            hg = hvp.Hypergradient(loss, loss, hvp.Neumann(4, alpha=0.01), engine)
            results[str(engine)] = torch.stack(
                [hg(weights, torch.tensor(-3.0, dtype=DTYPE), x, x).grads for _ in range(2)]
            )
        if isinstance(engine, LinearizedEngine):
            assert not any(functions.distrust for functions in engine._cache.values())
    first, *others = results.values()
    for other in others:
        torch.testing.assert_close(other, first, rtol=1e-9, atol=0)
    assert torch.equal(first[0], first[1]) == ("dropout" not in name), "each call draws its own masks"


@pytest.mark.parametrize("name", ["grouped, as HF", "nn.MultiheadAttention"])
def test_the_hessian_is_that_of_torchs_math_kernel(name: str) -> None:
    torch.manual_seed(0)
    loss, weights, x = losses(MODELS[name]().double())
    tangents = {key: torch.randn_like(w) for key, w in weights.items()}
    operator = hvp.HessianOperator(loss, weights, torch.tensor(-3.0, dtype=DTYPE), x, engine="eager")
    leaves = {key: w.clone().requires_grad_() for key, w in weights.items()}
    with sdpa_kernel(SDPBackend.MATH):
        value = loss(leaves, torch.tensor(-3.0, dtype=DTYPE), x)
        gradients = torch.autograd.grad(value, list(leaves.values()), create_graph=True)
        expected = torch.autograd.grad(gradients, list(leaves.values()), list(tangents.values()))
    found = list((operator @ tangents).values())
    assert difference_of_products(found, list(expected), [DTYPE]) is None


def test_a_trace_has_it_as_single_operations() -> None:
    """The weights' matrix appears nowhere, and a term runs the two derivatives alone."""
    loss, weights, x = losses(Grouped().double())
    engine = LinearizedEngine()
    hvp.HessianOperator(loss, weights, torch.tensor(-3.0, dtype=DTYPE), x, engine=engine)
    (functions,) = engine._cache.values()
    nodes = list(functions.partition.tangent.module.graph.nodes)
    ours = sorted(str(node.target) for node in nodes if "hvp_engine" in str(node.target))
    assert ours == ["hvp_engine.attention_backward.default", "hvp_engine.attention_backward_backward.default"]
    large = [node for node in nodes if isinstance(node.meta.get("val"), Tensor) and node.op != "placeholder"]
    assert max(node.meta["val"].numel() for node in large) < LENGTH * LENGTH


def test_recorded_products_read_its_nodes() -> None:
    loss, weights, x = losses(Grouped().double())
    w = {name: p.clone().requires_grad_() for name, p in weights.items()}
    tangents = {name: torch.randn_like(p) for name, p in weights.items()}
    with own_kernels():
        value = loss(w, torch.tensor(-3.0, dtype=DTYPE), x)
        gradient = torch.autograd.grad(value, list(w.values()), create_graph=True)
    expected = torch.autograd.grad(gradient, list(w.values()), list(tangents.values()), retain_graph=True)
    linearization = OwnedLinearization(gradient, list(w.values()), library=Library())
    for _ in range(2):
        assert difference_of_products(linearization.product(list(tangents.values())), expected, [DTYPE]) is None
    assert not linearization._known.hidden and linearization.program is not None


def test_checkpointed_attention_is_computed_again_by_the_same_kernels() -> None:
    torch.manual_seed(0)
    plain, checkpointed = Grouped().double(), Checkpointed().double()
    checkpointed.load_state_dict(plain.state_dict())
    results = []
    for module in (plain, checkpointed):
        loss, weights, x = losses(module)
        hg = hvp.Hypergradient(loss, loss, hvp.Neumann(4, alpha=0.01), "eager")
        results.append(hg(weights, torch.tensor(-3.0, dtype=DTYPE), x, x).grads)
    torch.testing.assert_close(*results, rtol=1e-10, atol=0)


def test_a_gradient_penalty_has_products() -> None:
    """The loss differentiates once, so its Hessian takes a third derivative of attention."""
    q, k = randn(1, 1, LENGTH, 4, seed=2), randn(1, 1, LENGTH, 4, seed=3)

    def loss(w: Tensor) -> Tensor:
        x = (q @ w).requires_grad_()
        (slope,) = torch.autograd.grad(F.scaled_dot_product_attention(x, k, k).sum(), x, create_graph=True)
        return slope.square().sum()

    w, v = randn(4, 4, seed=4), randn(4, 4, seed=5)
    found = hvp.HessianOperator(loss, w, engine="eager") @ v
    with sdpa_kernel(SDPBackend.MATH):
        _, expected = torch.autograd.functional.hvp(loss, w, v)
    assert relative_error(found, expected) < 1e-10


def called(function: Callable[[], Any]) -> bool:
    """Whether `function` runs our operator inside our calls."""
    with own_kernels(), Calls() as calls:
        function()
    return "hvp_engine.attention.default" in calls.names


def test_what_stays_with_torch() -> None:
    x, short = torch.randn(1, 2, LENGTH, 4), torch.randn(1, 2, 8, 4)
    bias = torch.zeros(LENGTH, LENGTH, requires_grad=True)
    assert called(lambda: F.scaled_dot_product_attention(x, x, x))
    assert not called(lambda: F.scaled_dot_product_attention(short, short, short)), "matrices are faster"
    assert not called(lambda: F.scaled_dot_product_attention(x, x, x, bias)), "the mask has a gradient"
    assert not called(lambda: torch.func.vmap(F.scaled_dot_product_attention)(x, x, x))
    assert not called(lambda: torch.func.grad(lambda y: F.scaled_dot_product_attention(y, x, x).sum())(x))
    with hvp.use_backend("reference"):
        assert not called(lambda: F.scaled_dot_product_attention(x, x, x))
    with pytest.raises(RuntimeError):  # torch's own error
        called(lambda: F.scaled_dot_product_attention(x, x, x[..., :8, :]))


def test_a_learned_bias_gets_its_derivatives_from_torch() -> None:
    x = randn(1, 1, LENGTH, 4, seed=6)

    def loss(bias: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(x, x, x, bias.expand(LENGTH, LENGTH)).square().sum()

    bias, v = randn(1, LENGTH, seed=7), randn(1, LENGTH, seed=8)
    with sdpa_kernel(SDPBackend.MATH):
        _, expected = torch.autograd.functional.hvp(loss, bias, v)
    assert relative_error(hvp.HessianOperator(loss, bias) @ v, expected) < 1e-10


def test_the_callers_own_calls_are_torchs() -> None:
    """Inside our calls only; afterwards nothing is replaced."""
    x = torch.randn(1, 2, LENGTH, 4)
    for context in (own_kernels, plain_kernels):
        with context():
            pass
    with Calls() as calls:
        F.scaled_dot_product_attention(x, x, x)
    assert not any("hvp_engine" in name for name in calls.names)


def test_tape_style_under_our_function() -> None:
    """The remedy for a loss that autograd records outside our calls."""
    x, w = randn(1, 2, LENGTH, 4, seed=9), randn(4, 4, seed=10).requires_grad_()
    v = torch.ones_like(w)

    def loss(function: Callable[..., Tensor]) -> Tensor:
        return function(x @ w, x, x).square().sum()

    with pytest.raises(hvp.SecondDerivativeError, match="hvp_engine.differentiable.scaled_dot_product_attention"):
        hvp.approx_inverse_hvp(v, loss(F.scaled_dot_product_attention), w, 2, 1e-3)
    (found,) = hvp.approx_inverse_hvp(v, loss(hvp.differentiable.scaled_dot_product_attention), w, 2, 1e-3)
    with sdpa_kernel(SDPBackend.MATH):
        (expected,) = hvp.approx_inverse_hvp(v, loss(F.scaled_dot_product_attention), w, 2, 1e-3)
    assert relative_error(found, expected) < 1e-12
