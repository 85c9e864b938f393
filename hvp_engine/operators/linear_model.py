"""The Hessian of a linear model's loss by its formula, for the losses that are known by name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional

from hvp_engine._support.flat_vector import INPUT_DTYPES, STATE_DTYPES
from hvp_engine._support.pytree import Structure, flatten
from hvp_engine._support.torch_compat import pytree
from hvp_engine.engines import Engine
from hvp_engine.operators.hessian import HessianOperator

_LOSSES: dict[str, Callable[..., Tensor]] = {
    "squared": functional.mse_loss,
    "logistic": functional.binary_cross_entropy_with_logits,
    "softmax": functional.cross_entropy,
}


class LinearModelOperator(HessianOperator):
    """The Hessian of a linear model's loss in its weights: a :class:`HessianOperator` of a loss that is given by name.

    With outputs = inputs W^T + b, it is the second derivative in (W, b) of
    `F.mse_loss(outputs, targets, reduction=reduction)` for the loss "squared",
    `F.binary_cross_entropy_with_logits(outputs, targets, reduction=reduction)` for "logistic" and
    `F.cross_entropy(outputs, targets, reduction=reduction)` for "softmax", plus sum(decay * W**2) / 2, and the same for
    b. (So "mean" divides the squared and the logistic loss by samples * outputs, the softmax loss by samples; the
    squared loss has no factor 1/2; the decay is never divided.)

    Arguments:
        inputs: (samples, features), in the weights' dtype or a narrower one (float32, bfloat16, float16).
        weights: W like that of `nn.Linear`, (outputs, features); or (features,) for one output, whose outputs have the
            shape (samples,). With a bias: a tree of two leaves (W, b), for example a tuple or an `nn.Linear`; b is
            (outputs,), or for a W of shape (features,) 0-dim or (1,).
        loss: "squared", "logistic" or "softmax".
        targets: as the loss takes them: like the outputs; for "softmax" class indices (samples,), none of them
            ignored, or probabilities like the outputs. Needed for `.loss` and `.gradient`, and for "softmax" with
            probabilities that do not add up to 1, since their sums multiply the curvature.
        decay: a number or 0-dim tensor, for all weights and the bias; or a tree like `weights` whose leaves are such,
            or tensors of the weights' shapes. It may be negative.
        reduction: "mean" or "sum".
        engine: as of :class:`HessianOperator`; where operators are made again and again, name one, as "linearized":
            "auto" expects few products of each.

    Weights, targets and decay are all float32 or all float64, and everything is on one device. The operator copies all
    but the inputs, which must not be changed in place while it is in use.

    Cost: a product takes 4 samples * features * outputs operations; a term of a series 2 samples^2 * outputs where
    that is less and all of W has the same decay, since it then stays in the space of the batch.

    Errors: `TypeError`/`ValueError` naming the argument for a shape, dtype, device or name that does not fit;
    `ValueError` from `.gradient` without targets; in a solve as :func:`solve`.

    Source: Bishop, Pattern Recognition and Machine Learning, Springer 2006, sections 4.3.3 and 4.3.4, for the Hessians.

    >>> import torch, hvp_engine as hvp
    >>> x, w = torch.tensor([[1.0, 0.0], [1.0, 2.0]]), torch.zeros(2)
    >>> H = hvp.LinearModelOperator(x, w, loss="squared", decay=0.5)
    >>> H @ torch.ones(2)                                      # 2 x^T x / 2 + 0.5
    tensor([4.5000, 6.5000])
    >>> H.solve(torch.tensor([4.5, 6.5]), hvp.Neumann(200)).value
    tensor([1.0000, 1.0000])
    """

    def __init__(
        self,
        inputs: Tensor,
        weights: Any,
        *,
        loss: Literal["squared", "logistic", "softmax"],
        targets: Tensor | None = None,
        decay: Any = 0.0,
        reduction: Literal["mean", "sum"] = "mean",
        engine: str | Engine = "auto",
    ):
        leaves, structure = flatten(weights, "weights")
        for name, value, known in (("loss", loss, tuple(_LOSSES)), ("reduction", reduction, ("mean", "sum"))):
            if value not in known:
                raise ValueError(f"{name}: expected one of {', '.join(map(repr, known))}; got {value!r}")
        _check_model(inputs, leaves, loss)
        leaves = [leaf.detach().clone(memory_format=torch.contiguous_format) for leaf in leaves]
        self._targeted = targets is not None
        targets = _checked_targets(targets, inputs, leaves[0], loss)
        decays = _decays(decay, leaves, structure)
        super().__init__(_value, leaves, inputs.detach(), targets, decays, loss, reduction, engine=engine)
        self._structure = structure

    @property
    def loss(self) -> Tensor | None:  # type: ignore[override]
        """The loss with its decay; None without targets."""
        return self._linear_map.loss if self._targeted else None

    @property
    def gradient(self) -> Any:
        """d loss / dw, detached, in the container of the weights."""
        if not self._targeted:
            raise ValueError("targets: expected those of the loss, which its gradient needs; got None")
        return super().gradient


def _value(
    weights: Sequence[Tensor], inputs: Tensor, targets: Tensor, decays: Sequence[Tensor], loss: str, reduction: str
) -> Tensor:
    weight, *bias = weights
    outputs = functional.linear(inputs.to(weight.dtype), weight)
    value = _LOSSES[loss](outputs + bias[0] if bias else outputs, targets, reduction=reduction)
    for decay, part in zip(decays, weights, strict=True):
        # One number is multiplied last, so that the graph shows that there is but one.
        value = value + ((decay * part.square()).sum() if decay.dim() else decay * part.square().sum()) / 2
    return value


def _check(
    tensor: Any, name: str, what: str, shapes: Sequence[tuple[int, ...]], dtype: torch.dtype, device: torch.device
) -> None:
    """Raise unless `tensor` is dense, has one of the shapes, and the dtype and device."""
    expected = f"{name}: expected {what} of shape {' or '.join(map(str, shapes))} in {dtype} on {device}; got "
    if not isinstance(tensor, Tensor):
        raise TypeError(expected + type(tensor).__name__)
    dense = tensor.layout is torch.strided
    if dense and tuple(tensor.shape) in shapes and tensor.dtype == dtype and tensor.device == device:
        return
    got = f"shape {tuple(tensor.shape)} in {tensor.dtype} on {tensor.device}"
    if not dense:
        raise TypeError(f"{expected}layout {tensor.layout}: use .to_dense()")
    if tensor.dtype != dtype:
        raise TypeError(f"{expected}{got}: cast it with .to({dtype})")
    raise ValueError(f"{expected}{got}" + (f": move it with .to({str(device)!r})" if tensor.device != device else ""))


def _check_model(inputs: Any, weights: Sequence[Tensor], loss: str) -> None:
    """Raise unless inputs and weights are those of a linear model."""
    weight, *bias = weights
    if len(bias) > 1:
        raise ValueError(f"weights: expected one tensor, or two with a bias; got {len(weights)}")
    if weight.dtype not in STATE_DTYPES:
        raise TypeError(f"weights: expected float32 or float64; got {weight.dtype}: cast them with .float()")
    shape, dtype = tuple(getattr(inputs, "shape", ("samples", "features"))), getattr(inputs, "dtype", weight.dtype)
    narrow = dtype in INPUT_DTYPES and dtype.itemsize <= weight.dtype.itemsize
    _check(inputs, "inputs", "a dense tensor", [shape], dtype if narrow else weight.dtype, weight.device)
    if len(shape) != 2 or 0 in shape:
        raise ValueError(
            f"inputs: expected a non-empty tensor (samples, features); got shape {shape}: flatten the other dimensions "
            "with .flatten(1)"
        )
    several = weight.dim() == 2
    if not (several or (weight.dim() == 1 and loss != "softmax")) or weight.shape[-1] != shape[1] or 0 in weight.shape:
        raise ValueError(
            f"weights: expected shape (outputs, {shape[1]}), or ({shape[1]},) for one output of another loss than "
            f"'softmax', for inputs of shape {shape}; got {tuple(weight.shape)}"
        )
    for part in bias:
        _check(
            part, "weights", "a bias", [tuple(weight.shape[:1])] if several else [(), (1,)], weight.dtype, weight.device
        )


def _checked_targets(targets: Any, inputs: Tensor, weight: Tensor, loss: str) -> Tensor:
    """The targets in memory of their own; without any, some: the second derivative is the same."""
    outputs = (len(inputs), *weight.shape[:-1])
    classes = loss == "softmax" and getattr(targets, "ndim", 1) == 1
    shape, dtype = (outputs[:1], torch.int64) if classes else (outputs, weight.dtype)
    if targets is None:
        return torch.zeros(shape, dtype=dtype, device=weight.device)
    _check(targets, "targets", "class indices" if classes else "a tensor or None", [shape], dtype, weight.device)
    if classes and not 0 <= int(targets.min()) <= int(targets.max()) < outputs[1]:
        raise ValueError(
            f"targets: expected class indices from 0 to {outputs[1] - 1}; got {int(targets.min())} to "
            f"{int(targets.max())}: leave out samples without a class"
        )
    return targets.detach().clone()


def _decays(decay: Any, weights: Sequence[Tensor], structure: Structure) -> tuple[Tensor, ...]:
    """One tensor for each of the weights, in memory of their own: 0-dim, or of its shape."""
    leaves, spec = pytree.tree_flatten(decay)
    if not spec.is_leaf() and spec != structure.spec:
        raise ValueError(f"decay: expected a number, or the container of the weights, {structure.spec}; got {spec}")
    found = []
    for weight, leaf in zip(weights, leaves * len(weights) if spec.is_leaf() else leaves, strict=True):
        if isinstance(leaf, (int, float)) and not isinstance(leaf, bool):
            leaf = weight.new_tensor(float(leaf))
        _check(leaf, "decay", "a number, or a tensor", [(), tuple(weight.shape)], weight.dtype, weight.device)
        found.append(leaf.detach().clone())
    return tuple(found)
