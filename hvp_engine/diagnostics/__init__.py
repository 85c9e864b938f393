"""Checks of a problem and of an installation, and how much memory and precision a computation takes."""

from hvp_engine._support.precision import float32_arithmetic
from hvp_engine.diagnostics.memory import Meter, peak_memory

__all__ = ["Meter", "float32_arithmetic", "peak_memory"]
