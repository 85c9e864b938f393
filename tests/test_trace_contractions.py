"""Contractions, chains of views and elementwise chains, in forms that nobody had in mind: what is left of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from hvp_engine.differentiation.trace.contractions import contract
from hvp_engine.differentiation.trace.elementwise_factors import fold_factors
from hvp_engine.differentiation.trace.graph_recorder import record_graph
from hvp_engine.differentiation.trace.point_convolutions import contract_convolutions
from hvp_engine.differentiation.trace.rewrites import simplify
from hvp_engine.differentiation.trace.rewriting import dependents, placeholders
from hvp_engine.differentiation.trace.view_chains import compose_views

aten = torch.ops.aten
BATCH, TIME, INPUTS, OUTPUTS = 3, 5, 4, 6

Function = Callable[[Tensor, Tensor], Tensor]


def operands(*shapes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def rewritten(function: Function, *shapes: tuple[int, ...], least: int = 0) -> Counter[str]:
    """How many operations of each name on the first argument are left, whose results have so many elements at least;
    the value is checked."""
    inputs = operands(*shapes)
    module = record_graph(function, inputs)
    graph = module.graph
    tangent = set(placeholders(graph)[:1])
    for rewrite in (simplify, contract_convolutions, compose_views, contract, compose_views, fold_factors):
        rewrite(graph, dependents(graph, tangent))
        graph.eliminate_dead_code()
        graph.lint()
    module.recompile()
    torch.testing.assert_close(module(*inputs), function(*inputs), rtol=1e-12, atol=1e-12)
    linear = dependents(graph, tangent)
    made = [node for node in graph.nodes if node in linear and node.op == "call_function"]
    names = [node.target for node in made if node.meta["val"].numel() >= least]
    return Counter(str(name).removeprefix("aten.").split(".")[0] for name in names)


W, X = (OUTPUTS, INPUTS), (BATCH, TIME, INPUTS)

LINEAR: dict[str, tuple[Function, tuple[tuple[int, ...], ...]]] = {
    "product summed": (lambda t, x: (x.unsqueeze(-2) * t).sum(-1), (W, X)),
    "summed with kept dimension": (lambda t, x: (t * x[:, :, None]).sum(dim=3, keepdim=True), (W, X)),
    "batched, expanded": (lambda t, x: torch.bmm(x, t.t().expand(BATCH, INPUTS, OUTPUTS)), (W, X)),
    "batched, expanded on the left": (lambda t, x: torch.bmm(t.expand(BATCH, OUTPUTS, INPUTS), x.mT), (W, X)),
    "of the batch's gradient": (lambda t, g: torch.bmm(t.mT, g).sum(0), (X, (BATCH, TIME, OUTPUTS))),
    "summed over the batch and turned": (
        lambda t, g: torch.bmm(t.mT, g).transpose(1, 2).sum(0),
        (X, (BATCH, TIME, OUTPUTS)),
    ),
    "two sums of one": (
        lambda t, g: (torch.bmm(t.mT, g) + torch.bmm(t.mT, 2 * g)).sum([0]),
        (X, (BATCH, TIME, OUTPUTS)),
    ),
    "one batch": (lambda t, x: torch.bmm(x.reshape(1, -1, INPUTS), t.mT[None]), (W, X)),
    "einsum": (lambda t, x: torch.einsum("bsi,oi->sbo", x, t), (W, X)),
    "einsum over the batch": (lambda t, g: torch.einsum("bsi,bso->oi", t, g), (X, (BATCH, TIME, OUTPUTS))),
    "outer products summed": (lambda t, g: (t[..., None, :] * g[..., None]).sum((0, 1)), (X, (BATCH, TIME, OUTPUTS))),
    "convolution of a point": (lambda t, x: F.conv1d(x.mT, t[..., None]), (W, X)),
    "convolution of the whole": (
        lambda t, x: F.conv1d(x, t.reshape(OUTPUTS, 2, 2), stride=2),
        ((OUTPUTS, 4), (BATCH, 2, 2)),
    ),
    "transposed convolution": (
        lambda t, x: F.conv_transpose2d(x[..., None], t.mT[..., None, None]),
        (W, (BATCH, INPUTS, TIME)),
    ),
}


@pytest.mark.parametrize("name", LINEAR)
def test_a_linear_layer_is_a_matrix_product(name: str) -> None:
    function, shapes = LINEAR[name]
    left = rewritten(function, *shapes)
    heavy = {k: n for k, n in left.items() if k in ("mm", "bmm", "mul", "convolution", "sum")}
    assert set(heavy) == {"mm"}, left


def test_dimensions_of_neither_operand_count() -> None:
    """Each of the three copies is summed."""
    left = rewritten(
        lambda t, x: (t.expand(3, OUTPUTS, INPUTS) * x.reshape(-1, 1, 1, INPUTS).expand(-1, 3, 1, -1)).sum((1, 3)),
        (OUTPUTS, INPUTS),
        (BATCH, TIME, INPUTS),
    )
    assert left["mm"] == 1 and left["sum"] == 0


IN_NEITHER: dict[str, tuple[Function, tuple[tuple[int, ...], ...]]] = {
    "rows": (lambda t, x: torch.bmm(x[:1, :1, :1].expand(1, TIME, OUTPUTS), t[None]), (W, X)),
    "columns": (lambda t, x: torch.bmm(t[None], x[:1, :1, :1].expand(1, INPUTS, TIME)), (W, X)),
    "a batch": (lambda t, x: torch.bmm(t.expand(2, OUTPUTS, INPUTS), x[0].mT.expand(2, INPUTS, TIME)), (W, X)),
    "a batch and rows": (
        lambda t, x: torch.bmm(x[0, 0].expand(2, TIME, INPUTS), t.mT.expand(2, INPUTS, OUTPUTS)),
        (W, X),
    ),
    "all but one": (
        lambda t, x: torch.bmm(x[0, :1].expand(2, TIME, INPUTS), t[0, :, None].expand(2, INPUTS, 3)),
        (W, X),
    ),
    "summed elsewhere": (
        lambda t, x: (t.expand(2, OUTPUTS, INPUTS) * x[0, 0].expand(2, OUTPUTS, INPUTS)).sum(2),
        (W, X),
    ),
    "points of a convolution": (lambda t, x: F.conv1d(x[:1].mT.expand(BATCH, INPUTS, TIME), t[..., None]), (W, X)),
}


@pytest.mark.parametrize("name", IN_NEITHER)
def test_dimensions_of_neither_operand_stay(name: str) -> None:
    """ones(4, 4) @ t has the same row four times: known factors of one number come expanded from a penalty or a sum."""
    function, shapes = IN_NEITHER[name]
    left = rewritten(function, *shapes)
    assert left["bmm"] == left["convolution"] == 0, left


SUMMANDS: dict[str, tuple[Function, tuple[tuple[int, ...], ...]]] = {
    "a dimension of one": (lambda t, x: (x.unsqueeze(-2) * t + t.exp()).sum(-1), ((1, INPUTS), X)),
    "one that stays": (lambda t, x: (x[:, :1, None] * t + (t * 2).expand(BATCH, 1, *W)).sum(-1), (W, X)),
}


@pytest.mark.parametrize("name", SUMMANDS)
def test_sums_of_products_and_others(name: str) -> None:
    function, shapes = SUMMANDS[name]
    rewritten(function, *shapes)


APART: dict[str, tuple[Function, tuple[tuple[int, ...], ...], str]] = {
    "different matrices": (lambda t, x: torch.bmm(x, t), ((BATCH, INPUTS, OUTPUTS), X), "bmm"),
    "products of each row": (lambda t, x: (t * x).sum(-1), (X, X), "sum"),
    "a product that is read again": (
        lambda t, x: (p := x.unsqueeze(-2) * t).sum(-1) + p.amax(-1).detach() * 0 + p[..., 0],
        (W, X),
        "sum",
    ),
    "a real convolution": (
        lambda t, x: F.conv1d(x.mT, t.reshape(OUTPUTS, INPUTS, 1).expand(OUTPUTS, INPUTS, 2)),
        (W, X),
        "convolution",
    ),
}


@pytest.mark.parametrize("name", APART)
def test_what_is_none_stays(name: str) -> None:
    function, shapes, operation = APART[name]
    assert rewritten(function, *shapes)[operation]


ELEMENTWISE: dict[str, Function] = {
    "chain": lambda t, k: -(k * -(k * t)) / k.exp(),
    "sum": lambda t, k: t * k + t * k.exp() + t,
    "twice": lambda t, k: (p := t * k) + p,
    "tanh": lambda t, k: aten.tanh_backward(t * 2, k) * 3 + aten.sigmoid_backward(t, k),
    "mask": lambda t, k: torch.where(k > 0, t * k, torch.zeros_like(t)) * (k > 1),
    "masked_fill": lambda t, k: (t / k).masked_fill(k < 0, 0.0) * k + t / 7,
    "quotients": lambda t, k: (t / k) / k.square() + (t * k) / k.exp(),
    "a shared beginning": lambda t, k: (p := t * 2) * k + (p * k.exp()) / (1 + k.square()),
    "rows": lambda t, k: (t * k[:1]) * 2 - (t * k[:1]) / -3,
}


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_elementwise_operations_are_one_product(name: str) -> None:
    left = rewritten(ELEMENTWISE[name], (4, 4), (4, 4))
    assert sum(left.values()) <= 2 and sum(left[k] for k in ("mul", "div")) == 1, left


def _first(t: Tensor) -> Tensor:
    return torch.zeros(len(t), 1, dtype=torch.int64)


PASSES: dict[str, tuple[Function, int]] = {
    "centred and summed": (lambda t, k: ((t - t.sum(-1, True) / 4) * k).sum(-1), 1),
    "shifted by a number of each row": (lambda t, k: (t * k - t.sum(-1, True)).sum(-1), 1),
    "softmax by hand": (lambda t, k: (p := k.softmax(-1)) * (t - (p * t).sum(-1, keepdim=True)) * 2, 3),
    "softmax of a centred row": (
        lambda t, k: aten._softmax_backward_data(t - t.sum(-1, True), k.softmax(-1), -1, torch.float64).gather(
            -1, _first(t)
        ),
        1,
    ),
    "logarithm of a softmax": (
        lambda t, k: aten._log_softmax_backward_data(t * k, k.log_softmax(-1), -1, torch.float64).gather(-1, _first(t)),
        1,
    ),
    "an entry of a centred row": (lambda t, k: ((t - t.sum(-1, True)) * k).gather(-1, _first(t)) * 3, 0),
    "scattered and summed": (
        lambda t, k: (torch.zeros_like(k).scatter_add(-1, _first(t), (t * k).sum(-1, True)) * k + t * k).sum(-1),
        2,
    ),
    "summed without the dimension": (lambda t, k: (t.sum(-1)[:, None] * k).sum(1), 0),
    "stacked with zeros": (lambda t, k: (torch.stack([t, 0 * k]) * torch.stack([k, k.exp()])).sum(0), 1),
    "an entry of a stack": (lambda t, k: (torch.stack([t, k - k]) * torch.stack([k, k.exp()]))[0] * k, 1),
    "both branches": (lambda t, k: torch.where(k > 0, t * k, -t), 1),
}


@pytest.mark.parametrize("name", PASSES)
def test_what_is_a_number_for_each_row_costs_no_pass_over_rows(name: str) -> None:
    function, passes = PASSES[name]
    left = rewritten(function, (4, 4), (4, 4), least=16)
    assert sum(left.values()) == passes, left


def test_rows_and_columns_are_not_multiplied_out() -> None:
    left = rewritten(lambda t, k: t * k[:1] + t * k[:, :1], (4, 4), (4, 4))
    assert left["mul"] == 2 and left["add"] == 1


def test_what_a_mask_hides_may_be_infinite() -> None:
    """0 / 0 behind a mask: the factor is masked as the tangent was."""
    left = rewritten(lambda t, k: torch.where(k > 0, t * (1 / k.clamp(min=0)), torch.zeros_like(t)) * 2, (4, 4), (4, 4))
    assert left["mul"] == 1
