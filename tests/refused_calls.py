"""A small problem, and a check that a refused call does not change it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from problems_with_known_answers import DTYPE, randn
from torch import Tensor


class World:
    """A small problem in tape and functional form, with gradients and a frozen flag that have to stay."""

    def __init__(self) -> None:
        torch.manual_seed(4)
        self.w = [randn(3, seed=1).requires_grad_(), randn(2, 2, seed=2).requires_grad_()]
        self.h = torch.tensor(0.2, dtype=DTYPE, requires_grad=True)
        self.v = [randn(3, seed=3), randn(2, 2, seed=4)]
        for tensor in (*self.w, self.h):
            tensor.grad = torch.ones_like(tensor)
        self.loss = self.train(self.w, self.h, None)
        self.value = self.val(self.w, self.h, None)
        self.f = list(torch.autograd.grad(self.loss, self.w, create_graph=True))

    def train(self, w: list[Tensor], h: Tensor, batch: Any) -> Tensor:
        return h.exp() * (w[0].square().sum() + w[1].pow(4).sum())

    def val(self, w: list[Tensor], h: Tensor, batch: Any) -> Tensor:
        return w[0].sum() + w[1].sum() + h

    def snapshot(self) -> list[Any]:
        tensors = [*self.w, self.h, *self.v, *self.f, self.loss]
        return [
            *(tensor.detach().clone() for tensor in tensors),
            *(tensor.grad.clone() for tensor in (*self.w, self.h)),
            *(tensor.requires_grad for tensor in tensors),
            torch.get_rng_state(),
            torch.is_grad_enabled(),
        ]

    @contextmanager
    def unchanged(self) -> Iterator[None]:
        before = self.snapshot()
        yield
        for a, b in zip(before, self.snapshot(), strict=True):
            assert torch.equal(a, b) if isinstance(a, Tensor) else a == b
        torch.autograd.grad(self.loss, self.w, retain_graph=True)  # the graph is still there

    def refuses(self, error: type[Exception], message: str, call: Callable[[], Any]) -> None:
        with self.unchanged(), pytest.raises(error, match=message):
            call()


def nan_like(tensors: list[Tensor], value: float = math.nan) -> list[Tensor]:
    bad = [tensor.clone() for tensor in tensors]
    bad[1][0, 1] = value
    return bad
