"""Each rule of the tables: it fires on its example, keeps the value, and stays away from what only looks like it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, fx

from hvp_engine.differentiation.trace.combining import _KEPT_DIMENSIONS
from hvp_engine.differentiation.trace.graph_recorder import record_graph
from hvp_engine.differentiation.trace.patterns import Rule, replace
from hvp_engine.differentiation.trace.rewrites import ACCUMULATIONS, SIMPLIFICATIONS, SUMS_OF_VIEWS, TRANSPOSITIONS
from hvp_engine.differentiation.trace.rewriting import dependents, placeholders

DTYPE = torch.float64
Function = Callable[[Tensor, Tensor], Tensor]
RULES = {
    f"{name}: {rule.example}": rule
    for name, table in (
        ("simplify", SIMPLIFICATIONS),
        ("transpose", TRANSPOSITIONS),
        ("views", SUMS_OF_VIEWS),
        ("accumulate", ACCUMULATIONS),
        ("combine", (_KEPT_DIMENSIONS,)),
    )
    for rule in table
}

# t is a tangent, k is known.
FIRE: dict[str, Function] = {
    "simplify: detach(x) -> x": lambda t, k: t.detach() * k,
    "simplify: (x^T)^T -> x": lambda t, k: t.t().t() * k,
    "simplify: x ** 0 -> 1, as derivatives of powers are full of": lambda t, k: t * k.pow(0),
    "simplify: x ** 1 -> x": lambda t, k: t * k.pow(1),
    "simplify: x + 0 -> x": lambda t, k: (t + torch.full((4, 4), 0.0, dtype=DTYPE)) * k,
    "simplify: x * 1 -> x": lambda t, k: t * torch.full((4, 4), 1.0, dtype=DTYPE) + k,
    "transpose: (x^T)^T -> x": lambda t, k: t.t().t() * k,
    "transpose: (A B)^T -> B^T A^T": lambda t, k: (t @ k).t() * k,
    "transpose: (A + B)^T -> A^T + B^T": lambda t, k: (t + k).t() * k,
    "simplify: flip(flip(x)) -> x, as running sums and their adjoints are written": lambda t, k: t.flip(1).flip(1) * k,
    "simplify: copy(overwritten, x) -> x": lambda t, k: torch.ops.aten.copy(k, t) * k,
    "views: view(a) + view(b) -> view(a + b), so that products can be added up": (
        lambda t, k: (t @ k).view(2, 8) + (k @ t).view(2, 8)
    ),
    "accumulate: A B + x -> addmm(x, A, B)": lambda t, k: k + t @ k,
    "accumulate: A B + x -> baddbmm(x, A, B), of batches": lambda t, k: torch.bmm(t[None], k[None]) + k[None],
    "accumulate: A B + x^T -> baddbmm(x, B^T, A^T)^T, where the sum has the strides of that: views follow": (
        lambda t, k: k[None].expand(2, 4, 4).transpose(1, 2) + torch.bmm(t.expand(2, 4, 4), k.expand(2, 4, 4))
    ),
    "accumulate: t * a + x -> addcmul(x, t, a)": lambda t, k: k + t * k,
    "combine: sum(x, 0, keepdim) viewed without the kept dimension -> sum(x, 0)": (
        lambda t, k: t.sum(0, keepdim=True).view(4) + k
    ),
}

STAY: dict[str, tuple[Sequence[Rule], Function]] = {
    "x + x": (ACCUMULATIONS, lambda t, k: (p := t * k) + p),
    "A B + A B": (ACCUMULATIONS, lambda t, k: (p := t @ k) + p),
    "a product that is read again": (ACCUMULATIONS, lambda t, k: torch.stack([p := t * k, p + k])),
    "a sum that broadcasts": (ACCUMULATIONS, lambda t, k: t[:1] @ k + k),
    "a sum of other strides": (ACCUMULATIONS, lambda t, k: t * k + k.t()),
    "alpha": (ACCUMULATIONS, lambda t, k: torch.add(k, t @ k, alpha=2)),
    "flips along different dimensions": (SIMPLIFICATIONS, lambda t, k: t.flip(0).flip(1) * k),
    "views that are read again": (SUMS_OF_VIEWS, lambda t, k: (p := (t @ k).view(2, 8)) + (k @ t).view(2, 8) * p),
    "one that broadcasts": (SIMPLIFICATIONS, lambda t, k: t[0] * torch.full((4, 4), 1.0, dtype=DTYPE)),
    "a product that is read untransposed": (TRANSPOSITIONS, lambda t, k: (p := t @ k).t() + p),
    "a dimension that stays": (
        (_KEPT_DIMENSIONS,),
        lambda t, k: t.sum(0, keepdim=True).view(2, 2) + k[:2, :2],
    ),
}


def traced(function: Function) -> tuple[fx.GraphModule, set[fx.Node]]:
    module = record_graph(function, inputs())
    return module, dependents(module.graph, set(placeholders(module.graph)[:1]))


def inputs() -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(4, 4, dtype=DTYPE), torch.randn(4, 4, dtype=DTYPE)


def operations(module: fx.GraphModule) -> list[str]:
    return [str(node.target) for node in module.graph.nodes if node.op == "call_function"]


@pytest.mark.parametrize("name", RULES)
def test_a_rule_fires_and_keeps_the_value(name: str) -> None:
    module, linear = traced(FIRE[name])
    before = str(module.graph)
    replace(module.graph, linear, (RULES[name],), only_linear=not name.startswith("simplify"))
    module.graph.lint()
    module.recompile()
    assert str(module.graph) != before
    torch.testing.assert_close(module(*inputs()), FIRE[name](*inputs()), rtol=1e-14, atol=1e-14)
    assert linear >= dependents(module.graph, set(placeholders(module.graph)[:1]))


@pytest.mark.parametrize("name", STAY)
def test_what_only_looks_like_it_stays(name: str) -> None:
    rules, function = STAY[name]
    module, linear = traced(function)
    before = operations(module)
    replace(module.graph, linear, rules, only_linear=rules is not SIMPLIFICATIONS)
    assert operations(module) == before


def test_what_was_made_can_match_again() -> None:
    module, linear = traced(lambda t, k: ((t @ k) @ k).t())
    replace(module.graph, linear, TRANSPOSITIONS)
    module.recompile()
    torch.testing.assert_close(module(*inputs()), ((inputs()[0] @ inputs()[1]) @ inputs()[1]).t())
    last = next(node for node in reversed(module.graph.nodes) if node.op == "call_function")
    assert last.target is torch.ops.aten.mm.default and last.args[1].target is torch.ops.aten.mm.default


def test_known_parts_are_left_to_the_primal_part() -> None:
    module, linear = traced(lambda t, k: t * (k @ k).t())
    before = operations(module)
    replace(module.graph, linear, TRANSPOSITIONS)
    assert operations(module) == before
