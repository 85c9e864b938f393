"""Normalizations, differentiable twice by kernels of their own."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from hvp_engine._support.torch_compat import in_transform
from hvp_engine.differentiable import normalization_reference as reference
from hvp_engine.differentiable import normalization_schemas as _schemas  # noqa: F401  registers the operations
from hvp_engine.differentiable.normalization_shapes import Kind
from hvp_engine.differentiable.registration import check_dtype, check_tensor

ops = torch.ops.hvp_engine


def batch_norm(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """`torch.nn.functional.batch_norm`, with kernels for the second derivative in training.

    weight (x - mean) / sqrt(variance + eps) + bias, with the mean and the variance of each channel over the batch.

    Arguments:
        input: (N, C, ...), contiguous or channels-last, in float32, float64, bfloat16 or float16; the last two are
            computed in float32.
        running_mean, running_var: (C,), updated in place in training, running <- (1 - momentum) running + momentum
            new, with the unbiased variance; used instead of the batch's in evaluation, where torch's kernel runs.
        weight, bias: (C,).

    Values and derivatives are those of torch. Derivatives beyond the second are made by plain torch, and so is all
    under transforms of `torch.func` and in forward mode.

    Cost: two reads of the input, and of the gradient and the tangent where there are some, and one write of each
    result, at each level. Memory: the results, and float64 statistics. Images that are channels-last stay so.

    Errors: `ValueError` for arguments that do not fit, and in training for one value per channel.

    >>> import torch
    >>> from hvp_engine import differentiable
    >>> differentiable.batch_norm(torch.tensor([[0.0], [2.0]]), training=True, eps=0.0)
    tensor([[-1.],
            [ 1.]])
    """
    check_tensor(input, "input")
    if training and momentum is None:
        raise TypeError(
            "momentum: expected a number; got None: for an average over all batches pass 1 / (how many there were), as "
            "torch.nn.BatchNorm2d does"
        )
    if not training:
        return functional.batch_norm(input, running_mean, running_var, weight, bias, False, momentum, eps)
    _check_images("batch_norm", input, weight, bias)
    channels = input.shape[1]
    for name, running in (("running_mean", running_mean), ("running_var", running_var)):
        if running is not None and tuple(running.shape) != (channels,):
            raise ValueError(f"{name}: expected shape ({channels},); got {tuple(running.shape)}")
    count = input.numel() // channels
    if count == 1:
        raise ValueError(
            f"input: expected more than one value per channel in training; got shape {tuple(input.shape)}: use a "
            "larger batch, or training=False"
        )
    output, mean, variance = _normalized("batch_norm", input, weight, bias, 0, eps)
    with torch.no_grad():
        for running, new in ((running_mean, mean), (running_var, variance * (count / max(1, count - 1)))):
            if running is not None:
                running.mul_(1 - momentum).add_(new.view(channels).to(running.dtype), alpha=momentum)
    return output


def group_norm(
    input: Tensor, num_groups: int, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> Tensor:
    """`torch.nn.functional.group_norm`, with kernels for the second derivative.

    weight (x - mean) / sqrt(variance + eps) + bias, with the mean and the variance of each sample over the points of
    `num_groups` groups of channels. As many groups as channels make it instance normalization.

    Arguments, cost, memory and errors: as of :func:`batch_norm`; (N, C, ...) with C a multiple of `num_groups`.

    >>> import torch
    >>> from hvp_engine import differentiable
    >>> differentiable.group_norm(torch.tensor([[0.0, 2.0, 5.0, 7.0]]), 2, eps=0.0)
    tensor([[-1.,  1., -1.,  1.]])
    """
    check_tensor(input, "input")
    _check_images("group_norm", input, weight, bias)
    if num_groups < 1 or input.shape[1] % num_groups:
        raise ValueError(f"num_groups: expected a divisor of the {input.shape[1]} channels of input; got {num_groups}")
    if input.numel() == num_groups:
        raise ValueError(
            f"input: expected more values than groups; got shape {tuple(input.shape)} in {num_groups} groups: "
            "use fewer groups"
        )
    return _normalized("group_norm", input, weight, bias, num_groups, eps)[0]


def layer_norm(
    input: Tensor,
    normalized_shape: int | Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """`torch.nn.functional.layer_norm`, with kernels for the second derivative.

    weight (x - mean) / sqrt(variance + eps) + bias, with the mean and the variance over the last dimensions, of shape
    `normalized_shape`, which is that of `weight` and `bias`, too.

    Arguments, cost, memory and errors: as of :func:`batch_norm`.

    >>> import torch
    >>> from hvp_engine import differentiable
    >>> differentiable.layer_norm(torch.tensor([[0.0, 2.0], [5.0, 7.0]]), 2, eps=0.0)
    tensor([[-1.,  1.],
            [-1.,  1.]])
    """
    return _normalized("layer_norm", input, weight, bias, _rows(input, normalized_shape, weight, bias), eps)[0]


def rms_norm(
    input: Tensor, normalized_shape: int | Sequence[int], weight: Tensor | None = None, eps: float | None = None
) -> Tensor:
    """`torch.nn.functional.rms_norm`, with kernels for the second derivative.

    weight x / sqrt(<x^2> + eps), with the mean <x^2> over the last dimensions, of shape `normalized_shape`, which is
    that of `weight`, too. Without `eps` it is the machine epsilon of the dtype of the arithmetic.

    Arguments, cost, memory and errors: as of :func:`batch_norm`.

    >>> import torch
    >>> from hvp_engine import differentiable
    >>> differentiable.rms_norm(torch.tensor([[3.0, 3.0]]), 2, eps=0.0)
    tensor([[1., 1.]])
    """
    size = _rows(input, normalized_shape, weight, None)
    if eps is None:
        eps = torch.finfo(torch.float64 if input.dtype == torch.float64 else torch.float32).eps
    return _normalized("rms_norm", input, weight, None, size, eps)[0]


def _normalized(
    kind: Kind, input: Tensor, weight: Tensor | None, bias: Tensor | None, size: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(Output, mean, variance) by the operation; by its formulas where something looks on that would not see the
    operation's derivatives."""
    if in_transform():
        return reference.normalize(kind, input, weight, bias, size, eps)
    return getattr(ops, kind)(input, weight, bias, size, eps)


def _rows(input: Tensor, normalized_shape: int | Sequence[int], weight: Tensor | None, bias: Tensor | None) -> int:
    """How many dimensions make up a row."""
    check_tensor(input, "input")
    shape = (normalized_shape,) if isinstance(normalized_shape, int) else tuple(normalized_shape)
    _check_numbers(input, weight, bias, shape)
    if not shape or tuple(input.shape[-len(shape) :]) != shape:
        raise ValueError(
            f"normalized_shape: expected the last dimensions of input, of shape {tuple(input.shape)}; got {shape}"
        )
    if math.prod(shape) == 0:
        raise ValueError(f"normalized_shape: expected at least one number in a row; got {shape}")
    return len(shape)


def _check_images(name: str, input: Tensor, weight: Tensor | None, bias: Tensor | None) -> None:
    if input.dim() < 2:
        raise ValueError(f"input: {name} expects (N, C, ...); got shape {tuple(input.shape)}")
    if math.prod(input.shape[1:]) == 0 or (name == "batch_norm" and input.shape[0] == 0):
        raise ValueError(f"input: {name} expects numbers to make statistics of; got shape {tuple(input.shape)}")
    _check_numbers(input, weight, bias, (input.shape[1],))


def _check_numbers(input: Tensor, weight: Tensor | None, bias: Tensor | None, shape: tuple[int, ...]) -> None:
    check_dtype(input)
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ValueError(f"{name}: expected shape {shape}; got {tuple(tensor.shape)}")
