"""Which code is the caller's own, where in it an error arose, and what it must not do."""

from __future__ import annotations

import contextlib
import linecache
import sysconfig
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from hvp_engine._support.torch_compat import versions_of

_OURS = str(Path(__file__).parents[1])
_PACKAGES = str(Path(torch.__file__).parent), _OURS
BUILT_IN = "<frozen"
"""What stands for the file of code that is built into Python."""

_STANDARD_LIBRARY = sysconfig.get_path("stdlib")


def innermost_line(error: BaseException) -> str:
    """'file.py:12, in function: `source line`', of the innermost frame outside of torch, this package and Python's own
    library; "the loss" if the traceback has none."""
    frames = [
        (frame.f_code, line)
        for frame, line in traceback.walk_tb(error.__traceback__)
        if is_callers(frame.f_code.co_filename)
    ]
    if not frames:
        return "the loss"
    code, line = frames[-1]
    source = linecache.getline(code.co_filename, line).strip()
    where = f"{Path(code.co_filename).name}:{line}, in {code.co_name}"
    return f"{where}: `{source}`" if source else where


def is_ours(filename: str) -> bool:
    """Whether code of this file is the library's."""
    return filename.startswith(_OURS)


def is_callers(filename: str) -> bool:
    """Whether code of this file is neither the library's nor torch's or Python's own."""
    standard = filename.startswith(_STANDARD_LIBRARY) and not _is_installed(filename)
    generated = filename.startswith((BUILT_IN, "<eval_with_key"))
    return not (filename.startswith(_PACKAGES) or standard or generated)


def is_written_here(filename: str) -> bool:
    """Whether code of this file is the caller's, and not of an installed package."""
    return is_callers(filename) and not _is_installed(filename)


def _is_installed(filename: str) -> bool:
    return "site-packages" in filename or "dist-packages" in filename


@contextlib.contextmanager
def left_as_it_is(tensors: Sequence[Tensor], call: str, remedy: str) -> Iterator[None]:
    """`ValueError` if the block, which runs the caller's function `call`, changes these tensors in place. Those of
    inference mode do not tell."""
    watched = [tensor for tensor in tensors if not tensor.is_inference()]
    before = versions_of(watched)
    yield
    if versions_of(watched) != before:
        raise ValueError(
            f"{call}: expected a function that leaves v as it is; got one that changed it in place: return new "
            f"tensors, as {remedy}"
        )
