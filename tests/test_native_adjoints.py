"""Operators that move elements by known numbers, and their adjoints, in native programs: against PyTorch's own."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import test_native_operations
import torch
from native_graphs import by_extension, graph_of
from test_native_operations import LAYOUTS, Case, choice, random
from torch import Tensor
from torch.nn import functional as F

from hvp_engine.differentiation.native import convolution, differentiable, nonlinear
from hvp_engine.differentiation.native.conversion import HANDLERS
from hvp_engine.differentiation.native.operations import UnsupportedError

aten = torch.ops.aten


def strided(t: Tensor) -> Tensor:
    """The way in which autograd writes what is assigned to a part of a tensor."""
    whole = aten.copy(aten.new_empty_strided(t, [3, 4], [4, 1]), t * 2)
    part = aten.as_strided(whole, [3], [4], 1)
    return aten.as_strided_scatter(whole, aten.copy(part, part * 3 + t[0, 0]), [3], [4], 1)


CASES: dict[str, Callable[[], Case]] = {
    "flip": lambda: (lambda t: t.flip(1) - t.flip(-1).flip(0), [], [(2, 5, 3)]),
    "flip of two": lambda: (lambda t: t.flip(0, 2), [], [(2, 5, 3)]),
    "roll": lambda: (lambda t: t.roll(2, 1) + t.roll(-1, 0), [], [(3, 4)]),
    "roll of all elements": lambda: (lambda t: t.roll(5), [], [(3, 4)]),
    "index by one": lambda: (lambda i, t: t[:, i - 2], [choice(4, 6)], [(2, 4, 3)]),
    "index by one, last": lambda: (lambda i, t: t[..., i], [choice(3, 5)], [(2, 4, 3)]),
    "index by a matrix": lambda: (lambda i, t: t[:, i], [choice(4, 2, 3)], [(2, 4)]),
    "index by what is chosen": lambda: (lambda i, t: t[:, i.nonzero()[:, 0]], [torch.tensor([1, 0, 1])], [(2, 3)]),
    "unfold": lambda: (lambda t: t.unfold(1, 3, 2).sum(-1) * 2, [], [(2, 9, 3)]),
    "unfold apart": lambda: (lambda t: t.unfold(0, 2, 4) * 2, [], [(9,)]),
    "unfold backward": lambda: (lambda t: aten.unfold_backward(t, [2, 9, 3], 1, 3, 2), [], [(2, 4, 3, 3)]),
    "unfold backward of one number": lambda: (
        lambda t: aten.unfold_backward(t.expand(6, 4), [9], 0, 4, 1), [], [(6, 1)]
    ),
    "diagonal backward": lambda: (lambda t: aten.diagonal_backward(t, [3, 4], 1, 0, 1), [], [(3,)]),
    "diagonal backward of a batch": lambda: (lambda t: aten.diagonal_backward(t, [2, 4, 3], -1, 1, 2), [], [(2, 3)]),
    "index add": lambda: (lambda i, x, t: x.index_add(1, i, t), [choice(4, 6), random(2, 4, 3)], [(2, 6, 3)]),
    "index add onto a tangent": lambda: (lambda i, t: t.index_add(-1, i, t * 2), [choice(4, 4)], [(3, 4)]),
    "scatter": lambda: (
        lambda i, x, t: x.scatter(1, i, t), [torch.tensor([[3, 1], [0, 2]]), random(3, 4)], [(2, 3)]
    ),
    "scatter onto a tangent": lambda: (
        lambda i, t, u: t.scatter(0, i, u.sum(0, keepdim=True)), [torch.tensor([[2, 0, 1]])], [(4, 3), (5, 3)]
    ),
    "scatter twice to one place": lambda: (
        lambda i, x, t: x.scatter(0, i, t), [torch.tensor([2, 0, 2, 2]), random(4)], [(4,)]
    ),
    "cumsum": lambda: (lambda t: t.cumsum(1) - t.cumsum(-1), [], [(2, 5, 3)]),
    "cumsum of a line": lambda: (lambda t: t.cumsum(0) * 2, [], [(7,)]),
    "cumsum of one": lambda: (lambda t: t.cumsum(1), [], [(4, 1)]),
    "glu backward": lambda: (lambda x, t: aten.glu_backward(t, x, 1), [random(2, 6, 3)], [(2, 3, 3)]),
    "glu backward, last": lambda: (lambda x, t: aten.glu_backward(t * 2, x, -1), [random(4, 6)], [(4, 3)]),
    "assigned part": lambda: (strided, [], [(3, 4)]),
    "outer diagonal": lambda: (lambda x, t: torch.outer(t, x).diagonal() + t, [random(4)], [(4,)]),
    "indexes of a decomposition": lambda: (
        lambda i, x, t: aten._unsafe_index_put(x, [None, i], aten._unsafe_index(t, [None, i]) * 2, True),
        [choice(4, 6), random(3, 4)], [(3, 4)],
    ),
    "padded": lambda: (lambda t: F.pad(t, (0, 0, 2, 0)).unfold(1, 3, 1).sum(-1), [], [(2, 5, 3)]),
}  # fmt: skip


def copies(name: str, dims: int) -> Case:
    """An operator whose pixels are those of an image, and its adjoint."""
    copy, adjoint = getattr(aten, name).default, getattr(aten, f"{name}_backward").default
    shape = (2, 3, *(4, 5, 3)[:dims])
    arguments = [[2, 1, 1, 2, 0, 1][: 2 * dims]] if "pad" in name else [[7, 4, 5][:dims]]
    wanted = copy(random(*shape), *arguments).shape
    image = [random(*shape)] if "pad" in name else []

    def function(*given: Tensor) -> Tensor:
        *known, t, u = given
        rest = [*known, *arguments] if known else [*arguments, list(shape)]
        return adjoint(u + copy(t, *arguments), *rest)

    return function, image, [shape, tuple(wanted)]


def largest(backward: Any, pool: Callable[[Tensor], tuple[Tensor, Tensor]], dims: int, *arguments: Any) -> Case:
    """The adjoint of the choice of a largest pixel in each window."""
    x = random(2, 3, *(4, 6, 4)[:dims])
    found, chosen = pool(x)
    return (lambda x, i, t: backward(t, x, *arguments, i)), [x, chosen], [tuple(found.shape)]


SAMPLES = torch.full((2, 3, 3), 0.4, dtype=torch.float64)
CASES |= {
    f"{name}{dims}d": partial(copies, f"{name}{dims}d", dims)
    for name in ("reflection_pad", "replication_pad", "_upsample_nearest_exact", "upsample_nearest")
    for dims in (1, 2, 3)
    if (name, dims) != ("upsample_nearest", 2)
}
CASES |= {
    "largest of a number of windows": lambda: largest(
        aten.adaptive_max_pool2d_backward, lambda x: aten.adaptive_max_pool2d(x, [3, 2]), 2
    ),
    "largest of a number of windows, in three dimensions": lambda: largest(
        aten.adaptive_max_pool3d_backward, lambda x: aten.adaptive_max_pool3d(x, [3, 2, 2]), 3
    ),
    "largest in three dimensions": lambda: largest(
        aten.max_pool3d_with_indices_backward,
        lambda x: aten.max_pool3d_with_indices(x, [2, 3, 2], [1, 2, 1]),
        3,
        *([2, 3, 2], [1, 2, 1], [0, 0, 0], [1, 1, 1], False),
    ),
    "largest of random windows": lambda: largest(
        aten.fractional_max_pool2d_backward,
        lambda x: aten.fractional_max_pool2d(x, [2, 2], [2, 3], SAMPLES[..., :2]),
        2,
        *([2, 2], [2, 3]),
    ),
    "largest of random windows, in three dimensions": lambda: largest(
        aten.fractional_max_pool3d_backward,
        lambda x: aten.fractional_max_pool3d(x, [2, 2, 2], [2, 3, 2], SAMPLES),
        3,
        *([2, 2, 2], [2, 3, 2]),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_as_pytorch(name: str) -> None:
    torch.manual_seed(0)
    function, known, shapes = CASES[name]()
    tangents = [random(*shape) for shape in shapes]
    expected = function(*known, *tangents)
    graph = graph_of(function, known, tangents)
    for layout, lay_out in LAYOUTS.items():
        given = [[lay_out(tensor) for tensor in tensors] for tensors in (known, tangents)]
        (ours,) = by_extension(graph, *given)
        torch.testing.assert_close(
            ours, expected.contiguous(), rtol=1e-12, atol=1e-13, msg=lambda text, layout=layout: f"{layout}: {text}"
        )


@pytest.mark.parametrize(
    "function",
    [lambda t: t.cumsum(0), lambda t: t.index_add(0, torch.tensor([0]), t[:1], alpha=2)],
    ids=["a long running sum", "alpha"],
)
def test_what_is_left_to_pytorch(function: Callable[[Tensor], Tensor]) -> None:
    with pytest.raises(UnsupportedError):
        by_extension(function, [], [random(65)])


def test_each_operator_has_a_case() -> None:
    elsewhere = nonlinear.__name__, differentiable.__name__, convolution.__name__  # in tests of their own
    missing: set[Any] = {target for target, handler in HANDLERS.items() if handler.__module__ not in elsewhere}
    for case in (*CASES.values(), *test_native_operations.CASES.values()):
        if not missing:
            break
        function, known, shapes = case()
        graph = graph_of(function, known, [random(*shape) for shape in shapes]).graph
        missing -= {node.target for node in graph.nodes if node.op == "call_function"}
    assert not missing, sorted(map(str, missing))
