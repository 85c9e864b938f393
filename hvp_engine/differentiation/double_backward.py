"""The gradient graph of a loss that autograd has recorded, retained and differentiated again and again."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.autograd.graph import Node, get_gradient_edge

from hvp_engine._support import torch_compat
from hvp_engine._support.flat_vector import Layout
from hvp_engine.differentiation.linear_map import Linearization
from hvp_engine.errors import GraphError, SecondDerivativeError

_AS_FUNCTION = "hand over the loss as a function (hvp.Hypergradient, hvp.HessianOperator), which uses a formula for it"
_REMEDIES = {
    "_MeanLoss": "pass the hvp.DataParallel itself to hvp.Hypergradient or an operator, with hvp.Averaged inside it",
    "_scaled_dot_product": "call hvp_engine.differentiable.scaled_dot_product_attention in its place, or run the "
    "forward under torch.nn.attention.sdpa_kernel(SDPBackend.MATH)",
    "_cudnn_rnn": "run the forward under torch.backends.cudnn.flags(enabled=False)",
    "mkldnn_rnn": "run the forward under torch.backends.mkldnn.flags(enabled=False)",
    "use_reentrant": "pass use_reentrant=False to torch.utils.checkpoint",
    "sparse gradients": "make the embedding with sparse=False: products are dense anyway",
    "torch.compile": "hand the original module or function to the loss, as hvp.functional does with a compiled module",
    torch_compat.CONTROL_FLOW: "write it as a Python loop (cond: with torch.where), or use engine='finite_difference'",
    "_weight_norm": "compute the weight as v * (g / torch.norm_except_dim(v, 2, dim)), as calls with loss functions do",
    "hardsigmoid": f"{_AS_FUNCTION}, or write hardtanh(x + 3, 0.0, 6.0) / 6",
    "cdist": f"{_AS_FUNCTION}, or write (x1.unsqueeze(-2) - x2.unsqueeze(-3)).square().sum(-1).sqrt()",
    "pdist": f"{_AS_FUNCTION}, or write the norms of x[i] - x[j], with i, j = torch.triu_indices(len(x), len(x), 1)",
    "embedding_bag": f"{_AS_FUNCTION}, or sum the rows of torch.nn.functional.embedding by Tensor.index_add",
    "multi_margin_loss": f"{_AS_FUNCTION}, or write out its sum with torch.relu",
    "multilabel_margin_loss": f"{_AS_FUNCTION}, or write out its sum with torch.relu",
    "ctc_loss": f"{_AS_FUNCTION}, or write out its forward recursion with torch.logsumexp",
    "segment_reduce": "use Tensor.index_add (sums, means) or Tensor.scatter_reduce (amax, amin)",
    "sparse": "use dense tensors (Tensor.to_dense())",
    "mkldnn": "use dense tensors (Tensor.to_dense(), or the module as it was before to_mkldnn)",
    "fake_quantize_learnable": "use torch.fake_quantize_per_tensor_affine, with a scale that is not learned",
    "standard_gamma": "draw without a derivative (Distribution.sample in place of rsample)",
    "once_differentiable": "write its backward with differentiable operations and drop once_differentiable",
}


class FastKernelError(SecondDerivativeError):
    """The second derivative of a fast kernel is wrong; `plain_kernels` has the right one."""


class ThirdDerivativeError(FastKernelError):
    """The loss differentiates through kernels whose third derivative is wrong; `plain_kernels(thrice=True)` has it."""


def second_derivative_error(operator: str, kind: type[SecondDerivativeError] = SecondDerivativeError) -> Exception:
    """The error for an operator without a second derivative, with the remedy where one is known."""
    remedy = next(
        (text for part, text in _REMEDIES.items() if part in operator),
        "replace it by an operator whose backward is differentiable, or use engine='finite_difference'",
    )
    return kind(f"the loss uses {operator}, which has no second derivative; remedy: {remedy}")


@contextlib.contextmanager
def explained() -> Iterator[None]:
    """Turns autograd's error about an operator without a second derivative into ours, which names the remedy."""
    try:
        yield
    except RuntimeError as error:
        if match := torch_compat.NOT_DIFFERENTIABLE.search(str(error)):
            raise second_derivative_error(match[1] or match[2]) from error
        if torch_compat.REENTRANT in str(error):
            raise second_derivative_error(f"gradient checkpointing with {torch_compat.REENTRANT}") from error
        if torch_compat.SPARSE_AND_DENSE in str(error):
            raise second_derivative_error("sparse gradients beside dense ones", FastKernelError) from error
        if torch_compat.COMPILED.search(str(error)):
            raise second_derivative_error("a part compiled by torch.compile") from error
        raise


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

    Attributes:
        outputs: those that depend on anything.
        pattern: which of all outputs do, and which inputs are not frozen.
    """

    def __init__(self, outputs: Sequence[Tensor], inputs: Sequence[Tensor]):
        self._inputs = tuple(inputs)
        self._varying = tuple([index for index, output in enumerate(outputs) if output.requires_grad])
        self.outputs = tuple([outputs[index] for index in self._varying])
        self._active = tuple([x for x in inputs if x.requires_grad])
        self.pattern = self._varying, tuple([x.requires_grad for x in inputs])

    def __call__(self, tangents: Sequence[Tensor]) -> list[Tensor | None]:
        """The product, dense; None for an input that is frozen or that the outputs do not depend on."""
        if not self.outputs or not self._active:
            return [None] * len(self._inputs)
        cotangents = tuple([tangents[index] for index in self._varying])
        with explained():
            found: Sequence[Tensor | None] = torch_compat.backward(self.outputs, cotangents, self._active)
        if len(self._active) < len(self._inputs):
            products = iter(found)
            found = [next(products) if x.requires_grad else None for x in self._inputs]
        return [_dense(product) for product in found]


def _dense(product: Tensor | None) -> Tensor | None:
    return product if product is None or product.layout is torch.strided else product.to_dense()


def gradients(loss: Tensor, weights: Sequence[Tensor], name: str) -> list[Tensor]:
    """dL/dw with its graph, zeros for weights that the loss does not use; `GraphError` if it uses none."""
    if not loss.requires_grad:
        raise GraphError(
            f"{name}: expected a loss with an autograd graph; got a tensor that does not require grad: compute it "
            "from the weights with grad mode on, and without .detach() or .item()"
        )
    _refuse_without_second_derivative(loss)
    found = differentiate(loss, weights, create_graph=True)
    if all(gradient is None for gradient in found):
        raise GraphError(
            f"{name}: expected a loss that depends on the weights; got one whose graph reaches none of the "
            f"{len(weights)} weights: pass the tensors that the forward used"
        )
    return filled(found, weights)


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
        gradient: f = dL/dw with its graph, one for each weight.
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
        gradient: Sequence[Tensor],
        weights: Sequence[Tensor],
        hyperparameters: Sequence[Tensor] = (),
        loss: Tensor | None = None,
        name: str = "loss",
        symmetric: bool = True,
        inside: Callable[[], AbstractContextManager[None]] = contextlib.nullcontext,
    ):
        self.layout, self.symmetric, self._inside = Layout.of(weights), symmetric, inside
        self.loss = None if loss is None else loss.detach()
        self.gradient = [g.detach() for g in gradient]
        self.weights = tuple(weights)
        self.name = name
        self._graph, self._hyperparameters = tuple(gradient), tuple(hyperparameters)
        self.facts = self._examined(hyperparameters)
        self.nodes = self.facts.nodes

    @cached_property
    def _product(self) -> Pullback:
        return Pullback(self._graph, self.weights)

    @cached_property
    def _mixed(self) -> Pullback:
        return Pullback(self._graph, self._hyperparameters)

    def _examined(self, hyperparameters: Sequence[Tensor]) -> GraphFacts:
        """Walk through the graph; raise for a part whose second derivative is known to be missing or wrong."""
        nodes = _walk(self._product.outputs)
        names = {node.name(): node for node in nodes}
        for node in names.values():
            _refuse_control_flow(node)
        if torch_compat.ERROR_NODE in names:  # autograd would return zeros without a word
            raise second_derivative_error("a function whose backward is marked once_differentiable")
        reaches_weights, reaches_hyperparameters = (
            any(get_gradient_edge(tensor).node in nodes for tensor in tensors if tensor.requires_grad)
            for tensors in (self.weights, hyperparameters)
        )
        incomplete = not torch_compat.NOT_IMPLEMENTED_NODES.isdisjoint(names)
        return GraphFacts(len(nodes), reaches_weights, reaches_hyperparameters, incomplete)

    def product(self, tangents: Sequence[Tensor]) -> Sequence[Tensor]:
        """H t; a weight that f does not depend on gets zeros."""
        with self._inside():
            return filled(self._product(tangents), self.weights)

    def mixed(self, tangents: Sequence[Tensor]) -> list[Tensor | None]:
        """(df/dlambda)^T t."""
        with self._inside():
            return self._mixed(tangents)


def _walk(outputs: Sequence[Tensor]) -> set[Node]:
    """The nodes of the graph of `outputs`."""
    seen: set[Node] = set()
    stack = [get_gradient_edge(output).node for output in outputs]
    while stack:
        node = stack.pop()
        if node not in seen:
            seen.add(node)
            stack.extend(following for following, _ in node.next_functions if following is not None)
    return seen


def other_leaves(outputs: Sequence[Tensor], known: Sequence[Tensor]) -> bool:
    """Whether `outputs` depend on leaves that require grad and are none of the `known` ones."""
    leaf_nodes = {node for node in _walk(outputs) if not node.next_functions}
    return not leaf_nodes <= {get_gradient_edge(tensor).node for tensor in known if tensor.requires_grad}


def _refuse_without_second_derivative(loss: Tensor) -> None:
    """Raise for a once-differentiable function in the loss, for control flow, for fused weight normalization, and for
    normalizations that the loss differentiates.

    The gradient's graph would not show the first behind a linear reduction such as a sum, and the second derivative
    would be silently wrong, as it is for the others.
    """
    refuse_wrong_third_derivative([loss])
    for node in _walk([loss]):
        _refuse_control_flow(node)
        if node.name() == torch_compat.WEIGHT_NORM_NODE:
            raise second_derivative_error("the fused kernel of weight normalization (_weight_norm)", FastKernelError)
        if name := torch_compat.once_differentiable(node):
            raise second_derivative_error(f"{name}, whose backward is once_differentiable")


def refuse_wrong_third_derivative(values: Sequence[Tensor]) -> None:
    """Raise if the values contain first derivatives of normalizations whose second ones alone are right."""
    for node in _walk([value for value in values if value.requires_grad]):
        if name := torch_compat.WRONG_WHEN_DIFFERENTIATED.get(node.name()):
            raise ThirdDerivativeError(
                f"the loss differentiates through torch's kernel of {name}, whose third derivative, which products "
                f"then take, is wrong; remedy: {_AS_FUNCTION}, or write the normalization out with Tensor.var and mean"
            )


def _refuse_control_flow(node: Node) -> None:
    """Raise for scan, map, while_loop, cond and their like, whose second derivative is wrong."""
    if module := torch_compat.control_flow(node):
        raise second_derivative_error(module)


def leaves(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Fresh leaves that share memory with `tensors`, so that the caller's own are not touched."""
    if any(tensor.is_inference() for tensor in tensors):
        raise GraphError(
            "weights, hyperparameters: expected tensors that can require grad; got one made under "
            "torch.inference_mode: clone it outside"
        )
    return [tensor.detach().requires_grad_() for tensor in tensors]
