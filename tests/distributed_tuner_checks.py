"""Checks of a Tuner that run in every process of a group; see spawned_processes.py."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from distributed_problem import (
    assert_close,
    assert_same_bits,
    batch,
    decays,
    losses,
    network,
    parallel,
    shard,
    weights_of,
)

import hvp_engine as hvp


def small_tuner(module: torch.nn.Module, hyper: Any, pair: Any, **arguments: Any) -> hvp.Tuner:
    return hvp.Tuner(
        module,
        hyper,
        *pair,
        weight_optimizer=lambda tensors: torch.optim.Adam(tensors, lr=1e-2),
        hyper_optimizer=lambda tensors: torch.optim.RMSprop(tensors, lr=1e-2),
        inner_steps=3,
        **{"solver": hvp.Neumann(5), **arguments},
    )


def loaders(rank: int, count: int) -> tuple[list[Any], list[Any]]:
    return [shard(batch(seed), rank, count) for seed in (1, 3, 4)], [shard(batch(2), rank, count)]


def check_tuner(rank: int, count: int, folder: Path) -> None:
    module, other = network(), network()
    hyper, other_hyper = decays(), decays()
    options = {"weight_clip": 1.0, "hyper_clip": 0.5, "accumulate": 2, "train_batches": 2, "engine": "eager"}
    ours = small_tuner(module, hyper, parallel(module), **options).fit(*loaders(rank, count), 4, progress=False)
    theirs = small_tuner(other, other_hyper, losses(other), **options).fit(*loaders(0, 1), 4, progress=False)
    assert_close(weights_of(module), weights_of(other), 1e-9)
    assert_close(hyper, other_hyper, 1e-9)
    assert [record.val_loss for record in ours] == pytest.approx([record.val_loss for record in theirs], rel=1e-9)
    assert_same_bits([*module.parameters(), *hyper.values()], [record.val_loss for record in ours])


def check_tuner_resumes(rank: int, count: int, folder: Path) -> None:
    """Each process has its own file; after a kill between their writes all continue from the older state."""
    path = folder / "run.pt"
    whole, whole_hyper = network(), decays()
    small_tuner(whole, whole_hyper, parallel(whole), engine="eager").fit(*loaders(rank, count), 6, progress=False)
    for steps in (2, 4):
        module, hyper = network(), decays()
        tuner = small_tuner(module, hyper, parallel(module), engine="eager")
        tuner.fit(*loaders(rank, count), steps, progress=False, checkpoint=path)
    own = folder / f"run-{rank}-of-{count}.pt"
    assert own.exists() and not path.exists()
    if rank == 0:  # as if it had been killed before it wrote
        own.with_name(own.name + ".previous").replace(own)
    dist.barrier()
    module, hyper = network(), decays()
    tuner = small_tuner(module, hyper, parallel(module), engine="eager")
    tuner.fit(*loaders(rank, count), 6, progress=False, checkpoint=path)
    assert_same_bits([*module.parameters(), *hyper.values()])
    assert all(torch.equal(a, b) for a, b in zip(module.parameters(), whole.parameters(), strict=True))
    assert all(torch.equal(hyper[name], whole_hyper[name]) for name in hyper)
    if rank == 0:
        own.unlink()
        own.with_name(own.name + ".previous").unlink(missing_ok=True)
    dist.barrier()
    with pytest.raises(hvp.CheckpointError, match="one moment in all processes"):
        small_tuner(network(), decays(), parallel(network())).fit(
            *loaders(rank, count), 9, progress=False, checkpoint=path
        )


class _EndsBadly:
    """A loader whose third batch cannot be read."""

    def __init__(self, batches: list[Any], bad: bool):
        self._batches, self._bad = batches, bad

    def __iter__(self) -> Iterator[Any]:
        yield from self._batches[:2]
        if self._bad:
            raise OSError("a hole in the disk")
        yield from self._batches[2:]


class _Only(hvp.tuning.Callback):
    """Stops the run in one process: True from `on_fit_start`, or an error in `on_train_step`."""

    def __init__(self, here: bool, method: str):
        self._active = method if here else ""

    def on_fit_start(self, tuner: hvp.Tuner) -> bool:
        return self._active == "on_fit_start"

    def on_train_step(self, tuner: hvp.Tuner, loss: Any) -> None:
        if self._active == "on_train_step":
            raise OSError("a full disk")


def check_tuner_stops_together(rank: int, count: int, folder: Path) -> None:
    last = rank == count - 1
    train, val = loaders(rank, count)

    def fit(train: Any, **arguments: Any) -> hvp.Tuner:
        module = network()
        tuner = small_tuner(module, decays(), parallel(module), engine="eager")
        tuner.fit(train, val, 5, progress=False, **arguments)
        return tuner

    with pytest.raises(OSError if last else hvp.DistributedError, match="a hole in the disk"):
        fit(_EndsBadly(train, last))
    with pytest.raises(ZeroDivisionError if last else hvp.DistributedError, match="division"):
        fit(train, evaluate=lambda tuner: {"score": 1 / (0 if last else 1)})
    if last:
        (folder / f"taken-{rank}-of-{count}.pt").mkdir()  # where this process would write
    with pytest.raises(hvp.CheckpointError, match="it is a folder"):
        fit(train, checkpoint=folder / "taken.pt")
    assert fit(train, callbacks=[lambda tuner, record: last and record.hyper_step == 1]).hyper_steps == 2
    with pytest.raises(OSError if last else hvp.DistributedError, match="a full disk"):
        fit(train, callbacks=[_Only(last, "on_train_step")])
    assert fit(train, callbacks=[_Only(last, "on_fit_start")]).hyper_steps == 0
    early = fit(train, metric="score", patience=1, evaluate=lambda tuner: {"score": tuner.hyper_steps * last})
    assert_same_bits([], early.hyper_steps)
    assert early.hyper_steps < 5


def check_failed_hyper_steps_are_left_out_by_all(rank: int, count: int, folder: Path) -> None:
    """A batch of one process makes the hypergradient infinite: all processes leave out that hyper step and continue."""
    last = rank == count - 1
    module, hyper = network(), decays()
    train, val = loaders(rank, count)
    spoiled = (val[0][0] * (torch.nan if last else 1.0), val[0][1])
    tuner = small_tuner(module, hyper, parallel(module), engine="eager")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        history = tuner.fit(train, [val[0], spoiled], 4, progress=False)
    assert len(history) == 2
    assert_same_bits([*module.parameters(), *hyper.values()], tuner.hyper_steps)


CHECKS = [
    check_tuner,
    check_tuner_resumes,
    check_tuner_stops_together,
    check_failed_hyper_steps_are_left_out_by_all,
]
