"""Cross-entropy and log-softmax of rows on a CPU, by the extension; see `csrc/cross_entropy.h`.

Rows of half precision are widened first: a copy of the logits in float32 while a call runs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hvp_engine import _C
from hvp_engine.differentiable.cross_entropy_reference import Labels, out_of_range
from hvp_engine.differentiable.registration import accumulated


def cross_entropy(input: Tensor, labels: Labels) -> tuple[Tensor, Tensor]:
    z = _dense(input)
    losses, lse = z.new_empty(len(z)), z.new_empty(len(z))
    _run(0, z, labels, lse, per_row=losses)
    return losses, lse


def cross_entropy_backward(grad: Tensor, input: Tensor, log_sum_exp: Tensor, labels: Labels) -> Tensor:
    z = _dense(input)
    gradient = torch.empty_like(z)
    _run(1, z, labels, _dense(log_sum_exp), grad=_dense(grad), product=gradient)
    return gradient.to(input.dtype)


def cross_entropy_double_backward(
    tangent: Tensor, grad: Tensor, input: Tensor, log_sum_exp: Tensor, labels: Labels
) -> tuple[Tensor, Tensor]:
    z = _dense(input)
    for_grad, product = z.new_empty(len(z)), torch.empty_like(z)
    given = {"grad": _dense(grad), "tangent": _dense(tangent)}
    _run(2, z, labels, _dense(log_sum_exp), **given, per_row=for_grad, product=product)
    return for_grad, product.to(input.dtype)


def log_softmax(input: Tensor) -> Tensor:
    z = _dense(input)
    output = torch.empty_like(z)
    _C.log_softmax(level=0, given=z, first=output)
    return output.to(input.dtype)


def log_softmax_backward(grad: Tensor, output: Tensor) -> Tensor:
    y = _dense(output)
    gradient = torch.empty_like(y)
    _C.log_softmax(level=1, given=y, grad=_dense(grad), first=gradient)
    return gradient.to(output.dtype)


def log_softmax_double_backward(tangent: Tensor, grad: Tensor, output: Tensor) -> tuple[Tensor, Tensor]:
    y = _dense(output)
    for_grad, product = torch.empty_like(y), torch.empty_like(y)
    _C.log_softmax(level=2, given=y, grad=_dense(grad), tangent=_dense(tangent), first=for_grad, second=product)
    return for_grad.to(output.dtype), product.to(output.dtype)


def _dense(tensor: Tensor) -> Tensor:
    return tensor.detach().resolve_neg().to(accumulated(tensor.dtype)).contiguous()


def _run(level: int, z: Tensor, labels: Labels, log_sum_exp: Tensor, **tensors: Tensor) -> None:
    weight = None if labels.weight is None else labels.weight.detach().to(z.dtype).contiguous()
    bad = _C.cross_entropy(
        level=level,
        logits=z,
        target=labels.target.contiguous(),
        weight=weight,
        weight_total=float(z.shape[1]) if weight is None else float(weight.sum(dtype=torch.float64)),
        ignored=labels.ignore_index,
        smoothing=labels.label_smoothing,
        log_sum_exp=log_sum_exp,
        **tensors,
    )
    if bad >= 0:
        raise out_of_range(int(labels.target[bad]), bad, z.shape[1])
