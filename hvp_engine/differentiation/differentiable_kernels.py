"""Kernels that have second derivatives, in place of fast ones that have none, a slow or a wrong one."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import embedding
from torch.overrides import TorchFunctionMode

from hvp_engine._support.torch_compat import fused_weight_norm, without_onednn
from hvp_engine.differentiation.formulas import FORMULAS
from hvp_engine.differentiation.losses_and_normalizations import LOSSES_AND_NORMALIZATIONS


@contextlib.contextmanager
def plain_kernels() -> Iterator[None]:
    """Attention, recurrent layers, embeddings, weight normalization, :data:`FORMULAS` and
    :data:`LOSSES_AND_NORMALIZATIONS`, with the right second derivatives."""
    with sdpa_kernel(SDPBackend.MATH), torch.backends.cudnn.flags(enabled=False), _PlainFunctions():
        yield


class _PlainFunctions(TorchFunctionMode):
    """Replaces functions of torch by others that compute the same values."""

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _PLAIN.get(func, func)(*args, **(kwargs or {}))


def _weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    """By the formula, since the second derivative of torch's fused kernel is wrong."""
    return v * (g / torch.norm_except_dim(v, 2, dim))


def _embedding(input: Tensor, weight: Tensor, *arguments: Any, **options: Any) -> Tensor:
    """With dense gradients: autograd cannot add a dense gradient, say of a penalty, to a sparse one."""
    return embedding(input, weight, *arguments[:4], **(options | {"sparse": False}))


def _lstm(*arguments: Any) -> Any:
    """Without oneDNN, whose kernel has no second derivative."""
    with without_onednn():
        return torch.lstm(*arguments)


_PLAIN: dict[Callable[..., Any], Callable[..., Any]] = {
    fused_weight_norm: _weight_norm,
    embedding: _embedding,
    torch.lstm: _lstm,
    **FORMULAS,
    **LOSSES_AND_NORMALIZATIONS,
}
