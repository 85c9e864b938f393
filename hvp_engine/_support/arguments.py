"""Checks of what callers pass: numbers, as Python's own, NumPy's or in a tensor of one element, and functions.

Each check of a number returns the plain Python number, or "auto" where that may come: `TypeError` for another type,
`ValueError` for a number out of range.
"""

from __future__ import annotations

import inspect
import math
import operator
from collections.abc import Callable
from numbers import Real
from typing import Any

from torch import nn


def check_count(value: Any, name: str, least: int = 1, what: str = "") -> int:
    """`value` as an int >= `least`; `what` tells in the message what it counts."""
    expected = f"{name}: expected an int >= {least}{f', {what}' if what else ''}"
    plain = unwrapped(value)
    try:
        count = operator.index(plain)
    except TypeError:
        raise TypeError(f"{expected}; got {shown(value)}") from None
    if isinstance(plain, bool):
        raise TypeError(f"{expected}; got {shown(value)}")
    if count < least:
        raise ValueError(f"{expected}; got {count}")
    return count


def check_or_auto(check: Callable[[Any, str], float], value: Any, name: str) -> Any:
    """ "auto", or what the check returns."""
    if isinstance(value, str) and value == "auto":
        return value
    try:
        return check(value, name)
    except TypeError as error:
        raise TypeError(str(error).replace("expected", 'expected "auto" or', 1)) from None


def check_function(function: Any, name: str, arguments: str, count: int) -> None:
    """`TypeError` for what cannot be called with `count` arguments: no function, or a module of its inputs alone."""
    expected = f"{name}: expected a function of {arguments}; got"
    if not callable(function):
        raise TypeError(f"{expected} {shown(function)}")
    if isinstance(function, nn.Module):
        signature = inspect.signature(function.forward)
        try:
            signature.bind(*[None] * count)
        except TypeError:
            raise TypeError(
                f"{expected} the module {shown(function)}, which is called with {signature}: pass "
                "hvp.functional(module), a function of (weights, inputs), or a function that calls it"
            ) from None


def shown(value: Any) -> str:
    """What a message says that came: text as it is, a class by its name, of anything else its type."""
    if isinstance(value, str):
        return repr(value)
    return f"the class {value.__name__} itself" if isinstance(value, type) else type(value).__name__


def check_positive(value: Any, name: str) -> float:
    """`value` as a finite number > 0."""
    number = _number(value, name, "> 0")
    if not (math.isfinite(number) and number > 0):
        raise ValueError(f"{name}: expected a finite number > 0; got {number}")
    return number


def check_not_negative(value: Any, name: str) -> float:
    """`value` as a finite number >= 0."""
    number = _number(value, name, ">= 0")
    if not (math.isfinite(number) and number >= 0):
        raise ValueError(f"{name}: expected a finite number >= 0; got {number}")
    return number


def check_limit(value: Any, name: str, *, positive: bool = False) -> float | None:
    """None, or `value` as a number >= 0, which must be > 0 if it is to be `positive`; it may be infinite."""
    if value is None:
        return None
    expected = f"{name}: expected a number {'> 0' if positive else '>= 0'} or None"
    try:
        number = as_number(value)
    except TypeError:
        raise TypeError(f"{expected}; got {shown(value)}") from None
    if not (number > 0 or (number == 0 and not positive)):
        raise ValueError(f"{expected}; got {number}")
    return number


def replace_fields(frozen: Any, **values: Any) -> None:
    """Set fields of a frozen dataclass, in its `__post_init__`, to what their checks returned."""
    for name, value in values.items():
        object.__setattr__(frozen, name, value)


def unwrapped(value: Any) -> Any:
    """The number in a tensor or a NumPy scalar or array of one element; anything else as it is."""
    if type(value) in (int, float):
        return value
    return value.item() if hasattr(value, "item") and math.prod(value.shape) == 1 else value


def as_number(value: Any) -> float:
    """`value` as an int or a float; `TypeError` if it is no real number."""
    plain = unwrapped(value)
    if type(plain) in (int, float):
        return plain
    if isinstance(plain, bool) or not isinstance(plain, Real):
        raise TypeError(f"expected a number; got {shown(value)}")
    return plain if isinstance(plain, int) else float(plain)


def _number(value: Any, name: str, range_of: str) -> float:
    try:
        return as_number(value)
    except TypeError:
        raise TypeError(f"{name}: expected a finite number {range_of}; got {shown(value)}") from None
