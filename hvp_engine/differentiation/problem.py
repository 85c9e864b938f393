"""A loss at a point, and a loss over several batches."""

from __future__ import annotations

import enum
import types
import weakref
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from hvp_engine._support.pytree import Structure, check_scalar, flatten_batch
from hvp_engine._support.reading import CONSTANTS
from hvp_engine._support.torch_compat import elements_of


class GatheringLoss:
    """Base of losses that take sharded tensors (DTensors) and gather them."""


class Leaf(enum.Enum):
    """What stands for a leaf of a batch where only the others are told: a tensor is not None, which a loss may ask."""

    TENSOR = enum.auto()


class _Signature(tuple[Any, ...]):
    """A tuple that is hashed once, since it is looked up several times in a call."""

    def __hash__(self) -> int:
        return self._hash

    @cached_property
    def _hash(self) -> int:
        return tuple.__hash__(self)


@dataclass(frozen=True)
class Problem:
    """A loss at a point: `loss(weights, [hyperparameters,] *inputs)`, with its trees flattened.

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
        if not isinstance(self.loss, GatheringLoss):
            for name, structure in (("weights", self.weight_structure), ("hyper", self.hyperparameter_structure)):
                if structure is not None and structure.shards is not None:
                    raise TypeError(
                        f"{name}: expected tensors that are whole in this process; got DTensors: wrap the loss in "
                        "hvp.DataParallel, which gathers them"
                    )

    @property
    def identity(self) -> Hashable:
        """The loss as a key. A function is referred to weakly, so that an engine that remembers it does not keep it and
        all that it holds alive."""
        return weakref.ref(self.loss) if isinstance(self.loss, types.FunctionType) else self.loss

    @cached_property
    def split(self) -> tuple[list[Tensor], list[Any], Structure]:
        """The batch's tensors, its other leaves (:class:`Leaf` in place of each tensor), and its structure."""
        leaves, structure = flatten_batch(self.inputs)
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        return tensors, [Leaf.TENSOR if isinstance(leaf, Tensor) else leaf for leaf in leaves], structure

    @cached_property
    def signature(self) -> Hashable:
        """What a trace depends on besides the values of tensors: the loss, and what its arguments look like."""
        point = _look_of([*self.weights, *self.hyperparameters])
        structures = self.weight_structure, self.hyperparameter_structure
        return _Signature((self.identity, *structures, point, *self.look_of_inputs))

    @property
    def look_of_inputs(self) -> tuple[Hashable, ...]:
        """What a trace depends on besides the values of the batch's tensors."""
        tensors, others, structure = self.split
        plain = tuple(
            [(type(leaf), leaf if is_constant(leaf) else None) for leaf in others]
        )  # 1, 1.0 and True are equal
        return _look_of(tensors), plain, structure

    def at(self, inputs: tuple[Any, ...]) -> Problem:
        """This problem with other inputs."""
        return replace(self, inputs=inputs)

    def nudged(self) -> Problem:
        """This problem with its weights moved by about one unit in the last place, to see what rounding does."""
        generator = torch.Generator().manual_seed(0)
        moved = []
        for weight in self.weights:
            noise = torch.randn(weight.shape, generator=generator).to(weight)
            moved.append(weight.detach() * (1 + torch.finfo(weight.dtype).eps * noise))
        return replace(self, weights=moved)

    def inputs_of(self, tensors: Sequence[Tensor]) -> tuple[Any, ...]:
        """The inputs with these in place of the batch's tensors."""
        _, others, structure = self.split
        given = iter(tensors)
        inputs: tuple[Any, ...] = structure.rebuild([next(given) if leaf is Leaf.TENSOR else leaf for leaf in others])
        return inputs

    def evaluate(self, weights: Sequence[Tensor], hyperparameters: Sequence[Tensor]) -> Tensor:
        """The loss at these leaves, as a 0-dim tensor; checked to have one element."""
        arguments = [self.weight_structure.rebuild(weights)]
        if self.hyperparameter_structure is not None:
            arguments.append(self.hyperparameter_structure.rebuild(hyperparameters))
        value = self.loss(*arguments, *self.inputs)
        check_scalar(value, self.name)
        return value if value.dim() == 0 else value.reshape(())


def _look_of(tensors: Sequence[Tensor]) -> Hashable:
    return tuple([(t.shape, form_of(t), t.dtype, t.device) for t in tensors])


def form_of(tensor: Tensor) -> Hashable:
    """The strides; of a sparse tensor its layout and how many elements it has."""
    return tensor.stride() if tensor.layout is torch.strided else (str(tensor.layout), elements_of(tensor))


class Averaged:
    """A loss of a list of batches: the mean of `loss` over them, as one problem with one Hessian.

    Arguments:
        loss: `loss(..., batch)` -> scalar tensor, the batch last: of (weights, batch), or (weights, hyper, batch).

    Use it wherever a loss is expected: `HessianOperator(hvp.Averaged(loss), weights, batches)`. Cost and memory: those
    of all batches together. (`Tuner` averages by itself, given `train_batches` and `val_batches`.)

    >>> import torch, hvp_engine as hvp
    >>> loss = lambda w, batch: batch * w**2 / 2
    >>> batches = [torch.tensor(1.0), torch.tensor(3.0)]
    >>> hvp.HessianOperator(hvp.Averaged(loss), torch.tensor(5.0), batches) @ torch.tensor(1.0)
    tensor(2.)
    """

    def __init__(self, loss: Callable[..., Tensor]):
        if not callable(loss):
            raise TypeError(f"loss: expected a function of (..., batch); got {type(loss).__name__}")
        self.loss = loss

    def __call__(self, *arguments: Any) -> Tensor:
        *point, batches = arguments
        losses = [self.loss(*point, batch) for batch in batches]
        if not losses:
            raise ValueError("batches: expected at least one batch; got none")
        return torch.stack([loss.reshape(()) for loss in losses]).mean()


def is_constant(leaf: Any) -> bool:
    """Whether a leaf of a batch, not a tensor, never changes, so that a trace may bake it in."""
    return isinstance(leaf, CONSTANTS) or (callable(leaf) and isinstance(leaf, Hashable))
