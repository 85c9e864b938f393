"""Cross-entropy and log-softmax of rows, and their two derivatives, in plain torch: what the kernels compute.

With q_c = (1 - label_smoothing) w_y [c = y] + label_smoothing / C w_c, a = sum q and p = softmax(z), a row z of label y
has the loss a logsumexp(z) - sum q z, with the derivative a p - q. Rows of label `ignore_index` have none.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from hvp_engine.differentiable.registration import accumulated


class Labels(NamedTuple):
    """What the labels are, and what they count for."""

    target: Tensor
    weight: Tensor | None
    ignore_index: int
    label_smoothing: float

    def of_rows(self, rows: slice) -> Labels:
        return self._replace(target=self.target[rows])


def label_weights(
    logits: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int, label_smoothing: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(w, (1 - label_smoothing) w_y, a); the last two are zero where the label is ignored."""
    classes, kept = logits.shape[1], target != ignore_index
    weights = logits.new_ones(classes) if weight is None else weight.to(logits.dtype)
    at_label = (1 - label_smoothing) * weights[target.where(kept, 0)]
    spread = label_smoothing / classes * weights.sum()
    return weights, at_label.where(kept, 0.0), (at_label + spread).where(kept, 0.0)


def _targets(logits: Tensor, labels: Labels) -> tuple[Tensor, Tensor, Tensor]:
    """(q, whether the row has a label, a); q and a are zero where it has none."""
    kept = labels.target != labels.ignore_index
    weights, at_label, a = label_weights(logits, *labels)
    hot = torch.zeros_like(logits).scatter(1, labels.target.where(kept, 0).unsqueeze(1), at_label.unsqueeze(1))
    return torch.where(kept.unsqueeze(1), hot + labels.label_smoothing / logits.shape[1] * weights, 0.0), kept, a


def cross_entropy(input: Tensor, labels: Labels) -> tuple[Tensor, Tensor]:
    """(losses, logsumexp) of rows of logits."""
    _check_labels(input, labels)
    z = input.to(accumulated(input.dtype))
    q, kept, a = _targets(z.detach(), labels)
    lse = z.logsumexp(1)
    losses = a * lse - (q * z.where(q != 0, 0.0)).sum(1)
    return losses.where(kept, 0.0), lse


def cross_entropy_backward(grad: Tensor, input: Tensor, log_sum_exp: Tensor, labels: Labels) -> Tensor:
    """grad (a p - q)."""
    z = input.to(grad.dtype)
    q, kept, a = _targets(z.detach(), labels)
    return torch.where(kept.unsqueeze(1), grad.unsqueeze(1) * (a.unsqueeze(1) * z.softmax(1) - q), 0.0).to(input.dtype)


def cross_entropy_double_backward(
    tangent: Tensor, grad: Tensor, input: Tensor, log_sum_exp: Tensor, labels: Labels
) -> tuple[Tensor, Tensor]:
    """The derivatives of sum tangent cross_entropy_backward for `grad` and for `input`."""
    z, t = input.to(grad.dtype), tangent.to(grad.dtype)
    q, kept, a = _targets(z.detach(), labels)
    p = z.softmax(1)
    mean = (p * t).sum(1)
    for_grad = torch.where(kept, a * mean - (q * t).sum(1), 0.0)
    product = (grad * a).unsqueeze(1) * p * (t - mean.unsqueeze(1))
    return for_grad, torch.where(kept.unsqueeze(1), product, 0.0).to(input.dtype)


def log_softmax(input: Tensor) -> Tensor:
    """z - logsumexp(z)."""
    return input.to(accumulated(input.dtype)).log_softmax(1).to(input.dtype)


def log_softmax_backward(grad: Tensor, output: Tensor) -> Tensor:
    """grad - exp(output) sum(grad)."""
    g, y = (tensor.to(accumulated(output.dtype)) for tensor in (grad, output))
    return (g - y.exp() * g.sum(1, keepdim=True)).to(output.dtype)


def log_softmax_double_backward(tangent: Tensor, grad: Tensor, output: Tensor) -> tuple[Tensor, Tensor]:
    """The derivatives of sum tangent log_softmax_backward for `grad` and for `output`."""
    t, g, y = (tensor.to(accumulated(output.dtype)) for tensor in (tangent, grad, output))
    weighted = y.exp() * t
    for_grad, for_output = t - weighted.sum(1, keepdim=True), -g.sum(1, keepdim=True) * weighted
    return for_grad.to(output.dtype), for_output.to(output.dtype)


def linear_cross_entropy_double_backward(
    input_tangent: Tensor | None,
    weight_tangent: Tensor | None,
    bias_tangent: Tensor | None,
    grad: Tensor,
    input: Tensor,
    linear_weight: Tensor,
    bias: Tensor | None,
    log_sum_exp: Tensor,
    labels: Labels,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The derivatives of the first derivative of a linear layer's cross-entropy for `grad` and what it is taken for."""
    wide = accumulated(input.dtype)
    h, w = input.to(wide), linear_weight.to(wide)
    z = h @ w.T if bias is None else h @ w.T + bias
    t, zero = torch.zeros_like(z), z.new_zeros(())
    s, weights = (zero if x is None else x.to(wide) for x in (input_tangent, weight_tangent))
    if input_tangent is not None:
        t = t + s @ w.T
    if weight_tangent is not None:
        t = t + h @ weights.T
    if bias_tangent is not None:
        t = t + bias_tangent
    d = cross_entropy_backward(grad, z, log_sum_exp, labels)
    for_grad, e = cross_entropy_double_backward(t, grad, z, log_sum_exp, labels)
    for_input, for_weight = e @ w, e.T @ h
    if weight_tangent is not None:
        for_input = for_input + d @ weights
    if input_tangent is not None:
        for_weight = for_weight + d.T @ s
    return for_grad, for_input.to(input.dtype), for_weight.to(linear_weight.dtype), e.sum(0).to(linear_weight.dtype)


def _check_labels(input: Tensor, labels: Labels) -> None:
    target = labels.target
    bad = (target != labels.ignore_index) & ((target < 0) | (target >= input.shape[1]))
    if bad.any():
        row = int(bad.nonzero()[0])
        raise out_of_range(int(target[row]), row, input.shape[1])


def out_of_range(label: int, row: int, classes: int) -> IndexError:
    """The error for a label that is none of the classes."""
    return IndexError(
        f"target: expected classes from 0 to {classes - 1}, or ignore_index; got {label} in row {row}: pass "
        "ignore_index for rows without a label"
    )
