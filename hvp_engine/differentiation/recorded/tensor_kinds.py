"""What graphs and programs have to know of a tensor, beside its values: whether it is plain, its kind, its place."""

from __future__ import annotations

from collections.abc import Hashable

import torch
from torch import Tensor

from hvp_engine._support.torch_compat import is_zero_tensor


def is_plain(tensor: Tensor) -> bool:
    """Whether the tensor is what its shape, strides and dtype say: no subclass, not sparse, not lazily conjugate."""
    plain = type(tensor) is Tensor or type(tensor) is torch.nn.Parameter
    lazy = tensor.is_neg() or tensor.is_conj() or is_zero_tensor(tensor)
    return plain and tensor.layout is torch.strided and not lazy


def kind_of(tensor: Tensor) -> Hashable:
    """All that a program depends on of a tensor whose values it is given."""
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.device


def whereabouts(tensor: Tensor) -> Hashable:
    """What two tensors share that are the same, as autograd makes a new one each time that it unpacks a saved one."""
    return tensor.data_ptr(), kind_of(tensor)
