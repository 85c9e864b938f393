"""What the package uses of torch's tracing and compiling beyond its public interface; see :mod:`torch_compat`."""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch._C._functorch import TransformType
from torch.fx._lazy_graph_module import _LazyGraphModule
from torch.fx.experimental import proxy_tensor
from torch.fx.experimental.proxy_tensor import get_proxy_mode, get_proxy_slot
from torch.fx.experimental.proxy_tensor import make_fx as make_fx
from torch.utils._python_dispatch import TorchDispatchMode

from hvp_engine._support.torch_compat import is_fake

__all__ = ["TorchDispatchMode", "make_fx"]


@contextlib.contextmanager
def traced_values(note: Callable[[Tensor], Any]) -> Iterator[None]:
    """Let `make_fx` in this thread keep `note(tensor)` of each value as the `val` of its node.

    It would keep a fake tensor, made in a fake mode of its own: half of the time of a long trace.
    `tracing_mode="fake"` gives the same operations on an MLP, LeNet, a transformer and a U-Net, no faster. But it
    predicts strides where this records them (for a U-Net it predicts other ones).
    """
    module: Any = proxy_tensor
    original, thread = module.extract_val, threading.get_ident()

    def noted(value: Any, *arguments: Any, **keywords: Any) -> Any:
        if threading.get_ident() == thread:
            if isinstance(value, Tensor) and value.layout is torch.strided and not is_fake(value):
                return note(value)
            if isinstance(value, (list, tuple)):
                return value.__class__([noted(item, *arguments, **keywords) for item in value])
        return original(value, *arguments, **keywords)

    module.extract_val = noted
    try:
        yield
    finally:
        module.extract_val = original


def sources_of(tensor: Tensor) -> list[Tensor] | None:
    """The tensors from which the trace that `make_fx` makes just now computes this one; None if its inputs are among
    them."""
    mode = get_proxy_mode()
    found: Any = None if mode is None else get_proxy_slot(tensor, mode.tracer, None)
    if mode is None or found is None:
        return [tensor]
    root: Any = mode.tracer.root  # type: ignore[union-attr]
    nodes, seen, sources = [found.proxy.node], set[fx.Node](), list[Tensor]()
    while nodes:
        node = nodes.pop()
        if node.op == "placeholder":
            return None
        if node.op == "get_attr":
            sources.append(getattr(root, node.target))
        if node not in seen:
            seen.add(node)
            nodes += node.all_input_nodes
    return sources


def is_higher_order(operation: Any) -> bool:
    """Whether an operator runs functions, as those of control flow do (scan, map, while_loop, cond)."""
    return isinstance(operation, torch._ops.HigherOrderOperator)


REVERSE_IN_FORWARD = "torch.func.grad inside torch.func.jvp"
"""Reverse mode inside forward mode (also as jacfwd of grad or jacrev, which `torch.func.hessian` is)."""


@contextlib.contextmanager
def reverse_in_forward_refused() -> Iterator[None]:
    """Raise a `RuntimeError` of this text where this thread comes to it: under `make_fx` it ends the whole process with
    a segmentation fault, jvp of grad always, the hessian under vmap. Seen in 2.13."""
    transforms, thread = torch._functorch.eager_transforms, threading.get_ident()
    original = transforms.grad_increment_nesting

    def guarded() -> Any:
        levels = torch._C._functorch.get_interpreter_stack() or ()
        if threading.get_ident() == thread and any(level.key() == TransformType.Jvp for level in levels):
            raise RuntimeError(REVERSE_IN_FORWARD)
        return original()

    transforms.grad_increment_nesting = guarded
    try:
        yield
    finally:
        transforms.grad_increment_nesting = original


def graph_module(root: torch.nn.Module, graph: fx.Graph) -> fx.GraphModule:
    """A module of the graph, whose Python code is written when it is needed: most are only read, and writing the code
    of all of them takes a tenth of the time to build a program."""
    return _LazyGraphModule(root, graph)


def function_of(module: fx.GraphModule) -> Callable[..., Any]:
    """The module's code, without what calling a module adds."""
    _LazyGraphModule.force_recompile(module)
    return module.forward


def compiler_is_imported() -> bool:
    """Whether a first trace need not import torch.compile, as `make_fx` does in 2.13."""
    return "torch._dynamo" in sys.modules


def compile_graph(module: fx.GraphModule, arguments: Sequence[Tensor], size_asserts: bool) -> Callable[..., Any]:
    """The graph through inductor."""
    return torch._inductor.compile(module, list(arguments), options={"size_asserts": size_asserts})


# Texts of errors.

WITHOUT_STRIDES = "tensors do not have strides"
"""In the error of a trace that meets a compressed sparse tensor (CSR and its like)."""


def says_data_dependent(error: Exception) -> bool:
    """Whether a trace failed since Python asked a tensor for its value."""
    text = str(error)
    return "data-dependent" in text or "proxy" in text.lower() or ".item()" in text
