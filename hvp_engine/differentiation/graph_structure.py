"""The structure of an autograd graph: its nodes and edges, read without running anything.

It is quick to read, and decides what a graph can do: whether it reaches the weights, and whether each of its parts
has a second derivative. What the nodes hold is read in :mod:`hvp_engine.differentiation.recorded.graph_contents`.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from itertools import count
from sys import intern
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from hvp_engine._support.torch_compat_nodes import NodeFields, fields_of

try:
    from hvp_engine.ops.cpp import _C
except ImportError:
    _C = None  # type: ignore[assignment]


class HiddenContentsError(Exception):
    """Some node does not show what it holds; the message says which."""


class NodeReader(NamedTuple):
    """How to read the nodes of one class.

    Attributes:
        number: of the class.
        hidden: why they cannot be read; empty if they can.
        tensors: names of saved tensors, as they are and before unpacking.
        plain: names of other values.
        leaf: whether they accumulate the gradient of a leaf.
        of_several: whether they have saved no size of constants among what they put together.
    """

    number: int
    hidden: str = ""
    tensors: tuple[tuple[str, str], ...] = ()
    plain: tuple[str, ...] = ()
    leaf: bool = False
    of_several: bool = False


_READERS: dict[type, NodeReader] = {}

_READER_NUMBERS = count()


def _reader_of(node: Any) -> NodeReader:
    """The reader for nodes like this one, which is a class's first."""
    fields: NodeFields | str = fields_of(node)
    number = next(_READER_NUMBERS)
    if isinstance(fields, str):
        reader = NodeReader(number, hidden=fields)
    else:
        tensors = tuple((intern(name), intern(f"_raw_{name.lstrip('_')}")) for name in fields.tensors)
        kind = type(node).__name__
        reader = NodeReader(number, "", tensors, fields.plain, kind == "AccumulateGrad", kind == "CatBackward0")
    # One for good: the extension's graphs point into it, so that a thread that comes second must not replace it.
    return _READERS.setdefault(type(node), reader)


def walk(outputs: Sequence[Tensor], inputs: Sequence[Tensor] = ()) -> Graph:
    """The graph from `outputs` back to `inputs`; :class:`HiddenContentsError` where a node hides what it holds.

    Cost: some 0.2 us for each node; without the extension 2.
    """
    roots = [_edge(output) for output in outputs]
    edges = [None if x.is_leaf else _edge(x) for x in inputs]
    found = _walk(roots, list(inputs), edges, _READERS, _reader_of)
    if isinstance(found, str):
        raise HiddenContentsError(found)
    return found


def _edge(tensor: Tensor) -> tuple[Any, int]:
    """The node that computes the tensor's gradient, and which of its inputs that is."""
    if tensor.grad_fn is not None:
        return tensor.grad_fn, tensor.output_nr
    edge = get_gradient_edge(tensor)
    return edge.node, edge.output_nr


class WalkedGraph:
    """A graph that has been walked through; every node is of a class that shows what it holds.

    Attributes:
        structure: which nodes the outputs and inputs are at, and of each node its class and what follows.
        inputs: of the walk.
        nodes: in the order in which they were met; with the readers of their classes, and what follows.
    """

    def __init__(
        self,
        inputs: Sequence[Tensor],
        nodes: list[Any],
        readers: list[NodeReader],
        following: list[list[tuple[int, int]]],
        structure: list[int],
    ):
        self.inputs, self.nodes, self.readers, self.following = inputs, nodes, readers, following
        self.structure = array("q", structure).tobytes()


if TYPE_CHECKING:
    from hvp_engine._C import Graph as ExtensionGraph
Graph: TypeAlias = "WalkedGraph | ExtensionGraph"


def walk_by_python(
    roots: Sequence[tuple[Any, int]],
    inputs: Sequence[Tensor],
    edges: Sequence[tuple[Any, int] | None],
    readers: dict[type, NodeReader],
    reader_of: Callable[[Any], NodeReader],
) -> WalkedGraph | str:
    """What `_C.walk_graph` does too: the graph, or which class of nodes hides what it holds.

    Arguments:
        roots: edges to the outputs.
        inputs, edges: leaves, with None for their edges, and other tensors, with theirs.
        readers, reader_of: by class of nodes, and what makes one that is missing.
    """
    nodes: list[Any] = []
    kinds: list[NodeReader] = []
    index: dict[Any, int] = {None: -1}
    after: list[Any] = []
    leaves: dict[int, int] = {}
    stack = [node for node, _ in reversed(roots)]
    while stack:
        node = stack.pop()
        if node in index:
            continue
        index[node] = len(nodes)
        reader = readers.get(type(node)) or reader_of(node)
        if reader.hidden:
            return reader.hidden
        if reader.leaf:
            leaves[id(node.variable)] = len(nodes)
        nodes.append(node)
        kinds.append(reader)
        after.append(node.next_functions)
        stack += [one for one, _ in after[-1] if one not in index]
    structure: list[int] = []
    for node, number in roots:
        structure += index[node], number
    for x, edge in zip(inputs, edges, strict=True):
        structure += (leaves.get(id(x), -1), 0) if edge is None else (index.get(edge[0], -1), edge[1])
    following = [[(index[one], number) for one, number in ones] for ones in after]
    for reader, ones in zip(kinds, following, strict=True):
        structure += reader.number, len(ones)
        for edge in ones:
            structure += edge
    return WalkedGraph(inputs, nodes, kinds, following, structure)


_walk: Callable[..., Graph | str] = walk_by_python if _C is None else _C.walk_graph
