"""The signatures of the recurrences and their derivatives: what each takes and gives, with shapes and checks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.float64)


@dataclass(frozen=True)
class Op:
    """The signature of an operation.

    Attributes:
        arguments, results: name and shape of each tensor, as of `SIZES`; an argument whose shape ends in "?" may be
            None, and a result whose shape ends in "?" has no rows unless it is asked to be kept.
    """

    name: str
    arguments: dict[str, str]
    results: dict[str, str]

    @property
    def keeps(self) -> bool:
        return any(shape.endswith("?") for shape in self.results.values())

    @property
    def schema(self) -> str:
        """The torch.library schema."""
        tensors = [f"Tensor{'?' if shape.endswith('?') else ''} {name}" for name, shape in self.arguments.items()]
        numbers = ["SymInt[] batch_sizes", "bool reverse", *(["bool keep"] if self.keeps else [])]
        return f"{self.name}({', '.join([*tensors, *numbers])}) -> ({', '.join(f'Tensor {r}' for r in self.results)})"


def _op(name: str, arguments: str, results: str) -> Op:
    sides = [dict(part.split(":") for part in text.split()) for text in (arguments, results)]
    return Op(name, *sides)


OPS = {
    op.name: op
    for op in (
        _op(
            "lstm_recurrence",
            "projected:N4 weight:W4 hidden:B cell:B",
            "output:N last_hidden:B last_cell:B previous:N gates:N4 previous_cell:N squashed:N",
        ),
        _op(
            "lstm_recurrence_backward",
            "output_grad:N? last_hidden_grad:B? last_cell_grad:B? previous_grad:N? gates_grad:N4? "
            "previous_cell_grad:N? squashed_grad:N? weight:W4 gates:N4 previous_cell:N squashed:N",
            "projected_grad:N4 hidden_grad:B cell_grad:B hidden_grads:N? cell_grads:N?",
        ),
        _op(
            "lstm_recurrence_double_backward",
            "projected_cotangent:N4 hidden_cotangent:B cell_cotangent:B weight:W4 gates:N4 previous_cell:N squashed:N "
            "hidden_grads:N cell_grads:N",
            "output:N last_hidden:B last_cell:B previous:N gates:N4 previous_cell:N squashed:N",
        ),
        _op(
            "gru_recurrence",
            "projected:N3 weight:W3 bias:V3? hidden:B",
            "output:N last_hidden:B previous:N gates:N4",
        ),
        _op(
            "gru_recurrence_backward",
            "output_grad:N? last_hidden_grad:B? previous_grad:N? gates_grad:N4? weight:W3 previous:N gates:N4",
            "projected_grad:N3 recurrent_grad:N3 hidden_grad:B hidden_grads:N?",
        ),
        _op(
            "gru_recurrence_double_backward",
            "projected_cotangent:N3 recurrent_cotangent:N3 hidden_cotangent:B weight:W3 previous:N gates:N4 "
            "projected_grad:N3 hidden_grads:N",
            "output:N last_hidden:B previous:N previous_sources:N gates:N4",
        ),
    )
}

CODES = {name: code for code, name in enumerate(OPS)}
"""The number of each operation in the extension, in the order of `RecurrentCode` in csrc/recurrent.h."""


def by_columns(weight: Tensor) -> Tensor:
    """The weight as its product with the state is fastest: (4H, H) as (H, 4H)."""
    return weight.t().contiguous()


def transposes(op: Op) -> bool:
    """Whether the operation takes the weight transposed: those that go with the recurrence do."""
    return not op.keeps


def sizes(code: str, batch_sizes: Sequence[int], units: int) -> tuple[int, ...]:
    """The shape behind a code: N rows at all times, B sequences, W a weight and V a bias, each times so many units."""
    kind, blocks = code[0], int(code.strip("?")[1:] or 1)
    width = blocks * units
    if kind == "V":
        return (width,)
    rows = {"N": lambda: sum(batch_sizes), "B": lambda: batch_sizes[0], "W": lambda: width}[kind]()
    return rows, units if kind == "W" else width


def check(op: Op, tensors: Sequence[Tensor | None], batch_sizes: Sequence[int]) -> int:
    """The number of units; `ValueError` or `TypeError`, naming the argument, unless the arguments fit together."""
    given = dict(zip(op.arguments, tensors, strict=True))
    weight = given["weight"]
    assert weight is not None
    if weight.dim() != 2:
        raise ValueError(f"{op.name}: weight: expected 2 dimensions; got shape {tuple(weight.shape)}")
    if (
        not batch_sizes
        or min(batch_sizes) < 1
        or any(a < b for a, b in zip(batch_sizes, batch_sizes[1:], strict=False))
    ):
        raise ValueError(
            f"{op.name}: batch_sizes: expected positive numbers that do not grow, one for each time; got "
            f"{list(batch_sizes[:8])}: sequences are sorted by length, as torch.nn.utils.rnn.pack_padded_sequence does"
        )
    units = weight.shape[1]
    for (name, code), tensor in zip(op.arguments.items(), tensors, strict=True):
        if tensor is None:
            continue
        expected = sizes(code, batch_sizes, units)
        if tuple(tensor.shape) != expected:
            raise ValueError(f"{op.name}: {name}: expected shape {expected}; got {tuple(tensor.shape)}")
        if tensor.dtype not in DTYPES or tensor.dtype != weight.dtype or tensor.device != weight.device:
            raise TypeError(
                f"{op.name}: {name}: expected float32 or float64, and dtype and device of the weight, {weight.dtype} "
                f"on {weight.device}; got {tensor.dtype} on {tensor.device}: convert one of them by Tensor.to"
            )
    return units


def empty_results(op: Op, like: Tensor, batch_sizes: Sequence[int], units: int, keep: bool = True) -> list[Tensor]:
    """Memory for the results."""
    shapes = [(code, sizes(code, batch_sizes, units)) for code in op.results.values()]
    return [like.new_empty((0, shape[1]) if code.endswith("?") and not keep else shape) for code, shape in shapes]
