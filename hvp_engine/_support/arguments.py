"""Checks of numbers that callers pass: `TypeError` for another type, `ValueError` for a number out of range."""

from __future__ import annotations

import math
from typing import Any


def check_count(value: Any, name: str, least: int = 1, what: str = "") -> int:
    """Return `value` if it is an int >= `least`; `what` tells in the message what it counts."""
    expected = f"{name}: expected an int >= {least}{f', {what}' if what else ''}"
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{expected}; got {type(value).__name__}")
    if value < least:
        raise ValueError(f"{expected}; got {value}")
    return value


def check_positive(value: Any, name: str) -> None:
    """Raise unless `value` is a finite number > 0."""
    _check_kind(value, name, "> 0")
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"{name}: expected a finite number > 0; got {value}")


def check_not_negative(value: Any, name: str) -> None:
    """Raise unless `value` is a finite number >= 0."""
    _check_kind(value, name, ">= 0")
    if not (math.isfinite(value) and value >= 0):
        raise ValueError(f"{name}: expected a finite number >= 0; got {value}")


def _check_kind(value: Any, name: str, range_of: str) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: expected a finite number {range_of}; got {type(value).__name__}")
