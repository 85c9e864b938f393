"""Sees which values a trace keeps for good, and refuses those of its inputs; and operators of control flow.

`make_fx` runs the loss on real tensors and notices `.item()` itself. It does not notice what Python reads from a
tensor's memory (`tolist`, `numpy`), nor that the result of `x[mask]` has as many elements as the mask has ones: a trace
of the first batch would use its numbers and sizes for all others. Of tensors that are no inputs, `.item()` too gives
the value of that moment, which holds as long as nobody writes into them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from hvp_engine._support.torch_compat import tags_of
from hvp_engine._support.torch_compat_traces import TorchDispatchMode, is_higher_order, sources_of

aten = torch.ops.aten

_READ_OUT = {"tolist", "numpy", "__array__", "__dlpack__"}

_BY_MASK = {aten.index.Tensor, aten.masked_select.default}
"""Operators whose second argument decides the size of the result: a mask, or a list with masks in it."""


class ValueDependenceError(RuntimeError):
    """A trace would keep a value of its inputs; the message says what asks for it."""


class ControlFlowError(RuntimeError):
    """A trace would have to follow an operator that runs functions."""


class _Reads(TorchFunctionMode):
    """Sees what Python reads from memory."""

    def __init__(self, kept: list[Tensor]):
        super().__init__()
        self._kept = kept

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in _READ_OUT:
            _keep([args[0]], f"Python asks for the values of a tensor, by Tensor.{name},", self._kept)
        return func(*args, **(kwargs or {}))


class _Answers(TorchDispatchMode):
    """Sees operators that give Python a number, or a tensor of a size, that values decide."""

    supports_higher_order_operators = True

    def __init__(self, kept: list[Tensor]):
        super().__init__()
        self._kept = kept

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if is_higher_order(func):
            raise ControlFlowError(str(func))
        keywords, tags = kwargs or {}, tags_of(func)
        result = func(*args, **keywords)
        if torch.Tag.data_dependent_output in tags:  # make_fx lets them be computed of other tensors than inputs alone
            _keep([one for one in args if isinstance(one, Tensor)], f"Python asks for a value by {func}", self._kept)
        elif torch.Tag.dynamic_output_shape in tags and not _is_fixed(func, args, keywords, result):
            _keep(_deciding(func, args), f"values decide the size of what {func} gives", self._kept)
        return result


def _keep(tensors: list[Tensor], asks: str, kept: list[Tensor]) -> None:
    """Note what these tensors, whose values a trace keeps, are computed from; an error if that is the inputs."""
    for tensor in tensors:
        sources = sources_of(tensor)
        if sources is None:
            raise ValueDependenceError(asks)
        kept.extend(sources)


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
def values_watched(kept: list[Tensor]) -> Iterator[None]:
    """In the block, which runs under `make_fx`, note the tensors whose values the trace keeps; raise
    :class:`ValueDependenceError` where it would keep those of its inputs."""
    # Functions of control flow compile themselves; what torch.compile makes of them here would be kept for all calls.
    with torch.compiler.set_stance("force_eager"), _Answers(kept), _Reads(kept):
        yield
