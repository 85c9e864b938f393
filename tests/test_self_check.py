"""What an engine's check takes for an error: not what a rounding does at the kinks of a loss, and all else."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from hvp_engine._support.pytree import flatten
from hvp_engine.differentiation.gradient import Gradient, by_autograd
from hvp_engine.differentiation.linear_map import Linearization
from hvp_engine.differentiation.problem import Problem
from hvp_engine.differentiation.self_check import disagreement, is_rounding
from hvp_engine.engines import EagerEngine
from hvp_engine.engines.gradients import gradients_disagree

UNITS, DEPTH, CANCELLED = 32, 3, 300.0
Weights = dict[str, Tensor]


def network(seed: int) -> tuple[Weights, Tensor]:
    """Weights and inputs of which two are the same, and cancel in half of the units of the first layer."""
    generator = torch.Generator().manual_seed(seed)
    weights = {f"{i}": torch.randn(UNITS, UNITS, generator=generator) / 5 for i in range(DEPTH)}
    x = torch.randn(200, UNITS, generator=generator)
    x[:, 1] = x[:, 0]
    half = weights["0"][: UNITS // 2]
    half *= 1e-2
    half[:, 0], half[:, 1] = CANCELLED, -CANCELLED
    return weights, x


def loss(weights: Weights, x: Tensor) -> Tensor:
    return outputs(weights, x, lambda a, b: a @ b.t())


def in_another_order(weights: Weights, x: Tensor) -> Tensor:
    return outputs(weights, x, lambda a, b: a.flip(1) @ b.flip(1).t())


def outputs(weights: Weights, x: Tensor, product: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """What is near zero in the first layer is made as large as all else, with its rounding."""
    for weight in weights.values():
        x = product(x, weight)
        x = F.relu((x - x.mean(0)) / (x.std(0) + 1e-3))
    return (x.square().mean(0) * torch.arange(UNITS)).mean()


def problem(loss: Callable[..., Tensor], seed: int) -> Problem:
    weights, x = network(seed)
    leaves, structure = flatten(weights, "weights")
    return Problem(loss, leaves, structure, [], None, (x,))


def compared(ours: Callable[..., Tensor], theirs: Callable[..., Tensor], seed: int, nudge: bool = True) -> str | None:
    eager, expected = EagerEngine(), problem(theirs, seed)

    def again(nudged: bool) -> Linearization:
        return eager.linearize(expected.nudged() if nudged and nudge else expected)

    made = eager.linearize(problem(ours, seed)), eager.linearize(expected)
    return disagreement(*made, expected.weights, [torch.float32], again)


@pytest.mark.parametrize("seed", range(3))
def test_a_rounding_at_kinks_is_no_error(seed: int) -> None:
    assert compared(in_another_order, loss, seed) is None
    found = compared(in_another_order, loss, seed, nudge=False)
    assert found is not None and "the product differs from eager's by" in found


@pytest.mark.parametrize("seed", range(3))
def test_an_error_is_one_where_roundings_matter(seed: int) -> None:
    assert compared(lambda w, x: 1.1 * loss(w, x), loss, seed) is not None


def test_draws_that_nobody_can_repeat_are_an_error() -> None:
    """A mask from a generator of the loss's own: another one at each evaluation, and a trace's for ever."""
    generator = torch.Generator().manual_seed(1)

    def masked(weights: Weights, x: Tensor) -> Tensor:
        return loss(weights, x * (torch.rand(x.shape, generator=generator) > 0.3))

    assert compared(masked, masked, 0) is not None


@pytest.mark.parametrize("seed", range(3))
def test_gradients(seed: int) -> None:
    expected = problem(loss, seed)
    ours, theirs = by_autograd(problem(in_another_order, seed)), by_autograd(expected)

    def again(nudged: bool) -> Gradient:
        return by_autograd(expected.nudged() if nudged else expected)

    assert gradients_disagree(ours, theirs, expected) == "the derivative by the weights differs"
    assert not gradients_disagree(ours, theirs, expected, again)
    doubled = Gradient(ours.loss, [1.1 * g for g in ours.weights], [])
    assert gradients_disagree(doubled, theirs, expected, again) == "the derivative by the weights differs"


def test_distances() -> None:
    theirs = [torch.tensor([1.0, 2.0]), None]
    near, far = [torch.tensor([1.0, 2.02]), None], [torch.tensor([1.0, 2.5]), None]
    moved = [torch.tensor([1.01, 2.0]), None]
    assert is_rounding(near, theirs, lambda nudged: moved if nudged else theirs)
    assert not is_rounding(far, theirs, lambda nudged: moved if nudged else theirs)
    assert not is_rounding(far, theirs, lambda nudged: far if nudged else theirs)
    assert not is_rounding(near, theirs, lambda nudged: moved)
    assert not is_rounding(near, theirs, lambda nudged: [*moved, moved[0]] if nudged else theirs)
    assert not is_rounding([None, None], theirs, lambda nudged: moved if nudged else theirs)
