"""What experiments do with a data set first: a stratified split, and standardized inputs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def stratified_split(labels: Tensor, sizes: Sequence[int], seed: int) -> tuple[Tensor, ...]:
    """Disjoint random sets of indices with exactly `sizes` elements, each with the class proportions of the whole.

    Arguments:
        labels: int64 (N,).
        sizes: how many elements each part gets, at most N together; the rest is left out. The number of elements of a
            class is within one of its proportion.
        seed: the same seed gives the same parts.

    Errors: `ValueError` where the sizes are negative or exceed N.

    >>> train, test = stratified_split(torch.tensor([0, 0, 1, 1, 1, 1]), (3, 3), seed=0)
    >>> len(train), len(test), len(set(train.tolist()) & set(test.tolist()))
    (3, 3, 0)
    """
    if any(size < 0 for size in sizes) or sum(sizes) > len(labels):
        raise ValueError(
            f"sizes: expected non-negative parts of at most {len(labels)} elements together; got {tuple(sizes)}"
        )
    # Each element gets its rank within its class as a fraction of the class: any run of the order by this
    # fraction holds every class in proportion. Shuffling first makes the ranks, and the ties, random.
    shuffled = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    fraction = torch.empty(len(labels), dtype=torch.float64)
    for label in labels.unique():
        members = labels[shuffled] == label
        count = int(members.sum())
        fraction[members] = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    order = shuffled[fraction.argsort(stable=True)]
    return order[: sum(sizes)].split(list(sizes))


def standardize(train: Tensor, *others: Tensor, dims: Sequence[int] = (0,)) -> tuple[Tensor, ...]:
    """(x - mean) / std of every tensor, with the mean and standard deviation of `train` alone.

    Arguments:
        train: floating, any shape; others: the same shape apart from the first dimension.
        dims: dimensions over which the statistics are taken: (0,) for each feature of a table, (0, 2, 3) for
            each channel of images. Where the standard deviation is 0, only the mean is subtracted.

    >>> standardize(torch.tensor([[1.0, 5.0], [3.0, 5.0]]), torch.tensor([[2.0, 6.0]]))
    (tensor([[-1.,  0.],
            [ 1.,  0.]]), tensor([[0., 1.]]))
    """
    std, mean = torch.std_mean(train, dim=tuple(dims), keepdim=True, correction=0)
    scale = torch.where(std > 0, std, torch.ones_like(std))
    return tuple((tensor - mean) / scale for tensor in (train, *others))
