"""Elementwise regions: what they hold, that alike ones share a function, that the outlined graph computes the same."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, fx

import hvp_engine as hvp
from hvp_engine import engines
from hvp_engine.differentiation.trace.graph_recorder import record_graph
from hvp_engine.differentiation.trace.regions import Regions, distinct
from hvp_engine.engines import compiled

DTYPE = torch.float64


def cell(state: Tensor, step: Tensor, matrix: Tensor) -> Tensor:
    gates = step + state @ matrix
    return torch.sigmoid(gates) * torch.tanh(gates) + 0.5 * state


def loop(steps: Tensor, matrix: Tensor) -> tuple[Tensor, Tensor]:
    state = torch.zeros_like(steps[0])
    first = state
    for k in range(len(steps)):
        state = cell(state, steps[k], matrix)
        first = state if k == 0 else first
    return state, first


def interpreted(module: fx.GraphModule, arguments: Sequence[Tensor]) -> Callable[..., Any]:
    return module.forward


def traced(function: Callable[..., Any], *arguments: Tensor) -> fx.GraphModule:
    return record_graph(function, arguments)


def calls(module: fx.GraphModule) -> list[fx.Node]:
    return [node for node in module.graph.nodes if getattr(node.target, "__name__", "") == "region"]


def test_steps_of_a_loop_share_their_functions() -> None:
    steps, matrix = torch.randn(9, 3, 4, dtype=DTYPE), torch.randn(4, 4, dtype=DTYPE)
    module = traced(loop, steps, matrix)
    made: list[int] = []

    def compile(module: fx.GraphModule, arguments: Sequence[Tensor]) -> Callable[..., Any]:
        made.append(len(arguments))
        return module.forward

    outlined = Regions(compile).outline(module)
    assert len(calls(outlined)) == 9
    assert len({node.target for node in calls(outlined)}) == distinct([module]) <= 3
    assert not made  # until the first call
    for ours, theirs in zip(outlined(steps, matrix), loop(steps, matrix), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-14, atol=0)
    assert len(made) == distinct([module])


def test_other_shapes_constants_or_strides_are_other_functions() -> None:
    regions = Regions(interpreted)
    inputs = torch.randn(6, 6, dtype=DTYPE)

    def function(scale: float, rows: int, transposed: bool) -> Any:
        def run(x: Tensor) -> Tensor:
            y = (x.t() if transposed else x)[:rows]
            y = torch.mm(y, y.t())
            return torch.tanh(y * scale).exp() + (y.t() if transposed else y)

        return run

    variants = [(2.0, 3, False), (3.0, 3, False), (2.0, 4, False), (2.0, 3, True)]
    for variant in [*variants, *variants]:
        outlined = regions.outline(traced(function(*variant), inputs))
        torch.testing.assert_close(outlined(inputs), function(*variant)(inputs))
    assert len(regions._functions) == len(variants)


def test_a_region_never_waits_for_itself() -> None:
    """Elementwise nodes on both sides of a product, joined by a path around it."""

    def function(x: Tensor) -> Tensor:
        a = torch.exp(x) * 2 - x
        b = torch.mm(a, a)
        return (b.sin() + a) * b.cos() + a

    x = torch.randn(4, 4, dtype=DTYPE)
    outlined = Regions(interpreted).outline(traced(function, x))
    assert len(calls(outlined)) == 2
    torch.testing.assert_close(outlined(x), function(x))


def test_random_draws_keep_their_order() -> None:
    def function(x: Tensor) -> Tensor:
        late = torch.mm(x, x).exp().sin().cos()
        first = torch.rand_like(late)
        return first * late + torch.rand_like(x) * 2 - x

    x = torch.randn(4, 4, dtype=DTYPE)
    outlined = Regions(interpreted).outline(traced(function, x))
    torch.manual_seed(0)
    ours = outlined(x)
    torch.manual_seed(0)
    torch.testing.assert_close(ours, function(x))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_compiled_regions_equal_eager(monkeypatch: pytest.MonkeyPatch, memory_format: torch.memory_format) -> None:
    """A small net, as if it were large; tangents in other strides than the weights'."""
    monkeypatch.setattr(compiled, "_LARGEST_WHOLE", 0)
    torch.manual_seed(0)
    x = torch.randn(2, 3, 6, 6, dtype=DTYPE)
    weights = [torch.randn(4, 3, 3, 3, dtype=DTYPE).to(memory_format=memory_format), torch.randn(64, dtype=DTYPE)]

    def loss(weights: list[Tensor]) -> Tensor:
        hidden = torch.nn.functional.conv2d(x, weights[0])
        return ((hidden.tanh() * hidden.sigmoid()).flatten(1) @ weights[1]).square().sum() + weights[0].pow(4).sum()

    v = [torch.randn(4, 3, 3, 3, dtype=DTYPE), torch.randn(64, dtype=DTYPE)]
    engine = engines.CompiledEngine()
    ours, theirs = (hvp.HessianOperator(loss, weights, engine=how) for how in (engine, "eager"))
    torch.testing.assert_close(ours @ v, theirs @ v, rtol=1e-10, atol=1e-12)
    solver = hvp.Neumann(4, alpha=1e-4)
    torch.testing.assert_close(ours.solve(v, solver).value, theirs.solve(v, solver).value, rtol=1e-10, atol=1e-12)
    [functions] = engine._cache.values()
    assert isinstance(functions, compiled.CompiledFunctions) and not functions.whole and functions.seconds > 0
    assert functions.distrust is None
