"""Sums over processes in one message each, which also says whether a process has failed."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

import hvp_engine.errors
from hvp_engine._support.flat_vector import Layout
from hvp_engine._support.torch_compat import foreach_copy_, foreach_mul_, foreach_zero_
from hvp_engine.errors import DistributedError, HvpError

Summands = tuple[Sequence["Tensor | None"], float]
"""The tensors that a process adds to a sum, None for zero, and the factor by which they are multiplied."""

NOTHING = Layout((), (), (), torch.device("cpu"))


class Processes:
    """The processes of a torch.distributed group; each must make the same calls in the same order.

    An error that one of them raises while it computes its summands is raised in all, after the message for which the
    others are waiting, so that none waits forever. The last number of each message says whether a process failed;
    reading it waits for the device, unless that may be done one message later: see :meth:`ahead`.

    Arguments:
        group: a process group; None is the default one.

    Attributes:
        rank, count: of this process in the group, and how many there are.
        ranks: those of all processes of the group in the default group.
        messages: messages of vectors so far.
        sent: bytes that this process has sent in them by a ring algorithm, which sends the least.
    """

    def __init__(self, group: dist.ProcessGroup | None = None):
        if not (dist.is_available() and dist.is_initialized()):
            raise DistributedError(
                "group: expected an initialized process group; got none: call torch.distributed.init_process_group "
                "first, in a script started by torchrun"
            )
        self.group = group
        self.rank, self.count = dist.get_rank(group), dist.get_world_size(group)
        if self.rank < 0:
            raise DistributedError("group: expected one that this process belongs to; got one without it")
        self.ranks = dist.get_process_group_ranks(group)
        self.messages, self.sent = 0, 0.0
        self._error: BaseException | None = None
        self._ahead = False
        self._unread: _Flag | None = None

    def sum(self, layout: Layout, figures: int, compute: Callable[[Tensor], Summands]) -> tuple[list[Tensor], Tensor]:
        """Sums over all processes of the tensors of a layout, and of `figures` numbers, by one all-reduce.

        Arguments:
            compute: returns the tensors, and writes the numbers into the 1-d tensor of zeros that it is given.

        Returns both in the layout's state dtype, or numbers in float64 if there are no tensors.
        """
        dtype = layout.state_dtype if layout.shapes else torch.float64
        buffer = torch.empty(layout.size + figures + 1, dtype=dtype, device=layout.device)
        views, tail = layout.views(buffer), buffer[layout.size :]
        with self.carrying(tail) as numbers:
            write(views, *compute(numbers))
        dist.all_reduce(buffer, group=self.group)
        self.count_message(2 * buffer.nbytes / self.count)
        self.check(tail)
        return views, tail[:-1]

    @contextlib.contextmanager
    def carrying(self, tail: Tensor) -> Iterator[Tensor]:
        """A block that computes what is sent with `tail`, the last number of which will say whether it failed."""
        self._error = None
        tail.zero_()
        try:
            yield tail[:-1]
        except BaseException as raised:  # Ctrl-C too, or the others would wait forever
            self._error = raised
            tail[-1] = 1.0

    def count_message(self, part: float) -> None:
        """Count a message in which every process sends `part` bytes to each of the others."""
        self.messages += 1
        self.sent += (self.count - 1) * part

    def check(self, tail: Tensor) -> None:
        """Raise if a process failed: there its own error, in the others one of the same class that names it. In a block
        of :meth:`ahead` this is about the message before."""
        flag: _Flag | None = _Flag(tail[-1], self._error)
        self._error = None
        if self._ahead:
            flag, self._unread = self._unread, flag
        if flag is not None:
            self._raise_if(flag)

    @contextlib.contextmanager
    def ahead(self) -> Iterator[None]:
        """A block in which the failure of a process is raised one message later, or at the end: the host goes on to
        queue a product while the device is busy with the one before. Sums mean nothing until then."""
        self._ahead = True
        try:
            yield
        finally:  # after an error too, which the numbers of a failed process may have led to
            self._ahead = False
            flag, self._unread = self._unread, None
            if flag is not None:
                self._raise_if(flag)

    def _raise_if(self, flag: _Flag) -> None:
        if not flag.raised():
            return
        self._unread, error = None, flag.error
        described = None if error is None else (type(error).__name__, str(error))
        found: list[tuple[str, str] | None] = [None] * self.count
        dist.all_gather_object(found, described, group=self.group)
        if error is not None:
            raise error
        rank, (name, text) = next((rank, failure) for rank, failure in enumerate(found) if failure is not None)
        kind = vars(hvp_engine.errors).get(name)
        if not (isinstance(kind, type) and issubclass(kind, HvpError)):  # others may need more than a message
            kind, text = DistributedError, f"{name}: {text}"
        raise kind(f"process {rank} of {self.count} failed: {text}")

    @contextlib.contextmanager
    def together(self, device: torch.device) -> Iterator[None]:
        """A block at the end of which an error in one process is raised in all, by one small message."""
        tail = torch.empty(1, dtype=torch.float64, device=device)
        with self.carrying(tail):
            yield
        dist.all_reduce(tail, group=self.group)
        self.check(tail)

    def same(self, tensors: Sequence[Tensor]) -> int | None:
        """The first process whose values differ from those of process 0, by checksums; None if there is none."""
        sums = [tensor.detach().double().sum() for tensor in tensors]
        found = self._gather(torch.stack(sums)) if sums else []
        different = [not torch.equal(theirs.nan_to_num(), found[0].nan_to_num()) for theirs in found]
        return different.index(True) if any(different) else None

    def gather(self, number: float, device: torch.device) -> list[float]:
        """The numbers of all processes."""
        return torch.stack(self._gather(torch.tensor(number, dtype=torch.float64, device=device))).tolist()

    def _gather(self, mine: Tensor) -> list[Tensor]:
        found = [torch.empty_like(mine) for _ in range(self.count)]
        dist.all_gather(found, mine, group=self.group)
        return found


class _Flag:
    """Whether a process failed, read when it is needed; and what went wrong, if it was this one."""

    def __init__(self, number: Tensor, error: BaseException | None):
        self.error = error
        self._copied: torch.cuda.Event | None = None
        if number.device.type == "cpu":
            self._number = number.clone()  # a view would keep the whole message alive
        else:  # copied in the stream's order: reading waits for what came before, and for nothing after
            self._number = torch.empty((), dtype=number.dtype, pin_memory=True).copy_(number, non_blocking=True)
            self._copied = torch.cuda.Event()
            self._copied.record(torch.cuda.current_stream(number.device))

    def raised(self) -> bool:
        if self._copied is not None:
            self._copied.synchronize()
        return bool(self._number)


def write(views: Sequence[Tensor], summands: Sequence[Tensor | None], factor: float) -> None:
    """Write factor * summands into the views, zeros for None."""
    absent = [view for view, part in zip(views, summands, strict=True) if part is None]
    if absent:
        foreach_zero_(absent)
    present = [(view, part.detach()) for view, part in zip(views, summands, strict=True) if part is not None]
    if present:
        targets, parts = zip(*present, strict=True)
        foreach_copy_(targets, parts)
        if factor != 1:
            foreach_mul_(targets, factor)


def note(figures: Tensor, summands: Sequence[Tensor | None]) -> None:
    """Write into `figures` 1 for each summand that is not None, and 0 for the others."""
    figures.copy_(torch.tensor([float(part is not None) for part in summands], dtype=figures.dtype))
