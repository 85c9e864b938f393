"""Choosing a backend: by name, nested, for each thread; and the reason when one is missing."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator

import pytest
import torch

from hvp_engine._support.flat_vector import Layout
from hvp_engine.errors import BackendError, HvpError
from hvp_engine.ops import backend, bind
from hvp_engine.ops.backend import BACKENDS, select, use_backend, why_not

CPU = torch.device("cpu")


def selected() -> str:
    return select(CPU)[0]


AUTOMATIC = next(name for name in ("cpp", "reference") if why_not(name, "cpu") is None)


def test_automatic_takes_the_fastest_available(device: torch.device) -> None:
    order = {"cpu": ("cpp", "reference"), "cuda": ("cuda", "triton", "reference")}[device.type]
    assert select(device)[0] == next(name for name in order if why_not(name, device.type) is None)


def test_a_device_without_a_backend_of_its_own_gets_the_reference() -> None:
    assert select(torch.device("meta"))[0] == "reference"


def test_a_name_selects_inside_the_block_only() -> None:
    assert selected() == AUTOMATIC
    with use_backend("reference"):
        assert selected() == "reference"
        with use_backend("auto"):
            assert selected() == AUTOMATIC
        assert selected() == "reference"
    assert selected() == AUTOMATIC


def test_the_choice_ends_with_an_exception() -> None:
    with pytest.raises(KeyError), use_backend("reference"):
        raise KeyError
    assert selected() == AUTOMATIC


def test_the_choice_is_made_for_each_thread() -> None:
    seen = []
    with use_backend("reference"):
        thread = threading.Thread(target=lambda: seen.append(backend.CHOICE.get()))
        thread.start()
        thread.join()
    assert seen == ["auto"]


def test_the_choice_is_made_for_each_task() -> None:
    async def task(name: str, others: asyncio.Event) -> str:
        with use_backend(name):
            await others.wait()
            return backend.CHOICE.get()

    async def both() -> list[str]:
        gate = asyncio.Event()
        tasks = [asyncio.create_task(task(name, gate)) for name in ("reference", "auto")]
        await asyncio.sleep(0)
        gate.set()
        return await asyncio.gather(*tasks)

    assert asyncio.run(both()) == ["reference", "auto"]


@pytest.mark.parametrize("name", ["c++", "Reference", "", "gpu"])
def test_an_unknown_name_is_refused_at_once(name: str) -> None:
    with (
        pytest.raises(
            ValueError,
            match=r"backend: expected 'auto' or one of 'reference', .*; got " + repr(name).replace("+", r"\+"),
        ),
        use_backend(name),
    ):
        raise AssertionError("the block must not be entered")
    assert selected() == AUTOMATIC


@pytest.mark.parametrize("name, device_type", [("cuda", "cpu"), ("cpp", "cuda")])
def test_a_backend_of_another_device(name: str, device_type: str) -> None:
    assert why_not(name, device_type) == f"backend {name!r} does not run on device type {device_type!r}"


def test_the_reference_runs_anywhere() -> None:
    assert why_not("reference", "cpu") is why_not("reference", "cuda") is why_not("reference", "meta") is None


def arguments(device: torch.device) -> tuple:
    layout = Layout.of([torch.zeros(3, device=device)])
    states = [torch.zeros(layout.size, device=device) for _ in range(2)]
    return states, layout, [torch.zeros((), dtype=torch.float64, device=device)], 0.0, layout.empty_partials()


@pytest.mark.parametrize("name", BACKENDS)
def test_an_unavailable_backend_shows_the_original_reason_at_the_first_op(device: torch.device, name: str) -> None:
    reason = why_not(name, device.type)
    with use_backend(name):
        if reason is None:
            bind("neumann_step", *arguments(device))([torch.ones(3, device=device)])
            return
        with pytest.raises(BackendError) as caught:
            bind("neumann_step", *arguments(device))
    assert isinstance(caught.value, HvpError)
    assert f"{name!r}" in str(caught.value) and reason in str(caught.value) and "doctor" in str(caught.value)


def test_an_error_while_importing_a_backend_is_kept(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    (tmp_path / "broken_backend.py").write_text("raise OSError('libsomething.so.3: cannot open shared object file')\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(backend._MODULES, "cpp", "broken_backend")
    backend._load.cache_clear()
    try:
        reason = "OSError: libsomething.so.3: cannot open shared object file"
        assert why_not("cpp", "cpu") == reason
        assert selected() == "reference"
        with use_backend("cpp"), pytest.raises(BackendError, match=reason):
            select(CPU)
    finally:
        backend._load.cache_clear()


@pytest.fixture
def not_built(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An installation without extension and Triton, in a process that has not warned yet."""
    for name in ("cpp", "cuda", "triton"):
        monkeypatch.setitem(backend._MODULES, name, "hvp_engine.not_built")
    backend._load.cache_clear()
    backend._warn_slow.cache_clear()
    yield
    backend._load.cache_clear()
    backend._warn_slow.cache_clear()


@pytest.mark.usefixtures("not_built")
def test_a_plain_machine_without_extension_and_triton_runs_and_says_once_that_it_is_slow() -> None:
    assert "ModuleNotFoundError" in (why_not("triton", "cuda") or "")
    states, *rest = arguments(CPU)
    rest[1][0].fill_(0.5)
    with pytest.warns(UserWarning) as caught:
        bind("neumann_step", states, *rest)([torch.ones(3)])
        bind("neumann_step", states, *rest)([torch.ones(3)])
        select(CPU)
    assert states[0][:3].tolist() == [-1.0] * 3
    (warning,) = caught
    text = str(warning.message)
    assert "backend 'auto' runs the slower 'reference' on cpu" in text
    assert "'cpp' is not available, ModuleNotFoundError: No module named 'hvp_engine.not_built'" in text
    with pytest.warns(UserWarning, match=r"on cuda.* 'cuda' is not available, .*; 'triton' is not available, "):
        select(torch.device("cuda"))


@pytest.mark.usefixtures("not_built")
def test_the_reference_by_choice_is_silent(recwarn: pytest.WarningsRecorder) -> None:
    with use_backend("reference"):
        select(CPU)
    select(CPU, "reference")
    select(torch.device("meta"))
    assert not list(recwarn)
