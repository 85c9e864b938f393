"""Sees which functions of torch Python calls while autograd runs: hooks, and the backward of custom functions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.overrides import TorchFunctionMode

HANDED_OUT = {"numpy", "__array__", "tolist", "data_ptr", "__dlpack__", "storage", "untyped_storage", "_typed_storage"}
"""Methods that give a tensor's memory to code that no dispatch mode sees."""


class PythonWatch(TorchFunctionMode):
    """Tells of each call, and of the tensors that it is given. C++ nodes of autograd call nothing by Python.

    Arguments:
        tell: takes the name of the function and its arguments.
    """

    def __init__(self, tell: Callable[[str, tuple[Any, ...]], None]):
        super().__init__()
        self._tell = tell

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name != "__get__":  # shapes, dtypes
            self._tell(name, args)
        return func(*args, **(kwargs or {}))
