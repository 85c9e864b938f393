"""Cross-entropy and log-softmax by vocabulary and rows; with the layer before them, too."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from hvp_engine import differentiable

SIZES = ((64, 1_000), (512, 1_000), (256, 10_000), (128, 50_304))
WIDTH = 256
"""Of the hidden states before the layer."""

Found = tuple[str, str, dict[str, Callable[..., Tensor]], list[Tensor]]


def cases() -> Iterator[Found]:
    for count, words in SIZES:
        target, size = torch.randint(words, (count,)), f"{count} x {words}"
        logits = torch.randn(count, words)

        def loss(function: Callable[..., Any], target: Tensor = target) -> Callable[..., Tensor]:
            return lambda z: function(z, target)

        yield (
            "cross_entropy",
            size,
            {"torch": loss(functional.cross_entropy), "hvp_engine": loss(differentiable.cross_entropy)},
            [logits],
        )
        functions = {
            "torch": lambda z: functional.log_softmax(z, 1).square().mean(),
            "hvp_engine": lambda z: differentiable.log_softmax(z).square().mean(),
        }
        yield "log_softmax", size, functions, [logits]
        del logits

        def layer(
            function: Callable[..., Tensor], separate: bool, target: Tensor = target
        ) -> Callable[..., Tensor]:
            if separate:
                return lambda h, w: function(functional.linear(h, w), target)
            return lambda h, w: function(h, w, target)

        inputs = [torch.randn(count, WIDTH), torch.randn(words, WIDTH) / WIDTH**0.5]
        methods = {
            "torch": layer(functional.cross_entropy, True),
            "hvp_engine, logits held": layer(differentiable.cross_entropy, True),
            "hvp_engine": layer(differentiable.linear_cross_entropy, False),
        }
        yield f"linear_cross_entropy, {WIDTH} inputs", size, methods, inputs
