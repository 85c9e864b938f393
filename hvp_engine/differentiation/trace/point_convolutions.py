"""Convolutions that are linear layers: of one point, or of as many as there are.

With a kernel w of one point, y[n, o, s] = sum_c w[o, c] x[n, c, s] for each point s; with one as large as the images,
y[n, o] = sum_cs w[o, c, s] x[n, c, s], which is also how the derivative with respect to a kernel of one point is
written. Only where all convolutions of a loss are such ones: others leave the images channel by channel, and to copy
them for a matrix product costs more than it saves.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from hvp_engine.differentiation.trace.contractions import Contraction, Labelled, labelled, put_instead
from hvp_engine.differentiation.trace.patterns import Builder

aten = torch.ops.aten

_INNER = -1
_NOWHERE = -2
"""The label of dimensions of one element."""


def contract_convolutions(graph: fx.Graph, linear: set[fx.Node]) -> None:
    """Write convolutions of one point as matrix products, if there are no others."""
    nodes = [node for node in graph.nodes if node in linear and node.op == "call_function"]
    every = [node for node in nodes if node.target in (aten.convolution.default, aten.convolution_backward.default)]
    if every and all(map(_is_linear_layer, every)):
        put_instead(graph, linear, _contracted)


def _is_linear_layer(node: fx.Node) -> bool:
    return all(found is not None for found in _contractions(node)) and all(
        node.target is aten.convolution.default or user.target is operator.getitem for user in node.users
    )


def _contractions(node: Any) -> list[Contraction | None]:
    """One for a convolution; of a backward pass those for the images and for the kernel."""
    if node.target is aten.convolution.default:
        x, w, bias, stride, padding, dilation, turned, _, groups = node.args
        points = _points(x, w, stride, padding, dilation, groups)
        if points is None or bias is not None or (turned and any(points)):
            return [None]
        places = tuple(range(2, x.meta["val"].dim()))
        inside = [_INNER - 2 * d if whole else d for d, whole in zip(places, points, strict=True)]
        of_kernel = [label if whole else _NOWHERE for label, whole in zip(inside, points, strict=True)]
        kernel = (_INNER, 1) if turned else (1, _INNER)
        return [_contraction(x, (0, _INNER, *inside), w, (*kernel, *of_kernel))]
    grad, x, w, _, stride, padding, dilation, turned, _, groups, _ = node.args
    points = _points(x, w, stride, padding, dilation, groups)
    if points is None or any(points) or turned:
        return [None]
    places = tuple(range(2, x.meta["val"].dim()))
    nowhere, summed = (_NOWHERE,) * len(places), tuple(_INNER - 2 * d for d in places)
    return [
        _contraction(grad, (0, _INNER, *places), w, (_INNER, 1, *nowhere)),
        _contraction(grad, (_INNER, 0, *summed), x, (_INNER, 1, *summed)),
    ]


def _points(x: Any, w: Any, stride: Any, padding: Any, dilation: Any, groups: int) -> list[bool] | None:
    """For each dimension of the images whether the kernel covers it; None if it is neither that nor of one point."""
    if groups != 1 or any(padding):
        return None
    images, kernel = x.meta["val"].shape[2:], w.meta["val"].shape[2:]
    of_one = [size == 1 and step == 1 for size, step in zip(kernel, stride, strict=True)]
    whole = [size == all_of_it and d == 1 for size, all_of_it, d in zip(kernel, images, dilation, strict=True)]
    if not all(one or covers for one, covers in zip(of_one, whole, strict=True)):
        return None
    return [not one for one in of_one]


def _contraction(a: fx.Node, a_labels: tuple[int, ...], b: fx.Node, b_labels: tuple[int, ...]) -> Contraction:
    sizes = dict(zip((*a_labels, *b_labels), (*a.meta["val"].shape, *b.meta["val"].shape), strict=True))
    summed = {label for label in sizes if label < 0}
    return Contraction(labelled(a, a_labels), labelled(b, b_labels), summed, sizes)


def _contracted(build: Builder, node: fx.Node) -> Labelled | None:
    if node.target is aten.convolution.default:
        (found,) = _contractions(node)
        assert found is not None
        return found.made(build)
    source: Any = node.args[0] if node.target is operator.getitem else None
    if source is None or source.target is not aten.convolution_backward.default:
        return None
    index: Any = node.args[1]
    if index < 2:
        found = _contractions(source)[index]
        assert found is not None
        return found.made(build)
    grad = source.args[0]
    dimensions = [d for d in range(grad.meta["val"].dim()) if d != 1]
    return Labelled(build(aten.sum.dim_IntList, (grad, dimensions), node.meta["val"]), (0,))
