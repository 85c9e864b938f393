"""The derivatives of the registered recurrences: each level is that of the one before, and those of the third are made
by autograd from the reference.

Matrix products that can be made for the whole sequence at once are made here, by torch, so that rewrites of recorded
products find them: of the gradient dW = sum_t d_t h_{t-1}^T, whose factors are results of operations.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hvp_engine._support.torch_compat import without_torch_functions
from hvp_engine.differentiable.recurrent import reference
from hvp_engine.differentiable.recurrent.schemas import LIBRARY
from hvp_engine.differentiable.recurrent.signatures import OPS
from hvp_engine.differentiable.registration import by_reference, derivatives

Gradients = tuple[Tensor | None, ...]

ops = torch.ops.hvp_engine


def _filled(gradient: Tensor | None, like: Tensor) -> Tensor:
    return torch.zeros_like(like) if gradient is None else gradient


def _keep(ctx: Any, settings: tuple[Any, ...], *tensors: Tensor | None) -> None:
    """Save what a backward needs, where a recorder of products finds it: tensors, and the settings that are none."""
    batch_sizes, *rest = settings
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors)
    ctx.settings = tuple(batch_sizes), *rest


def _needed(ctx: Any, gradients: Gradients) -> Gradients:
    """Without those for arguments that were None."""
    return tuple(g if needed else None for g, needed in zip(gradients, ctx.needs_input_grad, strict=True))


def _lstm_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _keep(ctx, inputs[4:], inputs[1], *output[3:])


def _lstm(ctx: Any, *gradients: Tensor | None) -> Gradients:
    weight, previous, gates, previous_cell, squashed = ctx.saved_tensors
    projected, hidden, cell, *_ = ops.lstm_recurrence_backward(
        *gradients, weight, gates, previous_cell, squashed, *ctx.settings, torch.is_grad_enabled()
    )
    of_weight = projected.t() @ previous if ctx.needs_input_grad[1] else None
    return projected, of_weight, hidden, cell, None, None


def _lstm_backward_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _keep(ctx, inputs[11:], *inputs[:11], *output)


def _lstm_backward(ctx: Any, *cotangents: Tensor | None) -> Gradients:
    inputs, (projected, hidden, cell, *kept) = ctx.saved_tensors[:11], ctx.saved_tensors[11:]
    if _beyond(ctx, inputs[4:7], cotangents[3:]):
        return derivatives(
            reference.lstm_recurrence_backward, (*inputs, *ctx.settings), ctx.needs_input_grad, cotangents
        )
    batch_sizes, reverse, _ = ctx.settings
    given = [_filled(one, like) for one, like in zip(cotangents, (projected, hidden, cell), strict=False)]
    output, last_hidden, last_cell, previous, *sources = ops.lstm_recurrence_double_backward(
        *given, *inputs[7:], *kept, batch_sizes, reverse
    )
    of_weight = projected.t() @ previous if ctx.needs_input_grad[7] else None
    found = output, last_hidden, last_cell, previous, None, None, None, of_weight, *sources, None, None, None
    return _needed(ctx, found)


def _gru_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _keep(ctx, inputs[4:], inputs[1], *output[2:])


def _gru(ctx: Any, *gradients: Tensor | None) -> Gradients:
    weight, previous, gates = ctx.saved_tensors
    projected, recurrent, hidden, _ = ops.gru_recurrence_backward(
        *gradients, weight, previous, gates, *ctx.settings, torch.is_grad_enabled()
    )
    of_weight = recurrent.t() @ previous if ctx.needs_input_grad[1] else None
    of_bias = recurrent.sum(0) if ctx.needs_input_grad[2] else None
    return projected, of_weight, of_bias, hidden, None, None


def _gru_backward_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _keep(ctx, inputs[7:], *inputs[:7], *output)


def _gru_backward(ctx: Any, *cotangents: Tensor | None) -> Gradients:
    inputs, (projected, recurrent, hidden, kept) = ctx.saved_tensors[:7], ctx.saved_tensors[7:]
    if _beyond(ctx, inputs[3:4], cotangents[3:]):
        return derivatives(
            reference.gru_recurrence_backward, (*inputs, *ctx.settings), ctx.needs_input_grad, cotangents
        )
    batch_sizes, reverse, _ = ctx.settings
    given = [_filled(one, like) for one, like in zip(cotangents, (projected, recurrent, hidden), strict=False)]
    output, last_hidden, before, *sources = ops.gru_recurrence_double_backward(
        *given, *inputs[4:], projected, kept, batch_sizes, reverse
    )
    of_weight = recurrent.t() @ before if ctx.needs_input_grad[4] else None
    return _needed(ctx, (output, last_hidden, before, None, of_weight, *sources, None, None, None))


def _beyond(ctx: Any, of_saved: Gradients, of_kept: Gradients) -> bool:
    """Whether a backward is to be differentiated that no double backward is made for: one that is part of a product, or
    of which a third derivative is asked for, or that has kept nothing."""
    *_, keep = ctx.settings
    return not keep or any(gradient is not None for gradient in (*of_saved, *of_kept))


def _unseen(formula: Callable[..., Any]) -> Callable[..., Any]:
    """The formula, out of sight of those who watch for Python code of users in the backward pass."""

    def unseen(*arguments: Any) -> Any:
        with without_torch_functions():
            return formula(*arguments)

    return unseen


_FORMULAS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "lstm_recurrence": (_lstm_setup, _lstm),
    "lstm_recurrence_backward": (_lstm_backward_setup, _lstm_backward),
    "lstm_recurrence_double_backward": by_reference(reference.lstm_recurrence_double_backward),
    "gru_recurrence": (_gru_setup, _gru),
    "gru_recurrence_backward": (_gru_backward_setup, _gru_backward),
    "gru_recurrence_double_backward": by_reference(reference.gru_recurrence_double_backward),
}
assert _FORMULAS.keys() == OPS.keys()
for _name, (_setup, _formula) in _FORMULAS.items():
    torch.library.register_autograd(f"hvp_engine::{_name}", _unseen(_formula), setup_context=_setup, lib=LIBRARY)
