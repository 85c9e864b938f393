"""Where our cross-entropy and normalizations take the place of torch's: where they are faster or save memory.

What they replace has second derivatives that are compositions of many operations. Small problems keep torch's, whose
compositions :mod:`hvp_engine.differentiation.native` turns into one call.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from hvp_engine import differentiable
from hvp_engine._support.flat_vector import INPUT_DTYPES
from hvp_engine._support.isolation import is_copy
from hvp_engine._support.torch_compat import in_transform

_FEWEST_CLASSES, _FEWEST_LOGITS = 512, 1 << 16
"""Cross-entropy and log-softmax are ours from these sizes on."""

_FEWEST_IN_ROWS = 1 << 16
"""Layer and root-mean-square normalization are ours from this many numbers on."""


def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    """Ours for class indices of many classes."""
    classes = input.shape[1] if input.dim() > 1 else 0
    if (
        target.dtype == torch.int64
        and target.dim() == input.dim() - 1
        and size_average is None
        and reduce is None
        and _many(input, classes)
        and input.movedim(1, -1).is_contiguous()
        and (weight is None or not weight.requires_grad)
    ):
        options: dict[str, Any] = {"ignore_index": ignore_index, "reduction": reduction}
        return differentiable.cross_entropy(input, target, weight, **options, label_smoothing=label_smoothing)
    return functional.cross_entropy(
        input, target, weight, size_average, ignore_index, reduce, reduction, label_smoothing
    )


def log_softmax(
    input: Tensor, dim: int | None = None, _stacklevel: int = 3, dtype: torch.dtype | None = None
) -> Tensor:
    """Ours along the last of many dimensions."""
    last = dim is not None and input.dim() > 1 and dim % input.dim() == input.dim() - 1
    if last and dtype is None and input.is_contiguous() and _many(input, input.shape[-1]):
        return differentiable.log_softmax(input)
    return functional.log_softmax(input, dim, _stacklevel, dtype)


def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """Ours for images in training, unless running statistics of the caller's own would change: those changes torch's
    kernels keep from a trace."""
    ours = all(running is None or is_copy(running) for running in (running_mean, running_var))
    if training and ours and _images(input) and input.numel() > input.shape[1]:
        return differentiable.batch_norm(input, running_mean, running_var, weight, bias, True, momentum, eps)
    return functional.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)


def group_norm(
    input: Tensor, num_groups: int, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> Tensor:
    """Ours for images."""
    fits = _images(input) and input.shape[1] % num_groups == 0
    if fits and input.numel() > len(input) * num_groups:
        return differentiable.group_norm(input, num_groups, weight, bias, eps)
    return functional.group_norm(input, num_groups, weight, bias, eps)


def instance_norm(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """Ours, as group normalization with a group for each channel, for images without running statistics."""
    if use_input_stats and running_mean is None and running_var is None and _images(input):
        return group_norm(input, input.shape[1], weight, bias, eps)
    return functional.instance_norm(input, running_mean, running_var, weight, bias, use_input_stats, momentum, eps)


def layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """Ours for many numbers."""
    if _usable(input) and input.numel() >= _FEWEST_IN_ROWS:
        return differentiable.layer_norm(input, normalized_shape, weight, bias, eps)
    return functional.layer_norm(input, list(normalized_shape), weight, bias, eps)


def rms_norm(
    input: Tensor, normalized_shape: Sequence[int], weight: Tensor | None = None, eps: float | None = None
) -> Tensor:
    """Ours for many numbers."""
    if _usable(input) and input.numel() >= _FEWEST_IN_ROWS:
        return differentiable.rms_norm(input, normalized_shape, weight, eps)
    return functional.rms_norm(input, list(normalized_shape), weight, eps)


def _many(input: Tensor, classes: int) -> bool:
    return _usable(input) and classes >= _FEWEST_CLASSES and input.numel() >= _FEWEST_LOGITS


def _images(input: Tensor) -> bool:
    return _usable(input) and input.dim() > 3 and 0 not in input.shape


def _usable(input: Tensor) -> bool:
    """Whether kernels take such a tensor, autocast would not convert it first, and no transform of `torch.func` and no
    forward mode looks on, for which torch's own kernels are as good as ours."""
    return input.dtype in INPUT_DTYPES and not torch.is_autocast_enabled(input.device.type) and not in_transform()


LOSSES_AND_NORMALIZATIONS: dict[Callable[..., Any], Callable[..., Any]] = {
    functional.cross_entropy: cross_entropy,
    functional.log_softmax: log_softmax,
    functional.batch_norm: batch_norm,
    functional.group_norm: group_norm,
    functional.instance_norm: instance_norm,
    functional.layer_norm: layer_norm,
    functional.rms_norm: rms_norm,
}
