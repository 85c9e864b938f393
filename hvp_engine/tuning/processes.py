"""What a tuning run needs from the other processes of a distributed run; nothing if there is only one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hvp_engine._support.dtensor import Shard
from hvp_engine.distributed import DataParallel, Processes, ShardedList
from hvp_engine.tuning.optimizer_step import Grads, global_norm


class OneProcess:
    """A run in a single process: no communication."""

    clock_is_shared = True

    def together(self) -> AbstractContextManager[None]:
        """A block whose exceptions are raised in every process."""
        return nullcontext()

    def gather(self, number: float) -> list[float]:
        """The number of every process."""
        return [number]

    def own(self, path: str | Path) -> Path:
        """The checkpoint file of this process."""
        return Path(path)

    def norm_of(self, tensors: Sequence[Tensor], shards: Sequence[Shard | None] | None) -> Callable[[Grads], Tensor]:
        """The norm of gradients of these tensors."""
        return global_norm


class ManyProcesses(OneProcess):
    """The processes of a torch.distributed group; all must make the same calls in the same order.

    Beside the sums of the losses a training step takes two small messages and a hyper step three.
    """

    clock_is_shared = False

    def __init__(self, processes: Processes, device: torch.device):
        self._processes, self._device = processes, device

    def together(self) -> AbstractContextManager[None]:
        return self._processes.together(self._device)

    def gather(self, number: float) -> list[float]:
        return self._processes.gather(number, self._device)

    def own(self, path: str | Path) -> Path:
        path = Path(path)
        return path.with_name(f"{path.stem}-{self._processes.rank}-of-{self._processes.count}{path.suffix}")

    def norm_of(self, tensors: Sequence[Tensor], shards: Sequence[Shard | None] | None) -> Callable[[Grads], Tensor]:
        return ShardedList(self._processes, tensors, shards).norm


def processes_of(loss: Any, device: torch.device) -> OneProcess:
    """The processes that evaluate `loss` together."""
    return ManyProcesses(loss.processes, device) if isinstance(loss, DataParallel) else OneProcess()
