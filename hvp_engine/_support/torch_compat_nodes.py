"""What the package uses of autograd's nodes beyond torch's public interface: what they hold, what hooks there are,
and which of them stand for a derivative that is missing.

As in `torch_compat`, each name has a test, in the files `tests/test_torch_compat*.py`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import Node
from torch.utils.hooks import RemovableHandle


@dataclass(frozen=True)
class NodeFields:
    """The attributes of a class of autograd nodes: names of saved tensors, and of plain values."""

    tensors: tuple[str, ...]
    plain: tuple[str, ...]


_GENERATED_NODE = re.compile(r"[A-Z]\w*Backward\d+")

HIDING_NODES = re.compile(r"AsStrided|BlockDiag|Foreach|NativeDropout|ToDense|Miopen")
"""Generated nodes that keep strides or flags to themselves. Others hide fields too, but only dtypes and shapes of
arguments, which the metadata of the following nodes show. Seen in 2.13; a test reads torch's Functions.h."""


OWN_NODES = "GeneratedBackwardFor_hvp_engine_"
"""How the names of nodes begin that `torch.library.register_autograd` makes for our own operators. What these keep is
in their saved tensors, and in an attribute `settings` of their context."""


def fields_of(node: Node) -> NodeFields | str:
    """What nodes of this class show of what they hold; a description of the class if they do not show everything."""
    name = node.name()
    if name == "torch::autograd::AccumulateGrad":
        return NodeFields((), ())
    if name.startswith(OWN_NODES):
        return NodeFields(("saved_tensors",), ("settings",))
    if not _GENERATED_NODE.fullmatch(name) or HIDING_NODES.match(name) or hasattr(node, "_forward_cls"):
        return f"a {name}, of which the graph does not show what it holds"
    names = dir(node)
    saved = [attribute for attribute in names if attribute.startswith("_saved_")]
    return NodeFields(
        tuple(attribute for attribute in saved if f"_raw{attribute}" in names),
        tuple(attribute for attribute in saved if f"_raw{attribute}" not in names),
    )


def has_unpack_hook(saved: Any) -> bool:
    """Whether a saved tensor, or one of a list of them, is unpacked by Python code."""
    if type(saved) in (tuple, list):
        return any(one.unpack_hook is not None for one in saved)
    return saved.unpack_hook is not None


def has_hooks(tensor: Tensor) -> bool:
    """Whether Python code sees, and may change, the tensor's gradient."""
    return bool(tensor._backward_hooks)


def input_metadata(node: Any) -> list[tuple[torch.dtype, Sequence[int]]]:
    """(dtype, shape) of each gradient that a node takes."""
    return [(one.dtype, one.shape) for one in node._input_metadata]


PRIVATE_NAMES = ("_input_metadata", "unpack_hook", "_is_zerotensor")
"""What the extension asks of nodes, of what they have saved, and of tensors."""


def hooks_registered() -> int:
    """How many hooks this process has registered so far, on tensors, nodes, modules and optimizers."""
    return RemovableHandle.next_id


def sequence_number() -> int:
    """The number that this thread's next autograd node gets."""
    return torch.autograd._get_sequence_nr()


def sequence_number_of(node: Any) -> int:
    """A number that grows from node to node in one thread; huge for a leaf's node."""
    return node._sequence_nr()


ERROR_NODE = "torch::autograd::Error"
"""Stands for the backward of a once-differentiable function; autograd returns zeros through it without a word."""

NOT_IMPLEMENTED_NODES = {
    "torch::autograd::NotImplemented",
    "CdistBackwardBackward0",
    "PdistBackwardBackward0",
    "EmbeddingBagBackwardBackward0",
}
"""Stand for backward kernels without a derivative: they raise where they are reached."""

WEIGHT_NORM_NODE = "WeightNormInterfaceBackward0"
"""The node of `torch_compat.fused_weight_norm`."""

WRONG_WHEN_DIFFERENTIATED = {
    "NativeLayerNormBackwardBackward0": "layer normalization",
    "NativeBatchNormBackwardBackward0": "batch normalization",
    "CudnnBatchNormBackwardBackward0": "batch normalization",
}
"""Nodes of second derivatives that take the statistics, which depend on the input, for constants: what autograd makes
of them, the third derivatives, is wrong."""

CONTROL_FLOW = "torch._higher_order_ops"
"""The package of scan, map, while_loop, cond and their like.

Their backward, a graph run without grad mode, drops terms of the second derivative, or all, without a word (seen in
2.13). associative_scan is of ordinary operators.
"""


def control_flow(node: Node) -> str | None:
    """The module of a control-flow operator that `node` is the backward of."""
    module = getattr(getattr(node, "_forward_cls", None), "__module__", "")
    return module if module.startswith(f"{CONTROL_FLOW}.") else None


def once_differentiable(node: Node) -> str | None:
    """The name of a Python function whose backward is marked so, if `node` is its backward.

    The decorator wraps the backward in a function of the file that defines it.
    """
    function: Any = getattr(node, "_forward_cls", None)
    method = getattr(function, "backward", None)
    code = getattr(method, "__code__", None)
    if code is None or code.co_filename != torch.autograd.function.__file__ or not hasattr(method, "__wrapped__"):
        return None
    return function.__name__
