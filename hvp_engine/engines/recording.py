"""CUDA graphs behind a narrow interface: record what a function launches on a device, and launch it all again at once.

A recording bakes in everything that the host decides: addresses, Python numbers, the path through the code. Whatever
differs between two replays has to be read from memory at a fixed address. The function does not run while it is
recorded; its outputs hold values only after a replay, and the next replay overwrites them.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Sequence
from functools import cache
from typing import Protocol

import torch
from torch import Tensor

from hvp_engine._support.random_state import random_state_kept
from hvp_engine._support.torch_compat import end_allocation_to_pool, foreach_copy_
from hvp_engine.engines.waits import WaitsRaise

Body = Callable[[], Sequence[Tensor]]
"""A function of tensors at fixed addresses."""


def copies(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Copies that no replay overwrites, made in few launches."""
    fresh = [torch.empty_like(tensor) for tensor in tensors]
    if fresh:
        foreach_copy_(fresh, list(tensors))
    return fresh


class CaptureError(RuntimeError):
    """A body that cannot be recorded; the message says why."""


class Recording(Protocol):
    """A recorded body."""

    @property
    def outputs(self) -> Sequence[Tensor]:
        """The body's results, always in the same memory."""

    def replay(self) -> None:
        """Run what was recorded. Random operations draw from the current state of the device's default generator."""


class Recorder(Protocol):
    """Makes recordings that share memory: a replay keeps the outputs of earlier recordings and may overwrite those of
    later ones."""

    @staticmethod
    def missing(device: torch.device) -> str | None:
        """Why nothing can be recorded on `device`, or None if it can."""

    def __init__(self, device: torch.device): ...

    def record(self, body: Body) -> Recording:
        """Run `body` to set up what it needs, then record it; :class:`CaptureError` if that is impossible."""

    def order(self) -> None:
        """Before the current stream uses the recordings or what they read and write: let it wait for the stream that
        used them last."""

    def retire(self) -> None:
        """Before their memory is freed, which the stream that was current at first may then reuse: let that one wait
        for the stream that used them last."""


_FAILED: list[torch.cuda.CUDAGraph] = []
"""Graphs whose capture failed: torch's allocators may still point to them."""


_RECORDING = threading.RLock()
"""Held while something is recorded: a device has one stream for it."""


@cache
def capture_stream(index: int) -> torch.cuda.Stream:
    """The stream on which everything is captured on the device of this index: a stream costs a workspace of cuBLAS, 8
    to 32 MB, for as long as the process lives."""
    return torch.cuda.Stream(index)


class CudaRecorder:
    """Records CUDA graphs, on the device's stream for it and from one memory pool."""

    @staticmethod
    def missing(device: torch.device) -> str | None:
        if device.type == "cuda":
            return None
        return f"CUDA graphs need a CUDA device; got {device}"

    def __init__(self, device: torch.device):
        self._device = device
        self._stream = capture_stream(torch.cuda.current_device() if device.index is None else device.index)
        self._pool = torch.cuda.graph_pool_handle()
        self._first = self._last = torch.cuda.current_stream(self._device)

    def order(self) -> None:
        current = torch.cuda.current_stream(self._device)
        if self._last != current:
            current.wait_stream(self._last)
        self._last = current

    def retire(self) -> None:
        if self._last != self._first:
            self._first.wait_stream(self._last)

    def record(self, body: Body) -> Recording:
        try:
            with _RECORDING, torch.cuda.device(self._device), random_state_kept(self._device):
                self._warm_up(body)
                return self._capture(body)
        except Exception as error:  # kernel libraries raise many kinds; the reason is reported
            text = str(error).strip().splitlines() or [""]
            raise CaptureError(f"{type(error).__name__}: {text[0]}") from error

    def _warm_up(self, body: Body) -> None:
        """Run the body on the capture's stream: once so that libraries set themselves up, once so that waits raise.

        They would raise in the capture as well, but leave torch's allocator in the middle of it.
        """
        current = torch.cuda.current_stream()
        self._stream.wait_stream(current)
        try:
            with torch.cuda.stream(self._stream):
                body()
                with WaitsRaise():
                    body()
        finally:
            current.wait_stream(self._stream)

    def _capture(self, body: Body) -> Recording:
        """Capture with the graph's own generator state, so that a failed capture does not spoil others."""
        graph = torch.cuda.CUDAGraph()
        generator = torch.cuda.default_generators[torch.cuda.current_device()]
        outside, own = generator.graphsafe_get_state(), generator.clone_state()
        torch.cuda.synchronize()
        generator.graphsafe_set_state(own)
        try:
            with torch.cuda.stream(self._stream):  # unlike torch.cuda.graph, it always restores the stream
                # This mode lets other threads, such as a loader's, go on allocating.
                graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
                try:
                    outputs = tuple(body())
                except BaseException:
                    with contextlib.suppress(RuntimeError):
                        graph.capture_end()
                    raise
                graph.capture_end()
        except BaseException:
            _FAILED.append(graph)
            with contextlib.suppress(RuntimeError):  # raises if capture_end has already ended it
                end_allocation_to_pool(torch.cuda.current_device(), self._pool)
            raise
        finally:
            generator.graphsafe_set_state(outside)
        return CudaRecording(graph, outputs, generator, own)


class CudaRecording:
    """A CUDA graph, its outputs, and the generator state that its random operations draw from."""

    def __init__(
        self, graph: torch.cuda.CUDAGraph, outputs: Sequence[Tensor], generator: torch.Generator, own: torch.Generator
    ):
        self.outputs = outputs
        self._graph, self._generator, self._own = graph, generator, own

    def replay(self) -> None:
        self._own.set_state(self._generator.get_state())
        self._graph.replay()
        self._generator.set_state(self._own.get_state())
