"""The values that a function reads beside its arguments."""

from __future__ import annotations

import enum
import functools
import numbers
import sys
import types
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple, Protocol

import numpy
import torch
from torch import Tensor

from hvp_engine._support.bytecode import names_read
from hvp_engine._support.isolation import is_copy
from hvp_engine._support.user_code import BUILT_IN, is_ours, is_written_here

CONSTANTS = (type(None), numbers.Number, str, bytes, enum.Enum, torch.dtype, torch.device, torch.Size)
"""Types of values, beside tensors, that never change, and that can be keys."""

_PLAIN = (*CONSTANTS, slice, range)
"""Types of values that are compared by what they are, not by which they are."""

_MOST_ITEMS = 100
"""A longer list, dict or array is looked at up to here only: all of it could take longer than a product."""

_MOST = 5_000
"""Values of one function."""

_MISSING = object()


class _Place(Protocol):
    """Where values have names: a dict, or what looks like one."""

    def get(self, key: Any, default: Any) -> Any: ...


class FreeVariable(NamedTuple):
    """A value that a function reads: `place[key]` is called `name`, and was `value`."""

    name: str
    place: _Place
    key: Any
    value: Any


def changed(variables: Iterable[FreeVariable]) -> str | None:
    """The name of the first of them that is another value now; two equal numbers are one, two equal tensors are not."""
    for name, place, key, value in variables:
        now = place.get(key, _MISSING)
        if now is not value and not _same(now, value):
            return name
    return None


def _same(now: Any, value: Any) -> bool:
    if isinstance(now, Tensor):
        return is_copy(now)  # of a buffer, in its place as long as another thread calls the module
    return type(now) is type(value) and is_plain(now) and bool(now == value)


def is_plain(value: Any) -> bool:
    """Whether a value is a number, a word or the like, or a tuple of them."""
    return isinstance(value, _PLAIN) or (isinstance(value, tuple) and all(map(is_plain, value)))


def free_variables(functions: Iterable[Any]) -> list[FreeVariable]:
    """What these functions, modules or callable objects read beside their arguments.

    Followed are the names that their code reads, and that of the caller's own functions and methods that it reaches:
    variables of modules and of enclosing functions, attributes, items of lists, tuples and dicts; of torch's modules
    the mode, buffers and parts. Code of installed packages is not followed: of their modules all numbers are taken.

    >>> settings, scale = {"power": 2}, 3.0
    >>> def loss(w):
    ...     return scale * (w ** settings["power"]).sum()
    >>> [variable.name for variable in free_variables([loss])]
    ['scale', 'settings', "settings['power']"]
    """
    functions = list(functions)
    walk, known = _Walk(set()), -1
    while len(walk.names) > known:  # code that is met late may read an attribute of an object that was met early
        known = len(walk.names)
        walk = _Walk(walk.names)
        for function in functions:
            walk.visit(function, type(function).__name__)
    return walk.found


class _Cell:
    """A variable of an enclosing function."""

    def __init__(self, cell: types.CellType):
        self._cell = cell

    def get(self, key: str, default: Any) -> Any:
        try:
            return self._cell.cell_contents
        except ValueError:  # deleted
            return default


class _List:
    """The items of a list by their numbers, and its length."""

    def __init__(self, items: list[Any]):
        self._items = items

    def get(self, key: int | str, default: Any) -> Any:
        if isinstance(key, str):
            return len(self._items)
        return self._items[key] if key < len(self._items) else default


class _Array:
    """What a numpy array holds, as the only item."""

    def __init__(self, array: numpy.ndarray[Any, Any]):
        self._array = array

    def get(self, key: str, default: Any) -> bytes:
        return self._array.tobytes()


class _Slots:
    """The attributes of an object that has no dict of them."""

    def __init__(self, owner: Any):
        self._owner = owner

    def get(self, key: str, default: Any) -> Any:
        return getattr(self._owner, key, default)


class _Walk:
    """One way through all that can be reached, with the names of attributes that code was found to read."""

    def __init__(self, names: set[str]):
        self.names = names
        self.found: list[FreeVariable] = []
        self._seen: dict[int, Any] = {}

    def visit(self, value: Any, name: str) -> None:
        """Find what is behind a value."""
        if isinstance(value, Tensor) or is_plain(value) or id(value) in self._seen:
            return
        self._seen[id(value)] = value
        if callable(value) or isinstance(value, (classmethod, staticmethod)):
            self.visit(getattr(value, "__wrapped__", None), name)  # of what is decorated
        if isinstance(value, types.FunctionType):
            self._function(value)
        elif isinstance(value, property):
            self.visit(value.fget, name)
        elif isinstance(value, types.MethodType):
            self.visit(value.__func__, name)
            self.visit(value.__self__, name)
        elif isinstance(value, functools.partial):
            for part in (value.func, *value.args, *value.keywords.values()):
                self.visit(part, name)
        elif isinstance(value, types.ModuleType):
            if is_written_here(getattr(value, "__file__", None) or BUILT_IN):
                self._attributes(vars(value), name, self.names)
        elif isinstance(value, type):
            if is_written_here(_file(value)):
                self._attributes(vars(value), name, self.names)
        elif isinstance(value, Mapping):
            for key in list(value)[:_MOST_ITEMS]:
                self._note(f"{name}[{key!r}]", value, key)
        elif isinstance(value, tuple):
            for number, item in enumerate(value[:_MOST_ITEMS]):
                self.visit(item, f"{name}[{number}]")
        elif isinstance(value, list):
            self._note(f"len({name})", _List(value), "length")
            for number in range(min(len(value), _MOST_ITEMS)):
                self._note(f"{name}[{number}]", _List(value), number)
        elif isinstance(value, numpy.ndarray):
            if value.size <= _MOST_ITEMS and not value.dtype.hasobject:
                self._note(f"items of {name}", _Array(value), "items")
        elif isinstance(value, torch.nn.Module):
            self._module(value, name)
        else:
            self._instance(value, name)

    def _note(self, name: str, place: _Place, key: Any) -> None:
        value = place.get(key, _MISSING)
        if value is not _MISSING and len(self.found) < _MOST:
            self.found.append(FreeVariable(name, place, key, value))
            self.visit(value, name)

    def _attributes(self, place: Mapping[str, Any], name: str, chosen: Iterable[str]) -> None:
        for attribute in sorted(set(chosen) & set(place)):
            self._note(f"{name}.{attribute}", place, attribute)

    def _function(self, function: types.FunctionType) -> None:
        file = function.__code__.co_filename
        if is_written_here(file):
            read = names_read(function.__code__)
            self.names |= read.attributes
            for name in sorted(read.globals & set(function.__globals__)):
                self._note(name, function.__globals__, name)
            cells = read.cells
        elif is_ours(file):  # a function around the caller's
            cells = set(function.__code__.co_freevars)
        else:
            return
        for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
            if name in cells:
                self._note(name, _Cell(cell), name)
        for default in (*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()):
            self.visit(default, function.__name__)

    def _instance(self, value: Any, name: str) -> None:
        kind, attributes = type(value), getattr(value, "__dict__", {})
        if is_ours(_file(kind)):  # a loss around the caller's
            for attribute, part in attributes.items():
                if callable(part):
                    self._note(f"{name}.{attribute}", attributes, attribute)
            return
        self._class(kind, name, "__call__")
        self._attributes(attributes, name, self.names)
        for base in kind.__mro__:
            for attribute in self.names.intersection(vars(base).get("__slots__", ())):
                self._note(f"{name}.{attribute}", _Slots(value), attribute)

    def _class(self, kind: type, name: str, *called: str) -> None:
        for base in kind.__mro__:
            if is_written_here(_file(base)):
                self._attributes(vars(base), name, {*self.names, *called})

    def _module(self, module: torch.nn.Module, name: str) -> None:
        self._class(type(module), name, "forward", "__call__")
        attributes, followed = vars(module), is_written_here(_file(type(module)))
        for attribute in list(attributes):
            read = attribute in self.names or attribute == "training" if followed else is_plain(attributes[attribute])
            if read and not attribute.startswith("_"):
                self._note(f"{name}.{attribute}", attributes, attribute)
        for kind in ("_modules", "_buffers"):
            for attribute in list(attributes[kind]):
                self._note(f"{name}.{attribute}", attributes[kind], attribute)


def _file(kind: type) -> str:
    """Where a class is written; for one that is built in, what stands for Python's own files."""
    if kind.__module__ == "__main__":
        return "__main__"
    return getattr(sys.modules.get(kind.__module__), "__file__", None) or BUILT_IN
