"""Cross-entropy and log-softmax for large vocabularies, differentiable twice by kernels of their own."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

from hvp_engine._support.arguments import check_not_negative
from hvp_engine._support.torch_compat import in_transform
from hvp_engine.differentiable import cross_entropy_schemas as _schemas  # noqa: F401  registers the operations
from hvp_engine.differentiable.registration import accumulated, autocast, autocasts, check_dtype, check_tensor

ops = torch.ops.hvp_engine

_REDUCTIONS = ("none", "mean", "sum")


def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    """`torch.nn.functional.cross_entropy` of class indices, with kernels for the second derivative.

    With q_c = (1 - label_smoothing) w_y [c = y] + label_smoothing / C w_c, a row z of label y has the loss
    sum_c q_c (logsumexp(z) - z_c). The mean divides by the sum of w_y over rows that have a label.

    Arguments:
        input: logits, (N, C), (C,) or (N, C, d1, ...), in float32, float64, bfloat16 or float16; the last two are
            computed in float32.
        target: int64 classes, of the shape of `input` without C.
        weight: one number for each class, (C,), a constant: no derivatives are made for it.
        ignore_index: the label of rows that count for nothing.
        reduction: "mean", "sum" or "none".
        label_smoothing: from 0 to 1.

    Values and derivatives are those of torch. Derivatives beyond the second are made by plain torch, and so is all
    under transforms of `torch.func` and in forward mode.

    Cost: two to three reads of the logits at each level. Memory: value, one number for each row; first and second
    derivative, their results. Between calls the logits are held, and nothing else of their size.

    Errors: `TypeError` and `ValueError` for arguments that do not fit, `IndexError` for a label that is no class (on a
    GPU the loss is NaN instead).

    >>> import torch
    >>> from hvp_engine import differentiable
    >>> z = torch.zeros(2, 4, requires_grad=True)
    >>> loss = differentiable.cross_entropy(z, torch.tensor([1, -100]))
    >>> loss
    tensor(1.3863, grad_fn=<DivBackward0>)
    >>> (gradient,) = torch.autograd.grad(loss, z, create_graph=True)
    >>> torch.autograd.grad(gradient[0, 0], z)[0][0]
    tensor([ 0.1875, -0.0625, -0.0625, -0.0625])
    """
    check_tensor(input, "input")
    if input.dim() == 0:
        raise ValueError("input: expected logits of shape (C,), (N, C) or (N, C, ...); got a 0-dim tensor")
    dim = 0 if input.dim() == 1 else 1
    classes = input.shape[dim]
    expected = (*input.shape[:dim], *input.shape[dim + 1 :])
    _check(input, classes, target, expected, weight, reduction, label_smoothing)
    if in_transform():  # which would not see the operation's derivatives
        return _of_torch(input, target, weight, ignore_index, reduction, label_smoothing)
    rows = input.movedim(dim, -1).reshape(-1, classes)
    labels = target.reshape(-1)
    losses, _ = ops.cross_entropy(rows, labels, weight, ignore_index, label_smoothing)
    return _reduced(losses, labels, weight, ignore_index, reduction, expected).to(_result_dtype(input))


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    weight: Tensor | None = None,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    """`cross_entropy(linear(input, linear_weight, bias), target, ...)`, without the matrix of all logits.

    Arguments:
        input: (N, d), such as hidden states. linear_weight: (C, d). bias: (C,).
        target: int64 classes, (N,).
        weight, ignore_index, reduction, label_smoothing: as of :func:`cross_entropy`.

    Cost: the logits are made again at each level: 1, 3 and 7 products of (N, d) and (d, C) matrices for the value, the
    first and the second derivative, where torch takes 1, 2 and 6. Memory: chunks of 32 MiB of logits, of which at most
    three exist at a time, and results.

    Errors: as of :func:`cross_entropy`.

    Source of computing the loss block by block: Wijmans et al., Cut Your Losses in Large-Vocabulary Language Models,
    ICLR 2025, which has the value and the first derivative.

    >>> import torch
    >>> from hvp_engine import differentiable
    >>> h, w = torch.ones(3, 2), torch.zeros(5, 2, requires_grad=True)
    >>> differentiable.linear_cross_entropy(h, w, torch.tensor([0, 1, 4])).item() == torch.tensor(5.0).log().item()
    True
    """
    check_tensor(input, "input")
    check_tensor(linear_weight, "linear_weight")
    if bias is not None:
        check_tensor(bias, "bias")
    if input.dim() != 2 or linear_weight.dim() != 2 or input.shape[1] != linear_weight.shape[1]:
        raise ValueError(
            "input, linear_weight: expected matrices (N, d) and (C, d); got shapes "
            f"{tuple(input.shape)} and {tuple(linear_weight.shape)}: flatten leading dimensions first"
        )
    input, linear_weight, bias = autocast(input, linear_weight, bias)
    classes = linear_weight.shape[0]
    for name, tensor, shape in (("linear_weight", linear_weight, None), ("bias", bias, (classes,))):
        if tensor is not None and (tensor.dtype != input.dtype or shape not in (None, tuple(tensor.shape))):
            raise ValueError(
                f"{name}: expected {input.dtype} as input{'' if shape is None else f' and shape {shape}'}; got "
                f"{tensor.dtype} and shape {tuple(tensor.shape)}"
            )
    _check(input, classes, target, (input.shape[0],), weight, reduction, label_smoothing)
    if in_transform():
        logits = functional.linear(input, linear_weight, bias)
        return _of_torch(logits, target, weight, ignore_index, reduction, label_smoothing)
    losses, _ = ops.linear_cross_entropy(input, linear_weight, bias, target, weight, ignore_index, label_smoothing)
    return _reduced(losses, target, weight, ignore_index, reduction, (input.shape[0],)).to(_result_dtype(input))


def log_softmax(input: Tensor, dim: int = -1) -> Tensor:
    """`torch.nn.functional.log_softmax`, with kernels for the second derivative.

    y = z - logsumexp(z); the derivative for a cotangent g is g - exp(y) sum g.

    Arguments:
        input: of any shape, in float32, float64, bfloat16 or float16. dim: along which probabilities add up to one.

    Cost: two reads at each level. Memory: between calls the result is held. Derivatives beyond the second are made by
    plain torch, and so is all under transforms of `torch.func` and in forward mode.

    Errors: `TypeError` for another dtype.

    >>> import torch
    >>> from hvp_engine import differentiable
    >>> differentiable.log_softmax(torch.zeros(2, 4))[0, 0]
    tensor(-1.3863)
    """
    check_tensor(input, "input")
    check_dtype(input)
    if dim is None:
        raise TypeError("dim: expected an int; got None")
    if in_transform():
        return functional.log_softmax(input, dim)
    if input.dim() == 0:
        return log_softmax(input.unsqueeze(0)).squeeze(0)
    moved = input.movedim(dim, -1)
    rows = moved.reshape(math.prod(moved.shape[:-1]), moved.shape[-1])
    return ops.log_softmax(rows).view(moved.shape).movedim(-1, dim)


def _result_dtype(input: Tensor) -> torch.dtype:
    """The dtype of the loss: under autocast the one in which it is computed, as torch has it."""
    return accumulated(input.dtype) if autocasts(input.device) else input.dtype


def _of_torch(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    reduction: str,
    label_smoothing: float,
) -> Tensor:
    """By torch's own kernel, in the dtype in which ours computes."""
    z = input.to(accumulated(input.dtype))
    constant = None if weight is None else weight.to(z.dtype)
    return functional.cross_entropy(
        z, target, constant, ignore_index=ignore_index, reduction=reduction, label_smoothing=label_smoothing
    ).to(_result_dtype(input))


def _check(
    input: Tensor,
    classes: int,
    target: Tensor,
    shape: tuple[int, ...],
    weight: Tensor | None,
    reduction: str,
    label_smoothing: float,
) -> None:
    check_dtype(input)
    check_tensor(target, "target")
    if target.dtype != torch.int64:
        raise TypeError(
            f"target: expected classes as int64; got {target.dtype}: torch.nn.functional.cross_entropy takes "
            "probabilities"
            if target.is_floating_point()
            else f"target: expected int64; got {target.dtype}: use .long()"
        )
    if tuple(target.shape) != shape:
        raise ValueError(f"target: expected shape {shape}, that of the logits without C; got {tuple(target.shape)}")
    if classes == 0:
        raise ValueError("input: expected at least one class; got logits of none")
    if weight is not None:
        check_tensor(weight, "weight")
        if tuple(weight.shape) != (classes,) or not weight.is_floating_point():
            raise ValueError(
                f"weight: expected {classes} numbers, one for each class; got shape {tuple(weight.shape)}, "
                f"{weight.dtype}"
            )
        if weight.requires_grad:
            raise ValueError(
                "weight: expected a constant; got a tensor that requires grad: multiply the losses of "
                "reduction='none' by weight[target]"
            )
    if reduction not in _REDUCTIONS:
        raise ValueError(f"reduction: expected one of {', '.join(map(repr, _REDUCTIONS))}; got {reduction!r}")
    if check_not_negative(label_smoothing, "label_smoothing") > 1:
        raise ValueError(f"label_smoothing: expected a number from 0 to 1; got {label_smoothing}")


def _reduced(
    losses: Tensor,
    labels: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    reduction: str,
    shape: tuple[int, ...],
) -> Tensor:
    if reduction == "none":
        return losses.view(shape)
    if reduction == "sum":
        return losses.sum()
    kept = labels != ignore_index
    if weight is None:
        return losses.sum() / kept.sum()
    return losses.sum() / torch.where(kept, weight.detach()[labels.where(kept, 0)], 0.0).sum()
