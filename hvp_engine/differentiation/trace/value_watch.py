"""Refuses what a trace would keep for good although it depends on the values of the trace's inputs.

`make_fx` runs the loss on real tensors and notices `.item()` itself. It does not notice what Python reads from a
tensor's memory (`tolist`, `numpy`), nor that the result of `x[mask]` has as many elements as the mask has ones: a trace
of the first batch would use its numbers and sizes for all others.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from hvp_engine._support.torch_compat import DispatchMode, depends_on_inputs, tags_of

aten = torch.ops.aten

_READ_OUT = {"tolist", "numpy", "__array__", "__dlpack__"}

_BY_MASK = {aten.index.Tensor, aten.masked_select.default}
"""Operators whose second argument decides the size of the result: a mask, or a list with masks in it."""


class ValueDependenceError(RuntimeError):
    """A trace would keep a value of its inputs; the message says what asks for it."""


class _Reads(TorchFunctionMode):
    """Sees what Python reads."""

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in _READ_OUT and depends_on_inputs(args[0]):
            raise ValueDependenceError(f"Python asks for the values of a tensor, by Tensor.{name},")
        return func(*args, **(kwargs or {}))


class _Sizes(DispatchMode):
    """Sees operators whose result has a size that values decide."""

    supports_higher_order_operators = True

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        keywords = kwargs or {}
        result = func(*args, **keywords)
        decided = torch.Tag.dynamic_output_shape in tags_of(func) and not _is_fixed(func, args, keywords, result)
        if decided and any(map(depends_on_inputs, _deciding(func, args))):
            raise ValueDependenceError(f"values decide the size of what {func} gives")
        return result


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


@contextlib.contextmanager
def values_refused() -> Iterator[None]:
    """Raise :class:`ValueDependenceError` in the block, which runs under `make_fx`, where a trace would be wrong for
    inputs of other values."""
    with _Sizes(), _Reads():
        yield
