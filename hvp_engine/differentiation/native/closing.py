"""The graph of what follows a solve: negative mixed products, and two inner products with the gradient."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, fx

from hvp_engine._support.torch_compat_traces import graph_module
from hvp_engine.differentiation.abstract_tensor import abstract
from hvp_engine.differentiation.trace.partial_evaluation import Part

aten = torch.ops.aten


def closing_graph(
    mixed: Part, gradient: Sequence[Tensor], direct: Sequence[Tensor | None] | None = None
) -> fx.GraphModule:
    """(residuals..., x..., gradient...) -> (-mixed..., x . gradient, gradient . gradient).

    With direct terms, one for each hyperparameter or None where that has none, it is all that is left to do:
    (residuals..., x / scale..., gradient..., scale, direct...) -> (x..., direct - mixed..., -x . gradient, |gradient|).
    """
    graph = fx.Graph()
    copies = {node: graph.node_copy(node) for node in mixed.module.graph.nodes if node.op == "placeholder"}

    def call(target: object, arguments: tuple[object, ...], like: Tensor) -> fx.Node:
        node = graph.call_function(target, arguments)  # type: ignore[arg-type]  # an operator
        node.meta["val"] = like
        return node

    def given(name: str, tensor: Tensor) -> fx.Node:
        node = graph.placeholder(name)
        node.meta["val"] = abstract(tensor)
        return node

    unscaled = list(copies)[len(mixed.residuals) :]
    x = [copies[node] for node in unscaled]
    g = [given(f"gradient_{index}", tensor) for index, tensor in enumerate(gradient)]
    terms: list[fx.Node | None] = [None] * sum(mixed.outputs)
    if direct is not None:
        scale = given("scale", gradient[0].new_empty(()))
        terms = [None if t is None else given(f"direct_{index}", t) for index, t in enumerate(direct)]
        x = [call(aten.mul.Tensor, (node, scale), node.meta["val"]) for node in x]
        copies |= dict(zip(unscaled, x, strict=True))
    for node in mixed.module.graph.nodes:
        if node.op not in ("placeholder", "output"):
            copies[node] = graph.node_copy(node, lambda argument: copies[argument])
    (outputs,) = [
        [copies[argument] for argument in node.args[0]] for node in mixed.module.graph.find_nodes(op="output")
    ]
    negative = [call(aten.neg.default, (node,), node.meta["val"]) for node in outputs]
    figures: list[fx.Node] = []
    for left in (x, g):
        total: fx.Node | None = None
        for one, other, tensor in zip(left, g, gradient, strict=True):
            flat = abstract(tensor.new_empty(1).expand(tensor.numel()))
            parts = [call(aten.view.default, (node, [-1]), flat) for node in (one, other)]
            product = call(aten.dot.default, tuple(parts), abstract(tensor.new_empty(())))
            total = product if total is None else call(aten.add.Tensor, (total, product), product.meta["val"])
        assert total is not None
        figures.append(total)
    if direct is None:
        graph.output((*negative, *figures))
    else:
        grads = [
            node if term is None else call(aten.add.Tensor, (node, term), node.meta["val"])
            for node, term in zip(negative, terms, strict=True)
        ]
        change, square = figures
        value = change.meta["val"]
        graph.output((*x, *grads, call(aten.neg.default, (change,), value), call(aten.sqrt.default, (square,), value)))
    return graph_module(mixed.module, graph)
