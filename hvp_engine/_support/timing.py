"""Time spent on a device, measured without making the host wait at each reading."""

from __future__ import annotations

import time

import torch


class Moment:
    """A point in time; on a GPU, the point when the device reaches what was queued so far."""

    def __init__(self, device: torch.device):
        self._event: torch.cuda.Event | None = None
        self._seconds = time.perf_counter()
        if device.type == "cuda":
            self._event = torch.cuda.Event(enable_timing=True)
            self._event.record(torch.cuda.current_stream(device))

    def seconds_since(self, earlier: Moment) -> float:
        """Seconds from `earlier` to this moment; waits until the device has reached this one."""
        if self._event is None or earlier._event is None:
            return self._seconds - earlier._seconds
        self._event.synchronize()
        return earlier._event.elapsed_time(self._event) / 1e3
