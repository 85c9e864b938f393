"""Attention and its two derivatives as operators of torch: schemas, checks, fakes, autograd, and which backend runs.

`torch.ops.hvp_engine.attention`, `attention_backward` and `attention_backward_backward`, on tensors of batch x heads x
length x width. Each is the derivative of the one before; what each computes is its function in
:mod:`hvp_engine.differentiable.attention.reference`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from hvp_engine._support.flat_vector import INPUT_DTYPES
from hvp_engine.differentiable.attention import reference
from hvp_engine.differentiable.attention.reference import Known, Settings
from hvp_engine.differentiable.registration import Signature, backend_among, implementation, register_levels, split_off

_MODULES = {
    "reference": "hvp_engine.differentiable.attention.reference",
    "cpp": "hvp_engine.differentiable.attention.cpp",
    "triton": "hvp_engine.kernels.attention",
}
_EXACT = {name: module for name, module in _MODULES.items() if name != "triton"}
"""The modules whose products are exact to float64 on every device."""


def check(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout_p: float) -> None:
    """Raise `ValueError` or `TypeError`, naming the argument, unless the arguments fit together."""
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if tensor.dtype not in INPUT_DTYPES or tensor.dtype != query.dtype:
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
        if mask.dtype != torch.bool and mask.dtype not in INPUT_DTYPES:
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


def runs_on(device: torch.device) -> str:
    """The backend that runs attention on a device: one that is faster than plain torch, or "reference"."""
    return backend_among(device, tuple(_MODULES))


def _run(schema: str) -> Callable[..., tuple[Tensor, ...]]:
    operator = Signature.of(schema)

    def run(*arguments: Any) -> tuple[Tensor, ...]:
        query = _checked(operator, dict(zip(operator.arguments, arguments, strict=True)))
        modules = _EXACT if query.dtype == torch.float64 else _MODULES
        with torch.no_grad():
            return _packed(getattr(implementation(query.device, modules), operator.name))(*arguments)

    return run


def _packed(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function of one of the modules, for all that its operator takes."""

    def packed(*arguments: Any) -> Any:
        tensors, settings = split_off(Settings, arguments)
        if len(tensors) == 3:
            return function(*tensors, settings)
        (*tangents, grad_output), known = split_off(Known, tensors)
        return function(*([tangents] if tangents else []), grad_output, known, settings)

    return packed


def _checked(operator: Signature, given: Mapping[str, Any]) -> Tensor:
    """The query, after all arguments have been checked."""
    query, key, value = given["query"], given["key"], given["value"]
    check(query, key, value, given["mask"], given["dropout_p"])
    _check_seed(given["seed"], given["dropout_p"], query.device)
    shape = torch.Size((*query.shape[:3], value.shape[3]))
    expected = {"grad_output": shape, "output": shape, "logsumexp": shape[:3]}
    expected |= {f"grad_grad_{name}": given[name].shape for name in ("query", "key", "value")}
    for name in expected.keys() & given.keys():
        if given[name] is not None and given[name].shape != expected[name]:
            raise ValueError(
                f"{operator.name}: {name}: expected shape {tuple(expected[name])}; got shape {tuple(given[name].shape)}"
            )
    return query


def _fake(schema: str) -> Callable[..., tuple[Tensor, ...]]:
    operator = Signature.of(schema)

    def fake(*arguments: Any) -> tuple[Tensor, ...]:
        given = dict(zip(operator.arguments, arguments, strict=True))
        query = _checked(operator, given)
        if operator.name == "attention":
            dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
            shape = query.shape[:3]
            return query.new_empty((*shape, given["value"].shape[3])), query.new_empty(shape, dtype=dtype)
        likes = (given[result.removeprefix("for_")] for result in operator.results)
        return tuple(like.new_empty(like.shape) for like in likes)

    return fake


_OPERANDS = "Tensor query, Tensor key, Tensor value"
_RESULTS = "Tensor output, Tensor logsumexp"
_SETTINGS = "Tensor? mask, Tensor? seed, float dropout_p, bool is_causal, float scale"
_GIVEN = f"Tensor grad_output, {_OPERANDS}, {_RESULTS}, {_SETTINGS}"
_TANGENTS = "Tensor? grad_grad_query, Tensor? grad_grad_key, Tensor? grad_grad_value"
_FOR_OPERANDS = "Tensor for_query, Tensor for_key, Tensor for_value"
_SCHEMAS = (
    f"attention({_OPERANDS}, {_SETTINGS}) -> ({_RESULTS})",
    f"attention_backward({_GIVEN}) -> ({_FOR_OPERANDS})",
    f"attention_backward_backward({_TANGENTS}, {_GIVEN}) -> (Tensor for_grad_output, {_FOR_OPERANDS})",
)

register_levels(
    _packed(reference.attention_backward_backward),
    *((schema, _run(schema), _fake(schema)) for schema in _SCHEMAS),
)
