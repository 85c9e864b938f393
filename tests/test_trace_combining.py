"""Loops whose steps are combined: as eager's numbers, with the operations that are left."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import hvp_engine as hvp
from hvp_engine import engines
from hvp_engine.differentiation.trace.partial_evaluation import Partition

DTYPE = torch.float64
aten = torch.ops.aten


def loop(recurrent: Tensor, inputs: Tensor, steps: Any, skip: int | None = None) -> Tensor:
    """A recurrent net without gates; `skip` leaves one step's output out of the loss."""
    state = torch.zeros(inputs.shape[1], recurrent.shape[0], dtype=DTYPE)
    outputs = []
    for step in range(steps):
        state = torch.tanh(inputs[step] + state @ recurrent.t())
        outputs.append(state)
    stacked = torch.stack(outputs)
    return sum((stacked[k].square().sum() for k in range(steps) if k != skip), torch.zeros((), dtype=DTYPE))


def partition_and_error(loss: Any, weights: Any) -> tuple[Partition, float]:
    """What the trace became, and how far products and a solve are from eager's."""
    engine = engines.LinearizedEngine()
    torch.manual_seed(3)
    leaves = weights if isinstance(weights, Tensor) else list(weights.values())
    v = (
        torch.randn_like(weights)
        if isinstance(leaves, Tensor)
        else {k: torch.randn_like(w) for k, w in weights.items()}
    )
    found = []
    for how in (engine, "eager"):
        operator = hvp.HessianOperator(loss, weights, engine=how)
        value = operator.solve(v, hvp.Neumann(4, alpha=1e-3)).value
        parts = [operator @ v, value]
        found.append(torch.cat([t.flatten() for p in parts for t in ([p] if isinstance(p, Tensor) else p.values())]))
    [functions] = engine._cache.values()
    assert functions.distrust is None
    return functions.partition, float((found[0] - found[1]).norm() / found[1].norm())


def count(partition: Partition) -> Counter[Any]:
    return Counter(node.target for node in partition.tangent.module.graph.nodes)


@pytest.mark.parametrize("skip", [None, 2], ids=["every step", "one left out"])
def test_a_loop_keeps_one_small_product_for_each_step_and_direction(skip: int | None) -> None:
    torch.manual_seed(0)
    steps, batch, width = 7, 3, 40
    inputs, recurrent = torch.randn(steps, batch, width, dtype=DTYPE), torch.randn(width, width, dtype=DTYPE) / 8
    partition, error = partition_and_error(lambda w: loop(w, inputs, steps, skip), recurrent)
    assert error < 1e-13
    made = count(partition)
    # Forward and backward through `steps` - 1 applications of W; what known states and gradients are multiplied with
    # is one product each, and so is the sum of outer products that is the result.
    assert made[aten.mm.default] + made[aten.addmm.default] <= 2 * (steps - 1) + 3
    assert made[aten.select_backward.default] == 0 or skip is not None


def test_large_steps_are_left_alone() -> None:
    """Copying factors of many rows would cost more than it saves."""
    torch.manual_seed(0)
    inputs, recurrent = torch.randn(3, 50, 8, dtype=DTYPE), torch.randn(8, 8, dtype=DTYPE) / 4
    partition, error = partition_and_error(lambda w: loop(w, inputs, 3), recurrent)
    assert error < 1e-13
    assert count(partition)[aten.cat.default] == 0


def test_bias_gradients_of_all_steps_are_one_sum() -> None:
    torch.manual_seed(0)
    cell, tokens = nn.RNNCell(6, 20).to(DTYPE), torch.randn(5, 4, 6, dtype=DTYPE)
    net = hvp.functional(cell)

    def loss(weights: dict[str, Tensor]) -> Tensor:
        state = torch.zeros(4, 20, dtype=DTYPE)
        for step in tokens:
            state = net(weights, step, state)
        return F.softplus(state).sum()

    partition, error = partition_and_error(loss, dict(cell.named_parameters()))
    assert error < 1e-13
    assert count(partition)[aten.sum.dim_IntList] <= 2


@pytest.mark.parametrize("factor", [2.0, -1.0])
def test_a_term_that_is_added_to_itself(factor: float) -> None:
    w = torch.linspace(-1, 1, 5, dtype=DTYPE)

    def loss(w: Tensor) -> Tensor:
        cube = w**3 * factor
        return (cube + cube).sum() + (cube + w).square().sum()

    assert partition_and_error(loss, w)[1] < 1e-14
