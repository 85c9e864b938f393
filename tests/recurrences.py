"""Arguments for the recurrences and their derivatives, of any sizes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hvp_engine.differentiable.recurrent import reference
from hvp_engine.differentiable.recurrent.signatures import OPS, sizes

BATCHES: dict[str, tuple[list[int], int, bool]] = {
    "one number": ([1], 1, False),
    "one sequence": ([1, 1, 1], 3, False),
    "equal lengths": ([3, 3, 3, 3], 5, False),
    "from the end": ([3, 3, 3], 5, True),
    "packed": ([4, 3, 3, 1], 6, False),
    "packed, from the end": ([4, 3, 1], 6, True),
    "no unit": ([2, 2], 0, False),
    "blocks and a rest": ([9, 9], 37, False),
    "tiles": ([16] * 3, 96, False),
    "threads": ([40] * 8, 64, True),
}
"""Batch sizes, units, and whether sequences are read from their ends."""


def arguments(
    name: str, batch_sizes: list[int], units: int, reverse: bool, dtype: torch.dtype = torch.float64, some: bool = True
) -> list[Any]:
    """Random arguments that fit together as those of a real call do, with every second optional one or none."""
    op = OPS[name]
    given: dict[str, Any] = {}
    for place, (argument, code) in enumerate(op.arguments.items()):
        missing = code.endswith("?") and not (some and place % 2 == 0)
        tensor = torch.randn(sizes(code, batch_sizes, units), dtype=torch.float64)
        given[argument] = None if missing else tensor / max(units, 1) ** 0.5 if argument == "weight" else tensor
    for argument, tensor in _kept(name, given, batch_sizes, reverse).items():
        given[argument] = tensor
    rest = [batch_sizes, reverse, *([True] if op.keeps else [])]
    return [*(t.to(dtype) if isinstance(t, Tensor) else t for t in given.values()), *rest]


def _kept(name: str, given: dict[str, Any], batch_sizes: list[int], reverse: bool) -> dict[str, Tensor]:
    """What a backward takes of the levels below it."""
    kind = name.partition("_")[0]
    if not name.endswith("backward"):
        return {}
    below = f"{kind}_recurrence_backward" if name.endswith("double_backward") else f"{kind}_recurrence"
    inputs = dict(
        zip(OPS[below].arguments, arguments(below, batch_sizes, given["weight"].shape[1], reverse), strict=False)
    )
    inputs |= {"weight": given["weight"]}
    if below.endswith("backward"):
        inputs["gates_grad"] = inputs["squashed_grad"] = None
        inputs = {argument: inputs[argument] for argument in OPS[below].arguments}
    rest = [batch_sizes, reverse, *([True] if OPS[below].keeps else [])]
    results = getattr(reference, below)(*inputs.values(), *rest)
    found = {**inputs, **dict(zip(OPS[below].results, results, strict=True))}
    return {argument: found[argument] for argument in given if argument in found and argument != "weight"}
