"""How the tensors of a trace lie in memory: images point by point, the factors of batched products densely.

Where the channels of a point lie together (channels-last), convolutions of few channels take half the time on a CPU (50
images of 32 x 32, 8 to 8 channels, 3 x 3, one core: forward 2.1 ms against 1.15, backward to the images 2.7 against
1.2). A network whose kernels lie so keeps its images so: convolutions return what they are given, and elementwise
operations follow.

The heads of attention are columns of one matrix, so that rows of a head, a cache line or a few long, are a page apart:
batched products of such matrices take up to 2.6 times as long as those of dense ones (200 products of 32 x 16 with 16 x
32, one core: 0.30 ms against 0.12), a copy 0.02 ms. A term of the transformer takes 1.04 times as long without copies.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from hvp_engine._support.torch_compat import onednn_enabled
from hvp_engine.differentiation.trace.functionalize import is_random, is_view
from hvp_engine.differentiation.trace.patterns import Builder, is_transposed

aten = torch.ops.aten

_LIBRARY_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""Dtypes for which oneDNN has convolutions; torch's own, for the others, only know images channel by channel."""

_BATCH_NORMALIZATIONS = (functional.batch_norm, torch.batch_norm)
_TRAINING = 5
"""The position of `training` among their arguments."""

_NORMALIZATIONS = (
    *_BATCH_NORMALIZATIONS,
    functional.instance_norm,
    torch.instance_norm,
    functional.group_norm,
    torch.group_norm,
)

_CHANNELS = 8
"""Channels that fill a vector register: kernels from and to multiples of it gain by the layout, others lose."""


def prefer_channels_last(weights: Sequence[Tensor]) -> bool:
    """Whether most of the convolution kernels among `weights` are faster in channels-last layout."""
    kernels = [weight for weight in weights if _is_kernel(weight)]
    whole = [w for w in kernels if w.shape[0] % _CHANNELS == 0 and w.shape[1] % _CHANNELS == 0]
    return onednn_enabled() and 2 * _elements(whole) > _elements(kernels)


def channels_last(weights: Sequence[Tensor]) -> list[Tensor]:
    """`weights` with the kernels among them in channels-last layout."""
    return [w.contiguous(memory_format=torch.channels_last) if _is_kernel(w) else w for w in weights]


class NoStatistics(TorchFunctionMode):
    """Raises `RuntimeError` where torch's kernels are to normalize images by statistics over their points.

    In channels-last layout they are slower, and sum less exactly (a ResNet-20 in float32: the gradient is off by 0.4%,
    and by 0.04% otherwise). Ours, which take their place almost everywhere, are not.
    """

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        keywords = kwargs or {}
        if func in _NORMALIZATIONS and (args[0] if args else keywords["input"]).dim() == 4:
            training = args[_TRAINING] if len(args) > _TRAINING else keywords.get("training", False)
            if func not in _BATCH_NORMALIZATIONS or training:
                raise RuntimeError(f"{func.__name__} is left in the layout it has")
        return func(*args, **keywords)


def layout_matters(graph: fx.Graph) -> bool:
    """Whether values depend on strides: random numbers are drawn in memory order, and some views name strides."""
    return any(_scattered(node) for node in graph.nodes if is_random(node)) or any(
        _scattered(node.args[0]) for node in graph.nodes if node.target is aten.as_strided.default
    )


def copy_tangents_for_strides(graph: fx.Graph, linear: set[fx.Node]) -> None:
    """Copy tangents that `as_strided` reads: it counts from where their memory begins, which in a solve is that of all
    weights."""
    build = Builder(graph, linear)
    for node in list(graph.nodes):
        base = node.args[0] if node.target in _STRIDED else None
        while base is not None and is_view(base):
            base = base.args[0]
        if base is None or base.op != "placeholder" or base not in linear:
            continue
        readers = list(base.users)
        with graph.inserting_before(min(readers)):
            copy = build(aten.clone.default, (base,), base.meta["val"])
        for reader in readers:
            reader.replace_input_with(base, copy)


def _elements(tensors: Sequence[Tensor]) -> int:
    return sum(tensor.numel() for tensor in tensors)


def _is_kernel(weight: Tensor) -> bool:
    return weight.dim() == 4 and weight.device.type == "cpu" and weight.dtype in _LIBRARY_DTYPES


def _scattered(node: Any) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) and not value.is_contiguous()


_STRIDED = (aten.as_strided.default, aten.as_strided_scatter.default)
"""What counts from where the memory begins that its argument shows."""

_FACTORS = {aten.bmm.default: (0, 1), aten.baddbmm.default: (1, 2)}
"""Batched products, and which of their arguments are matrices to multiply."""

_FEWEST_USES = 2
"""Fewest products of a term that are worth a copy of an operand that changes with the term."""


def compact_factors(graph: fx.Graph, linear: set[fx.Node]) -> None:
    """Replace operands of batched products whose rows lie apart by dense copies.

    A known operand is copied once, in the primal part; one that changes with the term where several products read it.
    """
    build = Builder(graph, linear)
    uses: dict[fx.Node, list[tuple[fx.Node, int]]] = defaultdict(list)
    for node in graph.nodes:
        if node.op == "call_function" and node in linear:
            for position in _FACTORS.get(node.target, ()):
                source, _ = _untransposed(node.args[position])
                uses[source].append((node, position))
    for source, places in uses.items():
        value = source.meta["val"]
        if not _rows_apart(value) or (source in linear and len(places) < _FEWEST_USES):
            continue
        with graph.inserting_before(places[0][0]):
            upright = value.stride(2) <= value.stride(1)
            below = source if upright else build.transposed(source)
            dense = below.meta["val"].new_empty(below.meta["val"].shape)
            copy = build(aten.clone.default, (below,), dense, memory_format=torch.contiguous_format)
            compact = copy if upright else build.transposed(copy)
        for node, position in places:
            with graph.inserting_before(node):
                _, flipped = _untransposed(node.args[position])
                node.update_arg(position, build.transposed(compact) if flipped else compact)


def _rows_apart(value: Tensor) -> bool:
    """Whether each matrix has gaps between its rows and between its columns; on a CPU."""
    if value.device.type != "cpu" or 0 in value.stride() or 0 in value.shape:
        return False
    matrix = value[0]
    return not matrix.is_contiguous() and not matrix.t().is_contiguous()


def _untransposed(node: Any) -> tuple[fx.Node, bool]:
    """The node below transpositions of its matrices, and whether their number is odd."""
    flipped = False
    while is_transposed(node):
        node, flipped = node.args[0], not flipped
    return node, flipped
