"""A small network, decays, and batches of which each process of a test holds a part."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
from problems_with_known_answers import DTYPE, randn
from torch import Tensor, nn

import hvp_engine as hvp

EXAMPLES = 24


def network_of_any_device() -> nn.Sequential:
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).to(DTYPE)


def network() -> nn.Sequential:
    """The same in every process; its size is not a multiple of the number of processes."""
    module = network_of_any_device()
    with torch.no_grad():
        for seed, weight in enumerate(module.parameters()):
            weight.copy_(randn(*weight.shape, seed=seed))
    return module


def weights_of(module: nn.Module) -> dict[str, Tensor]:
    return {name: weight.detach().clone() for name, weight in module.named_parameters()}


def decays() -> dict[str, Tensor]:
    """One log-decay for each weight, so large that the training loss is convex nearby."""
    return {name: 0.1 * weight for name, weight in weights_of(network()).items()}


def losses(module: nn.Module) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    """Training and validation loss of one process: means over the batch, each plus a term without a batch."""
    net = hvp.functional(module)

    def data(weights: Any, batch: Any) -> Tensor:
        return nn.functional.cross_entropy(net(weights, batch[0]), batch[1])

    def decay(weights: Any, hyper: Any) -> Tensor:
        pairs = zip(weights.values(), hyper.values(), strict=True)
        return sum((d.exp() * w**2).sum() for w, d in pairs)  # type: ignore[return-value]

    def train(weights: Any, hyper: Any, batch: Any) -> Tensor:
        return data(weights, batch) + decay(weights, hyper)

    def val(weights: Any, hyper: Any, batch: Any) -> Tensor:
        return data(weights, batch) + 0.01 * decay(weights, hyper)

    return train, val


def batch(seed: int) -> tuple[Tensor, Tensor]:
    """All examples."""
    generator = torch.Generator().manual_seed(seed)
    return randn(EXAMPLES, 5, seed=seed), torch.randint(0, 3, (EXAMPLES,), generator=generator)


def shard(whole: tuple[Tensor, Tensor], rank: int, count: int) -> tuple[Tensor, Tensor]:
    """The examples of one process; all processes have equally many."""
    return whole[0][rank::count], whole[1][rank::count]


def parallel(module: nn.Module, **arguments: Any) -> tuple[hvp.DataParallel, hvp.DataParallel]:
    """Both losses over all processes."""
    train, val = losses(module)
    return hvp.DataParallel(train, **arguments), hvp.DataParallel(val, **arguments)


def gathered(value: Any) -> list[Any]:
    """One value from every process."""
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return found


def assert_same_bits(tensors: Sequence[Tensor], *values: Any) -> None:
    """Every process has the same tensors, bit for bit, and the same plain values."""
    theirs = gathered(([tensor.detach().clone() for tensor in tensors], values))
    for other, other_values in theirs:
        assert other_values == values
        assert all(torch.equal(a, b) for a, b in zip(other, tensors, strict=True))


def assert_close(ours: Any, theirs: Any, tolerance: float = 1e-10, where: Any = "") -> None:
    """Two dicts of tensors agree by the global norm."""
    distance = sum(float((ours[name] - theirs[name]).square().sum()) for name in theirs) ** 0.5
    norm = sum(float(tensor.square().sum()) for tensor in theirs.values()) ** 0.5
    assert distance <= tolerance * norm, (distance / norm, where)


def twin(module: nn.Module) -> nn.Module:
    return copy.deepcopy(module)


def compare(ours: hvp.HypergradientResult, theirs: hvp.HypergradientResult) -> None:
    """Everything agrees with one process to rounding, and between processes in every bit."""
    assert_close(ours.grads, theirs.grads)
    assert_close(ours.solution.value, theirs.solution.value)
    for name in ("train_loss", "val_loss", "gradient_norm", "unfinished"):
        torch.testing.assert_close(getattr(ours, name), getattr(theirs, name), rtol=1e-10, atol=1e-12)
    mine, other = ours.solution, theirs.solution
    assert (mine.iterations, mine.hvps, mine.status) == (other.iterations, other.hvps, other.status)
    assert (mine.alpha or 0.0) == pytest.approx(other.alpha or 0.0, rel=1e-10)
    figures = (mine.iterations, mine.hvps, mine.status.name, mine.alpha, mine.residual_norm, mine.lambda_max)
    assert_same_bits([*ours.grads.values(), *mine.value.values(), ours.train_loss, ours.val_loss], *figures)
