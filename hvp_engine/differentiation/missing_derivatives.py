"""What has no or a wrong second derivative: found in the graph of a loss or reported by autograd, with the remedy."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence

from torch import Tensor
from torch.autograd.graph import Node, get_gradient_edge

from hvp_engine._support import torch_compat, torch_compat_nodes
from hvp_engine.differentiation.graph_structure import HiddenContentsError, walk
from hvp_engine.errors import SecondDerivativeError

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
    torch_compat_nodes.CONTROL_FLOW: (
        "write it as a Python loop (cond: with torch.where), or use engine='finite_difference'"
    ),
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


def nodes_of(outputs: Sequence[Tensor]) -> set[Node]:
    """The nodes of the graph of `outputs`."""
    seen: set[Node] = set()
    stack = [get_gradient_edge(output).node for output in outputs]
    while stack:
        node = stack.pop()
        if node not in seen:
            seen.add(node)
            stack.extend(following for following, _ in node.next_functions if following is not None)
    return seen


def nodes_between(outputs: Sequence[Tensor], inputs: Sequence[Tensor]) -> set[Node]:
    """The nodes through which `outputs` depend on `inputs`."""
    users: dict[Node, list[Node]] = {}
    for node in nodes_of(outputs):
        for following, _ in node.next_functions:
            if following is not None:
                users.setdefault(following, []).append(node)
    found: set[Node] = set()
    stack = [get_gradient_edge(tensor).node for tensor in inputs if tensor.requires_grad]
    while stack:
        fresh = [user for user in users.get(stack.pop(), ()) if user not in found]
        found.update(fresh)
        stack += fresh
    return found


def other_leaves(outputs: Sequence[Tensor], known: Sequence[Tensor]) -> bool:
    """Whether `outputs` depend on leaves that require grad and are none of the `known` ones."""
    leaf_nodes = {node for node in nodes_of(outputs) if not node.next_functions}
    return not leaf_nodes <= {get_gradient_edge(tensor).node for tensor in known if tensor.requires_grad}


def refuse_without_second_derivative(loss: Tensor, weights: Sequence[Tensor]) -> None:
    """Raise for a once-differentiable function in the loss, for control flow, for fused weight normalization, and for
    normalizations that the loss differentiates, if the weights are behind them.

    The gradient's graph would not show the first behind a linear reduction such as a sum, and the second derivative
    would be silently wrong, as it is for the others. What only hyperparameters are behind, as a network that makes
    targets or weighs losses, is differentiated once. All of that is decided by the classes of the nodes, where they
    show what they hold, so a loss of a structure that has passed passes.
    """
    try:
        structure = walk([loss], weights).structure
    except HiddenContentsError:
        structure = None
    if structure in _PASSED:
        return
    nodes = nodes_between([loss], weights)
    refuse_wrong_third_derivative(nodes)
    for node in nodes:
        refuse_control_flow(node)
        refuse_weight_norm(node)
        if name := torch_compat_nodes.once_differentiable(node):
            raise second_derivative_error(f"{name}, whose backward is once_differentiable")
    if structure is not None:
        if len(_PASSED) >= _MOST_PASSED:
            _PASSED.clear()
        _PASSED.add(structure)


_MOST_PASSED = 1024
_PASSED: set[bytes | None] = set()
"""Structures of losses and their weights: all parts between them have second derivatives."""


def refuse_wrong_third_derivative(nodes: Iterable[Node]) -> None:
    """Raise if some of the nodes are first derivatives of normalizations whose second ones alone are right."""
    for node in nodes:
        if name := torch_compat_nodes.WRONG_WHEN_DIFFERENTIATED.get(node.name()):
            raise ThirdDerivativeError(
                f"the loss differentiates through torch's kernel of {name}, whose third derivative, which products "
                f"then take, is wrong; remedy: {_AS_FUNCTION}, or write the normalization out with Tensor.var and mean"
            )


def refuse_control_flow(node: Node) -> None:
    """Raise for scan, map, while_loop, cond and their like, whose second derivative is wrong."""
    if module := torch_compat_nodes.control_flow(node):
        raise second_derivative_error(module)


def refuse_weight_norm(node: Node) -> None:
    """Raise for fused weight normalization, whose second derivative is wrong."""
    if node.name() == torch_compat_nodes.WEIGHT_NORM_NODE:
        raise second_derivative_error("the fused kernel of weight normalization (_weight_norm)", FastKernelError)
