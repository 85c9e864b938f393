"""A module as a pure function of (some of) its parameters."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from hvp_engine._support.isolation import copied, is_isolated, record_module
from hvp_engine._support.random_state import TURNS, kept_torch_state, one_thread
from hvp_engine._support.torch_compat import compiled_from

_HOOKS = "saved-tensor hooks in a functional call"


class FunctionalModule:
    """See :func:`functional`."""

    def __init__(self, module: torch.nn.Module):
        if not isinstance(module, torch.nn.Module):
            raise TypeError(f"module: expected a torch.nn.Module; got {type(module).__name__}")
        _refuse_fully_sharded(module)
        self._prefix = ""
        while inner := _wrapped(module):
            name, module = inner
            self._prefix += f"{name}."
        self.module = module
        self._names = {name for name, _ in module.named_parameters(remove_duplicate=False)}

    def __call__(self, weights: Mapping[str, Tensor], *inputs: Any, **keywords: Any) -> Any:
        if not isinstance(weights, Mapping):
            raise TypeError(
                f"weights: expected a dict from parameter names to tensors; got {type(weights).__name__}: "
                "use dict(module.named_parameters())"
            )
        weights = {name.removeprefix(self._prefix): weight for name, weight in weights.items()}
        if unknown := [name for name in weights if name not in self._names]:
            raise ValueError(
                f"weights: expected names of the module's parameters; got {unknown[0]!r}: "
                f"known are {', '.join(sorted(self._names)[:8])}{', ...' if len(self._names) > 8 else ''}"
            )
        record_module(self.module)
        if is_isolated():
            draw_again = kept_torch_state()
            with contextlib.ExitStack() as without_hooks:
                try:
                    without_hooks.enter_context(torch.autograd.graph.disable_saved_tensors_hooks(_HOOKS))
                except RuntimeError:  # the caller's hooks rerun this whole call, with these weights
                    return self._call(weights, inputs, keywords)
                try:
                    return self._call(weights, inputs, keywords)
                except RuntimeError as error:
                    if str(error) != _HOOKS:
                        raise
            draw_again()  # the layers before the checkpoint have drawn their masks already
            self._refuse_other_weights(weights)
        return self._call(weights, inputs, keywords)

    def _refuse_other_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Rematerialization inside the module reads the module's own weights: others would give wrong gradients."""
        own = dict(self.module.named_parameters(remove_duplicate=False))
        for name, weight in weights.items():
            if not weight.is_set_to(own[name]):
                raise ValueError(
                    f"weights: expected the module's own, since gradient checkpointing in it computes with those again "
                    f"in the backward pass; got another tensor for {name!r}: copy the weights into the module and pass "
                    "dict(module.named_parameters()), or switch checkpointing off"
                )

    def _call(self, weights: Mapping[str, Tensor], inputs: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
        # The module's own weights are swapped out meanwhile.
        with TURNS.holding([*self.module.modules()]) if TURNS.together else one_thread():
            return self._replaced(weights, inputs, keywords)

    def _replaced(self, weights: Mapping[str, Tensor], inputs: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
        places = self._places()
        state: dict[str, Tensor] = {}
        for name, weight in weights.items():
            for place in places[name]:
                if state.setdefault(place, weight) is not weight:
                    raise ValueError(f"weights: expected one tensor for tied parameters; got two, one as {name!r}")
        if is_isolated():
            for name, buffer in self.module.named_buffers():
                state |= dict.fromkeys(places[name], copied(buffer))
        return torch.func.functional_call(self.module, state, inputs, keywords, tie_weights=False)

    def _places(self) -> dict[str, list[str]]:
        """For each name, one name for every attribute that holds the same tensor.

        A module registered as both `a` and `b` has two names, a.weight and b.weight, for one attribute. Given both,
        `functional_call` with tie_weights swaps it twice, and at the end restores its own replacement.
        """
        modules = dict(self.module.named_modules(remove_duplicate=False))
        named = [
            *self.module.named_parameters(remove_duplicate=False),
            *self.module.named_buffers(remove_duplicate=False),
        ]
        attributes: dict[int, dict[tuple[int, str], str]] = {}
        for name, tensor in named:
            path, _, attribute = name.rpartition(".")
            attributes.setdefault(id(tensor), {}).setdefault((id(modules[path]), attribute), name)
        return {name: list(attributes[id(tensor)].values()) for name, tensor in named}

    def __repr__(self) -> str:
        return f"functional({type(self.module).__name__})"


def _wrapped(module: torch.nn.Module) -> tuple[str, torch.nn.Module] | None:
    """The module inside a wrapper, and its name there; None for any other module.

    DDP reduces only .grad, and its forward communicates; compiled code has no second derivatives.
    """
    return ("module", module.module) if isinstance(module, DistributedDataParallel) else compiled_from(module)


def _refuse_fully_sharded(module: torch.nn.Module) -> None:
    """FSDP2 gathers and frees parameters in hooks, which leave no graph to differentiate twice."""
    fsdp = sys.modules.get("torch.distributed.fsdp")  # not imported: no module can be sharded
    if fsdp is None:
        return
    for name, part in module.named_modules():
        if isinstance(part, (fsdp.FSDPModule, fsdp.FullyShardedDataParallel)):
            raise TypeError(
                f"module: expected one whose parameters are its own; got {name or 'the module'} under fully_shard, "
                "which gives no second derivatives: build the module without it (on the meta device, for its code "
                "alone), shard the dict of its weights by torch.distributed.tensor.distribute_tensor(weight, mesh, "
                "[Shard(0)]), and wrap the losses in hvp.DataParallel, which gathers them"
            )


def functional(module: torch.nn.Module) -> FunctionalModule:
    """`module` as a function `net(weights, *inputs, **keywords)`.

    Arguments:
        module: any module. It is not copied, and its training/eval mode is read at every call. If it is wrapped in
            DistributedDataParallel, the module inside is called, with the names of either; see :class:`DataParallel`.
            If it comes from torch.compile, the original is called, since compiled code has no second derivatives.

    The returned callable takes `weights`, a dict of some or all of the module's named parameters (tied parameters
    under either name); for the rest it uses the module's own. Buffers (BatchNorm statistics) are updated as by the
    module itself, except inside calls of this package, which use copies. Threads that call it, or another one made from
    the same module, take turns.

    Cost: that of the module and some 10 microseconds for each of its submodules, which traced engines pay once for each
    trace. Memory: nothing more; inside calls of this package, a copy of the buffers.

    Errors: `TypeError` if `module` is not a module, or one under `fully_shard`, or if `weights` is not a dict;
    `ValueError` for an unknown name.

    >>> import torch, hvp_engine as hvp
    >>> module = torch.nn.Linear(2, 1)
    >>> net = hvp.functional(module)
    >>> net({"weight": torch.ones(1, 2), "bias": torch.zeros(1)}, torch.ones(3, 2)).flatten()
    tensor([2., 2., 2.])
    """
    return FunctionalModule(module)
