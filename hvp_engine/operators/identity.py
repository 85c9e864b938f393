"""The identity, which sums with operators take."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Identity:
    """A multiple of the identity, of any size: `H + 0.1 * hvp.I`."""

    scale: float = 1.0

    def __mul__(self, scale: float) -> Identity:
        return Identity(self.scale * scale)

    __rmul__ = __mul__

    def __truediv__(self, scale: float) -> Identity:
        return Identity(self.scale / scale)

    def __neg__(self) -> Identity:
        return Identity(-self.scale)


I = Identity()  # noqa: E741
"""The identity, for sums with operators."""
