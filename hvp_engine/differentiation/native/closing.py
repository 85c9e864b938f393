"""The graph of what follows a solve: negative mixed products, and two inner products with the gradient."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, fx

from hvp_engine._support.torch_compat import FakeMode, fake_like
from hvp_engine.differentiation.trace.partial_evaluation import Part

aten = torch.ops.aten


def closing_graph(mixed: Part, gradient: Sequence[Tensor]) -> fx.GraphModule:
    """(residuals..., x..., gradient...) -> (-mixed..., x . gradient, gradient . gradient)."""
    graph, mode = fx.Graph(), FakeMode()
    copies: dict[fx.Node, fx.Node] = {}
    outputs: list[fx.Node] = []
    for node in mixed.module.graph.nodes:
        if node.op == "output":
            outputs = [copies[argument] for argument in node.args[0]]
        else:
            copies[node] = graph.node_copy(node, lambda argument: copies[argument])
    x = [node for node in copies.values() if node.op == "placeholder"][len(mixed.residuals) :]

    def call(target: object, arguments: tuple[object, ...], like: Tensor) -> fx.Node:
        node = graph.call_function(target, arguments)  # type: ignore[arg-type]  # an operator
        node.meta["val"] = like
        return node

    with graph.inserting_after(x[-1]):
        g = [graph.placeholder(f"gradient_{index}") for index in reversed(range(len(gradient)))][::-1]
    for node, tensor in zip(g, gradient, strict=True):
        node.meta["val"] = fake_like(mode, tensor)
    negative = [call(aten.neg.default, (node,), node.meta["val"]) for node in outputs]
    figures = []
    for left in (x, g):
        total: fx.Node | None = None
        for one, other, tensor in zip(left, g, gradient, strict=True):
            flat = fake_like(mode, tensor.new_empty(1).expand(tensor.numel()))
            parts = [call(aten.view.default, (node, [-1]), flat) for node in (one, other)]
            product = call(aten.dot.default, tuple(parts), fake_like(mode, tensor.new_empty(())))
            total = product if total is None else call(aten.add.Tensor, (total, product), product.meta["val"])
        figures.append(total)
    graph.output((*negative, *figures))
    return fx.GraphModule(mixed.module, graph)
