"""The device every test body runs on: the CPU, and on a machine with a GPU also that (`-m gpu` runs only those)."""

from __future__ import annotations

import pytest
import torch

DEVICES = ["cpu"]
if torch.cuda.is_available():
    DEVICES.append(pytest.param("cuda", marks=pytest.mark.gpu))


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.empty(0, device=request.param).device
