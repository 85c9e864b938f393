"""What lies between a loss and a solve: the problem, and its gradient made linear at one point."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from torch import Tensor

from hvp_engine.trees import Structure, check_scalar
from hvp_engine.vectors import Layout


@dataclass(frozen=True)
class Problem:
    """A loss at a point: `loss(weights, [hyperparameters,] *inputs)`, with the trees taken apart.

    `hyperparameter_structure` is None for a loss of weights alone. `name` is what messages call the loss.
    """

    loss: Callable[..., Tensor]
    weights: list[Tensor]
    weight_structure: Structure
    hyperparameters: list[Tensor]
    hyperparameter_structure: Structure | None
    inputs: tuple[Any, ...]
    name: str = "loss"

    def __post_init__(self) -> None:
        if not hasattr(self.loss, "processes"):
            structures = {"weights": self.weight_structure, "hyper": self.hyperparameter_structure}
            for name, structure in structures.items():
                if structure is not None and structure.shards is not None:
                    raise TypeError(
                        f"{name}: expected tensors that this process has whole; got DTensors: wrap the loss in "
                        "hvp.DataParallel, which gathers them"
                    )

    def at(self, inputs: tuple[Any, ...]) -> Problem:
        """The same problem on other inputs."""
        return replace(self, inputs=inputs)

    def evaluate(self, weights: Sequence[Tensor], hyperparameters: Sequence[Tensor]) -> Tensor:
        """The loss at these leaves; checked to be a scalar."""
        arguments = [self.weight_structure.rebuild(weights)]
        if self.hyperparameter_structure is not None:
            arguments.append(self.hyperparameter_structure.rebuild(hyperparameters))
        value = self.loss(*arguments, *self.inputs)
        check_scalar(value, self.name)
        return value


class LinearMap(Protocol):
    """A symmetric linear map on lists of tensors of one layout: what a solver solves with."""

    @property
    def layout(self) -> Layout: ...

    def product(self, tangents: Sequence[Tensor]) -> Sequence[Tensor]:
        """A times the vector whose parts are `tangents`; a part may alias a tangent."""


class Linearization(LinearMap, Protocol):
    """The gradient f = dL/dw of a loss, and its derivatives, at one point."""

    @property
    def loss(self) -> Tensor | None:
        """The loss, detached; None if only the gradient was given."""

    @property
    def gradient(self) -> Sequence[Tensor]:
        """dL/dw, detached."""

    def mixed(self, tangents: Sequence[Tensor]) -> list[Tensor | None]:
        """(d2L/dlambda dw^T) tangents: one for each hyperparameter, None where there is no path."""
