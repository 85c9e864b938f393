"""What a trace depends on besides the values of tensors."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from hvp_engine.differentiation.problem import Problem, is_constant


def signature(problem: Problem, tensors: Sequence[Tensor], others: Sequence[Any], spec: Any) -> Hashable:
    """The loss, and what its arguments look like."""
    leaves = [*problem.weights, *problem.hyperparameters, *tensors]
    return (
        problem.identity,
        problem.weight_structure,
        problem.hyperparameter_structure,
        tuple((t.shape, t.stride(), t.dtype, t.device) for t in leaves),
        tuple(leaf if is_constant(leaf) else type(leaf) for leaf in others),
        spec,
    )


class Modes:
    """Whether the modules that a loss called are in train or eval mode, as a trace saw it."""

    def __init__(self, modules: Sequence[torch.nn.Module]):
        self.modules = list(modules)
        self._seen = self._read()

    def unchanged(self) -> bool:
        return self._seen == self._read()

    def _read(self) -> list[bool]:
        return [part.training for module in self.modules for part in module.modules()]
