"""The recurrences in C++: import it where the backend "cpp" runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from hvp_engine.differentiable.recurrent import reference
from hvp_engine.differentiable.recurrent.signatures import CODES, OPS, by_columns, empty_results, transposes
from hvp_engine.ops.cpp import _C, find_blas


def _function(name: str) -> Callable[..., tuple[Tensor, ...]]:
    op = OPS[name]
    if find_blas():  # nothing that multiplies matrices
        formulas: Callable[..., tuple[Tensor, ...]] = getattr(reference, name)
        return formulas

    def run(*arguments: Any) -> tuple[Tensor, ...]:
        given: Sequence[Tensor | None] = arguments[: len(op.arguments)]
        batch_sizes, reverse, *keep = arguments[len(op.arguments) :]
        tensors = dict(zip(op.arguments, given, strict=True))
        weight = tensors["weight"]
        assert weight is not None
        if transposes(op):
            tensors["weight"] = by_columns(weight)
        results = empty_results(op, weight, batch_sizes, weight.shape[1], *keep)
        wanted = [
            None if code.endswith("?") and not all(keep) else result
            for code, result in zip(op.results.values(), results, strict=True)
        ]
        _C.recurrence(
            code=CODES[op.name],
            units=weight.shape[1],
            batch_sizes=batch_sizes,
            reverse=reverse,
            tensors=[
                *(None if tensor is None else tensor.resolve_neg().contiguous() for tensor in tensors.values()),
                *wanted,
            ],
        )
        return tuple(results)

    return run


lstm_recurrence = _function("lstm_recurrence")
lstm_recurrence_backward = _function("lstm_recurrence_backward")
lstm_recurrence_double_backward = _function("lstm_recurrence_double_backward")
gru_recurrence = _function("gru_recurrence")
gru_recurrence_backward = _function("gru_recurrence_backward")
gru_recurrence_double_backward = _function("gru_recurrence_double_backward")
