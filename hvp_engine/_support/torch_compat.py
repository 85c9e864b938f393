"""What the package uses of torch beyond its public interface: private names, and texts and names that guards match.

Nothing else in the package names any of them, and `tests/test_torch_compat*.py` have a test for each: that it exists
and does what is said here, and for each guard a graph that it must refuse. So a new version of torch is judged by two
files of tests. "Seen in" is where the behaviour was observed; a version that mends it lets its canary fail.
"""

from __future__ import annotations

import contextlib
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensor
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._python_dispatch import is_traceable_wrapper_subclass as is_traceable_wrapper_subclass

__all__ = ["is_traceable_wrapper_subclass", "pytree"]

REGISTER_PYTREE = "torch.utils._pytree.register_pytree_node"
"""What messages tell users to call: torch has no public name for it."""


class DispatchMode(TorchDispatchMode):
    """A dispatch mode that torch.compile is not told to skip: the wrapper that tells it imports all of torch.compile at
    its first call, which takes 1 s, and costs microseconds at every operation. Seen in 2.13."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False


# Lists of tensors, in one call.

foreach_copy_ = torch._foreach_copy_
foreach_norm = torch._foreach_norm
foreach_zero_ = torch._foreach_zero_
foreach_mul_ = torch._foreach_mul_

# Autograd.

below_autograd = torch._C._AutoDispatchBelowAutograd
"""A context in which operations skip autograd, unlike `torch.no_grad` without going through its kernels."""


def backward(
    outputs: Sequence[Tensor], tangents: Sequence[Tensor], inputs: Sequence[Tensor]
) -> Sequence[Tensor | None]:
    """As `torch.autograd.grad` with a retained graph and `allow_unused`, without 60 us of checks."""
    return _run_backward(outputs, tangents, True, False, inputs, allow_unreachable=True, accumulate_grad=False)


def backward_at(
    outputs: Sequence[Tensor], tangents: tuple[Tensor, ...], inputs: Sequence[Tensor]
) -> Callable[[], Sequence[Tensor | None]]:
    """:func:`backward` of what the tangents are at each call."""
    keywords = {"allow_unreachable": True, "accumulate_grad": False}
    return partial(_run_backward, outputs, tangents, True, False, inputs, **keywords)


_run_backward = torch.autograd.Variable._execution_engine.run_backward


def in_backward_pass() -> bool:
    """Whether this thread is inside autograd's backward pass."""
    return torch._C._current_graph_task_id() != -1


without_torch_functions = torch._C.DisableTorchFunction
"""A context in which no `TorchFunctionMode` sees what Python calls."""

without_torch_functions_of_classes = torch._C.DisableTorchFunctionSubclass
"""A context in which subclasses of tensors are taken for plain ones."""


def version_of(tensor: Tensor) -> int:
    """How often the tensor has been changed in place; `RuntimeError` for one made in inference mode."""
    return tensor._version


def versions_of(tensors: Sequence[Tensor]) -> list[int]:
    """:func:`version_of` each."""
    return [tensor._version for tensor in tensors]


def is_zero_tensor(tensor: Tensor) -> bool:
    """Whether the tensor is zeros without memory, as forward mode makes them. Its product with a number ends the
    process with a segmentation fault under a dispatch mode. Seen in 2.11, 2.13 and 2.15."""
    return tensor._is_zerotensor()


def elements_of(tensor: Tensor) -> int:
    """How many elements a sparse tensor stores."""
    return tensor._nnz()


def shares_storage(tensor: Tensor) -> bool:
    """Whether another tensor that is alive shows the same memory."""
    storage = tensor.untyped_storage()
    return torch._C._storage_Use_Count(storage._cdata) > 2  # the tensor's own use and the one made here


def in_transform() -> bool:
    """Whether this code runs under a transform of `torch.func` or in a level of forward mode."""
    return torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0


def is_batched(tensor: Tensor) -> bool:
    """Whether a transform has put a batch in place of the tensor: `torch.vmap`, or autograd's `is_grads_batched`."""
    return torch._C._functorch.is_batchedtensor(tensor) or torch._C._functorch.is_legacy_batchedtensor(tensor)


def is_wrapped(tensor: Tensor) -> bool:
    """Whether a transform of `torch.func` has put a tensor of its own in place of this one."""
    return torch._C._functorch.is_functorch_wrapped_tensor(tensor)


# Kernels.

fused_weight_norm = torch._weight_norm
"""Its derivative is differentiable and wrong: the backward takes the norms for constants. Seen in 2.13."""


def onednn_enabled() -> bool:
    """Whether convolutions and recurrent layers on a CPU may use oneDNN."""
    return torch._C._get_mkldnn_enabled()


@contextlib.contextmanager
def without_onednn() -> Iterator[None]:
    """As `torch.backends.mkldnn.flags(enabled=False)`, which warns about TF32 in 2.13."""
    enabled = onednn_enabled()
    torch._C._set_mkldnn_enabled(False)
    try:
        yield
    finally:
        torch._C._set_mkldnn_enabled(enabled)


def end_allocation_to_pool(device: int, pool: Any) -> None:
    """Undo what a CUDA capture that failed to begin or end has left: allocations would go to the graph's pool on."""
    torch._C._cuda_endAllocateToPool(device, pool)


# Optimizers.


def has_step_hooks(optimizer: torch.optim.Optimizer) -> bool:
    """Whether hooks are called before or after steps, of this optimizer or of all."""
    own = optimizer._optimizer_step_pre_hooks, optimizer._optimizer_step_post_hooks
    return any((*own, _global_optimizer_pre_hooks, _global_optimizer_post_hooks))


# Graphs.


def loaded_library(name: str) -> str:
    """The file of one of torch's own libraries, which are loaded with it."""
    suffix = {"darwin": "dylib", "win32": "dll"}.get(sys.platform, "so")
    return str(Path(torch.__file__).parent / "lib" / f"{'' if suffix == 'dll' else 'lib'}{name}.{suffix}")


def is_fake(tensor: Tensor) -> bool:
    """Whether a tensor has a shape and no values."""
    return isinstance(tensor, FakeTensor)


def broadcast_shapes(*shapes: Sequence[int]) -> torch.Size:
    """As `torch.broadcast_shapes`, which imports sympy at its first call, for 0.4 s. Seen in 2.13."""
    places = zip_longest(*map(reversed, shapes), fillvalue=1)
    found = torch.Size([next((size for size in sizes if size != 1), 1) for sizes in places][::-1])
    fit = all(size in (1, n) for shape in shapes for size, n in zip(reversed(shape), reversed(found), strict=False))
    return found if fit else torch.broadcast_shapes(*shapes)  # it raises


def suggest_memory_format(x: Tensor) -> torch.memory_format:
    """The format in which torch's convolutions give their results for images that are laid out as `x` is: the last one
    if, from the channels to the images, strides do not fall. `torch._prims_common` has it, and imports sympy."""
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    if x.layout is not torch.strided or x.dim() not in formats or x.stride(1) == 0 or 0 in x.shape:
        return torch.contiguous_format
    least = 0
    for dim in (1, *range(x.dim() - 1, 1, -1), 0):
        if x.stride(dim) < least or dim == 0 and least == x.stride(1):
            return torch.contiguous_format
        least = x.stride(dim) * x.shape[dim]
    return formats[x.dim()]


subclass_of = Tensor._make_subclass
"""A tensor of a subclass with the data of another; `Tensor.as_subclass` has none of sparse tensors. Seen in 2.13."""


def schema_of(operation: Any) -> Any:
    """The schema of an operator of `torch.ops`, with types and aliases of its arguments; None for anything else."""
    return getattr(operation, "_schema", None)


def tags_of(operation: Any) -> Sequence[torch.Tag]:
    """The tags of an operator of `torch.ops`; none for anything else."""
    return getattr(operation, "tags", ())


def compiled_from(module: torch.nn.Module) -> tuple[str, torch.nn.Module] | None:
    """The attribute in which a module that `torch.compile` returned keeps the original, and that; else None."""
    original = getattr(module, "_orig_mod", None)
    return None if original is None else ("_orig_mod", original)


# torch 2.13 renamed them.
all_gather_single = getattr(torch.distributed, "all_gather_single", None) or torch.distributed.all_gather_into_tensor
reduce_scatter_single = (
    getattr(torch.distributed, "reduce_scatter_single", None) or torch.distributed.reduce_scatter_tensor
)


# Texts that autograd's and make_fx's errors hold.

NOT_DIFFERENTIABLE = re.compile(
    r"derivative for '?(?:aten::)?([\w.]+)'? is not implemented"
    r"|trying to differentiate twice a function that was marked with @(\w+)"
)
"""An operator without a second derivative; the groups name it."""

REENTRANT = "use_reentrant=True"
"""Reentrant checkpointing, which `torch.autograd.grad` cannot pass."""

SPARSE_AND_DENSE = "add(sparse, dense)"
"""The sum of a sparse gradient and a dense one that came first."""

COMPILED = re.compile("does not currently support double backward|compiled with non-empty donated|dynamo-optimized")
"""A part made by torch.compile: its backward is a compiled graph, or has freed its buffers."""

NOT_BATCHED = "Batching rule not implemented"
"""`torch.vmap` met an operator, such as torch's recurrent layers, that it has no batched form of."""

FREED_GRAPH, CHANGED_TENSOR = "through the graph a second time", "modified by an inplace operation"
"""In the errors of a graph that was freed, and of one with a tensor that has been changed."""
