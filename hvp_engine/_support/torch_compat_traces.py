"""What the package uses of torch's tracing and compiling beyond its public interface; see :mod:`torch_compat`."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx._lazy_graph_module import _LazyGraphModule

from hvp_engine._support.torch_compat import without_torch_functions

aten = torch.ops.aten


def is_higher_order(operation: Any) -> bool:
    """Whether an operator runs functions, as those of control flow do (scan, map, while_loop, cond)."""
    return isinstance(operation, torch._ops.HigherOrderOperator)


@cache
def is_composite(operation: Any) -> bool:
    """Whether autograd replaces the operator by others, as it does where no device has a kernel for it. A mode below
    autograd meets it all the same where autograd is left out, as in `torch.inference_mode`."""
    has_kernel, name = torch._C._dispatch_has_kernel_for_dispatch_key, operation.name()
    return has_kernel(name, "CompositeImplicitAutograd") and not (has_kernel(name, "CPU") or has_kernel(name, "CUDA"))


def is_of_profiler(operation: Any) -> bool:
    """Whether the operator begins or ends a named range of a profile, as steps of optimizers do."""
    return getattr(operation, "namespace", "") == "profiler"


def decomposition(operation: Any) -> Callable[..., Any] | None:
    """A function that does the same by simpler operators, where torch has one."""
    from torch._decomp import decomposition_table  # not every torch has imported it by itself

    found: Callable[..., Any] | None = decomposition_table.get(operation)
    return found


def memory_of(tensor: Tensor) -> Any:
    """The storage: the same Python object, with what is set on it, as long as any tensor shows it."""
    with without_torch_functions():
        return tensor.untyped_storage()


def has_internal_overlap(tensor: Tensor) -> bool:
    """Whether several elements are in the same place, as in an expanded tensor."""
    return torch._debug_has_internal_overlap(tensor) != 0


@cache
def has_own_dispatch(kind: type) -> bool:
    """Whether tensors of this class do in Python what operators do on them."""
    return getattr(kind, "__torch_dispatch__", _PLAIN_DISPATCH) is not _PLAIN_DISPATCH


_PLAIN_DISPATCH = torch._C._disabled_torch_dispatch_impl


@contextlib.contextmanager
def compiled_code_discarded() -> Iterator[None]:
    """Keep nothing that torch.compile makes in the block: functions of control flow compile themselves, and what they
    make under a dispatch mode would be kept for all calls."""
    if compiler_is_imported():
        with torch.compiler.set_stance("force_eager"):
            yield
        return
    try:
        yield
    finally:
        if compiler_is_imported():
            torch.compiler.reset()


def graph_module(root: torch.nn.Module, graph: fx.Graph) -> fx.GraphModule:
    """A module of the graph, whose Python code is written when it is needed: most are only read, and writing the code
    of all of them takes a tenth of the time to build a program."""
    return _LazyGraphModule(root, graph)


def function_of(module: fx.GraphModule) -> Callable[..., Any]:
    """The module's code, without what calling a module adds."""
    _LazyGraphModule.force_recompile(module)
    return module.forward


def compiler_is_imported() -> bool:
    """Whether this process has come to torch.compile, which it takes a second to import."""
    return "torch._dynamo" in sys.modules


def compile_graph(module: fx.GraphModule, arguments: Sequence[Tensor], size_asserts: bool) -> Callable[..., Any]:
    """The graph through inductor.

    Layouts in it are those of fake tensors, which are not always the kernels', so that a view which was traced may be
    impossible: views become reshapes, which copy where they must. Where fake tensors are known to be wrong (seen in
    2.13) a copy gives the result the kernel's layout.
    """
    graph = fx.Graph()
    graph.output(graph.graph_copy(module.graph, {}))
    for node in graph.find_nodes(op="call_function", target=aten.view.default):
        node.target = aten.reshape.default
    for node in graph.find_nodes(op="call_function", target=LAID_OUT_OTHERWISE):
        with graph.inserting_after(node):
            rows = graph.call_function(aten.clone.default, (node,), {"memory_format": torch.contiguous_format})
        node.replace_all_uses_with(rows, delete_user_cb=lambda user, rows=rows: user is not rows)
    return torch._inductor.compile(graph_module(module, graph), list(arguments), options={"size_asserts": size_asserts})


LAID_OUT_OTHERWISE = aten._log_softmax_backward_data.default
"""What a fake tensor has other strides of than the kernel's result, which is laid out row after row."""
