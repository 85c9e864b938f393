"""The gradient graph of a loss that autograd has recorded, retained and differentiated again and again."""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from torch import Tensor

from hvp_engine.errors import GraphError, SecondDerivativeError
from hvp_engine.vectors import Layout

_NOT_DIFFERENTIABLE = re.compile(
    r"derivative for '?(?:aten::)?([\w.]+)'? is not implemented"
    r"|trying to differentiate twice a function that was marked with @(\w+)"
)
_REMEDIES = {
    "_scaled_dot_product": "run the forward under torch.nn.attention.sdpa_kernel(SDPBackend.MATH)",
    "_cudnn_rnn": "run the forward under torch.backends.cudnn.flags(enabled=False)",
    "mkldnn_rnn": "run the forward under torch.backends.mkldnn.flags(enabled=False)",
    "once_differentiable": "write its backward with differentiable operations and drop once_differentiable",
}


def second_derivative_error(operator: str) -> SecondDerivativeError:
    """The error for an operator without a second derivative, with the remedy where one is known."""
    remedy = next(
        (text for part, text in _REMEDIES.items() if part in operator),
        "replace it by an operator whose backward is differentiable, or use engine='finite_difference'",
    )
    return SecondDerivativeError(f"the loss uses {operator}, which has no second derivative; remedy: {remedy}")


def gradients(loss: Tensor, weights: Sequence[Tensor], name: str) -> list[Tensor]:
    """dL/dw with its graph, zeros for weights that the loss does not use; `GraphError` if it uses none."""
    if not loss.requires_grad:
        raise GraphError(
            f"{name}: expected a loss with an autograd graph; got a tensor that does not require grad: compute it "
            "from the weights with grad mode on, and without .detach() or .item()"
        )
    found = torch.autograd.grad(loss, weights, create_graph=True, allow_unused=True)
    if all(gradient is None for gradient in found):
        raise GraphError(
            f"{name}: expected a loss that depends on the weights; got one whose graph reaches none of the "
            f"{len(weights)} weights: pass the tensors that the forward used"
        )
    return [torch.zeros_like(w) if g is None else g for g, w in zip(found, weights, strict=True)]


class Tape:
    """The linearization that autograd's own graph is: products by `torch.autograd.grad`, graph retained.

    Arguments:
        gradient: f = dL/dw with its graph, one for each weight.
        weights: the leaves (or non-leaves) that f depends on.
        hyperparameters: what the mixed product is taken with respect to.
        loss: the loss, for reports.
    """

    def __init__(
        self,
        gradient: Sequence[Tensor],
        weights: Sequence[Tensor],
        hyperparameters: Sequence[Tensor] = (),
        loss: Tensor | None = None,
    ):
        self.layout = Layout.of(weights)
        self.loss = None if loss is None else loss.detach()
        self.gradient = [g.detach() for g in gradient]
        self.weights = tuple(weights)
        self._hyperparameters = tuple(hyperparameters)
        self._active = [index for index, g in enumerate(gradient) if g.requires_grad]
        self._outputs = tuple(gradient[index] for index in self._active)
        self._all_active = len(self._active) == len(gradient)
        self._sparse: bool | None = None
        _refuse_broken_graph(self._outputs)

    def product(self, tangents: Sequence[Tensor]) -> Sequence[Tensor]:
        """H t; a weight that f does not depend on gets zeros."""
        products = self._differentiate(self.weights, tangents, materialize=True)
        if self._sparse is None:
            self._sparse = any(product.layout != torch.strided for product in products)
        if self._sparse:
            products = tuple(p.to_dense() if p.layout != torch.strided else p for p in products)
        return products

    def mixed(self, tangents: Sequence[Tensor]) -> list[Tensor | None]:
        """(df/dlambda)^T t."""
        products = self._differentiate(self._hyperparameters, tangents, materialize=False)
        return [p.to_dense() if p is not None and p.layout != torch.strided else p for p in products]

    def _differentiate(
        self, inputs: tuple[Tensor, ...], tangents: Sequence[Tensor], materialize: bool
    ) -> tuple[Tensor, ...]:
        if not inputs:
            return ()
        if not self._outputs:  # the gradient is constant in everything
            return tuple(torch.zeros_like(t) for t in inputs) if materialize else (None,) * len(inputs)
        if not self._all_active:
            tangents = [tangents[index] for index in self._active]
        try:
            return torch.autograd.grad(
                self._outputs, inputs, tangents, retain_graph=True, allow_unused=True, materialize_grads=materialize
            )
        except RuntimeError as error:
            if match := _NOT_DIFFERENTIABLE.search(str(error)):
                raise second_derivative_error(match[1] or match[2]) from error
            raise


def _refuse_broken_graph(outputs: Sequence[Tensor]) -> None:
    """Raise where a once-differentiable function cut the graph: autograd would return zeros without a word."""
    seen: set[object] = set()
    stack = [output.grad_fn for output in outputs]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node.name() == "torch::autograd::Error":
            raise second_derivative_error("a function whose backward is marked once_differentiable")
        stack.extend(following for following, _ in node.next_functions)
