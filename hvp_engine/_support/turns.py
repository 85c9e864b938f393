"""Turns of threads: what changes something that belongs to the whole process runs alone, everything else together.

Whatever draws, or may draw, random numbers runs alone: the global generators are seeded for it and restored afterwards.
Calls of losses that drew nothing so far run together. Whether one has drawn something after all shows in the generators
afterwards, since nothing that runs alone can change them meanwhile; such a call is run again, alone. So is a call that
turns out on the way to need the process for itself, for example for a trace.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

Result = TypeVar("Result")


class NotAloneError(BaseException):
    """A call that runs together with others needs to run alone; no `except Exception` of a loss may stop it."""


class _Mine(threading.local):
    """What this thread is doing: calls within one another that run together with others, and what they hold."""

    def __init__(self) -> None:
        self.together = 0
        self.held: list[Any] = []


class Turns:
    """Admits threads one by one, or together.

    Arguments:
        state: what belongs to the process and must not change while threads run together; None if that cannot be said.
        restore: puts a state back.
    """

    def __init__(self, state: Callable[[], Hashable | None], restore: Callable[[Any], None]):
        self._state, self._restore = state, restore
        self._condition = threading.Condition()
        self._alone, self._depth, self._waiting = 0, 0, 0
        self._count, self._changed = 0, False
        self._before: Hashable | None = None
        self._mine = _Mine()
        self._locks: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()

    @property
    def together(self) -> bool:
        """Whether this thread runs together with others."""
        return self._mine.together > 0

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """The block runs when no other thread is in one; it may hold further ones."""
        if self.together:
            raise NotAloneError
        me = threading.get_ident()
        if self._alone != me:
            with self._condition:
                self._waiting += 1
                try:
                    self._condition.wait_for(lambda: not self._alone and not self._count)
                    self._alone = me
                finally:
                    self._waiting -= 1
        self._depth += 1
        try:
            yield
        finally:
            self._depth -= 1
            if not self._depth:
                with self._condition:
                    self._alone = 0
                    self._condition.notify_all()

    def attempt(self, work: Callable[[], Result], owners: Sequence[Any]) -> list[Result]:
        """What `work` returns, in a list, run together with other threads but for those that hold one of `owners`;
        an empty list if it has to be run alone, its result being worth nothing."""
        if self._alone == threading.get_ident() or self.together:
            return []
        with self._condition:
            self._condition.wait_for(lambda: not (self._alone or self._waiting or self._changed))
            if not self._count:
                self._before = self._state()
            if self._before is None:
                return []
            self._count += 1
        self._mine.together += 1
        try:
            with self.holding(owners):
                result = work()
            return [] if self._has_changed() else [result]
        except NotAloneError:
            return []
        except Exception:
            if self._has_changed():
                return []
            raise
        finally:
            self._mine.together -= 1
            with self._condition:
                self._has_changed()
                self._count -= 1
                if not self._count:
                    if self._changed:
                        self._restore(self._before)
                    self._changed, self._before = False, None
                self._condition.notify_all()

    def _has_changed(self) -> bool:
        self._changed = self._changed or self._state() != self._before
        return self._changed

    @contextlib.contextmanager
    def holding(self, owners: Sequence[Any]) -> Iterator[None]:
        """Keep other threads from holding any of these objects.

        Who holds some already does not wait for more, since the other thread may be waiting for those.
        """
        with self._condition:
            locks = [self._locks.setdefault(owner, threading.RLock()) for owner in sorted(owners, key=id)]
        waits, taken = not self._mine.held, []
        try:
            for lock in locks:
                if not lock.acquire(blocking=waits):
                    raise NotAloneError
                taken.append(lock)
                self._mine.held.append(lock)
            yield
        finally:
            for lock in taken:
                self._mine.held.pop()
                lock.release()
