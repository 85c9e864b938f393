"""The derivatives of the registered recurrences: each level is that of the one before, and the third has none.

Matrix products that can be made for the whole sequence at once are made here, by torch, so that rewrites of recorded
products find them: of the gradient dW = sum_t d_t h_{t-1}^T, whose factors are results of operations.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hvp_engine._support.torch_compat import without_torch_functions
from hvp_engine.differentiable.recurrent.schemas import LIBRARY
from hvp_engine.differentiable.recurrent.signatures import OPS
from hvp_engine.errors import SecondDerivativeError

Gradients = tuple[Tensor | None, ...]

ops = torch.ops.hvp_engine


def _refuse(kind: str) -> None:
    raise SecondDerivativeError(
        f"{kind}: expected a first or second derivative; a third one was asked for, which this operation does not "
        "have: torch's own layer has it, outside of hvp_engine's calls and under "
        "torch.backends.mkldnn.flags(enabled=False) on a CPU, torch.backends.cudnn.flags(enabled=False) on a GPU"
    )


def _filled(gradient: Tensor | None, like: Tensor) -> Tensor:
    return torch.zeros_like(like) if gradient is None else gradient


def _keep(ctx: Any, settings: tuple[Any, ...], *tensors: Tensor) -> None:
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
    again = any(gradient is not None for gradient in inputs[4:7])
    _keep(ctx, (*inputs[11:13], again), *inputs[7:11], *output)
    ctx.mark_non_differentiable(*output[3:])


def _lstm_backward(ctx: Any, *cotangents: Tensor | None) -> Gradients:
    weight, gates, previous_cell, squashed, projected, hidden, cell, *kept = ctx.saved_tensors
    batch_sizes, reverse, again = ctx.settings
    if again or not len(kept[0]):
        _refuse("LSTM")
    given = [_filled(one, like) for one, like in zip(cotangents, (projected, hidden, cell), strict=False)]
    output, last_hidden, last_cell, previous, *sources = ops.lstm_recurrence_double_backward(
        *given, weight, gates, previous_cell, squashed, *kept, batch_sizes, reverse
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
    _keep(ctx, (*inputs[7:9], inputs[3] is not None), *inputs[4:7], *output)
    ctx.mark_non_differentiable(*output[3:])


def _gru_backward(ctx: Any, *cotangents: Tensor | None) -> Gradients:
    weight, previous, gates, projected, recurrent, hidden, kept = ctx.saved_tensors
    batch_sizes, reverse, again = ctx.settings
    if again or not len(kept):
        _refuse("GRU")
    given = [_filled(one, like) for one, like in zip(cotangents, (projected, recurrent, hidden), strict=False)]
    output, last_hidden, before, *sources = ops.gru_recurrence_double_backward(
        *given, weight, previous, gates, projected, kept, batch_sizes, reverse
    )
    of_weight = recurrent.t() @ before if ctx.needs_input_grad[4] else None
    return _needed(ctx, (output, last_hidden, before, None, of_weight, *sources, None, None, None))


def _unseen(formula: Callable[..., Any]) -> Callable[..., Any]:
    """The formula, out of sight of those who watch for Python code of users in the backward pass."""

    def unseen(*arguments: Any) -> Any:
        with without_torch_functions():
            return formula(*arguments)

    return unseen


def _refused(kind: str) -> Callable[..., None]:
    return lambda ctx, *_: _refuse(kind)


_FORMULAS: dict[str, tuple[Callable[..., Any], Callable[..., Any] | None]] = {
    "lstm_recurrence": (_lstm, _lstm_setup),
    "lstm_recurrence_backward": (_lstm_backward, _lstm_backward_setup),
    "lstm_recurrence_double_backward": (_refused("LSTM"), None),
    "gru_recurrence": (_gru, _gru_setup),
    "gru_recurrence_backward": (_gru_backward, _gru_backward_setup),
    "gru_recurrence_double_backward": (_refused("GRU"), None),
}
assert _FORMULAS.keys() == OPS.keys()
for _name, (_formula, _setup) in _FORMULAS.items():
    torch.library.register_autograd(f"hvp_engine::{_name}", _unseen(_formula), setup_context=_setup, lib=LIBRARY)
