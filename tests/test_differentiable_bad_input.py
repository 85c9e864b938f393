"""What no function of `hvp_engine.differentiable` takes is refused by the name of the argument."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from hvp_engine import differentiable

ROWS, LABELS = torch.ones(2, 3), torch.tensor([0, 1])
STATE = torch.zeros(1, 2, 4)
LSTM = [tensor.detach() for tensor in torch.nn.LSTM(3, 4).parameters()]
GRU = [tensor.detach() for tensor in torch.nn.GRU(3, 4).parameters()]
REST = True, 1, 0.0, True, False, False
SEQUENCE = torch.ones(5, 2, 3)

REFUSED: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "attention": (
        lambda: differentiable.scaled_dot_product_attention([1], ROWS, ROWS),
        TypeError,
        "^query: expected a tensor; got list",
    ),
    "attention, devices": (
        lambda: differentiable.scaled_dot_product_attention(ROWS.to("meta"), ROWS, ROWS),
        ValueError,
        "key: expected device meta",
    ),
    "cross_entropy": (lambda: differentiable.cross_entropy([1], LABELS), TypeError, "^input: expected a tensor; got"),
    "labels": (lambda: differentiable.cross_entropy(ROWS, [0, 1]), TypeError, "^target: expected a tensor; got list"),
    "linear_cross_entropy": (
        lambda: differentiable.linear_cross_entropy(ROWS, None, LABELS),
        TypeError,
        "^linear_weight: expected a tensor; got NoneType",
    ),
    "weight": (lambda: differentiable.cross_entropy(ROWS, LABELS, [1.0] * 3), TypeError, "^weight: expected a tensor"),
    "bias": (
        lambda: differentiable.linear_cross_entropy(ROWS, torch.ones(4, 3), LABELS, [0.0] * 4),
        TypeError,
        "^bias: expected a tensor; got list",
    ),
    "log_softmax, dim": (lambda: differentiable.log_softmax(ROWS, None), TypeError, "^dim: expected an int; got None"),
    "batch_norm, running": (
        lambda: differentiable.batch_norm(ROWS, torch.zeros(3), torch.zeros(2), training=True),
        ValueError,
        r"^running_var: expected shape \(3,\); got \(2,\)",
    ),
    "lstm, states of two layers": (
        lambda: differentiable.lstm(SEQUENCE, (STATE, STATE.repeat(2, 1, 1)), LSTM, *REST),
        ValueError,
        r"^states: expected shape \(1, sequences, units\), .*; got \(2, 2, 4\)",
    ),
    "gru, no state": (
        lambda: differentiable.gru(SEQUENCE, STATE[:0], GRU, *REST),
        ValueError,
        r"^states: expected shape \(1, sequences, units\), .*; got \(0, 2, 4\)",
    ),
    "log_softmax": (lambda: differentiable.log_softmax(1.0), TypeError, "^input: expected a tensor; got float"),
    "batch_norm": (lambda: differentiable.batch_norm(1.0), TypeError, "^input: expected a tensor; got float"),
    "batch_norm, momentum": (
        lambda: differentiable.batch_norm(ROWS, training=True, momentum=None),
        TypeError,
        "^momentum: expected a number; got None.*pass 1 /",
    ),
    "group_norm": (lambda: differentiable.group_norm(1.0, 1), TypeError, "^input: expected a tensor; got float"),
    "layer_norm": (lambda: differentiable.layer_norm(1.0, 1), TypeError, "^input: expected a tensor; got float"),
    "rms_norm": (lambda: differentiable.rms_norm(1.0, 1), TypeError, "^input: expected a tensor; got float"),
    "lstm, one state": (
        lambda: differentiable.lstm(SEQUENCE, STATE, LSTM, *REST),
        TypeError,
        r"^states: expected a pair of tensors, \(h0, c0\); got Tensor",
    ),
    "gru, two states": (
        lambda: differentiable.gru(SEQUENCE, (STATE, STATE), GRU, *REST),
        TypeError,
        "^states: expected a tensor, h0; got tuple",
    ),
    "lstm, input": (
        lambda: differentiable.lstm(torch.ones(5, 2, 7), (STATE, STATE), LSTM, *REST),
        ValueError,
        r"^input: expected 3 numbers in the last dimension, as the weights of layer 0 \(16, 3\); got shape \(5, 2, 7\)",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_by_name(name: str) -> None:
    call, error, message = REFUSED[name]
    with pytest.raises(error, match=message):
        call()
