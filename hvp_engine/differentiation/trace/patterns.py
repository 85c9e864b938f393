"""Patterns of a traced graph and what replaces them: the language in which local rewrites are written.

A pattern is a call whose arguments are patterns again: a name captures whatever stands there, a number stands for
itself. Rules are data, in :mod:`hvp_engine.differentiation.trace.rewrites`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

aten = torch.ops.aten


@dataclass(frozen=True)
class Call:
    """A call of one of `targets` without keywords.

    Arguments:
        targets: an operation or several.
        arguments: a pattern for each positional argument: a :class:`Call`, a name to capture it by, or a value.
        alone: nothing else reads the result, so that it need not be computed once the pattern is replaced.
        name: what to capture the call itself by.
    """

    targets: Any
    arguments: tuple[Any, ...]
    alone: bool = False
    name: str = ""

    @property
    def all_targets(self) -> tuple[Any, ...]:
        return self.targets if isinstance(self.targets, tuple) else (self.targets,)

    def matches(self, node: Any, arguments: tuple[Any, ...]) -> Iterator[dict[str, Any]]:
        """What is captured in each way in which `node`, with `arguments` in this order, is such a call."""
        if node.target in self.all_targets and not node.kwargs and len(arguments) == len(self.arguments):
            yield from _captured(self.arguments, arguments)


def _captured(patterns: tuple[Any, ...], values: tuple[Any, ...]) -> Iterator[dict[str, Any]]:
    if not patterns:
        yield {}
        return
    for first in _matches(patterns[0], values[0]):
        for others in _captured(patterns[1:], values[1:]):
            yield first | others


def _matches(pattern: Any, value: Any) -> Iterator[dict[str, Any]]:
    if isinstance(pattern, str):
        yield {pattern: value}
    elif not isinstance(pattern, Call):
        if not isinstance(value, fx.Node) and value == pattern:
            yield {}
    elif isinstance(value, fx.Node) and (not pattern.alone or _reads(value) == 1):
        for arguments in _orders(value):
            for found in pattern.matches(value, arguments):
                yield found | {pattern.name: value} if pattern.name else found


def _orders(node: fx.Node) -> tuple[tuple[Any, ...], ...]:
    """The arguments of `node`, and, where the operation is commutative, these the other way round."""
    flips = node.target in _COMMUTATIVE and len(node.args) == 2
    return (node.args, node.args[::-1]) if flips else (node.args,)


_COMMUTATIVE = (aten.add.Tensor, aten.mul.Tensor)


@dataclass(frozen=True)
class Rule:
    """Replaces what matches `pattern`.

    Arguments:
        example: before -> after, for the reader.
        pattern: the call to be replaced; what commutes is tried in both orders.
        replacement: (builder, node, what was captured...) -> the node that stands for the old one from now on.
        guard: (builder, node, what was captured...) -> whether the rule applies.
    """

    example: str
    pattern: Call
    replacement: Callable[..., fx.Node]
    guard: Callable[..., bool] = lambda build, node, **captured: True


class Builder:
    """Makes nodes, and keeps account of which depend on the tangents."""

    def __init__(self, graph: fx.Graph, linear: set[fx.Node]):
        self.graph, self.linear = graph, linear
        self.made: list[fx.Node] = []

    def __call__(self, target: Any, arguments: tuple[Any, ...], value: Any, **keywords: Any) -> fx.Node:
        """A call whose result is like `value`."""
        node = self.graph.call_function(target, arguments, keywords)
        node.meta["val"] = value
        if any(argument in self.linear for argument in node.all_input_nodes):
            self.linear.add(node)
        self.made.append(node)
        return node

    def filled(self, like: Tensor, value: Any) -> fx.Node:
        """A tensor of the shape, dtype and device of `like`, filled with a number."""
        return self(aten.full.default, (tuple(like.shape), value), like, dtype=like.dtype, device=like.device)

    def t(self, node: fx.Node) -> fx.Node:
        """A matrix transposed."""
        return self(aten.t.default, (node,), node.meta["val"].t())

    def transposed(self, node: fx.Node) -> fx.Node:
        """The matrices of a batch transposed."""
        return self(aten.transpose.int, (node, 1, 2), node.meta["val"].transpose(1, 2))


def replace(graph: fx.Graph, linear: set[fx.Node], rules: Sequence[Rule], only_linear: bool = True) -> None:
    """Apply the first rule that fits to each node in turn, and to what it is replaced by.

    `only_linear`: to nodes that depend on the tangents, and to what replaces those.
    """
    erased: set[fx.Node] = set()
    targets = {target for rule in rules for target in rule.pattern.all_targets}
    for start in list(graph.nodes):
        waiting = [start] if start in linear or not only_linear else []
        while waiting:
            node = waiting.pop()
            if node in erased or node.target not in targets:
                continue
            new = _replacement(graph, linear, rules, node)
            if new is None:
                continue
            node.replace_all_uses_with(new[-1])
            _erase(graph, node, erased)
            waiting += reversed(new)


def _replacement(graph: fx.Graph, linear: set[fx.Node], rules: Sequence[Rule], node: fx.Node) -> list[fx.Node] | None:
    """What was made to replace `node`, the node that stands for it last; None if no rule applies."""
    builder = Builder(graph, linear)
    for arguments in _orders(node):
        for rule in rules:
            for found in rule.pattern.matches(node, arguments):
                if rule.guard(builder, node, **found):
                    with graph.inserting_before(node):
                        result = rule.replacement(builder, node, **found)
                    return [*(new for new in builder.made if new is not result), result]
    return None


def _erase(graph: fx.Graph, node: fx.Node, erased: set[fx.Node]) -> None:
    """Erase a node that nobody reads, with what nobody else reads below it."""
    inputs = node.all_input_nodes
    graph.erase_node(node)
    erased.add(node)
    for below in inputs:
        if not below.users and below.op == "call_function" and below not in erased:
            _erase(graph, below, erased)


def _reads(node: fx.Node) -> int:
    """How often the node's result is read: x + x reads x twice."""
    return sum(argument is node for user in node.users for argument in _flat((user.args, user.kwargs)))


def _flat(value: Any) -> list[Any]:
    if isinstance(value, (tuple, list)):
        return [leaf for item in value for leaf in _flat(item)]
    return [leaf for item in value.values() for leaf in _flat(item)] if isinstance(value, dict) else [value]


def alike(a: Any, b: fx.Node) -> bool:
    """Whether `a` is a node of the same shape and dtype as `b`."""
    x, y = _value(a), _value(b)
    tensors = isinstance(x, Tensor) and isinstance(y, Tensor)
    return tensors and x.shape == y.shape and x.dtype == y.dtype


def same_layout(a: Any, b: fx.Node) -> bool:
    """Whether two nodes have the same shape, dtype and strides."""
    return alike(a, b) and a.meta["val"].stride() == b.meta["val"].stride()


def same_dtype(a: Any, b: fx.Node) -> bool:
    x, y = _value(a), _value(b)
    return x is not None and y is not None and x.dtype == y.dtype


def is_number(value: Any, number: float) -> bool:
    """Whether a node or number is `number` everywhere."""
    if isinstance(value, fx.Node) and value.target is aten.full.default:
        value = value.args[1]
    return isinstance(value, (int, float)) and value == number


def _value(node: Any) -> Any:
    return node.meta.get("val") if isinstance(node, fx.Node) else None


def is_transposed(node: Any) -> bool:
    """Whether the node transposes the matrices of a batch."""
    return node.target is aten.transpose.int and {dimension % 3 for dimension in node.args[1:]} == {1, 2}


def result_bytes(node: fx.Node) -> int:
    """The size in bytes of the tensor that a node makes."""
    value = _value(node)
    return value.numel() * value.element_size() if isinstance(value, Tensor) else 0
