"""An endless stream of batches from a loader that ends."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from hvp_engine.trees import map_leaves


class Batches:
    """Batches of a re-iterable loader, epoch after epoch, moved to a device.

    Arguments:
        loader: a DataLoader, a list of batches (one element: full batch), or any re-iterable.
        device: where the batches' tensors go.
        name: what messages call the loader.
    """

    def __init__(self, loader: Iterable[Any], device: torch.device, name: str):
        if isinstance(loader, Tensor) or not hasattr(loader, "__iter__"):
            raise TypeError(
                f"{name}: expected a loader (an iterable of batches); got {type(loader).__name__}: "
                "for a full batch pass [batch]"
            )
        if iter(loader) is loader:
            raise TypeError(f"{name}: expected a loader that can be iterated again; got an iterator: pass a list")
        self.loader, self.device, self.name = loader, device, name
        self.epoch = -1
        self._iterator: Iterator[Any] = iter(())

    def next(self) -> Any:
        """The next batch; begins a new epoch where the loader ends."""
        try:
            batch = next(self._iterator)
        except StopIteration:
            self.epoch += 1
            self._iterator = iter(self.loader)
            try:
                batch = next(self._iterator)
            except StopIteration:
                raise ValueError(f"{self.name}: expected at least one batch; got an empty loader") from None
        return map_leaves(lambda tensor: tensor.to(self.device, non_blocking=True), batch)
