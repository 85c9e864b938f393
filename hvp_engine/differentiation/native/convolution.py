"""Convolutions of images and their derivatives, each as one operation, and sums of them as one."""

from __future__ import annotations

import enum
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from hvp_engine.differentiation.native import elementwise
from hvp_engine.differentiation.native.conversion import Conversion, Value, handles
from hvp_engine.differentiation.native.linear_algebra import total
from hvp_engine.differentiation.native.operations import Code as Instruction
from hvp_engine.differentiation.native.operations import Operation, UnsupportedError, Words
from hvp_engine.differentiation.native.places import Place

aten = torch.ops.aten

_FEW_NUMBERS = {False: 1 << 12, True: 1 << 15}
"""Numbers of a kernel, of a small and of a large one, up to which products of unfolded images are fast."""

_LARGE = 25
"""Pixels of a kernel from which it is a large one."""

_NARROW = 7
"""Columns from which rows of Winograd's tiles, which are 2 x 2, fill vectors well enough."""

_LEAST_TILED = 8
"""Channels from which 3 x 3 kernels go by tiles (`kLeastChannels` in csrc/winograd.h)."""

_MOST_PAIRS = 6
"""Convolutions that one operation may sum (`kMostConvolutionPairs` in csrc/convolution.h)."""


class Code(enum.IntEnum):
    """What is made, in the order of `ConvolutionCode` in csrc/convolution.h."""

    OUTPUTS = 0
    IMAGES = 1
    KERNELS = 2


@dataclass(frozen=True)
class Geometry:
    """Sizes of a convolution of images with rows and columns, from images x and kernels w to outputs y."""

    images: int
    inputs: int
    outputs: int
    size: tuple[int, ...]
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]

    @classmethod
    def of(
        cls, x: Sequence[int], y: Sequence[int], kernels: Tensor, stride: Any, padding: Any, dilation: Any, groups: int
    ) -> Geometry:
        """The geometry for images x, outputs y and kernels like these; a signal is an image of one row."""
        w = tuple(kernels.shape)
        if groups != 1:
            raise UnsupportedError("a convolution with groups")
        if len(x) not in (3, 4) or len(w) != len(x):
            raise UnsupportedError(f"a convolution of {len(x) - 2} dimensions")
        if 0 in (*x, *w):
            raise UnsupportedError("an empty convolution")
        if len(w) == 4 and not kernels.is_contiguous() and kernels.is_contiguous(memory_format=torch.channels_last):
            raise UnsupportedError("a convolution in channels-last layout, in which PyTorch's is faster")

        def both(numbers: Sequence[int], of_a_row: int) -> tuple[int, ...]:
            each = tuple(numbers) * (len(x) - 2) if len(numbers) == 1 else tuple(numbers)
            return each if len(x) == 4 else (of_a_row, *each)

        of_images, of_kernels = both(x[2:], 1), both(w[2:], 1)
        found = cls(x[0], x[1], w[0], of_images, of_kernels, both(stride, 1), both(padding, 0), both(dilation, 1))
        if found.made != both(y[2:], 1):
            raise UnsupportedError("a transposed convolution whose output_padding reaches its stride")
        return found

    @property
    def made(self) -> tuple[int, ...]:
        """Rows and columns of the outputs."""
        of_each = zip(self.size, self.kernel, self.stride, self.padding, self.dilation, strict=True)
        return tuple((size + 2 * p - d * (k - 1) - 1) // s + 1 for size, k, s, p, d in of_each)

    @property
    def multiplications(self) -> int:
        """That the definition takes."""
        return self.images * self.outputs * self.inputs * math.prod(self.kernel) * math.prod(self.made)

    @property
    def relative_time(self) -> float:
        """Of what PyTorch takes, roughly, by value and both derivatives together, on one core of an AMD EPYC: 0.55 to
        0.75 by Winograd's tiles (64 channels, 28 x 28: 9.6 ms instead of 13.5), 0.13 to 0.9 for kernels of one pixel,
        0.2 to 0.9 for few channels (3 of 32 x 32 to 3: 8.5 ms instead of 35), 0.85 to 1.3 with strides, else 1.4 to
        1.6."""
        pixels, ones = math.prod(self.kernel), (1, 1)
        tiled = self.kernel == (3, 3) and self.stride == self.dilation == ones and max(self.padding) <= 2
        if tiled and min(self.inputs, self.outputs) >= _LEAST_TILED:
            return 0.7 if self.made[1] >= _NARROW else 1.2
        if pixels == 1 or self.inputs * self.outputs * pixels <= _FEW_NUMBERS[pixels >= _LARGE]:
            return 0.8
        return 1.5 if self.stride == ones else 1.1


@dataclass(frozen=True)
class Convolution(Operation):
    """result <- the sum of what `code` names, over pairs of dense places: (x, w) for outputs, (y, w) for images, (x, y)
    for kernels."""

    code: Code
    geometry: Geometry
    pairs: tuple[tuple[Place, Place], ...]
    result: Place

    @property
    def reads(self) -> tuple[Place, ...]:
        return tuple(place for pair in self.pairs for place in pair)

    def write(self, words: Words, workspace: int) -> None:
        g = self.geometry
        words.words += [5, self.code, g.images, g.inputs, g.outputs]
        words.words += [*g.size, *g.kernel, *g.stride, *g.padding, *g.dilation, len(self.pairs)]
        for place in (*self.reads, self.result):
            words.place(place, (), workspace)


@handles(aten.convolution.default)
def _convolution(c: Conversion, node: Any) -> Value:
    x, w, bias, stride, padding, dilation, transposed, _, groups = node.args
    if transposed:  # the derivative of one that leads from its outputs to its images
        geometry = Geometry.of(c.shape(node), c.shape(x), w.meta["val"], stride, padding, dilation, groups)
        made = _made(c, Code.IMAGES, geometry, (x, w), c.shape(node))
    else:
        geometry = Geometry.of(c.shape(x), c.shape(node), w.meta["val"], stride, padding, dilation, groups)
        made = _made(c, Code.OUTPUTS, geometry, (x, w), c.shape(node))
    if bias is None:
        return made
    channels = c.place(bias)
    spread = channels.reshaped((channels.numel, *[1] * (len(made.sizes) - 2)))
    assert spread is not None
    return c.builder.combined(Instruction.ADD, [made, spread], made.sizes)


@handles(aten.convolution_backward.default)
def _convolution_backward(c: Conversion, node: Any) -> Value:
    grad, x, w, _, stride, padding, dilation, transposed, _, groups, wanted = node.args
    images, outputs = (grad, x) if transposed else (x, grad)
    geometry = Geometry.of(c.shape(images), c.shape(outputs), w.meta["val"], stride, padding, dilation, groups)
    results: list[Place | None] = [None, None, None]
    if wanted[0]:
        code = Code.OUTPUTS if transposed else Code.IMAGES
        results[0] = _made(c, code, geometry, (grad, w), c.shape(x))
    if wanted[1]:
        results[1] = _made(c, Code.KERNELS, geometry, (images, outputs), c.shape(w))
    if wanted[2]:
        channels = c.shape(grad)[1]
        results[2] = total(c, c.place(grad), [d for d in range(len(c.shape(grad))) if d != 1], (channels,))
    return tuple(results)


@handles(aten.add.Tensor, every_term=True)
def _add(c: Conversion, node: Any) -> Value:
    """A sum of convolutions, of which nothing else reads a part, is one operation; another sum is elementwise."""
    merged = _merged(c, node) if len(node.args) == 2 and not node.kwargs else None
    return elementwise.add(c, node) if merged is None else merged


def _made(
    c: Conversion, code: Code, geometry: Geometry, factors: tuple[fx.Node, fx.Node], sizes: Sequence[int]
) -> Place:
    c.weigh(geometry.multiplications, geometry.relative_time)
    first, second = (c.contiguous(factor) for factor in factors)
    result = c.builder.workspace(sizes)
    return _appended(c, Convolution(code, geometry, ((first, second),), result))


def _appended(c: Conversion, convolution: Convolution) -> Place:
    c.builder.operations.append(convolution)
    c.summands[convolution.result] = convolution
    return convolution.result


def _merged(c: Conversion, node: Any) -> Value | None:
    parts = []
    for argument in node.args:
        if not isinstance(argument, fx.Node) or len(argument.users) > 1:
            return None
        value = c.value(argument)
        made = c.summands.get(value) if isinstance(value, Place) else None
        if not isinstance(made, Convolution):
            return None
        parts.append(made)
    first, second = parts
    pairs = first.pairs + second.pairs
    alike = first is not second and (first.code, first.geometry) == (second.code, second.geometry)
    if not alike or first.result.sizes != second.result.sizes or len(pairs) > _MOST_PAIRS:
        return None
    for part in parts:
        c.builder.operations.remove(part)
    return _appended(c, replace(second, pairs=pairs))
