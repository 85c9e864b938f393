"""The recurrences as registered operations: which backend runs them, and their derivatives.

`torch.ops.hvp_engine.<name>` computes what the function of that name in the reference says. Each level is the
derivative of the one before, and those of the third are made by autograd from the reference. Matrix products that can
be made for the whole sequence at once, such as the gradient dW = sum_t d_t h_{t-1}^T, are made here by torch, so that
rewrites of recorded products find them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from hvp_engine._support.torch_compat import without_torch_functions
from hvp_engine.differentiable.recurrent import reference
from hvp_engine.differentiable.recurrent.signatures import OPS, Op, check, empty_results
from hvp_engine.differentiable.registration import by_reference, derivatives, implementation, keep, kept, register

Gradients = tuple[Tensor | None, ...]

ops = torch.ops.hvp_engine


_MODULES = {
    "reference": "hvp_engine.differentiable.recurrent.reference",
    "cpp": "hvp_engine.differentiable.recurrent.cpp",
    "triton": "hvp_engine.kernels.recurrent",
}


def _runner(op: Op) -> Callable[..., tuple[Tensor, ...]]:
    def run(*arguments: Any) -> tuple[Tensor, ...]:
        tensors, batch_sizes = arguments[: len(op.arguments)], arguments[len(op.arguments)]
        check(op, tensors, batch_sizes)
        weight = tensors[list(op.arguments).index("weight")]
        return getattr(implementation(weight.device, _MODULES), op.name)(*arguments)

    return run


def _fake(op: Op) -> Callable[..., list[Tensor]]:
    def fake(*arguments: Any) -> list[Tensor]:
        tensors, (batch_sizes, _, *kept) = arguments[: len(op.arguments)], arguments[len(op.arguments) :]
        units = check(op, tensors, batch_sizes)
        like = next(tensor for tensor in tensors if tensor is not None)
        return empty_results(op, like, batch_sizes, units, *kept)

    return fake


def _filled(cotangents: Gradients, results: Sequence[Tensor]) -> list[Tensor]:
    """The cotangents of the first three results."""
    return [torch.zeros_like(y) if g is None else g for g, y in zip(cotangents[:3], results[:3], strict=True)]


def _lstm_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    keep(ctx, (inputs[1], *output[3:], *inputs[4:]))


def _lstm(needed: Sequence[bool], given: list[Any], *gradients: Tensor | None) -> Gradients:
    weight, previous, *rest = given
    projected, hidden, cell, *_ = ops.lstm_recurrence_backward(*gradients, weight, *rest, torch.is_grad_enabled())
    return projected, projected.t() @ previous if needed[1] else None, hidden, cell, None, None


def _backward_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    keep(ctx, (*inputs, *output))


def _lstm_backward(needed: Sequence[bool], given: list[Any], *cotangents: Tensor | None) -> Gradients:
    inputs, (projected, _, _, *more), (batch_sizes, reverse, keeps) = given[:11], given[14:], given[11:14]
    if not keeps or _beyond(inputs[4:7], cotangents[3:]):
        return derivatives(reference.lstm_recurrence_backward, given[:14], needed, cotangents)
    output, last_hidden, last_cell, previous, *sources = ops.lstm_recurrence_double_backward(
        *_filled(cotangents, given[14:]), *inputs[7:], *more, batch_sizes, reverse
    )
    of_weight = projected.t() @ previous if needed[7] else None
    return output, last_hidden, last_cell, previous, None, None, None, of_weight, *sources, None, None, None


def _gru_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    keep(ctx, (inputs[1], *output[2:], *inputs[4:]))


def _gru(needed: Sequence[bool], given: list[Any], *gradients: Tensor | None) -> Gradients:
    projected, recurrent, hidden, _ = ops.gru_recurrence_backward(*gradients, *given, torch.is_grad_enabled())
    of_weight = recurrent.t() @ given[1] if needed[1] else None
    of_bias = recurrent.sum(0) if needed[2] else None
    return projected, of_weight, of_bias, hidden, None, None


def _gru_backward(needed: Sequence[bool], given: list[Any], *cotangents: Tensor | None) -> Gradients:
    inputs, (projected, recurrent, _, more), (batch_sizes, reverse, keeps) = given[:7], given[10:], given[7:10]
    if not keeps or _beyond(inputs[3:4], cotangents[3:]):
        return derivatives(reference.gru_recurrence_backward, given[:10], needed, cotangents)
    output, last_hidden, before, *sources = ops.gru_recurrence_double_backward(
        *_filled(cotangents, given[10:]), *inputs[4:], projected, more, batch_sizes, reverse
    )
    of_weight = recurrent.t() @ before if needed[4] else None
    return output, last_hidden, before, None, of_weight, *sources, None, None, None


def _beyond(of_saved: Sequence[Tensor | None], of_kept: Gradients) -> bool:
    """Whether a backward is to be differentiated that no double backward is made for: one that is part of a product, or
    of which a third derivative is asked for."""
    return any(gradient is not None for gradient in (*of_saved, *of_kept))


def _backward(formula: Callable[..., Gradients]) -> Callable[..., Gradients]:
    """The formula, out of sight of those who watch for Python code of users in the backward pass, and without gradients
    for arguments that were None."""

    def backward(ctx: Any, *gradients: Tensor | None) -> Gradients:
        given = kept(ctx)
        with without_torch_functions():
            found = formula(ctx.needs_input_grad, given, *gradients)
        return tuple(g if needed else None for g, needed in zip(found, ctx.needs_input_grad, strict=True))

    return backward


_DERIVATIVES: dict[str, tuple[Callable[..., None], Callable[..., Any]]] = {
    "lstm_recurrence": (_lstm_setup, _backward(_lstm)),
    "lstm_recurrence_backward": (_backward_setup, _backward(_lstm_backward)),
    "lstm_recurrence_double_backward": by_reference(reference.lstm_recurrence_double_backward),
    "gru_recurrence": (_gru_setup, _backward(_gru)),
    "gru_recurrence_backward": (_backward_setup, _backward(_gru_backward)),
    "gru_recurrence_double_backward": by_reference(reference.gru_recurrence_double_backward),
}
for _name, _op in OPS.items():
    register(_op.schema, _runner(_op), _fake(_op), *_DERIVATIVES[_name])
