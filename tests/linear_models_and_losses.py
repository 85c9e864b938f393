"""Linear models with every loss and decay, and the loss they stand for, in float64."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from problems_with_known_answers import DTYPE, flat, generator, randn, unflat
from torch import Tensor
from torch.nn import functional

import hvp_engine as hvp

LOSSES = ["squared", "logistic", "softmax"]
DECAYS = ["none", "scalar", "leaves", "per weight"]
FORMS = ["accumulate", "horner"]
ENGINES = ["eager", "recorded"]


@dataclass(frozen=True)
class Model:
    """A problem: everything LinearModelOperator takes, and the loss it stands for."""

    inputs: Tensor
    weights: list[Tensor]
    targets: Tensor
    loss: str
    decay: list[Tensor]
    reduction: str = "mean"

    @property
    def container(self) -> Any:
        return self.weights[0] if len(self.weights) == 1 else tuple(self.weights)

    @property
    def operator(self) -> hvp.LinearModelOperator:
        return self.operator_by("auto")

    def operator_by(self, engine: str) -> hvp.LinearModelOperator:
        decay = self.decay[0] if len(self.decay) == 1 else tuple(self.decay)
        return hvp.LinearModelOperator(
            self.inputs,
            self.container,
            loss=self.loss,  # type: ignore[arg-type]
            targets=self.targets,
            decay=decay,
            reduction=self.reduction,  # type: ignore[arg-type]
            engine=engine,
        )

    def value(self, weights: Sequence[Tensor]) -> Tensor:
        """The loss that the documentation states, word by word."""
        weight, *bias = weights
        if weight.dim() == 2:
            outputs = functional.linear(self.inputs, weight, *bias)
        else:
            outputs = self.inputs @ weight + (bias[0] if bias else 0.0)
        if self.loss == "squared":
            data = functional.mse_loss(outputs, self.targets, reduction=self.reduction)
        elif self.loss == "logistic":
            data = functional.binary_cross_entropy_with_logits(outputs, self.targets, reduction=self.reduction)
        else:
            data = functional.cross_entropy(outputs, self.targets, reduction=self.reduction)
        return data + sum((d * w**2).sum() / 2 for d, w in zip(self.decay, weights, strict=True))

    def hessian(self) -> Tensor:
        """By torch's own double backward."""
        point = flat(self.weights)
        return torch.autograd.functional.hessian(lambda x: self.value(unflat(x, self.weights)), point)

    def to(self, dtype: torch.dtype) -> Model:
        targets = self.targets if self.targets.dtype == torch.int64 else self.targets.to(dtype)
        weights, decay = [w.to(dtype) for w in self.weights], [d.to(dtype) for d in self.decay]
        return replace(self, inputs=self.inputs.to(dtype), weights=weights, targets=targets, decay=decay)


def model_of(
    loss: str, outputs: int | str = 3, decay: str = "scalar", bias: bool = True, samples: int = 12, features: int = 7
) -> Model:
    k = 1 if outputs == "vector" else int(outputs)
    weight = randn(k, features, seed=1) / 2
    weights = [weight, randn(k, seed=2)] if bias else [weight]
    targets = randn(samples, k, seed=3)
    if loss == "logistic":
        targets = (targets > 0).to(DTYPE)
    elif loss == "softmax":
        targets = torch.randint(k, (samples,), generator=generator(3))
    if outputs == "vector":
        weights = [w[0] for w in weights]
        targets = targets[:, 0]
    decays = {
        "none": [torch.zeros((), dtype=DTYPE) for _ in weights],
        "scalar": [torch.tensor(0.3, dtype=DTYPE) for _ in weights],
        "leaves": [torch.tensor(0.3 / (i + 1), dtype=DTYPE) for i in range(len(weights))],
        "per weight": [randn(w.numel(), seed=4).exp().view_as(w) / 5 for w in weights],
    }[decay]
    return Model(randn(samples, features, seed=5), weights, targets, loss, decays)


def likewise(model: Model, vector: Tensor) -> Any:
    parts = unflat(vector, model.weights)
    return parts[0] if len(parts) == 1 else tuple(parts)


def joined(tree: Any) -> Tensor:
    return flat([tree] if isinstance(tree, Tensor) else list(tree))


def safe_alpha(hessian: Tensor, damping: float = 0.0) -> float:
    return 1.0 / (float(torch.linalg.eigvalsh(hessian)[-1]) + damping)
