"""What a fault is."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Fault:
    """One mistake in one place.

    Attributes:
        file: its path in the tree.
        original: the snippet as it is, which must occur once.
        faulty: what is put in its place.
        tests: the arguments of pytest: the tests that should fail.
        why: what is wrong then, in a line.
    """

    file: str
    original: str
    faulty: str
    tests: str
    why: str

    @property
    def compiled(self) -> bool:
        """Whether the extension has to be built to try it."""
        return self.file.startswith("csrc/")

    @property
    def interpreted(self) -> bool:
        """Whether its tests run in Triton's interpreter."""
        return self.file.startswith("kernels/")
