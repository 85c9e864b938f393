"""Moments whose distance is what the device was busy for, without making it wait."""

from __future__ import annotations

import time

import torch


class Moment:
    """Now, in the order of what was handed to the device."""

    def __init__(self, device: torch.device):
        self._event: torch.cuda.Event | None = None
        self._seconds = time.perf_counter()
        if device.type == "cuda":
            self._event = torch.cuda.Event(enable_timing=True)
            self._event.record(torch.cuda.current_stream(device))

    def seconds_since(self, earlier: Moment) -> float:
        """Seconds between two moments; waits until the later one has come."""
        if self._event is None or earlier._event is None:
            return self._seconds - earlier._seconds
        self._event.synchronize()
        return earlier._event.elapsed_time(self._event) / 1e3
