"""Functions of torch whose kernels have no second derivative, by operations that have one.

:data:`FORMULAS` has one for each such operator of torch 2.13 with a short formula (a test walks all operators). The
values and first derivatives are torch's, also at kinks, where both take a derivative of zero.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional


def hardsigmoid(input: Tensor, inplace: bool = False) -> Tensor:
    """min(max(x + 3, 0), 6) / 6."""
    output = functional.hardtanh(input + 3, 0.0, 6.0) / 6
    return input.copy_(output) if inplace else output


def cdist(x1: Tensor, x2: Tensor, p: float = 2.0, compute_mode: str = "use_mm_for_euclid_dist_if_necessary") -> Tensor:
    """||x1[..., i, :] - x2[..., j, :]||_p, from all differences at once.

    Where torch takes the distances from a matrix product, as it does by default for more than 25 vectors, it is
    differentiable already, and needs less memory.
    """
    large = compute_mode != "donot_use_mm_for_euclid_dist" and max(x1.shape[-2], x2.shape[-2]) > 25
    if p == 2 and (large or compute_mode == "use_mm_for_euclid_dist"):
        return torch.cdist(x1, x2, p, compute_mode)
    return _norm(x1.unsqueeze(-2) - x2.unsqueeze(-3), p)


def pdist(input: Tensor, p: float = 2.0) -> Tensor:
    """||x[i] - x[j]||_p for i < j."""
    first, second = torch.triu_indices(len(input), len(input), 1, device=input.device).unbind()
    return _norm(input[first] - input[second], p)


def multi_margin_loss(
    input: Tensor,
    target: Tensor,
    p: int = 1,
    margin: float = 1.0,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Tensor:
    """weight[y] / C sum_{i != y} max(0, margin - x[y] + x[i])^p."""
    index = target.unsqueeze(-1)
    terms = (margin - input.gather(-1, index) + input).relu().pow(p)
    if weight is not None:
        terms = terms * weight[index]
    losses = terms.scatter(-1, index, 0.0).sum(-1) / input.shape[-1]
    return _reduced(losses, size_average, reduce, reduction)


def multilabel_margin_loss(
    input: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Tensor:
    """1 / C sum max(0, 1 - x[y] + x[i]) over the labels y, which stand before the first -1, and all other classes i."""
    listed = (target >= 0).cumprod(-1).bool()
    labels = target.where(listed, 0)
    is_label = torch.zeros_like(target).scatter_add(-1, labels, listed.to(target.dtype)) > 0
    terms = (1 - input.gather(-1, labels).unsqueeze(-1) + input.unsqueeze(-2)).relu()
    counted = listed.unsqueeze(-1) & ~is_label.unsqueeze(-2)
    losses = terms.where(counted, 0.0).sum((-2, -1)) / input.shape[-1]
    return _reduced(losses, size_average, reduce, reduction)


def embedding_bag(
    input: Tensor,
    weight: Tensor,
    offsets: Tensor | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    mode: str = "mean",
    sparse: bool = False,
    per_sample_weights: Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
) -> Tensor:
    """The sum, mean or largest entries of the rows of each bag, from all rows at once, with a dense gradient."""
    if scale_grad_by_freq:  # its gradient is not the derivative
        arguments = input, weight, offsets, max_norm, norm_type, scale_grad_by_freq, mode, sparse, per_sample_weights
        return functional.embedding_bag(*arguments, include_last_offset, padding_idx)
    if input.dim() == 2:
        bags, count = torch.arange(len(input), device=input.device).repeat_interleave(input.shape[1]), len(input)
    else:
        assert offsets is not None
        starts = offsets[:-1] if include_last_offset else offsets
        positions = torch.arange(len(input), device=input.device, dtype=offsets.dtype)
        bags, count = torch.searchsorted(starts.contiguous(), positions, right=True) - 1, len(starts)
    index = input.reshape(-1)
    rows = functional.embedding(index, weight, None, max_norm, norm_type)
    used = torch.ones_like(index, dtype=torch.bool)
    if padding_idx is not None:
        used = index != padding_idx % len(weight)
    if mode == "max":
        spread = bags.unsqueeze(-1).expand_as(rows)
        lowest = rows.where(used.unsqueeze(-1), -math.inf)
        largest = lowest.new_full((count, rows.shape[1]), -math.inf).scatter_reduce(0, spread, lowest, "amax")
        return largest.where(largest > -math.inf, 0.0)
    factors = used.to(rows.dtype)
    if per_sample_weights is not None:
        factors = factors * per_sample_weights.reshape(-1)
    total = rows.new_zeros(count, rows.shape[1]).index_add(0, bags, rows * factors.unsqueeze(-1))
    if mode == "sum":
        return total
    sizes = rows.new_zeros(count).index_add(0, bags, used.to(rows.dtype))
    return total / sizes.clamp_min(1).unsqueeze(-1)


def ctc_loss(
    log_probs: Tensor,
    targets: Tensor,
    input_lengths: Tensor | Sequence[int],
    target_lengths: Tensor | Sequence[int],
    blank: int = 0,
    reduction: str = "mean",
    zero_infinity: bool = False,
) -> Tensor:
    """-log P(targets), by the forward recursion over the labels with blanks between them.

    Source: Graves et al., Connectionist Temporal Classification, ICML 2006, Eqs. 6-8.
    """
    single = log_probs.dim() == 2
    scores = log_probs.unsqueeze(1) if single else log_probs
    times, batch, _ = scores.shape
    device, never = scores.device, torch.finfo(scores.dtype).min / 4  # -inf would have derivatives of NaN
    until, lengths = (
        torch.as_tensor(given, device=device, dtype=torch.long).reshape(batch)
        for given in (input_lengths, target_lengths)
    )
    if targets.dim() == 1:  # one after another
        longest = len(targets) if single else int(max(target_lengths))
        places = (lengths.cumsum(0) - lengths).unsqueeze(1) + torch.arange(longest, device=device)
        targets = targets[places.clamp_max(max(len(targets) - 1, 0))] if len(targets) else targets.new_zeros(batch, 0)
    labels = targets.new_full((batch, 2 * targets.shape[1] + 1), blank, dtype=torch.long)
    labels[:, 1::2] = targets
    emitted = scores.gather(2, labels.expand(times, -1, -1))
    start = torch.arange(labels.shape[1], device=device) <= (lengths > 0).long().unsqueeze(1)
    log_alpha = emitted[0].where(start, never)
    other = torch.zeros_like(labels, dtype=torch.bool)
    other[:, 2:] = (labels[:, 2:] != blank) & (labels[:, 2:] != labels[:, :-2])  # the blank before it may be left out
    for time in range(1, times):
        one, two = (functional.pad(log_alpha, (steps, 0), value=never)[:, : labels.shape[1]] for steps in (1, 2))
        reached = torch.stack([log_alpha, one, two.where(other, never)]).logsumexp(0)
        log_alpha = (reached + emitted[time]).where((time < until).unsqueeze(1), log_alpha)
    last = torch.stack([2 * lengths, (2 * lengths - 1).clamp_min(0)], 1)
    ends = log_alpha.gather(1, last)
    ends = torch.stack([ends[:, 0], ends[:, 1].where(lengths > 0, never)], 1)
    losses = -ends.logsumexp(1)
    impossible = losses > -never / 2
    losses = losses.where(~impossible, 0.0 if zero_infinity else math.inf)
    if reduction == "mean":
        return (losses / lengths.clamp_min(1)).mean()
    return losses.sum() if reduction == "sum" else losses.squeeze(0) if single else losses


def _norm(differences: Tensor, p: float) -> Tensor:
    """The p-norm along the last dimension; its derivatives are zero where it is not differentiable."""
    sizes = differences.abs()
    if p == 0:
        return (sizes > 0).sum(-1).to(sizes.dtype) + 0 * sizes.sum(-1)
    if p == 1:
        return sizes.sum(-1)
    if math.isinf(p):
        return sizes.amax(-1) if sizes.shape[-1] else sizes.sum(-1)
    if p == 2:
        powers = differences.square().sum(-1)
    else:  # |0|^p has no second derivative for p < 2
        powers = sizes.where(sizes > 0, 1.0).pow(p).where(sizes > 0, 0.0).sum(-1)
    return powers.where(powers > 0, 1.0).pow(1 / p).where(powers > 0, 0.0)


def _reduced(losses: Tensor, size_average: bool | None, reduce: bool | None, reduction: str) -> Tensor:
    """By `reduction`, or by the two arguments that it replaced."""
    if size_average is not None or reduce is not None:
        reduction = "none" if reduce is False else "sum" if size_average is False else "mean"
    return losses if reduction == "none" else losses.sum() if reduction == "sum" else losses.mean()


FORMULAS: dict[Callable[..., Any], Callable[..., Any]] = {
    functional.hardsigmoid: hardsigmoid,
    torch.cdist: cdist,
    torch.pdist: pdist,
    functional.multi_margin_loss: multi_margin_loss,
    functional.multilabel_margin_loss: multilabel_margin_loss,
    functional.embedding_bag: embedding_bag,
    functional.ctc_loss: ctc_loss,
}
