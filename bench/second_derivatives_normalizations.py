"""Normalizations by channels, images in both layouts, against torch's kernels."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from bench.levels import compared
from hvp_engine import differentiable

IMAGES = ((50, 16, 32), (50, 32, 16), (50, 64, 8), (16, 256, 14))
"""(images, channels, points of a side); the first three are those of a ResNet-20 for CIFAR."""

ROWS = ((1_600, 64), (512, 768), (128, 4_096))

Functions = dict[str, Callable[..., Tensor]]


def _squared(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A function with a second derivative for every input."""
    return lambda *inputs: function(*inputs).square().mean()


BATCH: Functions = {
    "torch": _squared(lambda x, w, b: functional.batch_norm(x, None, None, w, b, True)),
    "hvp_engine": _squared(lambda x, w, b: differentiable.batch_norm(x, None, None, w, b, True)),
}
GROUP: Functions = {
    "torch": _squared(lambda x, w, b: functional.group_norm(x, 8, w, b)),
    "hvp_engine": _squared(lambda x, w, b: differentiable.group_norm(x, 8, w, b)),
}
LAYER: Functions = {
    "torch": _squared(lambda x, w, b: functional.layer_norm(x, w.shape, w, b)),
    "hvp_engine": _squared(lambda x, w, b: differentiable.layer_norm(x, w.shape, w, b)),
}
SQUARE: Functions = {
    "torch": _squared(lambda x, w: functional.rms_norm(x, w.shape, w)),
    "hvp_engine": _squared(lambda x, w: differentiable.rms_norm(x, w.shape, w)),
}


def measure(quick: bool) -> Iterator[Mapping[str, Any]]:
    torch.manual_seed(0)
    for count, channels, side in IMAGES[2:3] if quick else IMAGES:
        for layout, last in ((torch.contiguous_format, ""), (torch.channels_last, ", channels last")):
            images = torch.randn(count, channels, side, side).contiguous(memory_format=layout)
            inputs = [images, torch.randn(channels), torch.randn(channels)]
            for name, functions in (("batch_norm", BATCH), ("group_norm", GROUP)):
                yield from compared(name + last, f"{count} x {channels} x {side} x {side}", functions, inputs, quick)
    for count, width in ROWS[:1] if quick else ROWS:
        inputs = [torch.randn(count, width), torch.randn(width), torch.randn(width)]
        yield from compared("layer_norm", f"{count} x {width}", LAYER, inputs, quick)
        yield from compared("rms_norm", f"{count} x {width}", SQUARE, inputs[:2], quick)
