"""Cross-entropy and log-softmax by vocabulary and rows, with the layer before them too, against torch's kernels."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from bench.levels import compared
from hvp_engine import differentiable

SIZES = ((64, 1_000), (512, 1_000), (256, 10_000), (128, 50_304))
WIDTH = 256
"""Width of the hidden states that the layer takes."""


def measure(quick: bool) -> Iterator[Mapping[str, Any]]:
    for count, words in SIZES[:1] if quick else SIZES:
        torch.manual_seed(0)
        target, logits = torch.randint(words, (count,)), torch.randn(count, words)
        functions = {
            "torch": lambda z, y=target: functional.cross_entropy(z, y),
            "hvp_engine": lambda z, y=target: differentiable.cross_entropy(z, y),
        }
        size = f"{count} x {words}"
        yield from compared("cross_entropy", size, functions, [logits], quick)
        functions = {
            "torch": lambda z: functional.log_softmax(z, 1).square().mean(),
            "hvp_engine": lambda z: differentiable.log_softmax(z).square().mean(),
        }
        yield from compared("log_softmax", size, functions, [logits], quick)
        del logits
        layers: dict[str, Callable[..., Tensor]] = {
            "torch": lambda h, w, y=target: functional.cross_entropy(functional.linear(h, w), y),
            "hvp_engine, logits held": lambda h, w, y=target: differentiable.cross_entropy(functional.linear(h, w), y),
            "hvp_engine": lambda h, w, y=target: differentiable.linear_cross_entropy(h, w, y),
        }
        inputs = [torch.randn(count, WIDTH), torch.randn(words, WIDTH) / WIDTH**0.5]
        yield from compared(f"linear_cross_entropy, {WIDTH} inputs", size, layers, inputs, quick)
