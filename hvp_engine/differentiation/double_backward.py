"""The gradient graph of a loss that autograd has recorded, retained and differentiated again and again."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from hvp_engine._support import torch_compat, torch_compat_nodes
from hvp_engine._support.flat_vector import Layout, joined, split_like
from hvp_engine.differentiation.linear_map import Linearization
from hvp_engine.differentiation.missing_derivatives import (
    explained,
    nodes_between,
    nodes_of,
    refuse_control_flow,
    refuse_weight_norm,
    refuse_without_second_derivative,
    second_derivative_error,
)
from hvp_engine.errors import GraphError


def differentiate(
    outputs: Tensor | Sequence[Tensor],
    inputs: Sequence[Tensor],
    tangents: Sequence[Tensor] | None = None,
    *,
    retain_graph: bool = True,
    create_graph: bool = False,
) -> list[Tensor | None]:
    """The vector-Jacobian product, dense; None for an input that is frozen or that `outputs` do not depend on."""
    active = [tensor for tensor in inputs if tensor.requires_grad]
    if not active:
        return [None] * len(inputs)
    with explained():
        products = torch.autograd.grad(
            outputs, active, tangents, retain_graph=retain_graph, create_graph=create_graph, allow_unused=True
        )
    found = iter(products)
    return [_dense(next(found)) if tensor.requires_grad else None for tensor in inputs]


def filled(products: Sequence[Tensor | None], inputs: Sequence[Tensor]) -> list[Tensor]:
    """`products` with zeros like the inputs for None."""
    return [torch.zeros_like(x) if p is None else p for p, x in zip(products, inputs, strict=True)]


class Pullback:
    """t -> (d outputs / d inputs)^T t, with everything that does not depend on t prepared once.

    `torch.autograd.grad` checks its arguments at every call, which takes 60 us, a fifth of a product of a small model.
    So products go to the autograd engine directly.

    Arguments:
        outputs: the tensors, or one vector with the elements of all; its t is a list all the same.

    Attributes:
        outputs: those that depend on anything.
        active: the inputs that are not frozen.
        whole: whether those are all.
        pattern: which of all outputs do, and which inputs are not frozen; whether the outputs are one vector.
    """

    def __init__(self, outputs: Sequence[Tensor] | Tensor, inputs: Sequence[Tensor]):
        self._flat = isinstance(outputs, Tensor)
        outputs = [outputs] if isinstance(outputs, Tensor) else outputs
        self._inputs = tuple(inputs)
        self._varying = tuple([index for index, output in enumerate(outputs) if output.requires_grad])
        self.outputs = tuple([outputs[index] for index in self._varying])
        free = tuple([x.requires_grad for x in inputs])
        all_free = False not in free
        self.active = self._inputs if all_free else tuple([x for x in inputs if x.requires_grad])
        self.whole = all_free and len(self.outputs) == len(outputs)
        self.pattern = self._varying, free, self._flat

    def __call__(self, tangents: Sequence[Tensor]) -> list[Tensor | None]:
        """The product, dense; None for an input that is frozen or that the outputs do not depend on."""
        if not self.outputs or not self.active:
            return [None] * len(self._inputs)
        if self._flat:
            with torch_compat.without_torch_functions():  # which look out for Python code of the caller's
                cotangents: tuple[Tensor, ...] = (joined(tangents),)
        else:
            cotangents = tuple([tangents[index] for index in self._varying])
        with explained():
            found = torch_compat.backward(self.outputs, cotangents, self.active)
        if len(self.active) < len(self._inputs):
            products = iter(found)
            found = [next(products) if x.requires_grad else None for x in self._inputs]
        return [_dense(product) for product in found]

    def copies(self, tangents: Sequence[Tensor]) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Copies of the tangents, and the cotangents that consist of their memory."""
        if not self._flat:
            copies = tuple([tangent.clone() for tangent in tangents])
            return copies, copies
        vector = joined(tangents)
        return tuple(split_like(vector, tangents)), (vector,)

    def at(self, cotangents: tuple[Tensor, ...]) -> Callable[[], Sequence[Tensor | None]]:
        """The product, as autograd gives it, of what the cotangents are at each call, where the map is `whole`."""
        return torch_compat.backward_at(self.outputs, cotangents, self.active)

    def rows_at(self, cotangents: tuple[Tensor, ...]) -> Callable[[], Sequence[Tensor]]:
        """The same, dense and row after row, whatever layout autograd gives it."""
        product = self.at(cotangents)

        def rows() -> list[Tensor]:
            return [part.contiguous() for part in filled([_dense(part) for part in product()], self.active)]

        return rows


def _dense(product: Tensor | None) -> Tensor | None:
    return product if product is None or product.layout is torch.strided else product.to_dense()


def gradients(loss: Tensor, weights: Sequence[Tensor], name: str) -> list[Tensor]:
    """dL/dw with its graph, zeros for weights that the loss does not use; `GraphError` if it uses none."""
    if not loss.requires_grad:
        raise GraphError(
            f"{name}: expected a loss with an autograd graph; got a tensor that does not require grad: compute it "
            "from the weights with grad mode on, and without .detach() or .item()"
        )
    refuse_without_second_derivative(loss, weights)
    found = differentiate(loss, weights, create_graph=True)
    check_reached(found, name)
    return filled(found, weights)


def check_reached(found: Sequence[Tensor | None], name: str) -> None:
    """`GraphError` where the derivatives by all weights are None."""
    if all(gradient is None for gradient in found):
        raise GraphError(
            f"{name}: expected a loss that depends on the weights; got one whose graph reaches none of the "
            f"{len(found)} weights: pass the tensors that the forward used, or, in a loss function, use the weights "
            "that it is given (hvp.functional does with a module, which has its own)"
        )


Made = TypeVar("Made")


@dataclass(frozen=True)
class GraphFacts:
    """What a walk through a gradient's graph finds.

    Attributes:
        nodes: how many there are.
        reaches_weights, reaches_hyperparameters: whether the gradient depends on some; if on no weight, the Hessian is
            zero.
        incomplete: whether some kernel of the forward has no second derivative; a product through it raises.
    """

    nodes: int
    reaches_weights: bool
    reaches_hyperparameters: bool
    incomplete: bool


class Tape(Linearization):
    """The linearization that autograd's own graph is: products by `torch.autograd.grad`, graph retained.

    Arguments:
        gradient: f = dL/dw with its graph, one for each weight; or one vector with the elements of all.
        weights: the leaves (or non-leaves) that f depends on; a frozen one gets zeros.
        hyperparameters: what the mixed product is taken with respect to.
        loss: the loss, for reports.
        name: what messages call the loss or the gradient.
        symmetric: whether df/dw is, as where f is a gradient.
        inside: makes the context that products run in: what a checkpointed part computes again in the backward pass
            must be computed as it was in the forward pass.

    Attributes:
        facts: what its graph is like.
    """

    def __init__(
        self,
        gradient: Sequence[Tensor] | Tensor,
        weights: Sequence[Tensor],
        hyperparameters: Sequence[Tensor] = (),
        loss: Tensor | None = None,
        name: str = "loss",
        symmetric: bool = True,
        inside: Callable[[], AbstractContextManager[None]] = contextlib.nullcontext,
    ):
        self.symmetric, self._inside = symmetric, inside
        self.loss = None if loss is None else loss.detach()
        self.weights = tuple(weights)
        self.name = name
        self._graph = gradient if isinstance(gradient, Tensor) else tuple(gradient)
        self._hyperparameters = tuple(hyperparameters)
        self.facts = self._examined(hyperparameters)
        self.nodes = self.facts.nodes

    @cached_property
    def layout(self) -> Layout:  # type: ignore[override]  # made where it is asked for
        return Layout.of(self.weights)

    @cached_property
    def gradient(self) -> Sequence[Tensor]:  # type: ignore[override]  # likewise
        graph = split_like(self._graph, self.weights) if isinstance(self._graph, Tensor) else self._graph
        return [g.detach() for g in graph]

    @cached_property
    def _product(self) -> Pullback:
        return Pullback(self._graph, self.weights)

    @cached_property
    def _mixed(self) -> Pullback:
        return Pullback(self._graph, self._hyperparameters)

    def _examined(self, hyperparameters: Sequence[Tensor]) -> GraphFacts:
        """Walk through the graph; raise for a part whose second derivative is known to be missing or wrong."""
        nodes = nodes_of(self._product.outputs)
        names = {node.name(): node for node in nodes}
        for node in names.values():
            refuse_control_flow(node)
        if torch_compat_nodes.ERROR_NODE in names:  # autograd would return zeros without a word
            raise second_derivative_error("a function whose backward is marked once_differentiable")
        if self.symmetric and torch_compat_nodes.WEIGHT_NORM_NODE in names:  # of a gradient, a second derivative
            for node in nodes_between(self._product.outputs, self.weights):
                refuse_weight_norm(node)
        reaches_weights, reaches_hyperparameters = (
            any(get_gradient_edge(tensor).node in nodes for tensor in tensors if tensor.requires_grad)
            for tensors in (self.weights, hyperparameters)
        )
        incomplete = not torch_compat_nodes.NOT_IMPLEMENTED_NODES.isdisjoint(names)
        return GraphFacts(len(nodes), reaches_weights, reaches_hyperparameters, incomplete)

    def plainly(self, count: int, work: Callable[[Pullback], Made]) -> Made | None:
        """What `work` makes by so many plain products; None if those are made otherwise, or in a context."""
        return work(self._product) if self._product.whole and self._inside is contextlib.nullcontext else None

    def solved(self, seconds: float) -> None:
        """A general solve has taken so long, from its call on."""

    def product(self, tangents: Sequence[Tensor]) -> Sequence[Tensor]:
        """H t; a weight that f does not depend on gets zeros."""
        with self._inside():
            return filled(self._product(tangents), self.weights)

    def mixed(self, tangents: Sequence[Tensor]) -> list[Tensor | None]:
        """(df/dlambda)^T t."""
        with self._inside():
            return self._mixed(tangents)


def leaves(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Fresh leaves that share memory with `tensors`, so that the caller's own are not touched."""
    if any(tensor.is_inference() for tensor in tensors):
        raise GraphError(
            "weights, hyperparameters: expected tensors that can require grad; got one made under "
            "torch.inference_mode: clone it outside"
        )
    return [tensor.detach().requires_grad_() for tensor in tensors]
