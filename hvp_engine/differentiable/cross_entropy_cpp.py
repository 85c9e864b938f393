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
    _refuse(_C.cross_entropy(losses, lse, z, *_settings(z, labels)), labels, z)
    return losses, lse


def cross_entropy_backward(grad: Tensor, input: Tensor, log_sum_exp: Tensor, labels: Labels) -> Tensor:
    z = _dense(input)
    found = torch.empty_like(z)
    given = _dense(grad), _dense(log_sum_exp), z, *_settings(z, labels)
    _refuse(_C.cross_entropy_backward(found, *given), labels, z)
    return found.to(input.dtype)


def cross_entropy_double_backward(
    tangent: Tensor, grad: Tensor, input: Tensor, log_sum_exp: Tensor, labels: Labels
) -> tuple[Tensor, Tensor]:
    z = _dense(input)
    for_grad, product = z.new_empty(len(z)), torch.empty_like(z)
    given = _dense(tangent), _dense(grad), _dense(log_sum_exp), z, *_settings(z, labels)
    _refuse(_C.cross_entropy_double_backward(for_grad, product, *given), labels, z)
    return for_grad, product.to(input.dtype)


def log_softmax(input: Tensor) -> Tensor:
    z = _dense(input)
    output = torch.empty_like(z)
    _C.log_softmax(output, z)
    return output.to(input.dtype)


def log_softmax_backward(grad: Tensor, output: Tensor) -> Tensor:
    y = _dense(output)
    gradient = torch.empty_like(y)
    _C.log_softmax_backward(gradient, _dense(grad), y)
    return gradient.to(output.dtype)


def log_softmax_double_backward(tangent: Tensor, grad: Tensor, output: Tensor) -> tuple[Tensor, Tensor]:
    y = _dense(output)
    for_grad, product = torch.empty_like(y), torch.empty_like(y)
    _C.log_softmax_double_backward(for_grad, product, _dense(tangent), _dense(grad), y)
    return for_grad.to(output.dtype), product.to(output.dtype)


def _dense(tensor: Tensor) -> Tensor:
    return tensor.detach().resolve_neg().to(accumulated(tensor.dtype)).contiguous()


def _settings(z: Tensor, labels: Labels) -> tuple[Tensor, Tensor | None, float, int, float]:
    target, weight, ignore_index, label_smoothing = labels
    weights = None if weight is None else weight.detach().to(z.dtype).contiguous()
    total = float(z.shape[1]) if weights is None else float(weights.sum(dtype=torch.float64))
    return target.contiguous(), weights, total, ignore_index, label_smoothing


def _refuse(bad: int, labels: Labels, z: Tensor) -> None:
    if bad >= 0:
        raise out_of_range(int(labels.target[bad]), bad, z.shape[1])
