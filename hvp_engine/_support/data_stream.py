"""Endless streams of batches from loaders, with positions that can be saved and restored."""

from __future__ import annotations

import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from hvp_engine._support.mappings import map_leaves
from hvp_engine._support.pytree import flatten_batch
from hvp_engine._support.random_state import RandomState, random_state_kept, seed_everything
from hvp_engine.errors import CheckpointError

_END = object()


class Batches:
    """Batches of a re-iterable loader, epoch after epoch, moved to a device.

    Each epoch draws a seed from torch's global generator. While the loader runs, the global generators (torch, Python,
    numpy) are replaced by ones that started from this seed. So shuffling and augmentation neither disturb the random
    draws outside nor depend on them, and an epoch can be replayed up to any batch.

    Arguments:
        loader: a DataLoader, a list of batches (one element: full batch), or any re-iterable. If it has both
            `state_dict` and `load_state_dict`, they save and restore its position; otherwise the epoch is replayed.
            `torch.Generator`s of a DataLoader and its samplers are restored, and `sampler.set_epoch` is called.
        device: where the batches' tensors go.
        name: the loader's name in messages.

    A loader with hidden random state (a generator inside the dataset, persistent workers that augment) cannot be
    replayed; restoring its position warns if the last batch differs.
    """

    def __init__(self, loader: Iterable[Any], device: torch.device, name: str):
        if isinstance(loader, Tensor | Mapping | str) or not isinstance(loader, Iterable):
            raise TypeError(
                f"{name}: expected a loader (an iterable of batches); got {type(loader).__name__}: "
                "for a full batch pass [batch]"
            )
        if isinstance(loader, Iterator):
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
        """Start an iteration of the loader, which may draw random numbers."""
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

    def state_dict(self) -> dict[str, Any]:
        """The position as tensors and plain values; the last batch is represented by a checksum."""
        return self.position()()

    def position(self) -> Callable[[], dict[str, Any]]:
        """A function that returns :meth:`state_dict` as of now, whenever it is called; until then it costs nothing."""
        state = {
            "epoch": self.epoch,
            "taken": self.taken,
            "seed": self._seed,
            "generators": list(self._at_start),
            "generators_now": [generator.get_state() for generator in self._generators],
        }
        loader = self.loader.state_dict() if self._stateful else None  # type: ignore[attr-defined]
        random, last = self._random if self._stateful else None, self._last
        return lambda: {
            **state,
            "random": None if random is None else random.state_dict(),
            "loader": loader,
            "checksum": _checksum(last),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a saved position.

        Cost: a loader without `state_dict` loads the batches of its epoch so far again.

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
        if not self._stateful:
            self._replay(state)
            return
        self.epoch, self.taken, self._seed = state["epoch"], state["taken"], state["seed"]
        self.loader.load_state_dict(state["loader"])  # type: ignore[attr-defined]
        with random_state_kept(self.device):
            self._iterate()
        self._random = RandomState.from_state_dict(state["random"])

    def _replay(self, state: dict[str, Any]) -> None:
        if state["epoch"] > 0 and getattr(self.loader, "persistent_workers", False):
            # Only the first iteration starts the workers, for which it draws a seed: the epoch to replay did not.
            with random_state_kept(self.device):
                iter(self.loader)
        for generator, start in zip(self._generators, state["generators"], strict=True):
            generator.set_state(start)
        self._begin(state["epoch"], state["seed"])
        for taken in range(state["taken"]):
            if self._draw() is _END:
                raise CheckpointError(
                    f"{self.name}: expected at least {state['taken']} batches in an epoch, as when the checkpoint "
                    f"was written; got {taken}: pass the same data in batches of the same size"
                )
        now = state.get("generators_now", ())  # they differ where loaders share one; older files do not have them
        for generator, last in zip(self._generators, now, strict=False):
            generator.set_state(last)
        if _checksum(self._last) != state["checksum"]:
            warnings.warn(
                f"{self.name}: replaying the epoch gave another batch than when the checkpoint was written, so the "
                "run does not continue exactly: pass the same data, and a loader whose random numbers come from "
                "torch's, Python's or numpy's global generator, or one with state_dict and load_state_dict",
                stacklevel=2,
            )


class Streams:
    """The streams of a tuner, by name. Each goes on where it stopped if it is opened again with the same loader."""

    def __init__(self, device: torch.device):
        self._device = device
        self._open: dict[str, Batches] = {}
        self._saved: dict[str, Any] = {}  # positions that wait for their loaders

    def open(self, name: str, loader: Iterable[Any], label: str) -> Batches:
        """The stream `name` over `loader`, at its saved position if there is one; `label` is for messages."""
        stream = self._open.get(name)
        if stream is None or stream.loader is not loader:
            stream = Batches(loader, self._device, label)
            if name in self._saved:
                stream.load_state_dict(self._saved[name])
                del self._saved[name]  # only now: the caller may pass another loader if this one was refused
            self._open[name] = stream
        return stream

    def close(self, name: str) -> None:
        """Forget a stream and its saved position: the next one of this name begins anew."""
        self._open.pop(name, None)
        self._saved.pop(name, None)

    def position(self) -> Callable[[], dict[str, Any]]:
        """A function that returns the positions as of now, whenever it is called."""
        positions, saved = {name: stream.position() for name, stream in self._open.items()}, dict(self._saved)
        return lambda: {name: position() for name, position in positions.items()} | saved

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from saved positions."""
        self._open, self._saved = {}, dict(state)


def _generators_of(loader: Any) -> list[torch.Generator]:
    """The generators that were passed to a DataLoader and its samplers."""
    batch_sampler = getattr(loader, "batch_sampler", None)
    holders = [loader, getattr(loader, "sampler", None), batch_sampler, getattr(batch_sampler, "sampler", None)]
    found = [getattr(holder, "generator", None) for holder in holders]
    return list({id(generator): generator for generator in found if isinstance(generator, torch.Generator)}.values())


def _checksum(batch: Any) -> int:
    """A checksum of all dense tensors of a batch."""
    checksum = 0
    for leaf in flatten_batch(batch)[0]:
        if isinstance(leaf, Tensor) and leaf.layout == torch.strided:
            data = leaf.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
            checksum = zlib.crc32(data.numpy().tobytes(), checksum)
    return checksum
