"""Which code is the caller's own, and where in it an error arose."""

from __future__ import annotations

import linecache
import sysconfig
import traceback
from pathlib import Path

import torch

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
