"""Known factors that are one number, or one for each row, are held as such."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from problems_with_known_answers import DTYPE, randn, relative_error
from test_engines_native import problem_at
from torch import Tensor

from hvp_engine.differentiation.trace.broadcasting import expand_last
from hvp_engine.engines import EagerEngine
from hvp_engine.engines.functions import TracedLinearization
from hvp_engine.engines.traced import LinearizedEngine

ROWS = torch.arange(1.0, 4.0, dtype=DTYPE)[:, None]
MATRIX = randn(3, 5, seed=1)


@pytest.mark.parametrize(
    ("penalty", "strides"),
    [
        (lambda w, h: h.exp() * w.square().sum(), (0, 0)),
        (lambda w, h: (h.exp().expand_as(w) * w.square()).mean(), (0, 0)),
        (lambda w, h: ((h * ROWS).sigmoid() * w.square()).sum() / 3, (1, 0)),
        (lambda w, h: ((ROWS / h).expand(3, 5) * w.square() / 2).sum(), (1, 0)),
        (lambda w, h: ((h + MATRIX) * w.square()).sum(), (5, 1)),
    ],
)
def test_strides_of_the_decay(penalty: Callable[[Tensor, Tensor], Tensor], strides: tuple[int, ...]) -> None:
    x = randn(4, 5, seed=2)
    at = problem_at(
        lambda w, h: torch.tanh(x @ w.t()).square().sum() + penalty(w, h),
        randn(3, 5, seed=3),
        torch.ones((), dtype=DTYPE),
    )
    linearization = LinearizedEngine().linearize(at)
    assert isinstance(linearization, TracedLinearization)
    (diagonals,) = linearization.functions.partition.diagonals
    assert [linearization._residuals[index].stride() for index in diagonals] == [strides]
    v = [randn(3, 5, seed=4)]
    expected = EagerEngine().linearize(at).product(v)
    assert relative_error(linearization.product(v)[0], expected[0]) < 1e-12


def test_memory_that_repeats_is_not_seen_as_one_with_its_neighbour() -> None:
    """The gradient of a mean over positions, the same for all of them, goes as a matrix into the layer below."""
    x = randn(2, 3, 4, seed=5)
    at = problem_at(
        lambda w, h: ((x.flatten(0, 1) @ w).view(2, 3, 5) * h.exp()).mean(1).tanh().square().sum(),
        randn(4, 5, seed=6),
        torch.ones((), dtype=DTYPE),
    )
    v = [randn(4, 5, seed=7)]
    expected = EagerEngine().linearize(at).product(v)
    linearization = LinearizedEngine().linearize(at)
    assert isinstance(linearization, TracedLinearization)
    assert relative_error(linearization.product(v)[0], expected[0]) < 1e-12


def test_types_stay_what_they_were() -> None:
    """A number and a matrix make float32 here; without the dimensions float64 would win."""
    graph = torch.fx.Graph()
    matrix, number = (graph.placeholder(name) for name in ("matrix", "number"))
    matrix.meta["val"], number.meta["val"] = torch.ones(()), torch.ones((), dtype=DTYPE)
    expanded = graph.call_function(torch.ops.aten.expand.default, (matrix, [2, 2]))
    expanded.meta["val"] = torch.ones(2, 2)
    product = graph.call_function(torch.ops.aten.mul.Tensor, (expanded, number))
    product.meta["val"] = torch.ones(2, 2)
    graph.output((product,))
    before = str(graph)
    expand_last(graph, set())
    assert str(graph) == before
