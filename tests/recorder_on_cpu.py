"""A recorder for a CPU, to test what uses recordings: it notes the operations that torch dispatches,
with their arguments, and replays them into the same memory. As with a CUDA graph, Python numbers and the path through
the code are baked in, nothing may wait for the device, outputs hold nothing before a replay, and a replay destroys
the outputs of later recordings. Ops of the extension are not seen, so the reference backend has to be selected.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from hvp_engine._support.random_state import random_state_kept
from hvp_engine.engines.recording import Body, CaptureError

aten = torch.ops.aten
WAITS = {aten._local_scalar_dense.default, aten.nonzero.default, aten.equal.default}
"""Operations that wait for the device."""

ALLOCATIONS = {
    aten.clone.default, aten.empty_like.default, aten.empty.memory_format, aten.zeros.default, aten.zeros_like.default,
    aten.full.default, aten.new_empty.default,
}  # fmt: skip
"""Operations that only make a tensor."""


def tensors_of(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


class Calls(TorchDispatchMode):
    """Notes the operations inside the block, their arguments and results, and which results are new memory."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...], dict[str, Any], list[tuple[int, Tensor]]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in WAITS:
            raise RuntimeError(f"{func} is not permitted while recording")
        kwargs = kwargs or {}
        args = tuple(list(arg) if isinstance(arg, list) else arg for arg in args)
        result = func(*args, **kwargs)
        known = {tensor.untyped_storage().data_ptr() for tensor in tensors_of((args, kwargs))}
        new = [(i, t) for i, t in enumerate(tensors_of(result)) if t.untyped_storage().data_ptr() not in known]
        self.calls.append((func, args, kwargs, new))
        return result

    def __enter__(self) -> Calls:
        _ACTIVE.append(self)
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        _ACTIVE.remove(self)
        super().__exit__(*error)

    def poison(self) -> None:
        """Overwrite all results, as an allocator might that gives their memory to others."""
        for *_, new in self.calls:
            for _, tensor in new:
                if tensor.is_floating_point():
                    tensor.fill_(torch.nan)


_ACTIVE: list[Calls] = []


def launching(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, whose work torch does not dispatch, as compiled code's: recordings note it as one call."""

    def call(*arguments: Tensor) -> Any:
        with _disable_current_modes():
            results = [tensor.clone(memory_format=torch.contiguous_format) for tensor in function(*arguments)]
        for calls in _ACTIVE:
            calls.calls.append((function, arguments, {}, list(enumerate(results))))
        return results

    return call


class OutOfMemory(TorchDispatchMode):
    """The operation with this number that makes a tensor, counted from the beginning of the block, raises as it does
    where the memory of a device is full."""

    def __init__(self, number: int):
        super().__init__()
        self.left = number
        self.failed = ""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in ALLOCATIONS:
            self.left -= 1
            if self.left == -1:
                self.failed = str(func)
                raise torch.OutOfMemoryError(f"CUDA out of memory in {func}\nand how to avoid it")
        return func(*args, **(kwargs or {}))


class CallRecording:
    def __init__(self, calls: Calls, outputs: Sequence[Tensor], later: list[Calls]):
        self.outputs = outputs
        self._calls, self._later = calls, later

    def replay(self) -> None:
        for calls in self._later[self._later.index(self._calls) + 1 :]:
            calls.poison()
        for func, args, kwargs, new in self._calls.calls:
            results = tensors_of(func(*args, **kwargs))
            for index, tensor in new:
                tensor.copy_(results[index])


class CallRecorder:
    @staticmethod
    def missing(device: torch.device) -> str | None:
        return None

    def __init__(self, device: torch.device):
        self._device = device
        self._all: list[Calls] = []

    def order(self) -> None:
        """A CPU has no streams."""

    def retire(self) -> None:
        """A CPU has no streams."""

    def record(self, body: Body) -> CallRecording:
        calls = Calls()
        try:
            with random_state_kept(self._device):
                body()
                with calls:
                    outputs = tuple(body())
        except Exception as error:
            text = str(error).strip().splitlines() or [""]
            raise CaptureError(f"{type(error).__name__}: {text[0]}") from error
        calls.poison()
        self._all.append(calls)
        return CallRecording(calls, outputs, self._all)


class FailingRecorder(CallRecorder):
    """The recording with number `fails`, counted over all, cannot be made."""

    fails = made = 0

    def record(self, body: Body) -> CallRecording:
        FailingRecorder.made += 1
        if FailingRecorder.made == FailingRecorder.fails:
            raise CaptureError(f"recording {FailingRecorder.made} failed")
        return super().record(body)
