"""A call, prepared from a :class:`callers_state.Caller`, and what is expected of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from callers_state import Caller

Prepare = Callable[[Caller], Callable[[], object]]


@dataclass(frozen=True)
class Call:
    """A call.

    Attributes:
        prepare: makes the call; not part of it.
        error: what the call raises.
        fails_at: the evaluation of a loss from which on it raises.
        returns: what the call returns an instance of.
        changes: what of the snapshot it is for the call to change.
        slow: whether it is made by `make soak` alone.
    """

    prepare: Prepare
    error: type[BaseException] | None = None
    fails_at: int | None = None
    returns: type = object
    changes: frozenset[str] = frozenset()
    slow: bool = False


def failing(prepare: Prepare, *evaluations: int) -> list[Call]:
    """The call as it is, and with a loss that raises from each of these evaluations on."""
    return [Call(prepare), *(Call(prepare, KeyError, number) for number in evaluations)]
