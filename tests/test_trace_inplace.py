"""Operations in place: which ones, and that nobody can tell."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

import hvp_engine as hvp
from hvp_engine.differentiation.trace.graph_recorder import record_graph
from hvp_engine.differentiation.trace.inplace import written_over
from hvp_engine.engines.functions import TracedLinearization
from hvp_engine.engines.traced import LinearizedEngine

aten = torch.ops.aten
DTYPE = torch.float64

Function = Callable[[Tensor, Tensor], Any]

CASES: dict[str, tuple[Function, Sequence[str]]] = {
    "a chain": (lambda x, y: (x @ y * 2 + y - x) / 3, ["mul_", "add_", "sub_", "div_"]),
    "inputs are left alone": (lambda x, y: (x * 2, y + x, x.mul(y)), []),
    "results are left alone": (lambda x, y: ((p := x @ y), p + 1), []),
    "read again": (lambda x, y: ((p := x @ y) * 2) + p, ["add_"]),
    "read again through a view": (lambda x, y: ((p := x @ y).t(), p * 2), []),
    "a view is written, the whole is read": (
        lambda x, y: (p := x @ y)[:2] * 2 + p[1:3].sum() + p[:2],
        ["add_", "add_"],
    ),
    "the last view": (lambda x, y: (x @ y)[:2] * 2, ["mul_"]),
    "the other operand": (lambda x, y: x + y @ y, ["add_"]),
    "a difference has an order": (lambda x, y: x - y @ y, []),
    "with its own transposed": (lambda x, y: (p := x @ y) + p.t(), []),
    "with itself": (lambda x, y: (p := x @ y) * p, []),
    "a broadcast": (lambda x, y: (x @ y)[0] * y, []),
    "the other operand of a broadcast": (lambda x, y: (x @ y)[0] * (x + y), ["mul_"]),
    "another type": (lambda x, y: (x @ y).float() * 2 + (x @ y), ["add_"]),
    "a product added": (lambda x, y: torch.addmm(x @ x, x, y), ["addmm_"]),
    "a derivative of an activation": (lambda x, y: aten.threshold_backward(x @ y, y, 0.0), ["grad_input"]),
    "its activation is left alone": (lambda x, y: aten.tanh_backward(x, x @ y), []),
    "with a keyword": (lambda x, y: aten.gelu_backward(x @ y, y, approximate="tanh"), ["grad_input"]),
    "several results of one operation": (lambda x, y: (s := (x @ y).sort(0)).values * 2 + s.indices, ["add_"]),
}


@pytest.mark.parametrize("name", CASES)
def test_values_stay_and_these_are_in_place(name: str) -> None:
    function, expected = CASES[name]
    torch.manual_seed(0)
    inputs = torch.randn(4, 4, dtype=DTYPE), torch.randn(4, 4, dtype=DTYPE)
    before = [x.clone() for x in inputs]
    module = written_over(record_graph(function, inputs))
    torch.testing.assert_close(module(*inputs), function(*inputs), rtol=0, atol=0)
    assert all(map(torch.equal, inputs, before))
    targets = [node.target for node in module.graph.nodes if node.op == "call_function"]
    parts = [str(target).split(".") for target in targets if str(target).startswith("aten")]
    names = [overload if overload == "grad_input" else name for _, name, overload in parts]
    assert [name for name in names if name.endswith("_") or name == "grad_input"] == expected


def test_an_unknown_function_may_return_its_argument() -> None:
    module = record_graph(lambda x: (x * 2, (x * 2).t() + 1), [torch.randn(3, 3)])
    for node in module.graph.nodes:
        if node.target is aten.t.default:
            node.target = transposed
    module.graph.lint()
    x = torch.randn(3, 3)
    torch.testing.assert_close(written_over(module)(x), (x * 2, (x * 2).t() + 1))


def transposed(x: Tensor) -> Tensor:
    return x.t()


@pytest.mark.parametrize("layout", ["plain", "transposed", "both"])
def test_batched_products_are_added_in_place(layout: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(5, 4, 6, dtype=DTYPE)
    w = torch.randn(6, 6, dtype=DTYPE)

    def loss(w: Tensor) -> Tensor:
        queries, keys = torch.tanh(x @ w), torch.tanh(x @ w.t())
        products = torch.bmm(queries, keys.transpose(1, 2)) if layout != "transposed" else torch.bmm(keys, queries.mT)
        scores = products.softmax(-1)
        mixed = torch.bmm(scores.mT if layout == "both" else scores, queries)
        return mixed.pow(3).sum()

    here, t = w.clone().requires_grad_(), torch.randn_like(w)
    (gradient,) = torch.autograd.grad(loss(here), here, create_graph=True)
    (expected,) = torch.autograd.grad(gradient, here, t)
    linearization = hvp.HessianOperator(loss, w, engine=LinearizedEngine()).linear_map
    assert isinstance(linearization, TracedLinearization)
    for _ in range(2):
        torch.testing.assert_close(linearization.product([t])[0], expected, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(linearization.products([torch.stack([t, 2 * t])])[0][1], 2 * expected)
    nodes = linearization.functions.partition.tangent.module.graph.nodes
    assert sum(node.target is aten.baddbmm.default for node in nodes) >= 3
