"""Fixtures: devices (the CPU and, if there is one, a GPU; `-m gpu` runs only GPU tests), backends, problems.

With HVP_TEST_DEVICE=cuda the tests of solvers, engines, estimators and the tuner make their numbers there, and are GPU
tests then: `HVP_TEST_DEVICE=cuda pytest -m "gpu and not soak"` runs all that needs a GPU.
"""

from __future__ import annotations

import contextlib
import faulthandler
import logging
import os
import re
import tempfile
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fused_op_oracles import TARGETS
from problems_with_known_answers import BILEVEL, Bilevel

from hvp_engine.differentiation.native.partition_programs import PartitionPrograms
from hvp_engine.differentiation.recorded.known_graphs import Known
from hvp_engine.differentiation.trace.rewriting import verified_rewrites
from hvp_engine.ops.backend import use_backend, why_not

# Torch tells pytest's log handler of every node that it traces, an eighth of the time of tests that trace.
logging.getLogger("torch.__trace").disabled = True

# Test processes side by side share the cores.
torch.set_num_threads(max(1, torch.get_num_threads() // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))))

CRASHES = pytest.StashKey[tempfile.TemporaryDirectory[str]]()
"""The folder in which test processes leave, each in a file of its own, where they were when they crashed."""


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    """Where pytest-xdist starts a process."""
    if CRASHES not in node.config.stash:
        node.config.stash[CRASHES] = tempfile.TemporaryDirectory(prefix="hvp_engine-crashes-")
    node.workerinput["crashes"] = node.config.stash[CRASHES].name


@pytest.hookimpl(trylast=True)  # after pytest's own, whose output is far above the summary, if it is kept at all
def pytest_sessionstart(session: pytest.Session) -> None:
    worker: dict[str, str] = getattr(session.config, "workerinput", {})
    if worker:
        faulthandler.enable(os.open(Path(worker["crashes"], worker["workerid"]), os.O_WRONLY | os.O_CREAT))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    for file in sorted(Path(config.stash[CRASHES].name).iterdir()) if CRASHES in config.stash else ():
        lines = [
            line for line in file.read_text().splitlines() if not re.search("/(_pytest|pluggy|xdist|execnet)/", line)
        ]
        if lines:
            terminalreporter.section(f"{file.name} crashed")
            terminalreporter.write("\n".join([*lines, ""]))


DEVICES = ["cpu"]
if torch.cuda.is_available():
    DEVICES.append(pytest.param("cuda", marks=pytest.mark.gpu))


TEST_DEVICE = torch.device(os.environ.get("HVP_TEST_DEVICE", "cpu"))
ANYWHERE = ("test_solv", "test_engines_", "test_estimators_", "test_implicit", "test_operators", "test_tuner")
"""How the names of files begin whose tests run on any device: what they make without naming one, is made there."""


def on_test_device(module: str) -> contextlib.AbstractContextManager[object]:
    """What is around a module of this name, and each of its tests."""
    return TEST_DEVICE if TEST_DEVICE.type != "cpu" and module.startswith(ANYWHERE) else contextlib.nullcontext()


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector: pytest.Collector) -> Generator[None, Any, Any]:
    """A module is imported on the test device, with the tensors that it makes at once."""
    with on_test_device(collector.path.stem if isinstance(collector, pytest.Module) else ""):
        return (yield)


@pytest.hookimpl(tryfirst=True)  # before tests are chosen by their marks
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark what runs on a GPU by the environment's wish; leave out the GPU tests if there is no GPU."""
    for item in items:
        if TEST_DEVICE.type == "cuda" and item.path.stem.startswith(ANYWHERE):
            item.add_marker(pytest.mark.gpu)
    if not torch.cuda.is_available():
        config.hook.pytest_deselected(items=[item for item in items if item.get_closest_marker("gpu")])
        items[:] = [item for item in items if not item.get_closest_marker("gpu")]


@pytest.fixture(autouse=True)
def numbers_on_the_test_device(request: pytest.FixtureRequest) -> Iterator[None]:
    """Factories without a device make tensors on the one that HVP_TEST_DEVICE names."""
    with on_test_device(request.path.stem):
        yield


@pytest.fixture(autouse=True)
def rewrites_keep_the_numbers() -> Iterator[None]:
    """Every rewrite of every traced graph is compared with the graph before it."""
    with verified_rewrites():
        yield


@pytest.fixture
def float64_by_default() -> Iterator[None]:
    """Numbers are float64 unless something else is said, and the same in every run."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(before)


@pytest.fixture
def programs_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """A recorded program is taken, however fast it is."""
    monkeypatch.setattr(Known, "breaks_even", 0.0)


@pytest.fixture
def no_native_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where the extension is missing, or lacks an operation: with a program, vectors go one by one."""
    monkeypatch.setattr(PartitionPrograms, "for_products", lambda *_: None)


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.empty(0, device=request.param).device


@pytest.fixture(params=TARGETS)
def target(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    """A device, with one of its backends selected."""
    device_type, name = request.param
    with use_backend(name):
        yield torch.empty(0, device=device_type).device


@pytest.fixture(params=BILEVEL)
def problem(request: pytest.FixtureRequest) -> Bilevel:
    """A bilevel problem with a closed-form hypergradient."""
    return BILEVEL[request.param]()


@pytest.fixture(params=[name for name in ("reference", "cpp", "triton") if why_not(name, "cpu") is None])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """A backend of the fused ops."""
    with use_backend(request.param):
        yield request.param
