"""Convolutions of a traced graph by the operations that are made for what they compute.

The derivative with respect to a kernel is, in the second derivatives that torch records, a convolution whose kernel is
an image: on a CPU that takes five times as long (measured: 50 images of 32 x 32, 8 to 8 channels, 3 x 3, one core: 3.9
ms against 0.8).
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from hvp_engine._support.torch_compat import suggest_memory_format
from hvp_engine.differentiation.trace.passes import alike, called, filled

aten = torch.ops.aten


def kernel_derivatives(graph: fx.Graph, linear: set[fx.Node]) -> None:
    """Convolutions whose kernels are images, as derivatives with respect to a kernel.

    With ^T for the exchange of images and channels, (x^T * g^T)^T of stride d, padding p and dilation s is the
    derivative with respect to the kernel of x * kernel of stride s, padding p and dilation d, for the cotangent g; and
    so are its first places, if it has more than the kernel.
    """
    for node in list(graph.nodes):
        if node.target is not aten.convolution.default:
            continue
        a, b, bias, stride, padding, dilation, turned, _, groups = node.args
        part = _leading_part(node)
        if bias is not None or turned or groups != 1 or not all(map(_exchanges, (a, b, *part.users))):
            continue
        x, g, value = a.args[0], b.args[0], part.meta["val"].transpose(0, 1)
        size = value.shape[2:]
        if g.meta["val"][0, 0].numel() <= size.numel() or not _fits(x, g, size, stride, padding, dilation):
            continue
        with graph.inserting_before(node):
            value = torch.empty_like(value, memory_format=suggest_memory_format(x.meta["val"]))
            kernel = filled(graph, value, 0)  # of which only the size is read
            arguments = (g, x, kernel, None, dilation, padding, stride, False, [0] * len(size), 1, [False, True, False])
            backward = called(graph, aten.convolution_backward.default, arguments, (None, value, None))
            derivative = called(graph, operator.getitem, (backward, 1), value)
        for user in list(part.users):
            user.replace_all_uses_with(derivative)


def _leading_part(node: fx.Node) -> fx.Node:
    """What is used of a convolution: itself, or its first places where nothing else is read."""
    while len(node.users) == 1:
        (user,) = node.users
        arguments: Any = user.args
        if (
            user.target is not aten.slice.Tensor
            or arguments[1] < 2
            or arguments[2] != 0
            or arguments[4:] not in ((), (1,))
        ):
            return node
        node = user
    return node


def _fits(x: fx.Node, g: fx.Node, kernel: Sequence[int], *geometry: Sequence[int]) -> bool:
    """Whether a kernel of this size maps images of x's size to images of g's."""
    return all(
        (size + 2 * p - s * (k - 1) - 1) // d + 1 == found
        for size, found, k, s, p, d in zip(
            x.meta["val"].shape[2:], g.meta["val"].shape[2:], kernel, *geometry, strict=True
        )
    )


def _exchanges(node: Any) -> bool:
    return isinstance(node, fx.Node) and node.target is aten.transpose.int and set(node.args[1:]) == {0, 1}


def add_biases(graph: fx.Graph, linear: set[fx.Node]) -> None:
    """x * kernel + bias in one operation, in place of a sum with a broadcast bias; with further summands too."""
    for node in list(graph.nodes):
        if node.target is not aten.add.Tensor or node.kwargs:
            continue
        for summand, broadcast in (node.args, reversed(node.args)):
            bias, found = _bias(broadcast), _convolution(summand)
            if bias is None or found is None or not alike(broadcast, summand):
                continue
            convolution, other = found
            with graph.inserting_before(node):
                arguments = (*convolution.args[:2], bias, *convolution.args[3:])
                value = called(graph, aten.convolution.default, arguments, convolution.meta["val"])
                if other is not None:
                    value = called(graph, aten.add.Tensor, (other, value), node.meta["val"])
            node.replace_all_uses_with(value)
            break


def _bias(node: Any) -> fx.Node | None:
    """b, if the node is b for each channel, everywhere."""
    if not isinstance(node, fx.Node) or node.target is not aten.expand.default:
        return None
    below: Any = node.args[0]
    if below.target is not aten.view.default or below.args[0].meta["val"].dim() != 1:
        return None
    one, _, *rest = below.meta["val"].shape
    return below.args[0] if {one, *rest} == {1} and below.meta["val"].dim() == node.meta["val"].dim() > 2 else None


def _convolution(node: Any) -> tuple[fx.Node, fx.Node | None] | None:
    """(convolution without bias, what is added to it) if that is what the node is, and nobody else reads it."""
    if not isinstance(node, fx.Node) or len(node.users) != 1:
        return None
    if node.target is aten.convolution.default:
        return (node, None) if node.args[2] is None else None
    if node.target is not aten.add.Tensor or node.kwargs:
        return None
    arguments: Any = node.args
    for summand, other in (reversed(arguments), arguments):
        found = _convolution(summand)
        if found is not None and found[1] is None and alike(other, summand):
            return found[0], other
    return None
