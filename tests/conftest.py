"""The device every test body runs on: the CPU, and on a machine with a GPU also that (`-m gpu` runs only those)."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from op_cases import TARGETS

from hvp_engine.backend import use_backend

DEVICES = ["cpu"]
if torch.cuda.is_available():
    DEVICES.append(pytest.param("cuda", marks=pytest.mark.gpu))


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.empty(0, device=request.param).device


@pytest.fixture(params=TARGETS)
def target(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    """A device, with one of its backends selected."""
    device_type, name = request.param
    with use_backend(name):
        yield torch.empty(0, device=device_type).device
