"""The recurrences as registered operations, and which backend runs them.

`torch.ops.hvp_engine.<name>` computes what the function of that name in the reference says; `derivatives` gives it to
autograd, so that it works under `make_fx` and `torch.compile` too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from hvp_engine.differentiable.recurrent import reference
from hvp_engine.differentiable.recurrent.signatures import OPS, Op, check, empty_results
from hvp_engine.ops import backend


def _split(op: Op, arguments: Sequence[Any]) -> tuple[Sequence[Tensor | None], Sequence[int], bool]:
    """Tensors, batch sizes, and whether results are kept."""
    count = len(op.arguments)
    return arguments[:count], arguments[count], arguments[-1] if op.keeps else True


def _runner(op: Op) -> Callable[..., tuple[Tensor, ...]]:
    def run(*arguments: Any) -> tuple[Tensor, ...]:
        tensors, batch_sizes, _ = _split(op, arguments)
        check(op, tensors, batch_sizes)
        weight = tensors[list(op.arguments).index("weight")]
        assert weight is not None
        name, _ = backend.select(weight.device, among=("cpp", "reference"))
        if name == "cpp":
            from hvp_engine.differentiable.recurrent import native  # exists only where the extension does

            if not native.PROBLEM:
                return native.FUNCTIONS[op.name](*arguments)
        return getattr(reference, op.name)(*arguments)

    return run


def _fake(op: Op) -> Callable[..., list[Tensor]]:
    def fake(*arguments: Any) -> list[Tensor]:
        tensors, batch_sizes, keep = _split(op, arguments)
        units = check(op, tensors, batch_sizes)
        like = next(tensor for tensor in tensors if tensor is not None)
        return empty_results(op, like, batch_sizes, units, keep)

    return fake


LIBRARY = torch.library.Library("hvp_engine", "FRAGMENT")
for _op_ in OPS.values():
    LIBRARY.define(_op_.schema)
    LIBRARY.impl(_op_.name, _runner(_op_), "CPU")
    LIBRARY.impl(_op_.name, _runner(_op_), "CUDA")
    torch.library.register_fake(f"hvp_engine::{_op_.name}", _fake(_op_), lib=LIBRARY)
