"""An endless stream of batches from a loader that ends, whose position can be saved and found again."""

from __future__ import annotations

import warnings
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hvp_engine._support.pytree import map_leaves
from hvp_engine._support.random_state import RandomState, random_state_kept, seed_everything
from hvp_engine._support.torch_compat import pytree
from hvp_engine.errors import CheckpointError

_END = object()


@dataclass(frozen=True)
class Position:
    """Where a stream is: `taken` batches into an epoch that began with `seed` and these states of its generators."""

    epoch: int
    taken: int
    seed: int
    generators: tuple[Tensor, ...]
    random: RandomState | None
    loader: Any
    last: Any

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values only; of the last batch a checksum."""
        return {
            "epoch": self.epoch,
            "taken": self.taken,
            "seed": self.seed,
            "generators": list(self.generators),
            "random": None if self.random is None else self.random.state_dict(),
            "loader": self.loader,
            "checksum": _checksum(self.last),
        }


class Batches:
    """Batches of a re-iterable loader, epoch after epoch, moved to a device.

    Each epoch begins with a seed drawn from torch's global generator, and the loader draws its random numbers
    (torch, Python, numpy: shuffling, augmentation) from generators of its own that start there. So they neither
    disturb other random draws nor depend on them, and an epoch can be replayed up to any batch.

    Arguments:
        loader: a DataLoader, a list of batches (one element: full batch), or any re-iterable. Its position is saved
            by its own `state_dict`/`load_state_dict` if it has both, else found again by replaying the epoch;
            `torch.Generator`s of a DataLoader and its samplers are put back, `sampler.set_epoch` is called.
        device: where the batches' tensors go.
        name: what messages call the loader.

    A loader with hidden random state (a generator inside the dataset, persistent workers that augment) cannot be
    replayed; finding its position again warns if the last batch differs.
    """

    def __init__(self, loader: Iterable[Any], device: torch.device, name: str):
        if isinstance(loader, Tensor) or not hasattr(loader, "__iter__"):
            raise TypeError(
                f"{name}: expected a loader (an iterable of batches); got {type(loader).__name__}: "
                "for a full batch pass [batch]"
            )
        if hasattr(loader, "__next__"):
            raise TypeError(f"{name}: expected a loader that can be iterated again; got an iterator: pass a list")
        self.loader, self.device, self.name = loader, device, name
        self.epoch, self.taken = -1, 0
        self._random_free = isinstance(loader, list | tuple)
        self._stateful = hasattr(loader, "state_dict") and hasattr(loader, "load_state_dict")
        self._seed = 0
        self._generators = _generators_of(loader)
        self._at_start: tuple[Tensor, ...] = ()
        self._random: RandomState | None = None
        self._last: Any = None
        self._iterator: Iterator[Any] = iter(())

    def next(self) -> Any:
        """The next batch; begins a new epoch where the loader ends."""
        batch = self._draw()
        if batch is _END:
            seed = 0 if self._random_free else int(torch.empty((), dtype=torch.int64).random_())
            self._begin(self.epoch + 1, seed)
            batch = self._draw()
        if batch is _END:
            raise ValueError(f"{self.name}: expected at least one batch; got an empty loader")
        return map_leaves(lambda tensor: tensor.to(self.device, non_blocking=True), batch)

    def take(self, count: int) -> list[Any]:
        """The next `count` batches."""
        return [self.next() for _ in range(count)]

    def _begin(self, epoch: int, seed: int) -> None:
        self.epoch, self.taken, self._seed = epoch, 0, seed
        self._at_start = tuple(generator.get_state() for generator in self._generators)
        if self._random_free:
            self._iterator = iter(self.loader)
            return
        with random_state_kept(self.device):
            seed_everything(seed, self.device)
            self._iterate()

    def _iterate(self) -> None:
        """Make the iterator; its first random numbers are drawn here."""
        set_epoch = getattr(getattr(self.loader, "sampler", None), "set_epoch", None)
        if set_epoch is not None:
            set_epoch(self.epoch)
        self._iterator = iter(self.loader)
        self._random = RandomState.now(self.device)

    def _draw(self) -> Any:
        if self._random is None:
            batch = next(self._iterator, _END)
        else:
            with random_state_kept(self.device):
                self._random.restore(self.device)
                batch = next(self._iterator, _END)
                self._random = RandomState.now(self.device)
        if batch is not _END:
            self.taken += 1
            self._last = batch
        return batch

    def position(self) -> Position:
        """Where the stream is now."""
        loader = self.loader.state_dict() if self._stateful else None  # type: ignore[attr-defined]
        random = self._random if self._stateful else None
        return Position(self.epoch, self.taken, self._seed, self._at_start, random, loader, self._last)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a saved position.

        Cost: for a loader without `state_dict`, the batches of the current epoch so far, once more.

        Errors: :class:`CheckpointError` for a loader that cannot be the one of the checkpoint.
        """
        if self._stateful != (state["loader"] is not None):
            kinds = ("without", "with") if self._stateful else ("with", "without")
            raise CheckpointError(
                f"{self.name}: expected a loader {kinds[0]} state_dict(), as when the checkpoint was written; got "
                f"one {kinds[1]} it: pass the same kind of loader"
            )
        if state["epoch"] < 0:
            return
        if len(state["generators"]) != len(self._generators):
            raise CheckpointError(
                f"{self.name}: expected a loader with {len(state['generators'])} generators, as when the checkpoint "
                f"was written; got one with {len(self._generators)}: pass the same kind of loader"
            )
        if self._stateful:
            self._resume(state)
        else:
            self._replay(state)

    def _resume(self, state: dict[str, Any]) -> None:
        self.epoch, self.taken, self._seed = state["epoch"], state["taken"], state["seed"]
        self.loader.load_state_dict(state["loader"])  # type: ignore[attr-defined]
        with random_state_kept(self.device):
            self._iterate()
        self._random = RandomState.from_state_dict(state["random"])

    def _replay(self, state: dict[str, Any]) -> None:
        for generator, start in zip(self._generators, state["generators"], strict=True):
            generator.set_state(start)
        self._begin(state["epoch"], state["seed"])
        for taken in range(state["taken"]):
            if self._draw() is _END:
                raise CheckpointError(
                    f"{self.name}: expected at least {state['taken']} batches in an epoch, as when the checkpoint "
                    f"was written; got {taken}: pass the same data in batches of the same size"
                )
        if _checksum(self._last) != state["checksum"]:
            warnings.warn(
                f"{self.name}: replaying the epoch gave another batch than when the checkpoint was written, so the "
                "run does not continue exactly: pass the same data, and a loader whose random numbers come from "
                "torch's, Python's or numpy's global generator, or one with state_dict and load_state_dict",
                stacklevel=2,
            )


def _generators_of(loader: Any) -> list[torch.Generator]:
    """The generators that a DataLoader and its samplers were given."""
    batch_sampler = getattr(loader, "batch_sampler", None)
    holders = [loader, getattr(loader, "sampler", None), batch_sampler, getattr(batch_sampler, "sampler", None)]
    found = [getattr(holder, "generator", None) for holder in holders]
    return list({id(generator): generator for generator in found if isinstance(generator, torch.Generator)}.values())


def _checksum(batch: Any) -> int:
    """A checksum of every tensor of a batch."""
    checksum = 0
    for leaf in pytree.tree_leaves(batch):
        if isinstance(leaf, Tensor) and leaf.layout == torch.strided:
            data = leaf.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
            checksum = zlib.crc32(data.numpy().tobytes(), checksum)
    return checksum
