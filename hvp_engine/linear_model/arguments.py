"""Checks of a linear model's arguments."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from hvp_engine._support.flat_vector import INPUT_DTYPES, STATE_DTYPES
from hvp_engine._support.pytree import Structure
from hvp_engine._support.torch_compat import pytree

Loss = Literal["squared", "logistic", "softmax"]
Reduction = Literal["mean", "sum"]


def check_names(loss: str, reduction: str) -> None:
    for name, value, kind in (("loss", loss, Loss), ("reduction", reduction, Reduction)):
        if value not in get_args(kind):
            raise ValueError(f"{name}: expected one of {', '.join(map(repr, get_args(kind)))}; got {value!r}")


def check_weights(inputs: Any, weights: Sequence[Tensor], loss: Loss) -> None:
    """Raise unless inputs and weights are those of a linear model."""
    if not isinstance(inputs, Tensor):
        raise TypeError(f"inputs: expected a tensor; got {type(inputs).__name__}")
    if inputs.layout is not torch.strided:
        raise TypeError(f"inputs: expected a dense tensor; got layout {inputs.layout}: use .to_dense()")
    if inputs.dim() != 2 or 0 in inputs.shape:
        raise ValueError(
            f"inputs: expected a non-empty tensor (samples, features); got shape {tuple(inputs.shape)}: "
            "flatten the other dimensions with .flatten(1)"
        )
    if len(weights) > 2:
        raise ValueError(f"weights: expected one tensor, or two with a bias; got {len(weights)}")
    weight, *biases = weights
    if weight.dtype not in STATE_DTYPES:
        raise TypeError(f"weights: expected float32 or float64; got {weight.dtype}: cast them with .float()")
    if weight.dim() not in (1, 2) or weight.shape[-1] != inputs.shape[1] or 0 in weight.shape:
        raise ValueError(
            f"weights: expected shape (outputs, {inputs.shape[1]}) or ({inputs.shape[1]},), for inputs of shape "
            f"{tuple(inputs.shape)}; got {tuple(weight.shape)}"
        )
    if weight.dim() == 1 and loss == "softmax":
        raise ValueError(
            f"weights: expected shape (outputs, {inputs.shape[1]}) for the softmax loss; got {tuple(weight.shape)}: "
            "for two classes and one output use loss='logistic'"
        )
    for bias in biases:
        shapes = [(len(weight),)] if weight.dim() == 2 else [(), (1,)]
        if tuple(bias.shape) not in shapes:
            raise ValueError(
                f"weights: expected a bias of shape {' or '.join(map(str, shapes))} after weights of shape "
                f"{tuple(weight.shape)}; got {tuple(bias.shape)}"
            )
    if inputs.dtype not in INPUT_DTYPES or inputs.dtype.itemsize > weight.dtype.itemsize:
        raise TypeError(
            f"inputs: expected a floating dtype no wider than the weights' {weight.dtype}; got {inputs.dtype}: "
            f"cast them with .to({weight.dtype})"
        )
    _check_device(inputs, weight, "inputs")
    for bias in biases:
        _check_kind(bias, weight, "weights: bias")


def _check_kind(tensor: Tensor, weight: Tensor, name: str) -> None:
    if tensor.dtype != weight.dtype:
        raise TypeError(
            f"{name}: expected {weight.dtype} as the weights; got {tensor.dtype}: cast it with .to({weight.dtype})"
        )
    _check_device(tensor, weight, name)


def _check_device(tensor: Tensor, weight: Tensor, name: str) -> None:
    if tensor.device != weight.device:
        raise ValueError(
            f"{name}: expected device {weight.device} as the weights; got {tensor.device}: "
            f"move it with .to({str(weight.device)!r})"
        )


def check_targets(targets: Any, outputs: Tensor, loss: Loss) -> None:
    """Raise unless the loss accepts these targets for these outputs."""
    if not isinstance(targets, Tensor):
        raise TypeError(f"targets: expected a tensor or None; got {type(targets).__name__}")
    classes = loss == "softmax" and targets.dim() == 1
    if classes and targets.dtype != torch.int64:
        raise TypeError(f"targets: expected class indices in torch.int64; got {targets.dtype}: cast them with .long()")
    shape = outputs.shape[:1] if classes else outputs.shape
    if targets.shape != shape:
        expected = f"({len(outputs)},) or {tuple(outputs.shape)}" if loss == "softmax" else str(tuple(outputs.shape))
        raise ValueError(f"targets: expected shape {expected} for this loss; got {tuple(targets.shape)}")
    if not classes:
        _check_kind(targets, outputs, "targets")
        return
    _check_device(targets, outputs, "targets")
    low, high = (int(bound) for bound in targets.aminmax())
    if low < 0 or high >= outputs.shape[1]:
        raise ValueError(
            f"targets: expected class indices from 0 to {outputs.shape[1] - 1}; got {low} to {high}: "
            "leave out samples without a class"
        )


def decays_of(decay: Any, weights: Sequence[Tensor], structure: Structure) -> list[Tensor]:
    """One tensor for each of the weights: 0-dim, or of its shape."""
    leaves, spec = pytree.tree_flatten(decay)
    if spec.is_leaf():
        leaves = leaves * len(weights)
    elif spec != structure.spec:
        raise ValueError(f"decay: expected a number, or the container of the weights, {structure.spec}; got {spec}")
    decays = []
    for index, (leaf, weight) in enumerate(zip(leaves, weights, strict=True)):
        where = "decay" if len(leaves) == 1 else f"decay[{index}]"
        if isinstance(leaf, (int, float)) and not isinstance(leaf, bool):
            leaf = weight.new_tensor(float(leaf))
        if not isinstance(leaf, Tensor):
            raise TypeError(f"{where}: expected a number or a tensor; got {type(leaf).__name__}")
        _check_kind(leaf, weight, where)
        if leaf.dim() and leaf.shape != weight.shape:
            raise ValueError(
                f"{where}: expected a number, or a tensor of shape {tuple(weight.shape)} as the weights; "
                f"got {tuple(leaf.shape)}"
            )
        decays.append(leaf.detach().clone())
    return decays
