"""What a tuner does around its hypergradients as CUDA graphs, in parts: training gradients, steps of optimizers.

It is recorded as it runs without graphs, so it gives the same numbers. To record it runs it a few times; what that
changes is put back.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hvp_engine._support.flat_vector import detached
from hvp_engine._support.torch_compat import foreach_copy_
from hvp_engine.engines.recording import Body, CaptureError, Recording, copies
from hvp_engine.engines.replays import Counted

Grads = Sequence[Tensor | None]

_FEW, _CHANCES = 10, 3
"""A recording was in vain if it could not be made, or came to fewer replays than this before it was outdated. After so
many in a row no more are made: each takes as long as several steps."""


@contextlib.contextmanager
def kept(tensors: Sequence[Tensor]) -> Iterator[None]:
    """The tensors have their values back after the block."""
    before = [tensor.detach().clone() for tensor in tensors]
    try:
        yield
    finally:
        if before:
            foreach_copy_(detached(tensors), before)


@dataclass
class Take:
    """A recording, the tensors that it reads instead of what it is called with, and how often it was replayed."""

    recording: Recording
    inputs: list[Tensor]
    replays: int = 0


class Replayed:
    """What is recorded and replayed, as long as that does some good.

    Attributes:
        name: for the report.
        reason: why it is not, or was not at last.
    """

    def __init__(self, name: str, recorder: Counted):
        self.name, self.reason = name, ""
        self._recorder, self._chances = recorder, _CHANCES
        self._made = self._replays = 0

    def __del__(self) -> None:
        self._recorder.retire()

    def report(self) -> str:
        """One line."""
        found = f"{self.name}: {self._made} graphs, {self._replays} replays"
        return f"{found}; otherwise without, since {self.reason}" if self.reason else found

    def refuse(self, reason: str) -> None:
        """Make no more recordings."""
        self.reason, self._chances = reason, 0

    def _fail(self, reason: str) -> None:
        self.reason, self._chances = reason, self._chances - 1

    def _record(self, body: Body, inputs: Sequence[Tensor], changes: Sequence[Tensor]) -> Take:
        """A recording of a body that reads these inputs, whose changes of tensors are taken back.

        Raises :class:`CaptureError`, or `torch.OutOfMemoryError` as memory for it is taken.
        """
        self._recorder.order()
        with torch.no_grad(), kept(changes):
            take = Take(self._recorder.record(body), list(inputs))
        self._made += 1
        return take

    def _play(self, take: Take, inputs: Sequence[Tensor]) -> list[Tensor]:
        """What the recording gives for these inputs."""
        self._recorder.order()
        with torch.no_grad():
            if inputs:
                foreach_copy_(take.inputs, detached(inputs))
            take.recording.replay()
            take.replays, self._replays = take.replays + 1, self._replays + 1
            return copies(take.recording.outputs)

    def _drop(self, take: Take, reason: str) -> None:
        """The recording does not hold any more."""
        self._recorder.retire()
        if take.replays < _FEW:
            self._fail(reason)
        else:
            self.reason, self._chances = reason, _CHANCES


def first_line(error: Exception) -> str:
    """Why there is no recording."""
    text = str(error).strip().splitlines() or [""]
    return text[0] if isinstance(error, CaptureError) else f"{type(error).__name__}: {text[0]}"
