"""Bounds of hyperparameters: one interval for all of them, or one for each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hvp_engine._support.pytree import Structure, trainable
from hvp_engine._support.torch_compat import broadcast_shapes, pytree


class Bounds:
    """low <= lambda <= high, elementwise.

    Arguments:
        given: a pair (low, high). Each is a number, None for no bound, or a tree like the hyperparameters whose leaves
            are numbers or tensors that broadcast to theirs.
        tensors, structure: the hyperparameters and their tree.
    """

    def __init__(self, given: Any, tensors: Sequence[Tensor], structure: Structure):
        if not isinstance(given, tuple | list) or len(given) != 2:
            raise TypeError(
                f"bounds: expected a pair (low, high), each a number, None or a tree like hyper; got {given!r}"
            )
        self.low, self.high = (_side(side, f"bounds[{index}]", tensors, structure) for index, side in enumerate(given))
        for index, (low, high) in enumerate(zip(self.low, self.high, strict=True)):
            if low is not None and high is not None and not bool((low <= high).all()):
                raise ValueError(f"bounds: expected low <= high; got the opposite for hyperparameter {index}")

    @torch.no_grad()
    def project(self, tensors: Sequence[Tensor]) -> None:
        """Project onto the bounds, in place."""
        for tensor, low, high in zip(tensors, self.low, self.high, strict=True):
            if low is not None or high is not None:
                tensor.clamp_(low, high)


def _side(given: Any, name: str, tensors: Sequence[Tensor], structure: Structure) -> list[Tensor | None]:
    """One bound, or None, for each tensor."""
    if given is None:
        return [None] * len(tensors)
    given = trainable(given)
    if isinstance(given, int | float) or (isinstance(given, Tensor) and given.dim() == 0):
        leaves = [given] * len(tensors)
    else:
        leaves, spec = pytree.tree_flatten(given)
        if spec != structure.spec:
            raise ValueError(f"{name}: expected a number, None or the container of hyper, {structure.spec}; got {spec}")
    return [_leaf(leaf, name, tensor) for leaf, tensor in zip(leaves, tensors, strict=True)]


def _leaf(leaf: Any, name: str, tensor: Tensor) -> Tensor:
    if isinstance(leaf, bool) or not isinstance(leaf, int | float | Tensor):
        raise TypeError(f"{name}: expected numbers or tensors; got {type(leaf).__name__}")
    bound = torch.as_tensor(leaf, dtype=tensor.dtype, device=tensor.device).detach()
    if bool(torch.isnan(bound).any()):
        raise ValueError(f"{name}: expected numbers; got NaN")
    try:
        fits = broadcast_shapes(bound.shape, tensor.shape) == tensor.shape
    except RuntimeError:
        fits = False
    if not fits:
        raise ValueError(f"{name}: expected a shape that broadcasts to {tuple(tensor.shape)}; got {tuple(bound.shape)}")
    return bound
