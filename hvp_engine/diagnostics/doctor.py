"""What this installation can do, and why not the rest: `python -m hvp_engine doctor`."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from hvp_engine import engines
from hvp_engine._support.precision import float32_arithmetic
from hvp_engine.ops import backend

_PACKAGES = ("hvp_engine", "torch", "triton", "numpy", "tqdm", "mlxtend", "matplotlib")
_OPENMP = re.compile(r"lib(?:gomp|iomp|omp)\d*(?:-[0-9a-f]+)?\.so[.\d]*")
_MAPS = Path("/proc/self/maps")


@dataclass(frozen=True)
class Diagnosis:
    """What :func:`examine` found.

    Attributes:
        versions: of Python, the system and each package, None for one that is not installed; where the version that
            runs is not the one that is installed, both.
        devices: a description of each device, by its torch name; for "cuda" the reason where there is none.
        threads: threads that torch uses for one operation.
        float32: for each device type, how float32 products are computed; see
            :func:`hvp_engine.diagnostics.float32_arithmetic`.
        backends: for each device type and each backend, the reason why it cannot run there, or None if it can.
        chosen: for each device type, the backend that "auto" uses.
        engines: for each engine the reason why it cannot run, or None if it can.
        openmp: the files of the OpenMP runtimes loaded in this process; None where that cannot be read.
    """

    versions: dict[str, str | None]
    devices: dict[str, str]
    threads: int
    float32: dict[str, str]
    backends: dict[str, dict[str, str | None]]
    chosen: dict[str, str]
    engines: dict[str, str | None]
    openmp: tuple[str, ...] | None

    def __str__(self) -> str:
        lines = ["versions"]
        lines += [f"  {name:<18}{version or 'not installed'}" for name, version in self.versions.items()]
        lines += ["devices"]
        lines += [f"  {name:<18}{description}" for name, description in self.devices.items()]
        lines += [f"  {'threads':<18}{self.threads}"]
        lines += ["float32 products"]
        lines += [f"  {device_type:<18}{precision}" for device_type, precision in self.float32.items()]
        for device_type, reasons in self.backends.items():
            lines += [f"backends on {device_type} ('auto' uses {self.chosen[device_type]!r})"]
            lines += [f"  {name:<18}{_verdict(reason)}" for name, reason in reasons.items()]
        lines += ["engines"]
        lines += [f"  {name:<18}{_verdict(reason)}" for name, reason in self.engines.items()]
        if self.openmp is None:
            lines += ["OpenMP runtimes loaded: unknown (they are read from /proc/self/maps, which is Linux only)"]
        else:
            lines += [f"OpenMP runtimes loaded: {len(self.openmp)}"]
            lines += [f"  {file}" for file in self.openmp]
            if len(self.openmp) > 1:
                lines += ["  more than one: each has its own pool of threads, and they compete for the cores"]
        return "\n".join(lines)


def examine() -> Diagnosis:
    """Load every backend and engine of this installation, and note what works and why the rest does not.

    >>> diagnosis = examine()
    >>> diagnosis.backends["cpu"]["reference"] is None
    True
    """
    chosen, reasons = {}, {}
    for device_type in ("cpu", "cuda"):
        reasons[device_type] = {name: backend.why_not(name, device_type) for name in backend.BACKENDS}
        chosen[device_type] = backend.fastest(device_type)
    return Diagnosis(
        versions=_versions(),
        devices=_devices(),
        threads=torch.get_num_threads(),
        float32={device_type: float32_arithmetic(device_type) for device_type in chosen},
        backends=reasons,
        chosen=chosen,
        engines={name: _why_not_engine(name) for name in engines.ENGINES},
        openmp=openmp_runtimes(_MAPS.read_text()) if _MAPS.exists() else None,
    )


def openmp_runtimes(maps: str) -> tuple[str, ...]:
    r"""The distinct OpenMP runtime files in `maps`, the text of a /proc/PID/maps file, links resolved.

    >>> openmp_runtimes("7f00-7f01 r-xp 0 08:01 7   /opt/libgomp.so.1\n7f02-7f03 r--p 0 08:01 8   /opt/libm.so.6")
    ('/opt/libgomp.so.1',)
    """
    paths = (line.split(maxsplit=5)[5] for line in maps.splitlines() if len(line.split(maxsplit=5)) == 6)
    return tuple(sorted({os.path.realpath(path) for path in paths if _OPENMP.fullmatch(os.path.basename(path))}))


def _verdict(reason: str | None) -> str:
    return "available" if reason is None else f"not available: {reason}"


def _versions() -> dict[str, str | None]:
    system = {"python": platform.python_version(), "system": platform.platform()}
    return {**system, **{package: _version(package) for package in _PACKAGES}}


def _version(package: str) -> str | None:
    """The version that runs, with the installed one beside it if the two differ; None if there is neither."""
    try:
        installed = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        installed = None
    running = getattr(sys.modules.get(package), "__version__", None)
    if running is None or running == installed:
        return installed
    return f"{running}, installed as {installed or 'no package'}"


def _devices() -> dict[str, str]:
    devices = {"cpu": f"{cpu_name()}, {os.cpu_count()} logical cores"}
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        devices[f"cuda:{index}"] = (
            f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB, sm_{properties.major}{properties.minor}"
        )
    if len(devices) == 1:
        try:
            torch.cuda.init()
            devices["cuda"] = "none: torch finds no device"
        except (AssertionError, RuntimeError) as error:
            devices["cuda"] = f"none: {error}"
    return devices


def cpu_name() -> str:
    """The model of the CPU, as far as the system names it, and the instruction set that torch uses on it."""
    cpuinfo = Path("/proc/cpuinfo")
    named = re.search(r"model name\s*:\s*(.+)", cpuinfo.read_text()) if cpuinfo.exists() else None
    model = named[1] if named else platform.processor() or platform.machine()
    return f"{model.strip()}, {torch.backends.cpu.get_cpu_capability()}"


def _why_not_engine(name: str) -> str | None:
    try:
        engine = engines.create(name)
    except Exception as error:  # what an engine needs can fail in many ways; whichever it is, the reason is shown
        return f"{type(error).__name__}: {error}"
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return engine.missing(device) if isinstance(engine, engines.CudaGraphEngine) else None
