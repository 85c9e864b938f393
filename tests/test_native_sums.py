"""Sums and sums of products in native programs: over any dimensions, in any layout."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from native_graphs import graph_of
from test_native_graphs import DTYPES, program_of
from torch import Tensor

from hvp_engine.differentiation.native.builder import Builder
from hvp_engine.differentiation.native.conversion import Conversion
from hvp_engine.differentiation.native.operations import Elementwise, Sum

LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": Tensor.contiguous,
    "channels-last": lambda t: t.contiguous(memory_format=torch.channels_last),
    "transposed": lambda t: t.transpose(0, 3).contiguous().transpose(0, 3),
    "every other": lambda t: t.repeat_interleave(2, 3)[..., ::2],
    "expanded": lambda t: t[:, :1].expand_as(t),
    "one number": lambda t: t[:1, :1, :1, :1].expand_as(t),
}
SHAPES = ((3, 4, 5, 70), (2, 300, 3, 2), (5, 2, 1, 130), (1, 1, 1, 1), (2, 3, 8, 64))
DIMS = [dims for n in (1, 2, 3, 4) for dims in itertools.combinations(range(4), n)]


def assert_sums(function: Callable[..., Tensor], inputs: list[Tensor]) -> None:
    """As near to the sum as the dtype allows for where numbers cancel; the sum in float64 is not exact itself."""
    (found,) = program_of(function, inputs)(*inputs)
    wide = [t.double() for t in inputs]
    error = (found.double() - function(*wide)).abs()
    allowed = {torch.float32: 4, torch.float64: 4000}[inputs[0].dtype] * torch.finfo(inputs[0].dtype).eps
    assert (error <= allowed * function(*map(torch.abs, wide))).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("second", LAYOUTS)
@pytest.mark.parametrize("first", LAYOUTS)
def test_products(first: str, second: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    for shape, dims in itertools.product(SHAPES, DIMS):
        a, b = (LAYOUTS[layout](torch.randn(shape, dtype=dtype)) for layout in (first, second))
        assert_sums(lambda a, b, dims=dims: (a * b).sum(dims), [a, b])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_sums(layout: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    for shape, dims in itertools.product(SHAPES, DIMS):
        a = LAYOUTS[layout](torch.randn(shape, dtype=dtype))
        assert_sums(lambda a, dims=dims: a.sum(dims), [a])


@pytest.mark.parametrize("shape", [(4, 1, 1), (3, 1, 1, 1), (1, 4, 5, 1), (70,), ()])
def test_products_with_smaller_tensors(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    a, b = torch.randn(3, 4, 5, 70), torch.randn(shape)
    for dims in DIMS:
        assert_sums(lambda a, b, dims=dims: (a * b).sum(dims), [a, b])
        assert_sums(lambda a, b, dims=dims: (b * a).sum(dims), [a, b])


def test_a_long_sum_is_as_exact_as_its_numbers() -> None:
    torch.manual_seed(0)
    a = torch.rand(3, 1_000_003)
    (found,) = program_of(lambda a: a.sum(1), [a])(a)
    torch.testing.assert_close(found.double(), a.double().sum(1), rtol=1e-7, atol=0)


def test_products_are_not_stored() -> None:
    builder = Builder(torch.float64)
    a, b = torch.randn(2, 3, 4, 5).double(), torch.randn(2, 3, 4, 5).double()
    Conversion(graph_of(lambda a, b: (a * b).sum((0, 2, 3)), [a], [b]), [builder.given(a)], builder)
    (sum_of_products,) = builder.operations
    assert isinstance(sum_of_products, Sum) and sum_of_products.factor is not None
    assert not any(isinstance(operation, Elementwise) for operation in builder.operations)
