"""Kernels that have second derivatives, in place of some that have none, or a wrong or a slow one."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from types import FunctionType, ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import embedding
from torch.overrides import TorchFunctionMode

from hvp_engine._support.random_state import one_thread
from hvp_engine._support.torch_compat import fused_weight_norm
from hvp_engine.differentiable.attention.function import is_worthwhile, scaled_dot_product_attention
from hvp_engine.differentiable.recurrent.layers import gru, lstm
from hvp_engine.differentiation.formulas import FORMULAS
from hvp_engine.differentiation.losses_and_normalizations import LOSSES_AND_NORMALIZATIONS
from hvp_engine.differentiation.normalization_formulas import NORMALIZATION_FORMULAS


class _Replacing(TorchFunctionMode):
    """Replaces functions of torch by others that compute the same values.

    Attributes:
        used: whether one has been replaced.
    """

    def __init__(self, replacements: dict[Callable[..., Any], Callable[..., Any]]):
        super().__init__()
        self._replacements = replacements
        self.used = False

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        replacement = self._replacements.get(func)
        if func is torch.autograd.grad:  # what it computes again, as for gradient checkpointing, needs the mode, too
            with self:
                return _with_names(func, torch.autograd, has_torch_function=_no)(*args, **(kwargs or {}))
        if replacement is None:
            return func(*args, **(kwargs or {}))
        self.used = True
        return replacement(*args, **(kwargs or {}))


def own_kernels() -> _Replacing:
    """A context in which attention and recurrent layers are operations of this package, which have second derivatives;
    it says whether there were any."""
    return _Replacing(_OWN)


def traceable_kernels() -> _Replacing:
    """A context in which what is itself no gradient, but looks at values of tensors in passing, can be traced."""
    return _Replacing(_TRACEABLE)


@contextlib.contextmanager
def plain_kernels(thrice: bool = False) -> Iterator[_Replacing]:
    """Attention, recurrent layers, embeddings, weight normalization, one-hot labels, :data:`FORMULAS` and
    :data:`LOSSES_AND_NORMALIZATIONS`, with the right second derivatives; `thrice`, for losses that themselves take
    derivatives, with the right third ones too. Torch's switches are the whole process's, so that its thread runs
    alone."""
    switches = sdpa_kernel(SDPBackend.MATH), torch.backends.cudnn.flags(enabled=False)
    with one_thread(), switches[0], switches[1], _Replacing(_THRICE if thrice else _PLAIN) as replacing:
        yield replacing


def _attention(*arguments: Any, **options: Any) -> Tensor:
    """By our operators where they are worth it, else by torch's one kernel that has a second derivative."""
    if is_worthwhile(*arguments, **options):
        return scaled_dot_product_attention(*arguments, **options)
    with sdpa_kernel(SDPBackend.MATH):
        return functional.scaled_dot_product_attention(*arguments, **options)


def _multi_head_attention(*arguments: Any, **options: Any) -> Any:
    """The function behind `nn.MultiheadAttention`, in which no mode sees the attention itself: its code, with another
    function under that name."""
    function = functional.multi_head_attention_forward
    return _with_names(function, functional, scaled_dot_product_attention=_attention)(*arguments, **options)


def _with_names(function: Callable[..., Any], module: ModuleType, **names: Any) -> Callable[..., Any]:
    """A function of a module whose code finds something else under these global names."""
    assert isinstance(function, FunctionType)
    copied = FunctionType(
        function.__code__, {**vars(module), **names}, function.__name__, function.__defaults__, function.__closure__
    )
    copied.__kwdefaults__ = function.__kwdefaults__
    return copied


def _no(*_: Any) -> bool:
    return False


def _weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    """By the formula, since the second derivative of torch's fused kernel is wrong."""
    return v * (g / torch.norm_except_dim(v, 2, dim))


def _embedding(input: Tensor, weight: Tensor, *arguments: Any, **options: Any) -> Tensor:
    """With dense gradients: autograd cannot add a dense gradient, say of a penalty, to a sparse one."""
    return embedding(input, weight, *arguments[:4], **(options | {"sparse": False}))


def _one_hot(input: Tensor, num_classes: int = -1) -> Tensor:
    """Without a look at the labels; one that is out of range is an error of `scatter`, too."""
    if input.dtype is not torch.int64 or num_classes < 1:
        return functional.one_hot(input, num_classes)
    return input.new_zeros(*input.shape, num_classes).scatter(-1, input.unsqueeze(-1), 1)


_TRACEABLE: dict[Callable[..., Any], Callable[..., Any]] = {functional.one_hot: _one_hot}

_OWN: dict[Callable[..., Any], Callable[..., Any]] = {
    functional.scaled_dot_product_attention: _attention,
    functional.multi_head_attention_forward: _multi_head_attention,
    torch.gru: gru,
    torch.lstm: lstm,
}

_PLAIN: dict[Callable[..., Any], Callable[..., Any]] = {
    **_OWN,
    **_TRACEABLE,
    fused_weight_norm: _weight_norm,
    embedding: _embedding,
    **FORMULAS,
    **LOSSES_AND_NORMALIZATIONS,
}

_THRICE: dict[Callable[..., Any], Callable[..., Any]] = {**_PLAIN, **NORMALIZATION_FORMULAS}
