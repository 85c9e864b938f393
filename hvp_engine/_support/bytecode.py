"""The names that a function's code reads."""

from __future__ import annotations

import dis
import types
from collections import Counter
from dataclasses import dataclass, field

_CELLS = {"LOAD_DEREF", "LOAD_CLASSDEREF", "LOAD_FROM_DICT_OR_DEREF"}
_GLOBALS = {"LOAD_GLOBAL", "LOAD_NAME", "LOAD_FROM_DICT_OR_GLOBALS"}
_ATTRIBUTES = {"LOAD_ATTR", "LOAD_METHOD", "LOAD_SUPER_ATTR"}
_CONSTANTS = {"LOAD_CONST", "LOAD_SMALL_INT"}
_DUPLICATES = {"COPY", "DUP_TOP_TWO"}

_ADDING = {"append", "extend", "add", "insert", "update"}
"""Methods that change a container and give nothing back."""


@dataclass
class NamesRead:
    """What the code of a function reads, functions inside of it included; not what it only counts or collects in.

    >>> calls, scale = [], 2.0
    >>> def loss(w):
    ...     calls.append(1)
    ...     return scale * w.sum()
    >>> sorted(names_read(loss.__code__).globals), sorted(names_read(loss.__code__).attributes)
    (['scale'], ['append', 'sum'])
    """

    globals: set[str] = field(default_factory=set)
    cells: set[str] = field(default_factory=set)
    attributes: set[str] = field(default_factory=set)


def names_read(code: types.CodeType) -> NamesRead:
    """The names that `code` reads.

    `n += 1` loads a name as often as it stores it: where that is all, the name is a counter, on which no result
    depends.
    """
    found = NamesRead()
    loads: Counter[tuple[str, str]] = Counter()
    stores: Counter[tuple[str, str]] = Counter()
    pending = [code]
    while pending:
        one = pending.pop()
        pending += [constant for constant in one.co_consts if isinstance(constant, types.CodeType)]
        instructions = [i for i in dis.get_instructions(one) if i.opname not in ("CACHE", "EXTENDED_ARG")]
        for place, instruction in enumerate(instructions):
            name, kind = str(instruction.argval), _kind(instruction.opname)
            following = instructions[place + 1 : place + 3]
            if kind and instruction.opname.startswith("STORE"):
                stores[kind, name] += 1
            elif kind and not _collects(following):
                loads[kind, name] += 1
    for kind, name in loads:
        if loads[kind, name] > stores[kind, name]:
            getattr(found, kind).add(name)
    return found


def _kind(opname: str) -> str:
    if opname in _CELLS or opname == "STORE_DEREF":
        return "cells"
    if opname in _GLOBALS or opname == "STORE_GLOBAL":
        return "globals"
    return "attributes" if opname in _ATTRIBUTES or opname == "STORE_ATTR" else ""


def _collects(following: list[dis.Instruction]) -> bool:
    """Whether a value that was just loaded is only added to: `calls.append(...)`, or `calls[0] += 1`."""
    if not following:
        return False
    if following[0].opname in _ATTRIBUTES:
        return following[0].argval in _ADDING
    return len(following) == 2 and following[0].opname in _CONSTANTS and following[1].opname in _DUPLICATES
