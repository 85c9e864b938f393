"""Endless streams of batches, restored at any position."""

from __future__ import annotations

import random
import warnings
from collections.abc import Iterator
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, TensorDataset

from hvp_engine._support.data_stream import Batches
from hvp_engine.errors import CheckpointError

CPU = torch.device("cpu")
NUMBERS = torch.arange(10.0)


class Noisy(Dataset):
    """Augments with each of the global generators that datasets use."""

    def __len__(self) -> int:
        return 10

    def __getitem__(self, index: int) -> Tensor:
        return index + torch.rand(()) + random.random() + numpy.random.rand()


class Counted(DataLoader):
    """Records the epochs that its sampler was told."""

    def __init__(self) -> None:
        super().__init__(TensorDataset(NUMBERS), batch_size=5)
        self.sampler.set_epoch = self.epochs_append  # type: ignore[attr-defined]
        self.epochs: list[int] = []

    def epochs_append(self, epoch: int) -> None:
        self.epochs.append(epoch)


class Stateful:
    """A loader in random order that saves its own position."""

    def __init__(self) -> None:
        self.taken = 0
        self.loaded = False
        self.order = torch.arange(4)

    def __iter__(self) -> Iterator[Tensor]:
        if not self.loaded:
            self.taken, self.order = 0, torch.randperm(4)
        self.loaded = False
        while self.taken < 4:
            self.taken += 1
            yield self.order[self.taken - 1] + torch.rand(())

    def state_dict(self) -> dict[str, Any]:
        return {"taken": self.taken, "order": self.order.clone()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.taken, self.order, self.loaded = state["taken"], state["order"], True


LOADERS = {
    "list": lambda: [NUMBERS[:4], NUMBERS[4:7], NUMBERS[7:]],
    "shuffled": lambda: DataLoader(TensorDataset(NUMBERS), batch_size=4, shuffle=True),
    "augmented": lambda: DataLoader(Noisy(), batch_size=3, shuffle=True),
    "own generator": lambda: DataLoader(
        TensorDataset(NUMBERS), batch_size=4, shuffle=True, generator=torch.Generator().manual_seed(3)
    ),
    "stateful": Stateful,
}


def stream(loader: Any) -> Batches:
    return Batches(loader, CPU, "loader")


def same(one: Any, other: Any) -> bool:
    one, other = (item if isinstance(item, list) else [item] for item in (one, other))
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("name", LOADERS)
def test_any_position_is_found_again(name: str) -> None:
    """A new loader continues with the same batches, also across epochs, whatever the state of the global generators."""
    for taken in range(14):
        torch.manual_seed(taken)
        original = stream(LOADERS[name]())
        original.take(taken)
        state, outside = original.state_dict(), torch.get_rng_state()
        expected = original.take(6)
        torch.manual_seed(99), random.seed(99), numpy.random.seed(99)
        again = stream(LOADERS[name]())
        again.load_state_dict(state)
        torch.set_rng_state(outside)
        assert (again.epoch, again.taken) == (state["epoch"], state["taken"])
        assert all(same(a, b) for a, b in zip(again.take(6), expected, strict=True)), f"after {taken} batches"


@pytest.mark.parametrize("taken", [2, 4, 5, 9])
@pytest.mark.parametrize("dataset, persistent", [(Noisy(), False), (TensorDataset(NUMBERS), False), (NUMBERS, True)])
def test_workers_replay(dataset: Any, persistent: bool, taken: int) -> None:
    """Those that persist, in the order of the sampler alone: what they draw themselves goes on from epoch to epoch."""

    def loader() -> DataLoader:
        return DataLoader(dataset, batch_size=3, shuffle=True, num_workers=1, persistent_workers=persistent)

    torch.manual_seed(0), random.seed(0), numpy.random.seed(0)
    original = stream(loader())
    original.take(taken)
    state, outside = original.state_dict(), torch.get_rng_state()
    expected = original.take(9)
    torch.manual_seed(99)
    again = stream(loader())
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        again.load_state_dict(state)
    torch.set_rng_state(outside)
    assert all(same(a, b) for a, b in zip(again.take(9), expected, strict=True))


@pytest.mark.parametrize("taken", range(1, 12))
def test_loaders_that_share_a_generator_are_found_again(taken: int) -> None:
    """Epochs of either begin where the other's last one left the generator."""

    def make() -> list[Batches]:
        generator = torch.Generator().manual_seed(3)
        loaders = [DataLoader(NUMBERS, size, shuffle=True, generator=generator) for size in (4, 5)]
        return [Batches(loader, CPU, "loader") for loader in loaders]

    def draw(streams: list[Batches], rounds: int) -> list[Tensor]:
        return [stream.next() for _ in range(rounds) for stream in streams]

    straight, resumed = make(), make()
    draw(straight, taken)
    states = [stream.state_dict() for stream in straight]
    expected = draw(straight, 12)
    for stream, state in zip(resumed, states, strict=True):
        stream.load_state_dict(state)
    assert all(torch.equal(a, b) for a, b in zip(draw(resumed, 12), expected, strict=True))


def test_other_random_draws_are_neither_disturbed_nor_felt() -> None:
    def run(disturb: bool) -> tuple[list[Any], Tensor]:
        torch.manual_seed(5), random.seed(5), numpy.random.seed(5)
        batches, drawn = stream(LOADERS["augmented"]()), []
        for _ in range(4):  # one epoch
            drawn.append(batches.next())
            if disturb:
                torch.rand(7), random.random(), numpy.random.rand()
        return drawn, torch.rand(3)

    quiet, after = run(False)
    noisy, _ = run(True)
    assert all(same(a, b) for a, b in zip(quiet, noisy, strict=True))
    torch.manual_seed(5), random.seed(5), numpy.random.seed(5)
    torch.empty((), dtype=torch.int64).random_()  # the stream draws the seed of its epoch and nothing else
    assert torch.equal(after, torch.rand(3))


def test_lists_draw_nothing() -> None:
    before = torch.get_rng_state()
    stream([1, 2]).take(7)
    assert torch.equal(before, torch.get_rng_state())


def test_samplers_are_told_the_epoch_also_when_it_is_replayed() -> None:
    loader = Counted()
    batches = stream(loader)
    batches.take(5)
    assert loader.epochs == [0, 1, 2]
    again = Counted()
    stream(again).load_state_dict(batches.state_dict())
    assert again.epochs == [2]


def test_a_loader_with_hidden_random_state_is_noticed() -> None:
    class Hidden:
        def __init__(self, seed: int):
            self.secret = torch.Generator().manual_seed(seed)

        def __iter__(self) -> Iterator[Tensor]:
            return iter(torch.rand(4, generator=self.secret))

    original = stream(Hidden(1))
    original.take(2)
    with pytest.warns(UserWarning, match="^loader: replaying the epoch gave another batch.*does not continue exactly"):
        stream(Hidden(2)).load_state_dict(original.state_dict())


def test_loaders_that_cannot_be_the_ones_of_the_checkpoint() -> None:
    original = stream([1, 2, 3])
    original.take(3)
    with pytest.raises(CheckpointError, match="^loader: expected at least 3 batches in an epoch.*got 2"):
        stream([1, 2]).load_state_dict(original.state_dict())
    with pytest.raises(CheckpointError, match=r"^loader: expected a loader without state_dict\(\).*got one with it"):
        stream(Stateful()).load_state_dict(original.state_dict())
    with pytest.raises(CheckpointError, match=r"^loader: expected a loader with state_dict\(\).*got one without it"):
        stream([1]).load_state_dict(stream(Stateful()).state_dict())
    shuffled = stream(LOADERS["own generator"]())
    shuffled.next()
    with pytest.raises(CheckpointError, match="^loader: expected a loader with 1 generators.*got one with 0"):
        stream([1]).load_state_dict(shuffled.state_dict())


def test_begin_again_and_count_epochs() -> None:
    batches = stream([1, 2, 3])
    assert batches.take(7) == [1, 2, 3, 1, 2, 3, 1]
    assert batches.epoch == 2


def test_reshuffle() -> None:
    torch.manual_seed(0)
    batches = stream(DataLoader(list(range(50)), batch_size=50, shuffle=True))
    first, second = batches.next(), batches.next()
    assert not torch.equal(first, second)
    assert torch.equal(first.sort().values, second.sort().values)


def test_move_tensors_only() -> None:
    batch = Batches([{"x": torch.zeros(2), "name": "a"}], torch.device("meta"), "loader").next()
    assert batch["x"].device.type == "meta" and batch["name"] == "a"


def endless() -> Iterator[int]:
    while True:
        yield 0


@pytest.mark.parametrize(
    ("loader", "error", "message"),
    [
        (torch.zeros(3), TypeError, r"^loader: expected a loader.*for a full batch pass \[batch\]"),
        (3, TypeError, r"^loader: expected a loader.*got int"),
        (endless(), TypeError, r"^loader: expected a loader that can be iterated again; got an iterator"),
    ],
    ids=["tensor", "number", "iterator"],
)
def test_refuse(loader: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        stream(loader)


def test_making_a_stream_does_not_iterate() -> None:
    before = torch.get_rng_state()
    stream(LOADERS["shuffled"]())
    assert torch.equal(before, torch.get_rng_state())
