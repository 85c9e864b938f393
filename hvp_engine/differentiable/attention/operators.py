"""Attention and its two derivatives as operators of torch: schemas, checks, fakes, autograd, and which backend runs.

`torch.ops.hvp_engine.attention`, `attention_backward` and `attention_backward_backward`, on tensors of batch x heads x
length x width. Each is the derivative of the one before; what each computes is its function in
:mod:`hvp_engine.differentiable.attention.reference`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from hvp_engine._support.torch_compat import without_torch_functions
from hvp_engine.differentiable.attention import reference
from hvp_engine.differentiable.attention.reference import Settings
from hvp_engine.ops import backend

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

_MODULES = {
    "reference": "hvp_engine.differentiable.attention.reference",
    "cpp": "hvp_engine.differentiable.attention.cpp",
    "triton": "hvp_engine.kernels.attention",
}

_OPERANDS = "Tensor query, Tensor key, Tensor value"
_RESULTS = "Tensor output, Tensor logsumexp"
_SETTINGS = "Tensor? mask, Tensor? seed, float dropout_p, bool is_causal, float scale"
_TANGENTS = "Tensor? grad_grad_query, Tensor? grad_grad_key, Tensor? grad_grad_value"
SCHEMAS = (
    f"attention({_OPERANDS}, {_SETTINGS}) -> ({_RESULTS})",
    f"attention_backward(Tensor grad_output, {_OPERANDS}, {_RESULTS}, {_SETTINGS}) -> (Tensor, Tensor, Tensor)",
    f"attention_backward_backward({_TANGENTS}, Tensor grad_output, {_OPERANDS}, {_RESULTS}, {_SETTINGS}) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
)
_SHARED = 5
"""Arguments of the settings, the last ones of every operator."""


def check(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout_p: float) -> None:
    """Raise `ValueError` or `TypeError`, naming the argument, unless the arguments fit together."""
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if tensor.dtype not in DTYPES or tensor.dtype != query.dtype:
            raise TypeError(
                f"attention: {name}: expected float32, float64, bfloat16 or float16, and the query's dtype; "
                f"got {tensor.dtype} beside a query of {query.dtype}: convert them to one dtype"
            )
        if tensor.dim() != 4:
            raise ValueError(
                f"attention: {name}: expected batch x heads x length x width; got shape {tuple(tensor.shape)}"
            )
        if tensor.device != query.device:
            raise ValueError(f"attention: {name}: expected device {query.device} as the query; got {tensor.device}")
    batch, heads, queries, width = query.shape
    groups, keys = key.shape[1:3]
    if key.shape[0] != batch or key.shape[3] != width:
        raise ValueError(
            f"attention: key: expected batch {batch} and width {width} as the query; got shape {tuple(key.shape)}"
        )
    if value.shape[:3] != key.shape[:3]:
        raise ValueError(
            f"attention: value: expected batch, heads and length of the key, {tuple(key.shape[:3])}; "
            f"got shape {tuple(value.shape)}"
        )
    if heads % groups if groups else heads:
        raise ValueError(f"attention: key: expected heads that divide the query's {heads}; got {groups}")
    if mask is not None:
        if mask.dtype != torch.bool and mask.dtype not in DTYPES:
            raise TypeError(f"attention: mask: expected a boolean or floating dtype; got {mask.dtype}")
        full = (batch, heads, queries, keys)
        if mask.dim() != 4 or any(size not in (1, whole) for size, whole in zip(mask.shape, full, strict=True)):
            raise ValueError(
                f"attention: mask: expected {full} (batch x heads x queries x keys), with 1 for any of them; "
                f"got shape {tuple(mask.shape)}"
            )
        if mask.device != query.device:
            raise ValueError(f"attention: mask: expected device {query.device} as the query; got {mask.device}")
    if not 0 <= dropout_p <= 1:
        raise ValueError(f"attention: dropout_p: expected a probability from 0 to 1; got {dropout_p}")


def _check_seed(seed: Tensor | None, dropout_p: float, device: torch.device) -> None:
    if (seed is None) != (dropout_p == 0):
        raise ValueError(f"attention: seed: expected one where dropout_p is not 0; got {seed} with {dropout_p}")
    if seed is not None and (seed.dtype != torch.int64 or seed.dim() or seed.device != device):
        raise ValueError(
            f"attention: seed: expected a 0-dim int64 tensor on {device}; got shape {tuple(seed.shape)}, "
            f"{seed.dtype}, {seed.device}"
        )


@cache
def _implementation(name: str) -> Any:
    return importlib.import_module(_MODULES.get(name, _MODULES["reference"]))


def runs_on(device: torch.device) -> str:
    """The backend that runs attention on a device: one that is faster than plain torch, or "reference"."""
    name, _ = backend.select(device, among=tuple(_MODULES))
    return name if name in _MODULES else "reference"


def _run(operator: str) -> Callable[..., tuple[Tensor, ...]]:
    def run(*arguments: Any) -> tuple[Tensor, ...]:
        tensors, settings = arguments[:-_SHARED], Settings(*arguments[-_SHARED:])
        query = _checked(operator, tensors, settings)
        name = runs_on(query.device)
        if name == "triton" and query.dtype == torch.float64:
            name = "reference"  # whose products are exact to float64 on every GPU
        with torch.no_grad():
            return getattr(_implementation(name), operator)(*tensors, settings)

    return run


def _checked(operator: str, tensors: Sequence[Any], settings: Settings) -> Tensor:
    """The query, after all arguments have been checked."""
    first = {"attention": 0, "attention_backward": 1, "attention_backward_backward": 4}[operator]
    query, key, value = tensors[first : first + 3]
    check(query, key, value, settings.mask, settings.dropout_p)
    _check_seed(settings.seed, settings.dropout_p, query.device)
    shape = (*query.shape[:3], value.shape[3])
    expected = {"grad_output": shape, "output": shape, "logsumexp": shape[:3]}
    given = dict(zip(("grad_output",), tensors[first - 1 : first], strict=True)) if first else {}
    given |= dict(zip(("output", "logsumexp"), tensors[first + 3 :], strict=False))
    if first == 4:
        expected |= {"grad_grad_query": query.shape, "grad_grad_key": key.shape, "grad_grad_value": value.shape}
        given |= dict(zip(("grad_grad_query", "grad_grad_key", "grad_grad_value"), tensors, strict=False))
    for name, tensor in given.items():
        if tensor is not None and tensor.shape != torch.Size(expected[name]):
            raise ValueError(
                f"{operator}: {name}: expected shape {tuple(expected[name])}; got shape {tuple(tensor.shape)}"
            )
    return query


def _fake(operator: str) -> Callable[..., tuple[Tensor, ...]]:
    def fake(*arguments: Any) -> tuple[Tensor, ...]:
        tensors, settings = arguments[:-_SHARED], Settings(*arguments[-_SHARED:])
        query = _checked(operator, tensors, settings)
        if operator == "attention":
            _, _, value = tensors
            dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
            shape = query.shape[:3]
            return query.new_empty((*shape, value.shape[3])), query.new_empty(shape, dtype=dtype)
        first = 0 if operator == "attention_backward_backward" else 1
        grad_output, *operands = tensors[3 - 3 * first :][:4]
        return tuple(like.new_empty(like.shape) for like in [grad_output, *operands][first:])

    return fake


def _keep(context: Any, inputs: Sequence[Any], output: Sequence[Tensor] = ()) -> None:
    """Save what a backward needs, where a recorder of products finds it: tensors, and the settings that are none."""
    *tensors, mask, seed, dropout_p, is_causal, scale = inputs
    if mask is not None and mask.requires_grad:
        raise ValueError(
            "attention: mask: expected one that does not require grad, since its gradient has a number for each query "
            "and key; got one that does: run this attention under torch.nn.attention.sdpa_kernel(SDPBackend.MATH)"
        )
    context.save_for_backward(*tensors, *output, mask, seed)
    context.settings = (dropout_p, is_causal, scale)
    context.set_materialize_grads(False)


def _keep_forward(ctx: Any, inputs: Sequence[Any], output: Sequence[Tensor]) -> None:
    ctx.mark_non_differentiable(output[1])
    _keep(ctx, inputs, output)


def _keep_backward(ctx: Any, inputs: Sequence[Any], output: Sequence[Tensor]) -> None:
    _keep(ctx, inputs)


def _attention_backward(ctx: Any, grad_output: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    if grad_output is None:
        return (None,) * 8
    saved = ctx.saved_tensors  # which checkpointing computes again, with whatever functions are replaced
    with without_torch_functions():
        gradients = torch.ops.hvp_engine.attention_backward(grad_output, *saved, *ctx.settings)
    return (*gradients, *(None,) * _SHARED)


def _attention_backward_backward(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor | None, ...]:
    if all(tangent is None for tangent in tangents):
        return (None,) * 11
    saved = ctx.saved_tensors
    with without_torch_functions():
        gradients = torch.ops.hvp_engine.attention_backward_backward(*tangents, *saved, *ctx.settings)
    return (*gradients, *(None,) * (2 + _SHARED))


def _third_derivative(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
    """By autograd from the reference, with its whole matrices; it can be differentiated again."""
    *saved, mask, seed = ctx.saved_tensors
    settings = Settings(mask, seed, *ctx.settings)
    with torch.enable_grad():
        inputs: list[Any] = [None if x is None else x.view_as(x) if x.requires_grad else x.detach() for x in saved[:7]]
        active = [x for x in inputs if x is not None and x.requires_grad]
        a, b, c, g, q, k, v = inputs
        outputs = reference.attention_backward_backward(a, b, c, g, q, k, v, saved[7], saved[8], settings)
        pairs = [(y, t) for y, t in zip(outputs, cotangents, strict=True) if t is not None and y.requires_grad]
        found = iter(
            torch.autograd.grad(
                [y for y, _ in pairs],
                active,
                [t for _, t in pairs],
                create_graph=torch.is_grad_enabled(),
                allow_unused=True,
            )
            if pairs
            else [None] * len(active)
        )
    gradients = [next(found) if x is not None and x.requires_grad else None for x in inputs]
    return (*gradients, *(None,) * (2 + _SHARED))


def _one_by_one(operator: str) -> Callable[..., tuple[tuple[Tensor, ...], tuple[int, ...]]]:
    """vmap's rule: element after element, since dropout's masks count the heads of a batch."""

    def batched(
        info: Any, in_dims: Sequence[int | None], *arguments: Any
    ) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        results = [
            getattr(torch.ops.hvp_engine, operator)(
                *(x if d is None else x.select(d, i) for x, d in zip(arguments, in_dims, strict=True))
            )
            for i in range(info.batch_size)
        ]
        stacked = tuple(torch.stack(parts) for parts in zip(*results, strict=True))
        return stacked, (0,) * len(stacked)

    return batched


_LIBRARY = torch.library.Library("hvp_engine", "FRAGMENT")
_DERIVATIVES: tuple[tuple[Callable[..., Any], Callable[..., Any]], ...] = (
    (_attention_backward, _keep_forward),
    (_attention_backward_backward, _keep_backward),
    (_third_derivative, _keep_backward),
)
for _schema, (_backward, _setup) in zip(SCHEMAS, _DERIVATIVES, strict=True):
    _LIBRARY.define(_schema)
    _name = _schema.partition("(")[0]
    _LIBRARY.impl(_name, _run(_name), "CPU")
    _LIBRARY.impl(_name, _run(_name), "CUDA")
    torch.library.register_fake(f"hvp_engine::{_name}", _fake(_name), lib=_LIBRARY)
    torch.library.register_autograd(f"hvp_engine::{_name}", _backward, setup_context=_setup, lib=_LIBRARY)
    torch.library.register_vmap(f"hvp_engine::{_name}", _one_by_one(_name), lib=_LIBRARY)
