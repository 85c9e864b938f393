"""Batched products of matrices whose rows lie apart: as eager's numbers, on dense copies where those pay."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx

import hvp_engine as hvp
from hvp_engine import engines
from hvp_engine.differentiation.trace.partial_evaluation import Partition

aten = torch.ops.aten
DTYPE = torch.float64
LENGTH, BATCH, HEADS, WIDTH = 5, 3, 2, 4


def heads(x: Tensor, weights: Tensor) -> Tensor:
    """(batch * heads, length, width), a view of (length, batch, heads * width)."""
    return (x @ weights).view(LENGTH, BATCH * HEADS, WIDTH).transpose(0, 1)


def attention(weights: Tensor, x: Tensor) -> Tensor:
    query, key, value = (heads(x, part) for part in weights)
    scores = torch.bmm(query, key.transpose(1, 2)).softmax(-1)
    return torch.bmm(scores, value).square().sum()


def shared(weights: Tensor, x: Tensor) -> Tensor:
    """One matrix for the whole batch: copies of it would be many."""
    query = heads(x, weights[0])
    return torch.bmm(query, weights[1, :WIDTH, :WIDTH].expand(len(query), -1, -1)).pow(3).sum()


def columns(weights: Tensor, x: Tensor) -> Tensor:
    """Matrices whose columns, not rows, are in one piece."""
    query, key = (heads(x, part).transpose(1, 2) for part in weights[:2])
    return torch.bmm(query.transpose(1, 2), key).tanh().sum()


def scattered(weights: Tensor, x: Tensor) -> Tensor:
    """Every second entry of every row."""
    query, key = (heads(x, part)[:, :, ::2] for part in weights[:2])
    return torch.bmm(query, key.transpose(1, 2)).tanh().sum()


def partition_and_error(loss: Callable[[Tensor, Tensor], Tensor], engine: engines.LinearizedEngine) -> tuple:
    torch.manual_seed(0)
    x = torch.randn(LENGTH, BATCH, HEADS * WIDTH, dtype=DTYPE)
    weights, v = (torch.randn(3, HEADS * WIDTH, HEADS * WIDTH, dtype=DTYPE) for _ in range(2))
    operator = hvp.HessianOperator(loss, weights, x, engine=engine)
    eager = hvp.HessianOperator(loss, weights, x, engine="eager")
    solver = hvp.Neumann(3, alpha=1e-4)
    pairs = [(operator @ v, eager @ v), (operator.solve(v, solver).value, eager.solve(v, solver).value)]
    error = max(float((ours - theirs).norm() / theirs.norm()) for ours, theirs in pairs)
    return operator.linear_map.functions.partition, error


def sources(module: fx.GraphModule) -> list[fx.Node]:
    """What batched products multiply, below transpositions."""
    found = []
    for node in module.graph.nodes:
        arguments = {aten.bmm.default: (0, 1), aten.baddbmm.default: (1, 2)}.get(node.target, ())
        for position in arguments:
            factor = node.args[position]
            while factor.target is aten.transpose.int:
                factor = factor.args[0]
            found.append(factor)
    return found


@pytest.mark.parametrize("loss", [attention, shared, columns, scattered])
def test_products_are_eagers(loss: Callable[[Tensor, Tensor], Tensor]) -> None:
    _, error = partition_and_error(loss, engines.LinearizedEngine())
    assert error < 1e-14


def test_heads_are_copied_once_and_known_ones_in_the_primal_part() -> None:
    parts: Partition
    parts, _ = partition_and_error(attention, engines.LinearizedEngine())
    factors = sources(parts.tangent.module)
    assert len(factors) == 24
    for factor in factors:
        matrix = factor.meta["val"][0]
        assert matrix.is_contiguous() or matrix.t().is_contiguous()
    compacted = {factor for factor in factors if factor.target is aten.clone.default}
    assert len(compacted) == 3  # tangents of query, key and value
    assert sum(node.target is aten.clone.default for node in parts.primal.graph.nodes) >= 4


def test_a_matrix_for_the_whole_batch_is_not_copied() -> None:
    parts, _ = partition_and_error(shared, engines.LinearizedEngine())
    assert not list(sources(parts.tangent.module)), "products of plain matrices"
