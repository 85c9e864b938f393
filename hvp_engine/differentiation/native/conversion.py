"""Converts a traced graph of known tensors and tangents into operations of the extension."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from hvp_engine.differentiation.native.builder import Builder, Kind
from hvp_engine.differentiation.native.expressions import Expression, Operand
from hvp_engine.differentiation.native.operations import Code, Operation, UnsupportedError
from hvp_engine.differentiation.native.places import Place
from hvp_engine.differentiation.trace.rewriting import dependents

aten = torch.ops.aten

_PRODUCTS = (aten.mm.default, aten.addmm.default, aten.bmm.default, aten.baddbmm.default)
"""Operators whose result nothing else shows: they are no views."""

Value = Operand | tuple[Any, ...]
Handler = Callable[["Conversion", fx.Node], Value]

HANDLERS: dict[Any, Handler] = {}
"""How each operator is made, by the operator; the modules of this package that have handlers fill it."""

EVERY_TERM: set[Any] = set()
"""Operators that cost next to nothing where they are part of a chain, so that their known results are not held."""


def handles(*targets: Any, every_term: bool = False) -> Callable[[Handler], Handler]:
    """Registers a handler for operators."""

    def register(handler: Handler) -> Handler:
        HANDLERS.update(dict.fromkeys(targets, handler))
        if every_term:
            EVERY_TERM.update(targets)
        return handler

    return register


class Conversion:
    """The operations of one graph, whose placeholders are known tensors and then tangents. The products of nodes in
    `given` are there already, and the operands of these are not computed.

    What does not depend on tangents is computed once by PyTorch, unless it is elementwise and large.
    """

    def __init__(
        self,
        module: fx.GraphModule,
        known: Sequence[Place],
        builder: Builder,
        given: Mapping[fx.Node, Place] | None = None,
    ):
        self.builder, given = builder, given or {}
        if any(node.meta.get("val", node) is None for node in module.graph.nodes):
            raise UnsupportedError("sparse tensors")
        inputs = [node for node in module.graph.nodes if node.op == "placeholder"]
        moving = inputs[len(known) :]
        self.tangents = [self._tangent(node) for node in moving]
        self._slots: dict[fx.Node, Place] = dict(zip(inputs, known, strict=False))  # of known nodes
        self._values: dict[fx.Node, Value] = {**self._slots, **dict(zip(moving, self.tangents, strict=True))}
        self._moving = dependents(module.graph, set(moving))
        self.outputs: list[Place] = []
        self.summands: dict[Place, Operation] = {}  # by their results: what a sum may be made with
        self._gain = 0.0
        for node in module.graph.nodes:
            if node.op == "output":
                self.outputs = [self._output(argument) for argument in node.args[0]]
            elif node in given:
                self._values[node] = self._onto(node, given[node])
            elif node.op == "call_function":
                try:
                    self._values[node] = self._convert(node)
                except UnsupportedError as error:
                    error.target = node.target
                    raise
            elif node.op != "placeholder":
                self._values[node] = self._other(node)
        if self._gain < 0:
            raise UnsupportedError("convolutions that are as fast as PyTorch's")

    # What handlers ask for.

    def weigh(self, work: int, relative_time: float) -> None:
        """Count work that takes so much of PyTorch's time: all together should take less than that."""
        self._gain += work * (1 - relative_time)

    def shape(self, node: fx.Node) -> tuple[int, ...]:
        return tuple(node.meta["val"].shape)

    def moves(self, argument: Any) -> bool:
        """Whether an argument depends on tangents."""
        return isinstance(argument, fx.Node) and argument in self._moving

    def operand(self, argument: Any, user: fx.Node) -> Operand:
        """An argument of an elementwise operation: unstored if nothing else reads it."""
        value = self._single(argument)
        if isinstance(value, Expression) and (len(argument.users) > 1 or value.sizes != self.shape(user)):
            return self.place(argument)
        if isinstance(value, Place) and value.region.known and argument.meta["val"].dtype != self.builder.dtype:
            return self.as_numbers(argument)
        return value

    def place(self, argument: fx.Node) -> Place:
        """An argument in memory."""
        value = self._single(argument)
        stored = self._values[argument] = self.builder.stored(value)
        if stored.region.known and argument.meta["val"].dtype != self.builder.dtype:
            return self.as_numbers(argument)
        return stored

    def contiguous(self, argument: fx.Node) -> Place:
        """An argument in memory, row after row; a known one is laid out so once."""
        place = self.place(argument)
        if place.is_row_major():
            return place
        if place.region.known:
            return self.derive(place.sizes, lambda tensor: tensor, [argument])
        return self.builder.copied(place)

    def value(self, argument: fx.Node) -> Value:
        """What an argument has become, stored or not."""
        return self._values[argument]

    def _single(self, argument: fx.Node) -> Operand:
        value = self._values[argument]
        if isinstance(value, tuple):
            raise UnsupportedError(f"several results where one is expected, at {argument}")
        return value

    def owned(self, argument: fx.Node) -> Operand:
        """An argument that its only user may overwrite where it is in the workspace; otherwise a value to be copied."""
        value = self._values[argument]
        if len(argument.users) == 1 and isinstance(value, Expression):
            return value
        place = self.place(argument)
        fresh = place.region.slot is None and len(argument.users) == 1 and argument.target in _PRODUCTS
        return place if fresh else self.copy_of(argument)

    def copy_of(self, argument: fx.Node) -> Expression:
        """An argument's value, to be stored elsewhere."""
        place = self.place(argument)
        return self.builder.combined(Code.SCALE, [place], place.sizes, 1.0)

    def part(self, argument: fx.Node, index: int) -> Value:
        value = self._values[argument]
        if not isinstance(value, tuple):
            raise UnsupportedError(f"one result where several are expected, at {argument}")
        return value[index]

    def as_numbers(self, argument: fx.Node) -> Place:
        """A known argument of any type as a floating tensor."""
        dtype = self.builder.dtype
        return self.derive(self.shape(argument), lambda tensor: tensor.to(dtype), [argument])

    def exponential(self, argument: fx.Node) -> Operand:
        """e to the power of a known argument."""
        same, build = argument.meta["val"].dtype == self.builder.dtype, self.builder
        source = self._tensor(argument) if same else self.as_numbers(argument)
        return build.prepare(
            source.sizes,
            lambda into: build.chain([(build.combined(Code.EXPONENTIAL, [source], source.sizes), into)]),
        )

    def derive(
        self,
        sizes: Sequence[int],
        compute: Callable[..., Tensor],
        arguments: Sequence[fx.Node],
        kind: Kind = Kind.NUMBERS,
    ) -> Place:
        """A tensor computed once from known arguments."""
        return self.builder.derive(sizes, compute, [self._tensor(argument) for argument in arguments], kind)

    def indices(self, argument: fx.Node) -> Place:
        """A known tensor of indices, flat."""
        count = argument.meta["val"].numel()
        return self.derive((count,), lambda tensor: tensor.reshape(-1).to(torch.int64), [argument], Kind.INDEX)

    # How values are made.

    def _other(self, node: fx.Node) -> Value:
        """A node that is neither an input nor a call."""
        raise UnsupportedError(f"a node of kind {node.op}")

    def _tangent(self, node: fx.Node) -> Place:
        value = node.meta["val"]
        if value.dtype != self.builder.dtype or value.device.type != "cpu":
            raise UnsupportedError(f"a weight of {value.dtype} on {value.device}")
        if any(stride == 0 for stride, size in zip(value.stride(), value.shape, strict=True) if size > 1):
            raise UnsupportedError("a weight whose elements overlap")
        return self.builder.slot(value.shape, value.stride(), tangent=True)

    def _output(self, argument: Any) -> Place:
        """A result, apart from the tangents, which are overwritten before it is read."""
        place = self.place(argument)
        if place.region.tangent:
            place = self.builder.copied(place)
        return place

    def _onto(self, node: fx.Node, product: Place) -> Value:
        """A matrix product, which is given, with the summand of the node, if it has one."""
        if node.target is aten.mm.default:
            return product
        return self.builder.combined(Code.ADD, [product, self.operand(node.args[0], node)], product.sizes)

    def _convert(self, node: fx.Node) -> Value:
        if node not in self._moving:
            return self._known(node)
        handler = HANDLERS.get(node.target)
        if handler is None:
            raise UnsupportedError(f"operator {node.target}")
        value = node.meta.get("val")
        for result in value if isinstance(value, (tuple, list)) else [value]:
            if isinstance(result, Tensor) and result.dtype != self.builder.dtype:
                raise UnsupportedError(f"{node.target} in {result.dtype} beside {self.builder.dtype}")
        return handler(self, node)

    def _known(self, node: fx.Node) -> Value:
        """What no tangent enters: elementwise chains and views in every term, all else once."""
        value, handler = node.meta["val"], HANDLERS.get(node.target)
        plain = isinstance(value, Tensor) and value.dtype == self.builder.dtype
        if plain and handler is not None and node.target in EVERY_TERM:
            return handler(self, node)
        if isinstance(value, (tuple, list)):
            return ()  # its results are computed where they are read
        return self._tensor(node)

    def _tensor(self, node: fx.Node) -> Place:
        """A known node as a whole slot, computed by PyTorch if it is no input."""
        if node in self._slots:
            return self._slots[node]
        result, part = node.meta["val"], None
        made = node
        if node.target is operator.getitem:  # one of the results of a node, which is computed for each of them
            made, part = node.args  # type: ignore[assignment]  # as operator.getitem takes them
        sources, target = list(made.all_input_nodes), made.target
        if not isinstance(result, Tensor) or not callable(target):
            raise UnsupportedError(f"known results of {target}")

        def compute(*tensors: Tensor) -> Tensor:
            known = dict(zip(sources, tensors, strict=True))
            args = fx.node.map_arg(made.args, lambda argument: known[argument])
            kwargs = fx.node.map_arg(made.kwargs, lambda argument: known[argument])
            found = target(*args, **kwargs)
            return found if part is None else found[part]

        kind = Kind.NUMBERS if result.dtype == self.builder.dtype else Kind.OTHER
        place = self._slots[node] = self.derive(result.shape, compute, sources, kind)
        return place
