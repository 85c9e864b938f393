"""Normalizations by channels, in both layouts of images."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn import functional

from hvp_engine import differentiable

IMAGES = ((50, 16, 32), (50, 32, 16), (50, 64, 8), (16, 256, 14))
"""(images, channels, points of a side); the first three are those of a ResNet-20 for CIFAR."""

ROWS = ((1_600, 64), (512, 768), (128, 4_096))

Functions = dict[str, Callable[..., Tensor]]
Found = tuple[str, str, Functions, list[Tensor]]


def _squared(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A function with a second derivative for every input."""
    return lambda *inputs: function(*inputs).square().mean()


def cases() -> Iterator[Found]:
    batch = {
        "torch": _squared(lambda x, w, b: functional.batch_norm(x, None, None, w, b, True)),
        "hvp_engine": _squared(lambda x, w, b: differentiable.batch_norm(x, None, None, w, b, True)),
    }
    group = {
        "torch": _squared(lambda x, w, b: functional.group_norm(x, 8, w, b)),
        "hvp_engine": _squared(lambda x, w, b: differentiable.group_norm(x, 8, w, b)),
    }
    for count, channels, side in IMAGES:
        for layout in (torch.contiguous_format, torch.channels_last):
            images = torch.randn(count, channels, side, side).contiguous(memory_format=layout)
            inputs = [images, torch.randn(channels), torch.randn(channels)]
            last = ", channels last" if layout is torch.channels_last else ""
            for name, functions in (("batch_norm", batch), ("group_norm", group)):
                yield name + last, f"{count} x {channels} x {side} x {side}", functions, inputs
    for count, width in ROWS:
        layer = {
            "torch": _squared(lambda x, w, b, n=width: functional.layer_norm(x, (n,), w, b)),
            "hvp_engine": _squared(lambda x, w, b, n=width: differentiable.layer_norm(x, n, w, b)),
        }
        square = {
            "torch": _squared(lambda x, w, n=width: functional.rms_norm(x, (n,), w)),
            "hvp_engine": _squared(lambda x, w, n=width: differentiable.rms_norm(x, n, w)),
        }
        inputs = [torch.randn(count, width), torch.randn(width), torch.randn(width)]
        yield "layer_norm", f"{count} x {width}", layer, inputs
        yield "rms_norm", f"{count} x {width}", square, inputs[:2]
