"""Tensors with a shape, strides, a dtype and a device, but no values: what rewrites know of the values of a graph.

Operations on them find out what the result is like. As torch's FakeTensor does, but that imports all of torch.compile
(more than a second in a new process), and takes 0.3 to 1 ms for an operation; here the usual ones take some 20 us.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from hvp_engine._support.torch_compat import make_wrapper, pytree, without_torch_function

aten = torch.ops.aten

_ELEMENTWISE = frozenset(
    (
        *(aten.add.Tensor, aten.add.Scalar, aten.sub.Tensor, aten.sub.Scalar, aten.rsub.Scalar),
        *(aten.mul.Tensor, aten.mul.Scalar, aten.div.Tensor, aten.div.Scalar, aten.pow.Tensor_Scalar),
        *(aten.addcmul.default, aten.addcdiv.default, aten.maximum.default, aten.minimum.default),
        *(aten.neg.default, aten.reciprocal.default, aten.sqrt.default, aten.rsqrt.default, aten.abs.default),
        *(aten.exp.default, aten.log.default, aten.sin.default, aten.cos.default, aten.erf.default, aten.sgn.default),
        *(aten.tanh.default, aten.sigmoid.default, aten.relu.default, aten.silu.default, aten.gelu.default),
        *(aten.tanh_backward.default, aten.sigmoid_backward.default, aten.threshold_backward.default),
        *(aten.silu_backward.default, aten.gelu_backward.default, aten.softplus.default),
        *(aten.softplus_backward.default, aten.elu.default, aten.leaky_relu.default),
    )
)
"""Operations on floating-point tensors of one dtype that give such a tensor."""


class AbstractTensor(Tensor):
    """A tensor like `like`, but on `device`."""

    __torch_function__ = without_torch_function  # type: ignore[assignment]  # torch's own, of another form

    @staticmethod
    def __new__(cls, like: Tensor, device: torch.device) -> AbstractTensor:
        return make_wrapper(cls, like, device)

    def __repr__(self) -> str:  # type: ignore[override]  # no values to choose a format for
        return f"AbstractTensor({tuple(self.shape)}, {self.dtype}, {self.device})"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch's stub takes it for a static method
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        keywords = kwargs or {}
        if func in _ELEMENTWISE and not keywords:
            result = _elementwise([argument for argument in args if isinstance(argument, Tensor)])
            if result is not None:
                return result
        operands = [leaf for leaf in pytree.tree_leaves((args, keywords)) if isinstance(leaf, AbstractTensor)]
        device = keywords.get("device") or next((x for x in operands if x.dim()), operands[0]).device
        given, named = pytree.tree_map(_on_meta, (args, keywords))
        return pytree.tree_map_only(Tensor, lambda made: AbstractTensor(made, device), func(*given, **named))


def abstract(tensor: Tensor) -> Tensor:
    """An abstract tensor like `tensor`."""
    return tensor if isinstance(tensor, AbstractTensor) else AbstractTensor(tensor, tensor.device)


def make_abstract(graph: fx.Graph) -> None:
    """Of each node know no more than what its value is like."""
    for node in graph.nodes:
        if "val" in node.meta:
            node.meta["val"] = pytree.tree_map_only(Tensor, abstract, node.meta["val"])


def _elementwise(operands: Sequence[Tensor]) -> AbstractTensor | None:
    """What an operation on these gives that goes element by element; None where that takes more thought.

    Operands whose strides descend give a row-major result: (5, 1) and (7,) give (5, 7) with the strides (7, 1). Those
    that are laid out alike, without gaps, give what is laid out like them.
    """
    large = [x for x in operands if x.dim()] or [*operands[:1]]
    first = large[0]
    if not first.dtype.is_floating_point or any(x.dtype != first.dtype for x in operands):
        return None
    shape, strides = first.shape, first.stride()
    if all(map(_descends, large)):
        if any(x.shape != shape for x in large):
            shape = torch.broadcast_shapes(*(x.shape for x in large))
        return AbstractTensor(torch.empty(shape, dtype=first.dtype, device="meta"), first.device)
    if _is_dense(first) and all(x.shape == shape and x.stride() == strides for x in large):
        return AbstractTensor(first, first.device)
    return None


def _descends(x: Tensor) -> bool:
    """Whether no stride is above the one before it, those left out that do not count: of dimensions that are expanded
    or have one element."""
    if x.is_contiguous():
        return True
    strides = [stride for size, stride in zip(x.shape, x.stride(), strict=True) if size > 1 and stride]
    return strides == sorted(strides, reverse=True)


def _is_dense(x: Tensor) -> bool:
    """Whether the elements fill their memory, each once."""
    expected = 1
    for stride, size in sorted(zip(x.stride(), x.shape, strict=True)):
        if size > 1 and stride != expected:
            return False
        expected *= size
    return True


def _on_meta(leaf: Any) -> Any:
    """In place of a tensor one like it without memory; in place of a device the one where those are."""
    if isinstance(leaf, Tensor):
        if leaf.layout is not torch.strided:
            return torch.empty(leaf.shape, dtype=leaf.dtype, layout=leaf.layout, device="meta")
        return torch.empty_strided(leaf.shape, leaf.stride(), dtype=leaf.dtype, device="meta")
    return torch.device("meta") if isinstance(leaf, torch.device) else leaf
