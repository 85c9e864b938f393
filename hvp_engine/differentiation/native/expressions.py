"""Elementwise expressions that are not stored yet: what becomes one chain of instructions."""

from __future__ import annotations

from dataclasses import dataclass

from hvp_engine.differentiation.native.operations import Code, Constant
from hvp_engine.differentiation.native.places import Place


@dataclass(frozen=True)
class Expression:
    """An elementwise result that is not stored yet."""

    code: Code
    operands: tuple[Operand, ...]
    sizes: tuple[int, ...]
    constant: Constant = 0.0
    second: Constant = 0.0

    def leaves(self) -> list[Place]:
        """The places that are read."""
        found: list[Place] = []
        for operand in self.operands:
            found += [operand] if isinstance(operand, Place) else operand.leaves()
        return found

    def length(self) -> int:
        """Instructions."""
        return 1 + sum(operand.length() for operand in self.operands if isinstance(operand, Expression))


Operand = Place | Expression


def length(operand: Operand) -> int:
    """Instructions before the operand can be read."""
    return operand.length() if isinstance(operand, Expression) else 0
