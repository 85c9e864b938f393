"""Elementwise operations of native programs on operands of every layout, against PyTorch."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from hvp_engine.differentiation.native.builder import Builder
from hvp_engine.differentiation.native.extension import Slots
from hvp_engine.differentiation.native.operations import Code

LAYOUTS = ("dense", "padded rows", "every second", "reversed", "broadcast rows")
SHAPES = [(10, 64), (3, 5, 7), (2, 9, 1), (600, 2), (3, 257), (3, 513), (2, 3, 300), (4, 0), (0, 4), (7,), ()]
"""Rows that are short, many of which make one block; 257 and 513 leave one element for the last block of a row."""


def laid_out(shape: tuple[int, ...], layout: str) -> Tensor:
    """Random numbers; what lies between them in memory is NaN."""
    if not shape or layout == "dense":
        return torch.randn(shape, dtype=torch.float64)
    *outer, width = shape
    if layout == "reversed":
        return torch.randn(shape[::-1], dtype=torch.float64).permute(*range(len(shape))[::-1])
    if layout == "broadcast rows":
        return torch.randn((1,) * len(outer) + (width,), dtype=torch.float64).expand(shape)
    whole = torch.full((*outer, 2 * width + 3), torch.nan, dtype=torch.float64)
    found = whole[..., :width] if layout == "padded rows" else whole[..., : 2 * width : 2]
    return found.copy_(torch.randn(shape, dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_layouts(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    for first, third, fourth in itertools.product(LAYOUTS, LAYOUTS[:-1], LAYOUTS[:-1]):
        second = LAYOUTS[int(torch.randint(len(LAYOUTS), ()))]
        tensors = [_as(dtype, laid_out(shape, layout)) for layout in (first, second, third, fourth)]
        a, b, plain, affine = tensors
        expected = a * b + a, (2 * a - 0.5) * b
        builder = Builder(dtype)
        places = [builder.slot(tensor.shape, tensor.stride()) for tensor in tensors]
        factor = builder.combined(Code.AFFINE, places[:1], shape, 2.0, -0.5)
        builder.chain(
            [
                (builder.combined(Code.MULTIPLY_ADD, [places[0], places[1], places[0]], shape), places[2]),
                (builder.combined(Code.MULTIPLY, [factor, places[1]], shape), places[3]),
            ]
        )
        slots = Slots(builder.slots, dtype)
        memory = slots.memory()
        assert memory.put(0, tensors) < 0
        slots.program(builder.operations, 0).run(memory, [[]])
        torch.testing.assert_close((plain, affine), expected, msg=f"{first}, {second} to {third}, {fourth}")


def _as(dtype: torch.dtype, tensor: Tensor) -> Tensor:
    """The same layout in another dtype."""
    whole = tensor.as_strided((tensor.untyped_storage().size() // 8,), (1,)).to(dtype)
    return whole.as_strided(tensor.shape, tensor.stride())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_in_place_on_rows_that_lie_apart(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    whole = torch.randn(40, 256, dtype=dtype)
    rows, before = whole[:, 64:128], whole.clone()
    builder = Builder(dtype)
    place = builder.slot(rows.shape, rows.stride())
    builder.chain([(builder.combined(Code.AFFINE, [place], rows.shape, 3.0, 1.0), place)])
    slots = Slots(builder.slots, dtype)
    memory = slots.memory()
    assert memory.put(0, [rows]) < 0
    slots.program(builder.operations, 0).run(memory, [[]])
    before[:, 64:128] = 3 * before[:, 64:128] + 1
    torch.testing.assert_close(whole, before)
