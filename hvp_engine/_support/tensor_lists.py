"""Weights, and what belongs to them, in the forms that scripts around `torch.autograd.grad` use, as checked lists."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeGuard

import torch
from torch import Tensor

from hvp_engine._support.flat_vector import Layout, split_like
from hvp_engine._support.pytree import PLAIN, check_like, flatten, is_plain, refuse_inference_mode, trainable
from hvp_engine.errors import GraphError

Tensors = Tensor | Sequence[Tensor] | Mapping[Any, Tensor] | torch.nn.Module
"""How functions of recorded losses take weights: without nesting. A module stands for its parameters that require
grad."""


def as_list(tensors: Tensors, name: str) -> list[Tensor]:
    """The tensors in a checked list, those of a dict or a module in its order."""
    flat = _unnested(tensors, name)
    if type(flat) is list and flat and all(map(is_plain, flat)) and len({part.device for part in flat}) == 1:
        refuse_inference_mode(name)
        return flat  # nothing that a general tree has to be asked about, at a fifth of the time
    leaves, _ = flatten(flat, name)
    parts = [flat] if isinstance(flat, Tensor) else list(flat.values() if isinstance(flat, dict) else flat)
    if not all(isinstance(part, Tensor) for part in parts):
        raise TypeError(f"{name}: expected a flat sequence of tensors; got nested containers")
    return leaves


def as_list_like(tensors: Any, weights: Sequence[Tensor], given: Tensors, name: str, like: str) -> list[Tensor]:
    """What belongs to each of `weights`: `tensors` in any form that public code uses, as a checked list.

    * in a container like the weights' own, `given`: by position, or by key where both have keys;
    * flat: one vector with the elements of all weights, one after another;
    * with None for a weight that is not used, as from `torch.autograd.grad(..., allow_unused=True)`: zeros.

    Errors: :class:`GraphError` where all are None; else as :func:`check_like`. `name` and `like` are the arguments that
    messages name.
    """
    if is_flat_for(tensors, weights, given):
        tensors = split_like(tensors, weights)
    if type(tensors) in (list, tuple) and _are_alike(tensors, weights):
        refuse_inference_mode(name)
        return list(tensors)  # nothing else has to be asked, at a third of the time
    layout, found = Layout.of(weights), _unnested(tensors, name)
    if isinstance(found, Tensor) and len(weights) > 1:
        raise ValueError(
            f"{name}: expected {len(weights)} tensors, one for each of {like}, or one flat vector of their "
            f"{layout.numel} elements; got 1 of shape {tuple(found.shape)}"
        )
    elif isinstance(found, dict):
        keys = trainable(given)
        if isinstance(keys, Mapping) and found.keys() != keys.keys():
            differing = ", ".join(sorted(map(repr, found.keys() ^ keys.keys())))
            raise ValueError(f"{name}: expected the keys of {like}; these are in one of them only: {differing}")
        found = [found[key] for key in (keys if isinstance(keys, Mapping) else found)]
    if isinstance(found, list) and len(found) == len(weights):
        if all(part is None for part in found):
            raise GraphError(
                f"{name}: expected a gradient for at least one of {like}; got None for each: what was differentiated "
                f"does not depend on {like}; compute it from these very tensors"
            )
        found = [torch.zeros_like(w) if part is None else part for part, w in zip(found, weights, strict=True)]
    leaves = as_list(found, name)
    check_like(leaves, layout, name, like)
    return leaves


def _are_alike(tensors: Sequence[Any], weights: Sequence[Tensor]) -> bool:
    """Whether these are plain tensors of the weights' shapes, dtypes and device, one for each."""
    if len(tensors) != len(weights):
        return False
    for x, w in zip(tensors, weights, strict=True):
        if type(x) not in PLAIN or x.shape != w.shape or x.dtype is not w.dtype or x.layout is not torch.strided:
            return False
        if x.device != w.device:
            return False
    return True


def is_flat_for(tensors: Any, weights: Sequence[Tensor], given: Tensors) -> TypeGuard[Tensor]:
    """Whether `tensors` is one vector for all weights, not a tensor like the only one that was `given`."""
    if not isinstance(tensors, Tensor) or tensors.dim() != 1 or tensors.layout is not torch.strided:
        return False
    single = isinstance(given, Tensor) and given.shape == tensors.shape
    return not single and len(tensors) == sum([weight.numel() for weight in weights])


def _unnested(tensors: Any, name: str) -> Any:
    """A module's parameters and any mapping as a dict, other containers as a list; a tensor as it is."""
    if type(tensors) in (list, tuple):
        return list(tensors)
    tensors = trainable(tensors)
    if isinstance(tensors, Tensor):
        return tensors
    if isinstance(tensors, Mapping):
        return dict(tensors)
    try:
        return list(tensors)
    except TypeError:
        raise TypeError(f"{name}: expected a tensor or a sequence of tensors; got {type(tensors).__name__}") from None
