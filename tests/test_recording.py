"""How CUDA graphs are recorded: what waits for the device, which stream is used, and what an error leaves behind.

There need be no GPU: torch's part is played by an object that writes down what it is told, and fails where it should.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from threads_at_once import at_once
from torch import Tensor
from torch._subclasses import FakeTensorMode

from hvp_engine.engines import recording
from hvp_engine.engines.recording import CaptureError, CudaRecorder
from hvp_engine.engines.waits import WaitsRaise

DEVICE = torch.device("cuda", 0)
aten = torch.ops.aten  # torch's own bindings of a few operations ask for the device itself


# --- operations that wait -------------------------------------------------------------------------------------------


@pytest.fixture
def on_device() -> Iterator[Callable[..., Tensor]]:
    """Makes tensors on a CUDA device that need not be there: they have no values."""
    with FakeTensorMode():
        yield lambda *shape, dtype=torch.float32: torch.empty(shape, dtype=dtype, device=DEVICE)


WAITING: dict[str, Callable[..., Any]] = {
    "item": lambda x, mask: x.sum().item(),
    "bool": lambda x, mask: bool(x.sum() > 0),
    "nonzero": lambda x, mask: aten.nonzero(x),
    "a mask": lambda x, mask: aten.index(x, [mask]),
    "masked_select": lambda x, mask: torch.masked_select(x, mask),
    "unique": lambda x, mask: x.unique(),
    "equal": lambda x, mask: torch.equal(x, x),
    "to the host": lambda x, mask: x.cpu(),
    "from the host": lambda x, mask: torch.empty(4, device="cpu").to(DEVICE),
    "from the host, not pinned": lambda x, mask: torch.empty(4, device="cpu").to(DEVICE, non_blocking=True),
    "copy_": lambda x, mask: aten.copy_(x, torch.empty(4, device="cpu")),
}


@pytest.mark.parametrize("name", WAITING)
def test_what_waits_for_the_device_raises(on_device: Any, name: str) -> None:
    with WaitsRaise(), pytest.raises(RuntimeError, match="waits for"):
        WAITING[name](on_device(4), on_device(4, dtype=torch.bool))


def test_what_does_not_wait_runs(on_device: Any) -> None:
    x, index = on_device(4), on_device(2, dtype=torch.int64)
    with WaitsRaise():
        assert aten.index(x, [index]).shape == (2,)
        assert (2.0 * x.to(torch.bfloat16) @ x.bfloat16()).shape == ()
        aten.copy_(x, on_device(4, dtype=torch.float64))
        aten.index_put_(torch.where(x > 0, x, 0.0), [index], on_device(2))


def test_the_host_may_look_at_its_own_tensors() -> None:
    x = torch.arange(4.0)
    with WaitsRaise():
        assert x.sum().item() == 6 and x[x > 1].shape == (2,) and x.double().dtype == torch.float64


def test_other_threads_may_wait(on_device: Any) -> None:
    """With torch's own mode, which is the process's, a loader's thread would be ended."""
    found: list[str] = []

    def other() -> None:
        with FakeTensorMode():
            found.append(str(torch.empty(4, device=DEVICE).cpu().device))

    with WaitsRaise():
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
    assert found == ["cpu"]


# --- torch's part, played ------------------------------------------------------------------------------------------


class Played:
    """Streams, graphs and generators of `torch.cuda`. Every call is a step; the one with number `fails` raises."""

    def __init__(self, fails: int | None = None):
        self.fails = fails
        self.steps: list[str] = []
        self.raised = False
        self.current: Any = Stream(self, "the user's")
        self.state = "outside"
        self.capturing = False

    def step(self, name: str, may_fail: bool = True) -> None:
        self.steps.append(name)
        if may_fail and not self.raised and len(self.steps) - 1 == self.fails:
            self.raised = True
            raise torch.OutOfMemoryError(f"out of memory in {name}")

    @contextlib.contextmanager
    def stream(self, stream: Any) -> Iterator[None]:
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before

    # Generators, which torch.cuda.default_generators holds.

    def graphsafe_get_state(self) -> str:
        return self.state

    def clone_state(self) -> str:
        return "the graph's own"

    def graphsafe_set_state(self, state: str) -> None:
        self.state = state


class Stream:
    def __init__(self, played: Played, name: str):
        self.played, self.name = played, name

    def wait_stream(self, other: Stream) -> None:
        self.played.step(f"{self.name} waits for {other.name}", may_fail=False)


class Graph:
    def __init__(self, played: Played):
        self.played = played

    def capture_begin(self, **_: Any) -> None:
        self.played.step("begin")
        self.played.capturing = True

    def capture_end(self) -> None:
        self.played.capturing = False
        self.played.step("end")

    def replay(self) -> None:
        self.played.step("replay")


@pytest.fixture
def play(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Played]:
    def start(fails: int | None = None) -> Played:
        played, numbers = Played(fails), itertools.count()
        cuda = SimpleNamespace(
            Stream=lambda index: Stream(played, f"capture stream {next(numbers)} of device {index}"),
            CUDAGraph=lambda: Graph(played),
            current_stream=lambda device=None: played.current,
            current_device=lambda: 0,
            default_generators=[played],
            device=lambda device: contextlib.nullcontext(),
            graph_pool_handle=lambda: "pool",
            stream=played.stream,
            synchronize=lambda: played.step("synchronize"),
        )
        ended = lambda device, pool: played.step("end of the pool", may_fail=False)  # noqa: E731
        monkeypatch.setattr(recording, "torch", SimpleNamespace(cuda=cuda))
        monkeypatch.setattr(recording, "random_state_kept", lambda device: contextlib.nullcontext())
        monkeypatch.setattr(recording, "end_allocation_to_pool", ended)
        recording.capture_stream.cache_clear()
        return played

    yield start
    recording.capture_stream.cache_clear()


def body_of(played: Played) -> Callable[[], list[Tensor]]:
    def body() -> list[Tensor]:
        played.step(f"body on {played.current.name}")
        return [torch.ones(2)]

    return body


ON = "capture stream 0 of device 0"
STEPS = [
    f"{ON} waits for the user's", f"body on {ON}", f"body on {ON}", f"the user's waits for {ON}",
    "synchronize", "begin", f"body on {ON}", "end",
]  # fmt: skip


def test_a_recording_warms_up_twice_and_captures(play: Any) -> None:
    played = play()
    recorder = CudaRecorder(DEVICE)
    recorder.record(body_of(played))
    assert played.steps == STEPS


@pytest.mark.parametrize("fails", [index for index, step in enumerate(STEPS) if "waits" not in step])
def test_an_error_at_any_step_leaves_all_as_it_was(play: Any, fails: int) -> None:
    played = play(fails)
    before = played.current
    recorder = CudaRecorder(DEVICE)
    with pytest.raises(CaptureError, match=f"OutOfMemoryError: out of memory in {STEPS[fails]}"):
        recorder.record(body_of(played))
    assert played.current is before and played.state == "outside" and not played.capturing
    assert ("end of the pool" in played.steps) == (fails >= STEPS.index("begin"))
    assert ("end" in played.steps) == (fails > STEPS.index("begin"))  # a capture that began has been ended
    del played.steps[:]
    recorder.record(body_of(played))  # and the next is made
    assert played.steps == STEPS


def test_a_device_has_one_stream_for_all_recordings(play: Any) -> None:
    played = play()
    for recorder in (CudaRecorder(DEVICE), CudaRecorder(DEVICE), CudaRecorder(torch.device("cuda"))):
        recorder.record(body_of(played))
    assert {step for step in played.steps if "body" in step} == {f"body on {ON}"}
    CudaRecorder(torch.device("cuda", 1)).record(body_of(played))
    assert played.steps[-2] == "body on capture stream 1 of device 1"


def test_two_threads_do_not_record_at_once(play: Any) -> None:
    played = play()
    inside, most = 0, 0

    def body() -> list[Tensor]:
        nonlocal inside, most
        inside += 1
        most = max(most, inside)
        threading.Event().wait(0.01)
        inside -= 1
        return []

    at_once(*[lambda: CudaRecorder(DEVICE).record(body)] * 4)
    assert most == 1 and played.steps.count("end") == 4


def test_the_users_streams_use_the_buffers_one_after_the_other(play: Any) -> None:
    played = play()
    first, second = played.current, Stream(played, "another")
    recorder = CudaRecorder(DEVICE)
    for stream in (first, first, second, second, first):
        with played.stream(stream):
            recorder.order()
    assert played.steps == ["another waits for the user's", "the user's waits for another"]
    recorder.retire()
    assert len(played.steps) == 2  # the memory goes back to the stream that used it last
    with played.stream(second):
        recorder.order()
        recorder.retire()
    assert played.steps[2:] == ["another waits for the user's", "the user's waits for another"]
