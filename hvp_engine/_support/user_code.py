"""Where in the caller's own code an error came up."""

from __future__ import annotations

import linecache
import sysconfig
import traceback
from pathlib import Path

import torch

_PACKAGES = str(Path(torch.__file__).parent), str(Path(__file__).parents[1])
_STANDARD_LIBRARY = sysconfig.get_path("stdlib")


def innermost_line(error: BaseException) -> str:
    """'file.py:12, in function: `source line`', of the innermost frame outside of torch, this package and Python's own
    library; "the loss" if the traceback has none."""
    frames = [
        (frame.f_code, line)
        for frame, line in traceback.walk_tb(error.__traceback__)
        if _is_callers(frame.f_code.co_filename)
    ]
    if not frames:
        return "the loss"
    code, line = frames[-1]
    source = linecache.getline(code.co_filename, line).strip()
    where = f"{Path(code.co_filename).name}:{line}, in {code.co_name}"
    return f"{where}: `{source}`" if source else where


def _is_callers(filename: str) -> bool:
    installed = "site-packages" in filename or "dist-packages" in filename
    standard = filename.startswith(_STANDARD_LIBRARY) and not installed
    generated = filename.startswith(("<frozen", "<eval_with_key"))
    return not (filename.startswith(_PACKAGES) or standard or generated)
