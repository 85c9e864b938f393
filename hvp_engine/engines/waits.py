"""Operations that make the host wait for a CUDA device, found before a capture, in which they would fail."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from hvp_engine._support.torch_compat import DispatchMode, pytree

aten = torch.ops.aten

_INDEXING = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default}
"""Operations that wait only for a mask, whose elements they count."""

_COPIES = {aten._to_copy.default, aten.copy_.default}

_CHECKS = {aten._linalg_check_errors.default, aten.is_nonzero.default}


class WaitsRaise(DispatchMode):
    """A block in which this thread's operations raise `RuntimeError` where they would wait for a CUDA device.

    `torch.cuda.set_sync_debug_mode("error")` sees deeper, but it is the process's: it would end whatever another
    thread, such as a loader's, reads or copies in the meantime. What an operation does inside is not seen here; if it
    waits there, the capture itself fails.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _COPIES:
            result = func(*args, **kwargs)
            blocking = not (kwargs.get("non_blocking") or (len(args) > 2 and args[2]))
            if _crosses([*args[:2], result], blocking):
                raise RuntimeError(f"{func} copies between the host and the device, and waits for it")
            return result
        if _asks_for_values(func, args) and _on_device(pytree.tree_leaves((args, kwargs))):
            raise RuntimeError(f"{func} waits for the device")
        return func(*args, **kwargs)


def _asks_for_values(func: Any, args: Sequence[Any]) -> bool:
    """Whether the operation needs values on the host: as its result, or to know how many elements that has."""
    if func in _INDEXING:
        return any(isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8) for index in args[1])
    tags = func.tags
    return func in _CHECKS or torch.Tag.data_dependent_output in tags or torch.Tag.dynamic_output_shape in tags


def _on_device(leaves: Iterable[Any]) -> bool:
    return any(isinstance(leaf, Tensor) and leaf.device.type == "cuda" for leaf in leaves)


def _crosses(leaves: Sequence[Any], blocking: bool) -> bool:
    """Whether a copy between these tensors joins the host's memory, unless it is pinned, and the device's."""
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    on_host = [leaf for leaf in tensors if leaf.device.type == "cpu"]
    return bool(on_host) and _on_device(tensors) and (blocking or not all(leaf.is_pinned() for leaf in on_host))
