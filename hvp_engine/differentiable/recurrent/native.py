"""The recurrences in C++: import it where the backend "cpp" runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from hvp_engine.differentiable.recurrent.signatures import CODES, OPS, Op, by_columns, empty_results, transposes
from hvp_engine.ops.cpp import _C, find_blas

PROBLEM = find_blas()
"""Why the recurrences cannot run here; empty if they can."""


def _function(op: Op) -> Callable[..., tuple[Tensor, ...]]:
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


FUNCTIONS = {name: _function(op) for name, op in OPS.items()}
