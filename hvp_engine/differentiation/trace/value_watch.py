"""What asks for the values of tensors while a graph is recorded: the graph would use those of that moment for good.

Python reads them from memory (`tolist`, `numpy`) and by operators (`.item()`, `bool`); the result of `x[mask]` has as
many elements as the mask has ones. A graph of the first batch would use its numbers and sizes for all others. Values of
tensors that are no inputs hold as long as nobody writes into them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from hvp_engine._support.torch_compat import tags_of

aten = torch.ops.aten

_READ_OUT = {"tolist", "numpy", "__array__", "__dlpack__"}

_BY_MASK = {aten.index.Tensor, aten.masked_select.default}
"""Operators whose second argument decides the size of the result: a mask, or a list with masks in it."""


class ValueDependenceError(RuntimeError):
    """A graph would keep a value of its inputs; the message says what asks for it."""


class ControlFlowError(RuntimeError):
    """A graph would have to follow an operator that runs functions."""


class ValueReads(TorchFunctionMode):
    """Tells `keep` (tensors, what asks) what Python reads from memory."""

    def __init__(self, keep: Callable[[Sequence[Tensor], str], None]):
        super().__init__()
        self._keep = keep

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in _READ_OUT:
            self._keep([args[0]], f"Python asks for the values of a tensor, by Tensor.{name},")
        return func(*args, **(kwargs or {}))


def asked(func: Any, args: tuple[Any, ...], keywords: dict[str, Any], result: Any) -> tuple[Sequence[Tensor], str]:
    """The tensors whose values decide what Python sees of an operator's result, and how."""
    tags = tags_of(func)
    if torch.Tag.data_dependent_output in tags:
        return [one for one in args if isinstance(one, Tensor)], f"Python asks for a value by {func}"
    if torch.Tag.dynamic_output_shape in tags and not _is_fixed(func, args, keywords, result):
        return _deciding(func, args), f"values decide the size of what {func} gives"
    return (), ""


def _deciding(func: Any, args: tuple[Any, ...]) -> list[Tensor]:
    """The tensors whose values decide the size of a result."""
    if func not in _BY_MASK:
        return [args[0]]
    indices = args[1] if isinstance(args[1], (list, tuple)) else [args[1]]
    return [index for index in indices if index is not None and index.dtype in (torch.bool, torch.uint8)]


def _is_fixed(func: Any, args: tuple[Any, ...], keywords: dict[str, Any], result: Any) -> bool:
    """Whether the size is the same for all values, or the caller has given it."""
    if func is aten.bincount.default:  # of classes, if none of them is beyond the last
        return len(result) in (args[2:] or (keywords.get("minlength"),))
    if func is aten.repeat_interleave.Tensor:
        return keywords.get("output_size") is not None
    return func is aten.linalg_lstsq.default  # of the solution; there are no residuals of a matrix without full rank
