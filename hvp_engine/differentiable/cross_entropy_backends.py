"""Which implementation of the rows of cross-entropy runs on a device."""

from __future__ import annotations

from typing import Any

import torch

from hvp_engine.differentiable.registration import implementation

_MODULES = {
    "reference": "hvp_engine.differentiable.cross_entropy_reference",
    "cpp": "hvp_engine.differentiable.cross_entropy_cpp",
    "triton": "hvp_engine.kernels.cross_entropy",
}


def rows_on(device: torch.device) -> Any:
    """The module whose functions compute rows on `device`."""
    return implementation(device, _MODULES)
