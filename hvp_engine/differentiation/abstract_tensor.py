"""Tensors with a shape, strides, a dtype and a device, but no values: what rewrites know of the values of a graph.

Operations on them find out what the result is like. As torch's FakeTensor does, but that imports all of torch.compile
(more than a second in a new process), and takes 0.3 to 1 ms for an operation; here the usual ones take some 20 us.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from hvp_engine._support.torch_compat import broadcast_shapes, subclass_of, without_torch_functions_of_classes

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

    meta: Tensor
    """A plain tensor without memory, as torch's meta kernels take them."""

    _device: torch.device

    @staticmethod
    def __new__(cls, like: Tensor, device: torch.device) -> AbstractTensor:
        meta = _on_meta(like, [])
        made = subclass_of(cls, meta)
        made.meta, made._device = meta, device
        return made

    device = property(lambda self: self._device)
    shape = property(lambda self: self.meta.shape)  # not by way of __torch_function__
    dtype = property(lambda self: self.meta.dtype)

    def stride(self, *dimension: Any) -> Any:
        return self.meta.stride(*dimension)

    def __repr__(self) -> str:  # type: ignore[override]  # no values to choose a format for
        return f"AbstractTensor({tuple(self.shape)}, {self.dtype}, {self.device})"

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        keywords = kwargs or {}
        with without_torch_functions_of_classes():
            if func in _ELEMENTWISE and not keywords:
                result = _elementwise([argument for argument in args if isinstance(argument, Tensor)])
                if result is not None:
                    return result
            if func is aten.sum.dim_IntList and not keywords and args[0].dtype.is_floating_point:
                return _sum(*args)
            operands: list[AbstractTensor] = []
            result = func(*_on_meta(args, operands), **_on_meta(keywords, operands))
            if not isinstance(result, (Tensor, tuple, list)):
                return result
            device = keywords.get("device") or next((x for x in operands if x.dim()), operands[0]).device
            return _on_device(result, device)


def abstract(tensor: Tensor) -> Tensor:
    """An abstract tensor like `tensor`."""
    return tensor if isinstance(tensor, AbstractTensor) else AbstractTensor(tensor, tensor.device)


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
            shape = broadcast_shapes(*(x.shape for x in large))
        return AbstractTensor(torch.empty(shape, dtype=first.dtype, device="meta"), first.device)
    if _is_dense(first) and all(x.shape == shape and x.stride() == strides for x in large):
        return AbstractTensor(first, first.device)
    return None


def _sum(x: AbstractTensor, dims: Sequence[int] | None, keep: bool = False) -> AbstractTensor:
    """By torch's own kernel this would be the only operation of most programs that imports sympy, for 0.4 s."""
    summed = {dim % x.dim() for dim in dims or range(x.dim())} if x.dim() else set()
    shape = [1 if dim in summed else size for dim, size in enumerate(x.shape) if keep or dim not in summed]
    return AbstractTensor(torch.empty(shape, dtype=x.dtype, device="meta"), x.device)


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


def _on_meta(argument: Any, operands: list[AbstractTensor]) -> Any:
    """In place of a tensor one like it without memory; in place of a device the one where those are. The abstract
    tensors are added to `operands`."""
    if isinstance(argument, AbstractTensor):
        operands.append(argument)
        return argument.meta
    if isinstance(argument, Tensor):
        if argument.is_meta:
            return argument
        if argument.layout is not torch.strided:
            return torch.empty(argument.shape, dtype=argument.dtype, layout=argument.layout, device="meta")
        return torch.empty_strided(argument.shape, argument.stride(), dtype=argument.dtype, device="meta")
    if type(argument) in (tuple, list):
        return type(argument)([_on_meta(part, operands) for part in argument])
    if type(argument) is dict:
        return {name: _on_meta(part, operands) for name, part in argument.items()}
    return torch.device("meta") if isinstance(argument, torch.device) else argument


def _on_device(result: Any, device: torch.device) -> Any:
    """The result with abstract tensors in place of those without memory."""
    if isinstance(result, Tensor):
        return AbstractTensor(result, device)
    if type(result) in (tuple, list):
        return type(result)([_on_device(part, device) for part in result])
    return result
