"""The gradient graph as a linearization: products, mixed products, what it refuses, what it leaves alone."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from problems_with_known_answers import DTYPE, randn, relative_error
from torch import Tensor
from torch._higher_order_ops.map import map as control_flow_map
from torch._higher_order_ops.scan import scan
from torch._higher_order_ops.while_loop import while_loop
from torch.autograd.function import once_differentiable
from torch.nn.functional import embedding, hardsigmoid, scaled_dot_product_attention

import hvp_engine as hvp
from hvp_engine import engines
from hvp_engine.differentiation.double_backward import Tape, differentiate, filled, gradients, leaves
from hvp_engine.engines.eager import EagerEngine


def tape_of(
    loss: Callable[..., Tensor], weights: list[Tensor], hyperparameters: list[Tensor] | None = None
) -> tuple[Tape, list[Tensor], list[Tensor]]:
    weights = [w.clone().requires_grad_() for w in weights]
    hyperparameters = [h.clone().requires_grad_() for h in hyperparameters or []]
    value = loss(weights, hyperparameters)
    return Tape(gradients(value, weights, "loss"), weights, hyperparameters, value), weights, hyperparameters


# Products


def test_products_by_hand() -> None:
    """L = w^T M w h / 2 with M symmetric: H = h M, d2L/dh dw^T = (M w)^T."""
    matrix, w, h = randn(4, 4, seed=1), randn(4, seed=2), torch.tensor(0.7, dtype=DTYPE)
    matrix = matrix + matrix.T
    tape, _, _ = tape_of(lambda w, h: w[0] @ matrix @ w[0] * h[0] / 2, [w], [h])
    t = randn(4, seed=3)
    torch.testing.assert_close(list(tape.gradient), [h * matrix @ w])
    torch.testing.assert_close(list(tape.product([t])), [h * matrix @ t])
    torch.testing.assert_close(tape.mixed([t]), [(matrix @ w) @ t])
    assert tape.facts.reaches_weights and not tape.facts.incomplete


def test_constant_gradient() -> None:
    tape, _, _ = tape_of(lambda w, h: w[0].sum(), [randn(3, seed=4)], [randn(2, seed=5)])
    assert torch.equal(tape.product([torch.ones(3, dtype=DTYPE)])[0], torch.zeros(3, dtype=DTYPE))
    assert tape.mixed([torch.ones(3, dtype=DTYPE)]) == [None]
    assert not tape.facts.reaches_weights


def test_some_gradients_constant() -> None:
    """The second weight enters linearly: its row of the Hessian is zero, and its gradient has no graph."""
    tape, _, _ = tape_of(lambda w, h: w[0].pow(3).sum() + 2 * w[1].sum(), [randn(3, seed=6), randn(2, seed=7)])
    t = [randn(3, seed=8), randn(2, seed=9)]
    first, second = tape.product(t)
    torch.testing.assert_close(first, 6 * tape.weights[0].detach() * t[0])
    assert torch.equal(second, torch.zeros(2, dtype=DTYPE))


def test_gradient_that_is_a_weight() -> None:
    """The gradient of 0.5 ||w||^2 need not have a node of its own."""
    w = randn(3, seed=10).requires_grad_()
    tape = Tape([w], [w])
    t = randn(3, seed=11)
    torch.testing.assert_close(list(tape.product([t])), [t])
    assert tape.facts.reaches_weights


def test_weights_that_are_no_leaves() -> None:
    root = randn(3, seed=12).requires_grad_()
    w = 2 * root
    (value,) = hvp.approx_inverse_hvp(torch.ones(3, dtype=DTYPE), w.square().sum(), w, 1, 0.25)
    torch.testing.assert_close(value, torch.full((3,), 0.25 * 1.5, dtype=DTYPE))


def test_sparse_products_become_dense() -> None:
    words = torch.tensor([0, 2, 2])
    tape, _, _ = tape_of(
        lambda w, h: (embedding(words, w[0], sparse=True) * h[0]).square().sum() / 2,
        [randn(4, 2, seed=13)],
        [torch.ones(3, 2, dtype=DTYPE)],
    )
    product = tape.product([torch.ones(4, 2, dtype=DTYPE)])[0]
    assert product.layout == torch.strided
    expected = torch.tensor([1.0, 0.0, 2.0, 0.0], dtype=DTYPE)[:, None].expand(4, 2)
    torch.testing.assert_close(product, expected.contiguous())
    assert tape.gradient[0].layout == torch.strided


def test_sparse_hyperparameters_become_dense() -> None:
    """An embedding table of hyperparameters: one weight for each training example, looked up sparsely."""
    examples, w = torch.tensor([3, 1]), randn(3, seed=14)
    table = randn(5, 1, seed=15)
    grads = hvp.Hypergradient(
        lambda w, h, batch: (embedding(batch, h, sparse=True).exp() * (w - 1).square()).sum() / 2,
        lambda w, h, batch: w.sum(),
        hvp.Neumann(3, alpha=0.1),
    )(w, table, examples, None).grads
    assert grads.layout == torch.strided and grads.shape == table.shape
    assert torch.equal(grads != 0, torch.tensor([[False], [True], [False], [True], [False]]))


def test_differentiate_and_filled() -> None:
    used, unused, frozen = randn(2, seed=16).requires_grad_(), randn(3, seed=17).requires_grad_(), randn(4, seed=18)
    found = differentiate(used.sum() + frozen.sum(), [frozen, used, unused])
    assert found[0] is None and found[2] is None
    assert torch.equal(found[1], torch.ones(2, dtype=DTYPE))
    assert [x.shape for x in filled(found, [frozen, used, unused])] == [(4,), (2,), (3,)]
    assert differentiate(used.sum(), [frozen]) == [None]


def test_graph_survives_products() -> None:
    tape, (w,), _ = tape_of(lambda w, h: w[0].pow(4).sum(), [randn(3, seed=19)])
    t = [torch.ones(3, dtype=DTYPE)]
    products = [tape.product(t)[0] for _ in range(3)]
    assert torch.equal(products[0], products[2])
    assert not products[0].requires_grad and w.grad is None


def test_leaves_share_memory_and_leave_flags() -> None:
    w = randn(3, seed=20)
    (leaf,) = leaves([w])
    assert leaf.data_ptr() == w.data_ptr() and leaf.requires_grad and leaf.is_leaf and not w.requires_grad


# What has no second derivative


class OnceSquare(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 2 * ctx.saved_tensors[0] * grad


@pytest.mark.parametrize("style", ["approx_inverse_hvp", "hypergradient", "best_response", "functional"])
def test_once_differentiable_functions_are_refused(style: str) -> None:
    """Autograd itself would return zero products without a word."""
    w, h = randn(3, seed=21).requires_grad_(), randn(3, seed=22).requires_grad_()

    def loss(w: Tensor, h: Tensor, batch: Any) -> Tensor:
        return (OnceSquare.apply(w) * h).sum()

    with pytest.raises(hvp.SecondDerivativeError, match=r"once_differentiable.*remedy: .*differentiable operations"):
        if style == "approx_inverse_hvp":
            hvp.approx_inverse_hvp(torch.ones_like(w), loss(w, h, None), w, 2, 0.1)
        elif style == "hypergradient":
            hvp.hypergradient(loss(w, h, None), w.sum(), w, h)
        elif style == "best_response":
            hvp.best_response(loss(w, h, None), w, h)
        else:
            hvp.Hypergradient(loss, lambda w, h, b: w.sum())(w, h, None, None)


def scanned(w: Tensor) -> Tensor:
    def step(state: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        state = torch.tanh(state * w + x)
        return state, state.clone()

    return scan(step, torch.zeros_like(w), torch.ones(4, 3, dtype=DTYPE))[0]


def mapped(w: Tensor) -> Tensor:
    return control_flow_map(lambda x, w: torch.tanh(x * w), torch.ones(4, 3, dtype=DTYPE), w).sum(0)


def looped(w: Tensor) -> Tensor:
    return while_loop(lambda x, w: x.sum() < 9, lambda x, w: (x + w.square(), w.clone()), (torch.ones_like(w), w))[0]


def chosen(w: Tensor) -> Tensor:
    return torch.cond(w.sum() > -9, lambda w: w.sin(), lambda w: w.cos(), (w,))


CONTROL_FLOW = {"scan": scanned, "map": mapped, "while_loop": looped, "cond": chosen}


@pytest.mark.parametrize("style", ["tape, of a loss", "tape, of a gradient", "eager", "linearized"])
@pytest.mark.parametrize("operator", CONTROL_FLOW)
def test_control_flow_is_refused(operator: str, style: str) -> None:
    """Torch's own double backward through it is wrong without a word."""

    def loss(w: Tensor) -> Tensor:
        return CONTROL_FLOW[operator](w).square().sum()

    if (operator, style) == ("cond", "tape, of a gradient"):
        pytest.skip("its gradient has no graph: see test_gradients_without_a_graph")
    w = (1 + randn(3, seed=41).abs()).requires_grad_()
    v = torch.ones_like(w)
    with pytest.raises(hvp.SecondDerivativeError, match=rf"_ops\.{operator}, which has no second.* a Python loop"):
        if style == "tape, of a loss":
            hvp.approx_inverse_hvp(v, loss(w), w, 2, 0.1)
        elif style == "tape, of a gradient":
            hvp.approx_inverse_hvp(v, torch.autograd.grad(loss(w), w, create_graph=True), w, 2, 0.1)
        else:
            hvp.HessianOperator(loss, w.detach(), engine=style) @ v


def attention(w: Tensor, h: Tensor, batch: Any) -> Tensor:
    x = w.view(1, 1, 4, 8)
    return scaled_dot_product_attention(x, x, x).square().sum() + h * w.square().sum()


@pytest.mark.parametrize("style", ["approx_inverse_hvp", "hypergradient", "best_response"])
def test_flash_attention_tape_style_names_operator_and_remedy(style: str) -> None:
    w, h = randn(32, seed=23).requires_grad_(), torch.ones((), dtype=DTYPE, requires_grad=True)
    loss = attention(w, h, None)
    with pytest.raises(hvp.SecondDerivativeError, match=r"_scaled_dot_product_flash.*sdpa_kernel\(SDPBackend.MATH\)"):
        if style == "approx_inverse_hvp":
            hvp.approx_inverse_hvp(torch.ones_like(w), loss, w, 2, 0.01)
        elif style == "hypergradient":
            hvp.hypergradient(loss, w.sum(), w, h, hvp.Neumann(2, alpha=0.01))
        else:
            hvp.best_response(loss, w, h, hvp.Neumann(2, alpha=0.01))[0].sum().backward()
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):  # the remedy works
        loss = attention(w, h, None)
    hvp.approx_inverse_hvp(torch.ones_like(w), loss, w, 2, 0.01)


def gated(w: Tensor, h: Tensor, batch: Any) -> Tensor:
    return (hardsigmoid(w) * w).square().sum() + attention(w, h, batch)


def gated_by_hand(w: Tensor, h: Tensor, batch: Any) -> Tensor:
    return (torch.nn.functional.hardtanh(w + 3, 0.0, 6.0) / 6 * w).square().sum() + attention(w, h, batch)


@pytest.mark.parametrize("loss, by_hand, warned", [(attention, attention, 0), (gated, gated_by_hand, 1)])
def test_fast_kernels_are_replaced_attention_without_a_warning(loss: Any, by_hand: Any, warned: int) -> None:
    w, h = randn(32, seed=24), torch.ones((), dtype=DTYPE)
    hypergradient = hvp.Hypergradient(loss, lambda w, h, b: w.sum(), hvp.Neumann(3, alpha=0.01))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        first = hypergradient(w, h, None, None).grads
        second = hypergradient(w, h, None, None).grads
    told = [str(one.message) for one in caught if "a kernel in it has no second derivative" in str(one.message)]
    assert len(told) == warned and all("train_loss: " in text for text in told)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH), warnings.catch_warnings():
        warnings.simplefilter("error")
        leaf, hyper = w.clone().requires_grad_(), h.clone().requires_grad_()
        train = by_hand(leaf, hyper, None)
        (expected,) = hvp.hypergradient(train, leaf.sum(), leaf, hyper, hvp.Neumann(3, alpha=0.01))
    assert relative_error(first, expected) < 1e-12 and torch.equal(first, second)
    assert torch.backends.cuda.flash_sdp_enabled(), "the caller's settings are back"


def test_differentiable_custom_function_is_fine() -> None:
    class Square(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.save_for_backward(x)
            return x.square()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            return 2 * ctx.saved_tensors[0] * grad

    tape, _, _ = tape_of(lambda w, h: Square.apply(w[0]).sum(), [randn(3, seed=25)])
    t = randn(3, seed=26)
    torch.testing.assert_close(list(tape.product([t])), [2 * t])


def test_an_error_of_the_backward_is_passed_on() -> None:
    class Faulty(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            raise ZeroDivisionError("mine")

    w = randn(3, seed=27).requires_grad_()
    with pytest.raises(ZeroDivisionError, match="mine"):
        hvp.approx_inverse_hvp(torch.ones_like(w), Faulty.apply(w).square().sum(), w, 1, 0.1)


# The engine


def test_engine_by_name() -> None:
    assert isinstance(engines.create("eager"), EagerEngine)
    assert engines.create("eager") is not engines.create("eager"), "an engine keeps its own record of remedies"


def test_engine_makes_exactly_the_products_the_solver_asks_for() -> None:
    calls = []

    def loss(w: Tensor, h: Tensor, batch: Any) -> Tensor:
        calls.append("loss")
        return ((w - h) ** 2).sum()

    w = randn(3, seed=28)
    result = hvp.Hypergradient(loss, lambda w, h, b: w.sum(), hvp.Neumann(7, alpha=0.1), engine="eager")(w, w, 0, 0)
    assert calls == ["loss"], "the gradient graph is built once, whatever the number of products"
    assert result.solution.hvps == result.solution.iterations == 7


def test_report_names_the_engine() -> None:
    hypergradient = hvp.Hypergradient(lambda w, h, b: (w - h).square(), lambda w, h, b: w, engine="eager")
    assert "eager" in hypergradient.report()
