"""Means over windows of images, and images made larger, by operators that the extension has.

Windows side by side are dimensions of their own: of four pixels (a b c d) and windows of two, ((a b) (c d)).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from hvp_engine.differentiation.native.operations import UnsupportedError

aten = torch.ops.aten

Sizes = Sequence[int]


def _both(numbers: Sequence[int]) -> tuple[int, int]:
    first, *rest = numbers
    return first, *(rest or [first])  # type: ignore[return-value]  # one or two of them


def _split(x: Tensor, outputs: Sizes) -> Tensor:
    """Images with a dimension of its own for the rows of a window, and one for its columns."""
    (height, width), (rows, columns) = x.shape[-2:], outputs
    if height % rows or width % columns:
        raise UnsupportedError("windows of different sizes")
    return x.reshape(*x.shape[:-2], rows, height // rows, columns, width // columns)


def _spread(y: Tensor, split: Tensor) -> Tensor:
    """What each window has, at all of its pixels."""
    return y[..., :, None, :, None].expand_as(split)


def _images(x: Tensor) -> Tensor:
    """Each channel as an image of its own."""
    return x.reshape(-1, 1, *x.shape[-2:])


class _Windows:
    """The windows of `aten.avg_pool2d`, all with the same weight."""

    def __init__(
        self,
        x: Tensor,
        kernel: Sizes,
        stride: Sizes = (),
        padding: Sizes = (0,),
        ceil_mode: bool = False,
        include_padding: bool = True,
        divisor: int | None = None,
    ):
        self.kernel, self.padding = _both(kernel), _both(padding)
        self.stride = _both(stride or kernel)
        if ceil_mode or (any(self.padding) and not include_padding and divisor is None):
            raise UnsupportedError("windows of different weights")
        self.weight = 1 / (divisor or math.prod(self.kernel))
        whole = all(size % step == 0 for size, step in zip(x.shape[-2:], self.kernel, strict=True))
        self.side_by_side = whole and self.stride == self.kernel and not any(self.padding)

    def factors(self, x: Tensor) -> Tensor:
        """The kernel of a convolution that does the same."""
        return x.new_full((1, 1, *self.kernel), self.weight)


def average_pool(x: Tensor, *geometry: Any) -> Tensor:
    windows = _Windows(x, *geometry)
    if windows.side_by_side:
        rows, columns = (size // step for size, step in zip(x.shape[-2:], windows.kernel, strict=True))
        return _split(x, (rows, columns)).sum((-3, -1)) * windows.weight
    made = functional.conv2d(_images(x), windows.factors(x), None, windows.stride, windows.padding)
    return made.reshape(*x.shape[:-2], *made.shape[-2:])


def average_pool_backward(grad: Tensor, x: Tensor, *geometry: Any) -> Tensor:
    windows = _Windows(x, *geometry)
    if windows.side_by_side:
        return _spread(grad * windows.weight, _split(x, grad.shape[-2:])).reshape(x.shape)
    plain = windows.stride, windows.padding, (1, 1), False, (0, 0), 1, (True, False, False)
    found: Tensor = aten.convolution_backward(_images(grad), _images(x), windows.factors(x), None, *plain)[0]
    return found.reshape(x.shape)


def adaptive_average_pool(x: Tensor, outputs: Sizes) -> Tensor:
    return _split(x, outputs).mean((-3, -1))


def adaptive_average_pool_backward(grad: Tensor, x: Tensor) -> Tensor:
    split = _split(x, grad.shape[-2:])
    return _spread(grad / (split.shape[-1] * split.shape[-3]), split).reshape(x.shape)


def _check_scales(inputs: Sizes, outputs: Sizes, scales: Sequence[float | None]) -> None:
    """PyTorch counts pixels by the scale that was asked for: of 3.4, two become six, four of the first."""
    if any(scale and scale * size != made for size, made, scale in zip(inputs, outputs, scales, strict=False)):
        raise UnsupportedError("pixels of different sizes")


def upsample_nearest(x: Tensor, outputs: Sizes, *scales: float | None) -> Tensor:
    _check_scales(x.shape[-2:], outputs, scales)
    made = x.new_empty(*x.shape[:-2], *outputs)
    return _spread(x, _split(made, x.shape[-2:])).reshape(made.shape)


def upsample_nearest_backward(grad: Tensor, outputs: Sizes, inputs: Sizes, *scales: float | None) -> Tensor:
    _check_scales(inputs[-2:], outputs, scales)
    return _split(grad, inputs[-2:]).sum((-3, -1))


FORMULAS: dict[Any, Callable[..., Any]] = {
    aten.avg_pool2d.default: average_pool,
    aten.avg_pool2d_backward.default: average_pool_backward,
    aten._adaptive_avg_pool2d.default: adaptive_average_pool,
    aten._adaptive_avg_pool2d_backward.default: adaptive_average_pool_backward,
    aten.upsample_nearest2d.default: upsample_nearest,
    aten.upsample_nearest2d_backward.default: upsample_nearest_backward,
}
"""A function of an operator's arguments for each that PyTorch does not decompose, or not so well."""
