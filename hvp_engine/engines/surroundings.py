"""Whether everything that a loss reads beside its arguments is still as it was when the loss was traced."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hvp_engine._support.reading import FreeVariable, changed, free_variables
from hvp_engine._support.torch_compat import DispatchMode, is_traceable_wrapper_subclass, pytree, version_of
from hvp_engine.differentiation.problem import Problem
from hvp_engine.differentiation.self_check import CHECKED, Schedule


class Reads(DispatchMode):
    """Notes the tensors that this thread's operations in the block take and that were there before.

    Attributes:
        found: each by the address of its memory, which cannot become another's as long as it is held here.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[int, Tensor] = {}
        self._made: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        taken, given = _by_address((args, kwargs)), _by_address(result)
        if func is torch.ops.aten.lift_fresh.default:  # of a tensor made from a number, which no operation did
            self._made |= taken.keys()
        self._made |= given.keys() - taken.keys()
        self.found |= {address: taken[address] for address in taken.keys() - self._made - self.found.keys()}
        return result


def _by_address(tree: Any) -> dict[int, Tensor]:
    return {address_of(leaf): leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor) and leaf.numel()}


def address_of(tensor: Tensor) -> int:
    """Where a tensor's memory begins that others may share; of one that is made of tensors where it is itself."""
    if tensor.layout is not torch.strided or is_traceable_wrapper_subclass(tensor):
        return id(tensor)
    return tensor.untyped_storage().data_ptr()


_MOST_BYTES = 1024
"""A larger tensor counts as changed only where torch has counted a write: `tensor.data.copy_(x)`, and writes to a NumPy
array on the same memory, are none."""


class _Contents:
    """How often a tensor has been written into and, if it is small, what it holds, as the only item."""

    def __init__(self, tensor: Tensor):
        self._tensor = tensor

    def get(self, key: object, default: object) -> tuple[int, bytes]:
        held, tensor = b"", self._tensor.detach()
        if tensor.device.type == "cpu" and tensor.layout is torch.strided and tensor.nbytes <= _MOST_BYTES:
            held = tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()
        return version_of(self._tensor), held


def _values(tensor: Tensor) -> FreeVariable:
    """What a tensor holds, as a value that a loss reads."""
    contents = _Contents(tensor)
    return FreeVariable(f"a tensor of shape {tuple(tensor.shape)} in Python", contents, None, contents.get(None, None))


class Surroundings:
    """What a loss reads beside its arguments, as it was when the loss was traced; see :func:`free_variables`.

    A trace has baked in numbers, and holds tensors themselves: a number that is another one now, or a name that stands
    for another tensor, makes it wrong. (What is written into a tensor in place, a trace sees.)

    Cost: some 0.1 us for each value.

    Arguments:
        problem: whose loss was traced.
        modules: that the loss has called.
        kept: tensors of whose values the trace has numbers.
    """

    def __init__(self, problem: Problem, modules: Sequence[torch.nn.Module], kept: Sequence[Tensor] = ()):
        self._device_type = problem.weights[0].device.type
        self._dtypes = self._dtypes_now()
        self._called = modules
        self._all = variables = [
            *free_variables([problem.loss, *modules]),
            *(_values(t) for t in kept if not t.is_inference()),
        ]
        self._modes = [variable for variable in variables if variable.key == "training"]
        self._others = [variable for variable in variables if variable.key != "training"]

    def __deepcopy__(self, memo: dict[int, object]) -> Surroundings:
        """The same one: it looks at the globals of the loss's functions, which copies of these share."""
        return self

    def outdated(self) -> bool:
        """Whether modules are in another mode, training or evaluation, or torch computes in other dtypes: then the loss
        is traced anew."""
        return changed(self._modes) is not None or self._dtypes_now() != self._dtypes

    def changed(self) -> str | None:
        """The name of the first other value that is not what it was: then the loss is no function of its arguments."""
        return changed(self._others)

    @property
    def buffers(self) -> list[Tensor]:
        """The buffers of all modules among them, which a loss may change."""
        modules = (variable.value for variable in self._others if isinstance(variable.value, torch.nn.Module))
        found = {id(buffer): buffer for module in (*self._called, *modules) for buffer in module.buffers()}
        return list(found.values())

    def same(self) -> bool:
        """Whether all is what it was: neither outdated nor changed."""
        return self._dtypes_now() == self._dtypes and changed(self._all) is None

    def settled(self, schedule: Schedule) -> bool:
        """Whether the next use of the trace needs no check, which would come by this schedule, and nothing traced anew.
        (Not by the methods of both: this is asked twice in every call.)"""
        return schedule.calls + 1 not in CHECKED and self.same()

    def _dtypes_now(self) -> tuple[object, ...]:
        """What decides on dtypes beside the arguments of operations: autocast on the device, and torch's default."""
        kind = self._device_type
        return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None, torch.get_default_dtype()
