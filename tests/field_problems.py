"""A hypergradient through a model of another package: ours, and a plain loop's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from field_models import Batch, FieldModel
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import hvp_engine as hvp
from hvp_engine._support.isolation import Draws

SEED = 7

Weights = dict[str, Tensor]
Net = Callable[..., Any]


@dataclass
class Problem:
    """A model with one weight decay for each weight tensor, on one batch."""

    model: FieldModel
    iterations: int
    alpha: float

    def losses(self, net: Net) -> tuple[Any, Any]:
        """A training loss of (weights, decays, batch), and a validation loss."""

        def train(weights: Weights, decays: Weights, batch: Batch) -> Tensor:
            return val(weights, decays, batch) + sum(
                decays[name].exp() * (weight**2).sum() for name, weight in weights.items()
            )

        def val(weights: Weights, decays: Weights, batch: Batch) -> Tensor:
            return self.model.score(net(weights, **batch), batch)

        return train, val

    def decays(self, weights: Weights) -> Weights:
        return {name: weight.new_full((), -4.0) for name, weight in weights.items()}

    def ours(self, engine: Any) -> Callable[[], Weights]:
        """A call of a `Hypergradient`; made once, called often."""
        module, weights, batch = self.model.built()
        hypergradient = hvp.Hypergradient(*self.losses(hvp.functional(module)), self.solver, engine)
        decays = self.decays(weights)
        return lambda: hypergradient(weights, decays, batch, batch).grads

    @property
    def solver(self) -> hvp.Neumann:
        return hvp.Neumann(self.iterations, self.alpha)

    def plain(self, dtype: torch.dtype | None = None) -> Callable[[], Weights]:
        """The loop that people write: one retained graph, a list of tensors, `autograd.grad` for each term."""
        module, weights, batch = self.model.built(dtype, plain=True)
        names = list(weights)
        train, val = self.losses(lambda weights, **inputs: called(module, weights, inputs))
        decays = self.decays(weights)

        def run() -> Weights:
            ws = [weight.detach().clone().requires_grad_() for weight in weights.values()]
            hs = [decay.clone().requires_grad_() for decay in decays.values()]
            w, h = dict(zip(names, ws, strict=True)), dict(zip(names, hs, strict=True))
            settings = {"allow_unused": True, "materialize_grads": True}
            with sdpa_kernel(SDPBackend.MATH):
                v = list(torch.autograd.grad(val(w, h, batch), ws, **settings))
                f = torch.autograd.grad(train(w, h, batch), ws, create_graph=True)
                total = [self.alpha * t for t in v]
                p = list(total)
                for _ in range(self.iterations):
                    product = torch.autograd.grad(f, ws, p, retain_graph=True, **settings)
                    p = [t - self.alpha * s for t, s in zip(p, product, strict=True)]
                    total = [t + s for t, s in zip(total, p, strict=True)]
                mixed = torch.autograd.grad(f, hs, total)
            return dict(zip(names, (-m for m in mixed), strict=True))

        return run

    def truth(self) -> Weights:
        """By the plain loop in float64, with the random numbers of the first call of a `Hypergradient`."""
        run = self.plain(torch.float64)
        torch.manual_seed(SEED)
        torch.manual_seed(Draws().next_seed())
        return run()

    def found(self, engine: Any) -> Weights:
        """By an engine, seeded alike."""
        torch.manual_seed(SEED)
        return self.ours(engine)()


def called(module: nn.Module, weights: Weights, inputs: Batch) -> Any:
    """The module's outputs with these weights; its buffers stay as they are."""
    buffers = {name: buffer.clone() for name, buffer in module.named_buffers()}
    with mock.patch("torch.nn.functional.hardsigmoid", hardsigmoid):
        return torch.func.functional_call(module, buffers | weights, (), inputs)


def hardsigmoid(x: Tensor, inplace: bool = False) -> Tensor:
    """By its formula, since torch has no second derivative of the operator."""
    return (x / 6 + 0.5).clamp(0, 1)


def difference(found: Weights, truth: Weights) -> float:
    """Relative, of all hyperparameters together."""
    ours, true = (torch.stack([t.detach().double() for t in tree.values()]) for tree in (found, truth))
    return float((ours - true).norm() / true.norm())
