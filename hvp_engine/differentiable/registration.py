"""How operations with two derivatives are registered: schema, shapes without values, kernels and autograd."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from hvp_engine.ops.backend import fastest, select

LIBRARY = torch.library.Library("hvp_engine", "FRAGMENT")


def register(
    schema: str,
    run: Callable[..., Any],
    fake: Callable[..., Any],
    setup: Callable[..., None],
    backward: Callable[..., Any],
) -> None:
    """Make `torch.ops.hvp_engine.<name>` of `schema`.

    Arguments:
        run: the operation, on a CPU and on CUDA.
        fake: results of the right shapes, dtypes and strides, without values.
        setup, backward: as `torch.library.register_autograd` takes them. What is no tensor goes to `ctx.settings`.
    """
    name = schema.partition("(")[0]
    LIBRARY.define(schema)
    LIBRARY.impl(name, run, "CPU")
    LIBRARY.impl(name, run, "CUDA")
    torch.library.register_fake(f"hvp_engine::{name}", fake, lib=LIBRARY)
    torch.library.register_autograd(f"hvp_engine::{name}", backward, setup_context=setup, lib=LIBRARY)
    torch.library.register_vmap(f"hvp_engine::{name}", partial(_one_by_one, name), lib=LIBRARY)


def _one_by_one(name: str, info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> tuple[Any, Any]:
    """The operation on each of a batch of arguments."""
    operation = getattr(torch.ops.hvp_engine, name)
    results = [
        operation(*(a if d is None else a.select(d, index) for a, d in zip(arguments, in_dims, strict=True)))
        for index in range(info.batch_size)
    ]
    if isinstance(results[0], Tensor):
        return torch.stack(results), 0
    return tuple(map(torch.stack, zip(*results, strict=True))), (0,) * len(results[0])


def by_reference(reference: Callable[..., Any]) -> tuple[Callable[..., None], Callable[..., Any]]:
    """`setup` and `backward` of an operation that has a reference in plain torch, whose derivatives are torch's.

    So derivatives of an order for which there is no kernel exist all the same.
    """

    def setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.set_materialize_grads(False)
        ctx.settings = tuple("" if isinstance(value, Tensor) else value for value in inputs)
        ctx.save_for_backward(*(value for value in inputs if isinstance(value, Tensor)))

    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        saved = iter(ctx.saved_tensors)
        arguments = [next(saved) if value == "" else value for value in ctx.settings]
        return derivatives(reference, arguments, ctx.needs_input_grad, grads)

    return setup, backward


def derivatives(
    reference: Callable[..., Any], arguments: Sequence[Any], wanted: Sequence[bool], grads: Sequence[Tensor | None]
) -> tuple[Tensor | None, ...]:
    """Of a reference in plain torch, by autograd, with a graph if grad mode is on: for each argument that is wanted,
    from the gradients of the results."""
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():  # one argument may depend on another: the derivatives are partial
        taken = [x.view_as(x) if isinstance(x, Tensor) else x for x in arguments]
        found = reference(*taken)
        outputs: Sequence[Tensor] = found if isinstance(found, tuple) else (found,)
        pairs = [(y, g) for y, g in zip(outputs, grads, strict=True) if g is not None and y.requires_grad]
        active = [x for x, needed in zip(taken, wanted, strict=True) if needed]
        by_autograd: Sequence[Tensor | None] = [None] * len(active)
        if pairs and active:
            results, gradients = zip(*pairs, strict=True)
            by_autograd = torch.autograd.grad(results, active, gradients, create_graph=create_graph, allow_unused=True)
    each = iter(by_autograd)
    return tuple(next(each) if needed else None for needed in wanted)


def check_tensor(value: Any, name: str) -> None:
    """`TypeError` for an argument that is no tensor."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a tensor; got {type(value).__name__}")


def implementation(device: torch.device, modules: Mapping[str, str]) -> Any:
    """The module that computes on `device`, of those given by backend; the fastest of them where `use_backend` names
    one that is not among them."""
    name, _ = select(device, among=tuple(modules))
    return _module(modules[name if name in modules else fastest(device.type, tuple(modules))])


_module = cache(importlib.import_module)


def accumulated(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which numbers of `dtype` are computed and added up."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype
