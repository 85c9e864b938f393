"""Convolutions and their derivatives in native programs: against PyTorch in float64, for every geometry."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from native_graphs import by_extension, graph_of
from test_native_graphs import assert_close, program_of
from torch import Tensor
from torch.nn import functional as F

from hvp_engine.differentiation.native.builder import Builder
from hvp_engine.differentiation.native.conversion import Conversion
from hvp_engine.differentiation.native.convolution import Convolution
from hvp_engine.differentiation.native.operations import UnsupportedError

aten = torch.ops.aten

# images, kernels, stride, padding, dilation
GEOMETRIES: dict[str, tuple[tuple[int, ...], tuple[int, ...], Any, Any, Any]] = {
    "plain": ((3, 2, 7, 6), (4, 2, 3, 2), 1, 0, 1),
    "padded": ((3, 2, 7, 6), (4, 2, 3, 3), 1, 1, 1),
    "padded unevenly": ((2, 3, 5, 8), (2, 3, 3, 5), 1, (2, 1), 1),
    "more padding than kernel": ((2, 1, 3, 4), (2, 1, 2, 2), 1, 3, 1),
    "strided": ((3, 2, 9, 8), (4, 2, 3, 3), 2, 1, 1),
    "strided unevenly": ((2, 2, 9, 11), (3, 2, 3, 2), (3, 2), (0, 1), 1),
    "dilated": ((2, 2, 9, 10), (3, 2, 3, 3), 1, 2, 2),
    "strided and dilated": ((2, 2, 12, 11), (3, 2, 3, 2), 2, (1, 2), (2, 3)),
    "rows that no output reads": ((2, 1, 8, 8), (2, 1, 2, 2), 3, 0, 1),
    "one point": ((3, 4, 5, 6), (2, 4, 1, 1), 1, 0, 1),
    "one point, strided": ((3, 4, 5, 6), (2, 4, 1, 1), 2, 0, 1),
    "one point, padded": ((3, 4, 5, 6), (2, 4, 1, 1), 1, 1, 1),
    "all of an image": ((5, 3, 4, 4), (6, 3, 4, 4), 1, 0, 1),
    "one channel": ((6, 1, 12, 12), (5, 1, 5, 5), 1, 2, 1),
    "short lines": ((4, 2, 10, 9), (3, 2, 3, 3), 1, 0, 1),
    "lines of sixteen": ((2, 2, 6, 16), (3, 2, 3, 3), 1, 1, 1),
    "bands of rows": ((2, 16, 60, 40), (8, 16, 3, 3), 1, 1, 1),
    "bands of strided rows": ((2, 16, 90, 70), (8, 16, 3, 3), 2, 1, 1),
    "tiles": ((3, 9, 9, 14), (8, 9, 3, 3), 1, 1, 1),
    "tiles without padding": ((2, 8, 5, 17), (12, 8, 3, 3), 1, 0, 1),
    "tiles with more padding": ((2, 8, 6, 7), (9, 8, 3, 3), 1, 2, 1),
    "tiles padded unevenly": ((2, 8, 7, 10), (8, 8, 3, 3), 1, (2, 0), 1),
    "one row of tiles": ((3, 8, 1, 40), (8, 8, 3, 3), 1, 1, 1),
    "bands of tiles": ((2, 40, 50, 60), (48, 40, 3, 3), 1, 1, 1),
    "several images of tiles": ((70, 16, 8, 8), (16, 16, 3, 3), 1, 1, 1),
    "many channels": ((2, 64, 5, 5), (7, 64, 3, 3), 1, 1, 1),
    "long kernels": ((9, 300, 3, 3), (1, 300, 3, 3), 1, 1, 1),
    "a signal": ((3, 2, 20), (4, 2, 5), 1, 2, 1),
    "a signal, strided and dilated": ((3, 2, 21), (4, 2, 3), 2, 1, 3),
}
DTYPES = (torch.float64, torch.float32)


def convolve(x: Tensor, w: Tensor, *geometry: Any, bias: Tensor | None = None) -> Tensor:
    stride, padding, dilation = geometry
    return (F.conv2d if x.dim() == 4 else F.conv1d)(x, w, bias, stride, padding, dilation)


def backward(name: str, wanted: list[bool]) -> Callable[[Tensor, Tensor, Tensor], tuple[Tensor, ...]]:
    *_, stride, padding, dilation = GEOMETRIES[name]
    two = [(n, n) if isinstance(n, int) else n for n in (stride, padding, dilation)]

    def function(grad: Tensor, x: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        geometry = [list(n[: x.dim() - 2]) for n in two]
        found = aten.convolution_backward(grad, x, w, [w.shape[0]], *geometry, False, [0] * (x.dim() - 2), 1, wanted)
        return tuple(part for part in found if part is not None)

    return function


@pytest.mark.parametrize("name", GEOMETRIES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_values_and_derivatives(name: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    of_images, of_kernels, *geometry = GEOMETRIES[name]
    x, w, bias = (torch.randn(shape, dtype=dtype) for shape in (of_images, of_kernels, of_kernels[:1]))
    value = convolve(x, w, *geometry, bias=bias)
    grad = torch.randn_like(value)
    program = program_of(lambda x, w, b: convolve(x, w, *geometry, bias=b), [x, w, bias])
    assert_close(program(x, w, bias)[0], value)
    assert not [call for _, call in program.segments if call is not None]
    function = backward(name, [True, True, True])
    program = program_of(function, [grad, x, w])
    for found, expected in zip(program(grad, x, w), function(grad.double(), x.double(), w.double()), strict=True):
        assert_close(found, expected.to(dtype))
    assert not [call for _, call in program.segments if call is not None]


@settings(deadline=None, derandomize=True, max_examples=50)
@given(st.data())
def test_any_geometry(data: st.DataObject) -> None:
    """In memory of just the size, so that sanitizers see what is read beside it."""
    torch.manual_seed(data.draw(st.integers(0, 99)))
    small, step = st.integers(1, 4), st.integers(1, 3)
    images, inputs, outputs = (data.draw(small) for _ in range(3))
    kernel, dilation, stride = ([data.draw(d) for _ in range(2)] for d in (small, step, step))
    padding = [data.draw(st.integers(0, 3)) for _ in range(2)]
    least = [max(1, d * (k - 1) + 1 - 2 * p) for d, k, p in zip(dilation, kernel, padding, strict=True)]
    size = [data.draw(st.integers(n, n + 20)) for n in least]
    x, w = torch.randn(images, inputs, *size).double(), torch.randn(outputs, inputs, *kernel).double()
    grad = torch.randn_like(convolve(x, w, stride, padding, dilation))

    def function(grad: Tensor, x: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        geometry = stride, padding, dilation, False, [0, 0], 1
        found = aten.convolution_backward(grad, x, w, None, *geometry, [True, True, False])
        return aten.convolution(x, w, None, *geometry), found[0], found[1]

    for found, expected in zip(program_of(function, [grad, x, w])(grad, x, w), function(grad, x, w), strict=True):
        assert_close(found, expected)


@settings(deadline=None, derandomize=True, max_examples=40)
@given(st.data())
def test_any_tiles(data: st.DataObject) -> None:
    """By Winograd's tiles, of which those at the borders are not whole."""
    torch.manual_seed(data.draw(st.integers(0, 99)))
    images, inputs, outputs = data.draw(st.integers(1, 5)), *(data.draw(st.integers(8, 20)) for _ in range(2))
    padding = [data.draw(st.integers(0, 2)) for _ in range(2)]
    least = [max(1, 3 - 2 * padding[0]), 9 - 2 * padding[1]]  # at least seven columns of outputs
    size = [data.draw(st.integers(n, 24)) for n in least]
    x, w = torch.randn(images, inputs, *size).double(), torch.randn(outputs, inputs, 3, 3).double()
    grad = torch.randn_like(convolve(x, w, 1, padding, 1))

    def function(grad: Tensor, x: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        geometry = [1, 1], padding, [1, 1], False, [0, 0], 1
        found = aten.convolution_backward(grad, x, w, None, *geometry, [True, True, False])
        return aten.convolution(x, w, None, *geometry), found[0], found[1]

    program = program_of(function, [grad, x, w])
    assert not [call for _, call in program.segments if call is not None]
    for found, expected in zip(program(grad, x, w), function(grad, x, w), strict=True):
        assert_close(found, expected)


@pytest.mark.parametrize("name", ["plain", "strided", "dilated", "one point", "a signal"])
def test_transposed(name: str) -> None:
    torch.manual_seed(0)
    of_images, of_kernels, stride, padding, dilation = GEOMETRIES[name]
    x, w = torch.randn(of_images[0], of_kernels[0], *of_images[2:]).double(), torch.randn(of_kernels).double()
    count, ones = x.dim() - 2, lambda n: [n] * (x.dim() - 2) if isinstance(n, int) else [*n]
    geometry = ones(stride), ones(padding), ones(dilation), True, [0] * count, 1

    def value(x: Tensor, w: Tensor) -> Tensor:
        return aten.convolution(x, w, None, *geometry)

    def derivatives(grad: Tensor, x: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        found = aten.convolution_backward(grad, x, w, [w.shape[1]], *geometry, [True] * 3)
        return tuple(found)

    made = value(x, w)
    assert_close(program_of(value, [x, w])(x, w)[0], made)
    grad = torch.randn_like(made)
    program = program_of(derivatives, [grad, x, w])
    assert not [call for _, call in program.segments if call is not None]
    for found, expected in zip(program(grad, x, w), derivatives(grad, x, w), strict=True):
        assert_close(found, expected)


@pytest.mark.parametrize("known_first", [True, False])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("name", ["plain", "strided", "one channel", "bands of rows", "tiles", "tiles padded unevenly"])
def test_tangents(name: str, layout: torch.memory_format, known_first: bool) -> None:
    """Both summands of the tangent of an output, of an image and of a kernel, from tangents laid out in any way."""
    torch.manual_seed(0)
    of_images, of_kernels, *geometry = GEOMETRIES[name]
    x, w = torch.randn(of_images).double().contiguous(memory_format=layout), torch.randn(of_kernels).double()
    grad = torch.randn_like(convolve(x, w, *geometry))
    tangents = [torch.randn_like(t) for t in (x, w, grad)]
    both = backward(name, [True, True, False])

    def function(x: Tensor, w: Tensor, grad: Tensor, dx: Tensor, dw: Tensor, dg: Tensor) -> tuple[Tensor, ...]:
        first, second = convolve(dx, w, *geometry), convolve(x, dw, *geometry)
        to_images, to_kernels = both(dg, x, w)
        of_image = backward(name, [True, False, False])(grad, x, dw)[0]
        of_kernel = backward(name, [False, True, False])(grad, dx, w)[0]
        value = second + first if known_first else first + second
        return value, to_images + of_image, of_kernel + to_kernels

    known = [x, w, grad]
    for found, expected in zip(by_extension(function, known, tangents), function(*known, *tangents), strict=True):
        assert_close(found, expected.contiguous())


@pytest.mark.parametrize("wanted", [[True, False, False], [False, True, False], [False, False, True]])
def test_what_is_not_wanted_is_not_made(wanted: list[bool]) -> None:
    x, w = torch.randn(2, 3, 8, 8).double(), torch.randn(4, 3, 3, 3).double()
    grad = torch.randn_like(F.conv2d(x, w, padding=1))
    function = backward("padded", wanted)
    program = program_of(function, [grad, x, w])
    assert not [call for _, call in program.segments if call is not None]
    assert_close(program(grad, x, w)[0], function(grad, x, w)[0])


def convolutions(function: Callable[..., Tensor], known: list[Tensor], tangents: list[Tensor]) -> list[Convolution]:
    traced = graph_of(function, known, tangents)
    builder = Builder(torch.float64)
    Conversion(traced, [builder.given(tensor) for tensor in known], builder)
    return [operation for operation in builder.operations if isinstance(operation, Convolution)]


def test_a_sum_is_one_operation() -> None:
    x, w = torch.randn(2, 3, 8, 8).double(), torch.randn(4, 3, 3, 3).double()

    def alike(x: Tensor, w: Tensor, dx: Tensor, dw: Tensor) -> Tensor:
        return (F.conv2d(dx, w) + F.conv2d(x, dw)) + F.conv2d(dx, w * 2)

    (one,) = convolutions(alike, [x, w], [x, w])
    assert len(one.pairs) == 3
    (found,) = by_extension(alike, [x, w], [x, w])
    assert_close(found, alike(x, w, x, w))


@pytest.mark.parametrize(
    "function",
    [
        lambda x, w, other, dx, dw: F.conv2d(dx, w) + F.conv2d(x[:, :, 1:-1, 1:-1], other * dw[:, :, :1, :1]),
        lambda x, w, other, dx, dw: (y := F.conv2d(dx, w)) + F.conv2d(x, dw) + y.sum(),
        lambda x, w, other, dx, dw: (y := F.conv2d(dx, w)) + y,
        lambda x, w, other, dx, dw: torch.add(F.conv2d(dx, w), F.conv2d(x, dw), alpha=2),
    ],
    ids=["of other geometries", "of a part that is read", "with itself", "with a factor"],
)
def test_other_sums(function: Callable[..., Tensor]) -> None:
    torch.manual_seed(0)
    x, w, other = torch.randn(2, 3, 8, 8).double(), torch.randn(4, 3, 3, 3).double(), torch.randn(4, 3, 1, 1).double()
    tangents = [torch.randn_like(x), torch.randn_like(w)]
    (found,) = by_extension(function, [x, w, other], tangents)
    assert_close(found, function(x, w, other, *tangents))


@pytest.mark.parametrize(
    ("x", "w", "groups"),
    [
        (torch.randn(2, 4, 6, 6), torch.randn(4, 4, 3, 3).contiguous(memory_format=torch.channels_last), 1),
        (torch.randn(2, 4, 6, 6), torch.randn(4, 2, 3, 3), 2),
        (torch.randn(2, 3, 4, 4, 4), torch.randn(2, 3, 2, 2, 2), 1),
        (torch.randn(0, 3, 4, 4), torch.randn(2, 3, 2, 2), 1),
        (torch.randn(2, 32, 4, 4), torch.randn(32, 32, 3, 3), 1),
    ],
    ids=["channels-last", "groups", "volumes", "no images", "many channels"],
)
def test_what_is_left_to_pytorch(x: Tensor, w: Tensor, groups: int) -> None:
    convolve = F.conv3d if x.dim() == 5 else F.conv2d
    with pytest.raises(UnsupportedError):
        by_extension(lambda x, dw: convolve(x, dw, groups=groups), [x], [w])


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_outputs_that_are_larger_than_what_reads_them(layout: torch.memory_format) -> None:
    torch.manual_seed(0)
    x, w = torch.randn(2, 5, 2, 7).double().to(memory_format=layout), torch.randn(5, 4, 3, 7).double()
    geometry = [2, 3], [3, 3], [3, 2], True, [2, 1], 1  # an output_padding of the stride or more
    with pytest.raises(UnsupportedError, match="output_padding"):
        by_extension(lambda x, dw: aten.convolution(x, dw, None, *geometry), [x], [w])

    def value(x: Tensor, w: Tensor) -> Tensor:
        return aten.convolution(x, w, None, *geometry)

    assert_close(program_of(value, [x, w])(x, w)[0], value(x, w))


@pytest.mark.parametrize("threads", [2, 3])
def test_several_threads(threads: int) -> None:
    torch.manual_seed(0)
    x, w = torch.randn(20, 16, 20, 20), torch.randn(24, 16, 3, 3)
    grad = torch.randn_like(F.conv2d(x, w))

    def function(grad: Tensor, x: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        geometry = [1, 1], [0, 0], [1, 1], False, [0, 0], 1
        found = aten.convolution_backward(grad, x, w, None, *geometry, [True, True, False])
        return aten.convolution(x, w, None, *geometry), found[0], found[1]

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = program_of(function, [grad, x, w])(grad, x, w)
    finally:
        torch.set_num_threads(before)
    for ours, expected in zip(found, function(grad.double(), x.double(), w.double()), strict=True):
        assert_close(ours, expected.float())
