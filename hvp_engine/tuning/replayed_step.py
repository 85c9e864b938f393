"""The step of an optimizer as a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from hvp_engine._support.flat_vector import detached
from hvp_engine._support.torch_compat import has_step_hooks, pytree
from hvp_engine.engines.recording import CaptureError, copies
from hvp_engine.engines.replays import Counted
from hvp_engine.tuning.replayed import Grads, Replayed, Take, first_line, kept


class ReplayedStep(Replayed):
    """The step of an optimizer, recorded once nothing changes any more that a graph cannot read.

    Arguments:
        tensors: what the step moves.
    """

    def __init__(self, name: str, recorder: Counted, optimizer: torch.optim.Optimizer, tensors: Sequence[Tensor]):
        super().__init__(name, recorder)
        self._optimizer, self._tensors = optimizer, tensors
        self._baked: dict[str, tuple[Hashable, ...]] = {}
        self._changes: list[Tensor] = []
        self._take: Take | None = None

    def __call__(self, grads: Grads, move: Callable[[Grads], None]) -> bool:
        """Make the step; false if it has to be made by `move`, and nothing has happened."""
        if not self._chances:
            return False
        baked = self._bakes(grads)
        if baked != self._baked:
            changed = next(name for name in {**baked, **self._baked} if baked.get(name) != self._baked.get(name))
            self._baked = baked
            self._outdated(f"{changed} changed: a number of the optimizer may do so as a tensor on the device")
            return False
        if self._take is None:
            return self._first(grads, move)
        self._play(self._take, [grad for grad in grads if grad is not None])
        return True

    def _outdated(self, reason: str) -> None:
        take, self._take = self._take, None
        self.reason = reason
        if take is not None:
            self._drop(take, reason)

    def _bakes(self, grads: Grads) -> dict[str, tuple[Hashable, ...]]:
        """What a recording bakes in, by name: numbers, and where tensors are."""
        found: dict[str, tuple[Hashable, ...]] = {}
        for number, group in enumerate(self._optimizer.param_groups):
            for name, value in group.items():
                own = name if number == 0 else f"{name} of group {number}"
                found[own] = tuple(map(id, value)) if name == "params" else tuple(map(_baked, _leaves(value)))
        found["hooks"] = (has_step_hooks(self._optimizer),)
        found["the optimizer's state"] = tuple(map(_baked, self._state()))
        found["the memory of tensors"] = tuple(map(_baked, self._tensors))
        found["which tensors have a gradient"] = tuple([grad is None for grad in grads])
        return found

    def _state(self) -> list[Any]:
        return [leaf for entry in self._optimizer.state.values() for leaf in entry.values()]

    def _first(self, grads: Grads, move: Callable[[Grads], None]) -> bool:
        """Record the step, make it without a graph, and see that a replay gives the same; false if nothing happened."""
        if (unfit := self._unfit(grads)) is not None:
            self.refuse(unfit)
            return False
        there = [grad for grad in grads if grad is not None]
        # Held, so that no other tensor can come to stand where one of these was.
        self._changes = [*detached(self._tensors), *(leaf for leaf in self._state() if isinstance(leaf, Tensor))]
        try:
            inputs = copies(there)
            ours = iter(inputs)
            static = [None if grad is None else next(ours) for grad in grads]

            def body() -> list[Tensor]:
                move(static)
                return []

            take = self._record(body, inputs, self._changes)
            with torch.no_grad(), kept(self._changes):
                self._play(take, there)
                found = copies(self._changes)
        except (CaptureError, torch.OutOfMemoryError) as error:
            self.refuse(first_line(error))
            return False
        move(grads)
        if all(map(torch.equal, found, self._changes)):
            self._take, self.reason = take, ""
        else:
            self.refuse("a replay does not give the same")
        return True

    def _unfit(self, grads: Grads) -> str | None:
        """Why a graph would not do all that the step does, if so."""
        optimizer, name = self._optimizer, type(self._optimizer).__name__
        device, moved = self._tensors[0].device, {id(tensor) for tensor in self._tensors}
        if not type(optimizer).__module__.startswith("torch.optim"):
            return f"{name} is not one of torch's optimizers: what its step does beside launching kernels would be lost"
        if any(group.get("capturable") is False for group in optimizer.param_groups):
            return f"{name} was made with capturable=False: pass capturable=True"
        if has_step_hooks(optimizer):
            return f"{name} has hooks, which a graph would not call"
        if any(id(tensor) not in moved for group in optimizer.param_groups for tensor in group["params"]):
            return f"{name} moves other tensors, too"
        options = [option for group in optimizer.param_groups for option in group.items()]
        leaves = [(key, leaf) for key, value in options for leaf in _leaves(value)]
        states = [(key, leaf) for entry in optimizer.state.values() for key, leaf in entry.items()]
        for key, leaf in (*leaves, *states):
            if isinstance(leaf, Tensor) and leaf.device != device:
                return f"its {key} is on {leaf.device}, where a graph cannot read it"
        for key, leaf in states:
            if leaf is not None and not isinstance(leaf, Tensor):
                return f"its {key} is no tensor, so that a graph would always take the same"
        if any(grad is not None and grad.layout is not torch.strided for grad in grads):
            return "gradients are sparse"
        return None


def _leaves(value: Any) -> Sequence[Any]:
    return pytree.tree_leaves(value) if isinstance(value, (tuple, list, dict)) else (value,)


def _baked(leaf: Any) -> Hashable:
    """Of a tensor its address, anything else as it is."""
    return leaf.data_ptr() if isinstance(leaf, Tensor) else leaf
