"""The recurrences of LSTM and GRU and their derivatives on a GPU; see
:mod:`hvp_engine.differentiable.recurrent.reference` for what each computes.

A time takes two launches: torch's product of weight and states, which writes to rows of a result, and one kernel of
recurrent_gates.py beside this file for all the rest. Nothing is allocated between them and nothing waits, so that a
CUDA graph can hold a whole sequence.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from typing import Any

import torch
import triton
from torch import Tensor

from hvp_engine.differentiable.recurrent.signatures import OPS, empty_results
from hvp_engine.kernels import recurrent_gates as gates
from hvp_engine.kernels.launch import device_of

ROWS, UNITS, WARPS = 4, 32, 4
"""The tile of sequences and units of a program, and its warps: one number a thread, as few numbers as a time has."""


def _times(batch_sizes: Sequence[int], reverse: bool) -> Iterator[tuple[int, int]]:
    """First row and number of rows of each time, in the order in which the recurrence goes."""
    times = list(zip(accumulate(batch_sizes, initial=0), batch_sizes, strict=False))
    return reversed(times) if reverse else iter(times)


def time_by_time(name: str, kernel: Any) -> Callable[..., tuple[Tensor, ...]]:
    """The operation `name`, of which `kernel` computes one time.

    The states are its results of one row for each sequence, and begin as its arguments of that kind. The kernel takes
    the other arguments but the weight, then the results, in the order of the signature.
    """
    op = OPS[name]
    moved = "recurrent_grad" if "recurrent_grad" in op.results else "projected_grad" if op.keeps else "gates"

    def run(*arguments: Any) -> tuple[Tensor, ...]:
        tensors, (batch_sizes, reverse, *keep) = arguments[: len(op.arguments)], arguments[len(op.arguments) :]
        given = dict(zip(op.arguments, map(_dense, tensors), strict=True))
        weight = given.pop("weight")
        width, units = weight.shape
        found = empty_results(op, weight, batch_sizes, units, *keep)
        results = dict(zip(op.results, found, strict=True))
        initial = [given.pop(argument) for argument, code in op.arguments.items() if code.startswith("B")]
        states = [results[result] for result, code in op.results.items() if code == "B"]
        for state, begin in zip(states, initial, strict=True):
            state.zero_() if begin is None else state.copy_(begin)
        written = [result if len(result) else None for result in found]  # without rows: not to be kept
        rows_of, by_columns = results[moved][:, results[moved].shape[1] - width :], weight.t()
        with device_of(weight):
            for first, count in _times(batch_sizes, reverse != op.keeps):
                state, rows = states[0][:count], rows_of[first : first + count]
                if not op.keeps:
                    torch.mm(state, by_columns, out=rows)
                if units:
                    kernel[(triton.cdiv(count, ROWS), triton.cdiv(units, UNITS))](
                        first, count, units, *given.values(), *written, ROWS=ROWS, UNITS=UNITS, num_warps=WARPS
                    )
                if op.keeps:
                    torch.addmm(state, rows, weight, out=state)
        return tuple(found)

    return run


def _dense(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.resolve_neg().contiguous()


lstm_recurrence = time_by_time("lstm_recurrence", gates.lstm_gates)
lstm_recurrence_backward = time_by_time("lstm_recurrence_backward", gates.lstm_gates_backward)
lstm_recurrence_double_backward = time_by_time("lstm_recurrence_double_backward", gates.lstm_gates_double_backward)
gru_recurrence = time_by_time("gru_recurrence", gates.gru_gates)
gru_recurrence_backward = time_by_time("gru_recurrence_backward", gates.gru_gates_backward)
gru_recurrence_double_backward = time_by_time("gru_recurrence_double_backward", gates.gru_gates_double_backward)
