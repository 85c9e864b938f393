"""Recorded products against plain ones: `torch.autograd.grad` of the same gradient, in float64."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from hvp_engine.differentiation.recorded.library import Library
from hvp_engine.differentiation.recorded.linearization import RecordedLinearization
from hvp_engine.differentiation.recorded.owned import OwnedLinearization

PYTHON, UNPACKED = "of which the graph does not show", "saved-tensor hooks"
"""Reasons for level 2."""


def gradient_of(loss: Tensor, weights: Sequence[Tensor]) -> list[Tensor]:
    """dL/dw with its graph; zeros where a weight is not used."""
    settings = {"create_graph": True, "allow_unused": True, "materialize_grads": True}
    return list(torch.autograd.grad(loss, list(weights), **settings))


def plain(gradient: Sequence[Tensor], inputs: Sequence[Tensor], tangents: Sequence[Tensor]) -> list[Tensor | None]:
    """(df/dx)^T t for each x; None where there is no path."""
    paths = [(g, t) for g, t in zip(gradient, tangents, strict=True) if g.requires_grad]
    active = [x for x in inputs if x.requires_grad]
    outputs, vectors = [g for g, _ in paths], [t for _, t in paths]
    found = iter(torch.autograd.grad(outputs, active, vectors, retain_graph=True, allow_unused=True))
    products = [next(found) if x.requires_grad else None for x in inputs]
    return [p.to_dense() if p is not None and p.layout is not torch.strided else p for p in products]


def assert_same(
    ours: Sequence[Tensor | None], theirs: Sequence[Tensor | None], tolerance: float, zeros: bool = True
) -> None:
    """By the norm over all tensors; with `zeros`, None of theirs is 0."""
    assert len(ours) == len(theirs)
    distance = size = torch.zeros((), dtype=torch.float64)
    for mine, other in zip(ours, theirs, strict=True):
        assert mine is not None or other is None, "no path, and plain double backward has one"
        assert other is not None or zeros or mine is None, "a path that plain double backward has not"
        if mine is not None:
            true = torch.zeros_like(mine) if other is None else other
            assert mine.dtype == true.dtype and mine.shape == true.shape
            distance = distance + (mine - true).abs().double().square().sum()
            size = size + true.abs().double().square().sum()
    assert float(distance.sqrt()) <= tolerance * float(size.sqrt()), (float(distance.sqrt()), float(size.sqrt()))


def level(linearization: RecordedLinearization) -> int:
    """1: from the graph; 2: written down in each solve; 3: all products by autograd."""
    if linearization.program is None:
        return 3
    return 2 if linearization._known.hidden else 1


def reason(linearization: RecordedLinearization) -> str:
    """Why it is not level 1."""
    return linearization._known.refused or linearization._known.hidden


def checked(
    library: Library,
    gradient: Sequence[Tensor],
    weights: Sequence[Tensor],
    hyperparameters: Sequence[Tensor] = (),
    *,
    kind: type[RecordedLinearization] = OwnedLinearization,
    tolerance: float = 1e-10,
    products: int = 3,
) -> RecordedLinearization:
    """A linearization whose products, mixed ones too, have been found to be the plain ones.

    Of an :class:`OwnedLinearization` the second product is by a program, if there can be one; which does not depend on
    the time that anything takes.
    """
    made = kind(gradient, weights, hyperparameters, name="loss", library=library)
    inputs = [*weights, *hyperparameters]
    generator = torch.Generator().manual_seed(3)
    for _ in range(products):
        tangents = [torch.randn(w.shape, generator=generator, dtype=torch.float64).to(w.dtype) for w in weights]
        kept = [t.clone() for t in tangents]
        true = plain(gradient, inputs, tangents)
        assert_same(made.product(tangents), true[: len(weights)], tolerance)
        if hyperparameters:
            assert_same(made.mixed(tangents), true[len(weights) :], tolerance, zeros=False)
        assert all(torch.equal(a, b) for a, b in zip(tangents, kept, strict=True)), "tangents are the caller's"
    return made


def calls(
    loss: Callable[[], Tensor],
    weights: Sequence[Tensor],
    hyperparameters: Sequence[Tensor] = (),
    *,
    count: int = 3,
    library: Library | None = None,
    tolerance: float = 1e-10,
) -> list[RecordedLinearization]:
    """Several calls of `loss`, each with weights that have moved, on one library."""
    library = Library() if library is None else library
    made = []
    for _ in range(count):
        with torch.no_grad():
            for w in weights:
                w.add_(0.01 * torch.randn_like(w))
        gradient = gradient_of(loss(), weights)
        made.append(checked(library, gradient, weights, hyperparameters, tolerance=tolerance))
    return made
