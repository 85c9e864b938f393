"""Functions that are recorded at their first call, and what recording them has cost."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hvp_engine.differentiation.self_check import difference
from hvp_engine.engines.recording import Body, CaptureError, Recorder, Recording, copies


@dataclass
class Tally:
    """The cost of recording so far: how many graphs, for how many sets of buffers."""

    recordings: int = 0
    buffers: int = 0
    seconds: float = 0.0


class Counted:
    """A recorder whose recordings are counted."""

    def __init__(self, recorder: Recorder, tally: Tally):
        self.order, self.retire = recorder.order, recorder.retire
        self.recorder, self._tally = recorder, tally

    def record(self, body: Body) -> Recording:
        start = time.perf_counter()
        try:
            recording = self.recorder.record(body)
            self._tally.recordings += 1
        finally:
            self._tally.seconds += time.perf_counter() - start
        return recording


class Replay:
    """A body that is recorded at its first call and replayed from then on, or just called if it cannot be recorded."""

    def __init__(self, recorder: Counted, body: Body):
        self._recorder, self._body = recorder, body
        self._recording: Recording | None = None
        self.refusal: str | None = None

    def __call__(self) -> Sequence[Tensor]:
        if not self.ready() or self._recording is None:
            return self._body()
        self._recording.replay()
        return self._recording.outputs

    def check(self, dtypes: Iterable[torch.dtype]) -> None:
        """Compare a replay with the body, and leave it to the body from now on if they differ."""
        if self.ready():
            found = copies(self())
            apart = difference(found, self._body(), dtypes)
            if apart is not None:
                self._recording, self.refusal = None, f"its graph gives a result that differs by {apart:.2g} (relative)"

    def ready(self) -> bool:
        """Whether it is recorded; tries to record it if that has not been tried."""
        if self._recording is None and self.refusal is None:
            try:
                self.record()
            except CaptureError as error:
                self.refusal = str(error)
        return self._recording is not None

    def record(self) -> Recording:
        """Record now; :class:`CaptureError` if that is impossible."""
        self._recording = self._recorder.record(self._body)
        return self._recording
