"""Which of the derivatives that a hypergradient is made of disagrees with finite differences, at one point."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from hvp_engine.diagnostics.hypergradient_check.refitting import Pair, flat, like, product_of

_DISTANCE = 0.03
"""How far from the point the derivatives are compared, relative to the size of each weight tensor."""


def step_of(dtype: torch.dtype) -> float:
    """The relative step of a central difference at which truncation and rounding balance: eps^(1/3)."""
    return torch.finfo(dtype).eps ** (1 / 3)


def random_direction(tensors: Sequence[Tensor], generator: torch.Generator) -> list[Tensor]:
    """Normal numbers, each tensor's scaled by the root mean square of that tensor, or by 1 where it is all zero."""
    directions = []
    for tensor in tensors:
        size = float(tensor.detach().double().square().mean().sqrt()) if tensor.numel() else 0.0
        drawn = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
        directions.append((drawn * (size or 1.0)).to(tensor))
    return directions


def shifted(tensors: Sequence[Tensor], directions: Sequence[Tensor], step: float) -> list[Tensor]:
    """tensors + step * directions, detached."""
    return [t.detach() + step * d for t, d in zip(tensors, directions, strict=True)]


def wrong_derivatives(pair: Pair, tolerance: float, generator: torch.Generator) -> list[str]:
    """One sentence for each derivative that differs from its central difference by more than `tolerance`.

    Near `pair`'s point (at a minimum a gradient is zero, right or wrong) and along random directions: the gradients
    of both losses, and of the training gradient the products with the Hessian and with the mixed second derivative.
    """
    pair = pair.at(shifted(pair.weights, random_direction(pair.weights, generator), _DISTANCE))
    weights, hyper = pair.weights, pair.hyper
    dtype = weights[0].dtype
    step, epsilon = step_of(dtype), torch.finfo(dtype).eps
    along_weights, along_hyper = random_direction(weights, generator), random_direction(hyper, generator)
    found = []

    def difference(of: Callable[[Pair], Tensor], move_weights: bool) -> tuple[Tensor, float]:
        """The central difference of `of` and its uncertainty: rounding, and a fraction of the second derivative."""

        def at(multiple: int) -> Tensor:
            if move_weights:
                return of(pair.at(shifted(weights, along_weights, multiple * step)))
            return of(pair.at(weights, shifted(hyper, along_hyper, multiple * step)))

        up, middle, down = at(1), of(pair), at(-1)
        rounding, bend = (float(torch.linalg.vector_norm(t)) for t in (10 * epsilon * middle, up + down - 2 * middle))
        return (up - down) / (2 * step), (rounding + tolerance * bend) / step

    def compare(what: str, expected: Tensor, doubt: float, given: Tensor) -> None:
        error, *sizes = (float(torch.linalg.vector_norm(t)) for t in (given - expected, given, expected))
        if not error <= doubt + tolerance * max(sizes):
            figures = (float(given), float(expected)) if given.numel() == 1 else sizes
            found.append(f"{what}: autograd gives {figures[0]:.3g}, finite differences give {figures[1]:.3g}")

    for name, which, move_weights in (("train_loss", 0, True), ("val_loss", 1, True), ("val_loss", 1, False)):

        def loss(at: Pair, which: int = which) -> Tensor:
            return torch.tensor([at.value(at.losses[which])], dtype=torch.float64)

        expected, doubt = difference(loss, move_weights)
        gradient = pair.gradient(pair.losses[which])[0 if move_weights else 1]
        along = flat(along_weights if move_weights else along_hyper)
        what = f"{name} with respect to the {'weights' if move_weights else 'hyperparameters'}"
        compare(what, expected, doubt, (gradient @ along).reshape(1))

    linearization = pair.linearization()
    expected, doubt = difference(lambda at: at.gradient(at.train)[0], True)
    given = product_of(linearization, weights)(flat(along_weights))
    compare("the gradient of train_loss with respect to the weights (Hessian)", expected, doubt, given)

    expected, doubt = difference(lambda at: at.gradient(at.train)[0], False)
    size = torch.linalg.vector_norm(expected)
    test = expected / size if float(size) > doubt else torch.nn.functional.normalize(flat(along_weights), dim=0)
    mixed = [
        torch.zeros_like(h) if m is None else m
        for m, h in zip(linearization.mixed(like(test, weights)), hyper, strict=True)
    ]
    given = (flat(mixed) @ flat(along_hyper)).reshape(1)
    what = "the gradient of train_loss with respect to the hyperparameters (mixed second derivative)"
    compare(what, (expected @ test).reshape(1), doubt, given)
    return found
