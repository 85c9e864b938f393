"""A graph of known tensors by the extension, with calls of PyTorch's operators in between where it lacks them."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from hvp_engine.differentiation.native import handlers  # noqa: F401, without it there are none
from hvp_engine.differentiation.native.builder import Builder, Kind
from hvp_engine.differentiation.native.conversion import HANDLERS, Conversion, Value
from hvp_engine.differentiation.native.expressions import Operand
from hvp_engine.differentiation.native.extension import Slots, check
from hvp_engine.differentiation.native.memory_plan import plan
from hvp_engine.differentiation.native.operations import Call, Code, Operation, UnsupportedError
from hvp_engine.differentiation.native.places import Place, in_order, nesting, row_major
from hvp_engine.differentiation.trace.functionalize import is_random

aten = torch.ops.aten

_FEW_CALLS, _MOST_CALLS = 2, 0.3
"""How many of a graph's operators, and what share of them, PyTorch may compute: by itself it takes less for each."""

_View = tuple[int, tuple[int, ...], tuple[int, ...], int]
"""A slot, and sizes, strides and offset of a part of what is there."""


class _Builder(Builder):
    """What is derived becomes part of the program, since nothing is known before it runs."""

    def derive(
        self,
        sizes: Sequence[int],
        compute: Callable[..., Tensor],
        sources: Sequence[Place],
        kind: Kind = Kind.NUMBERS,
    ) -> Place:
        place = self.slot(sizes, row_major(sizes), known=kind is not Kind.NUMBERS, kind=kind)
        self.call([place], compute, sources)
        return place

    def call(self, results: Sequence[Place], compute: Callable[..., Any], sources: Sequence[Place]) -> None:
        """Have PyTorch compute `results`, which are whole slots."""
        slots = tuple(place.region.slot for place in results if place.region.slot is not None)
        self.operations.append(Call(slots, compute, tuple(sources)))  # type: ignore[arg-type]  # of this class alone

    def like(self, tensor: Tensor, strides: Sequence[int]) -> Place:
        """A slot for tensors like this one."""
        if tensor.device.type != "cpu":
            raise UnsupportedError(f"a tensor on {tensor.device}")
        if tensor.layout is not torch.strided:
            raise UnsupportedError(f"a tensor of layout {tensor.layout}")
        kind = {self.dtype: Kind.NUMBERS, torch.int64: Kind.INDEX}.get(tensor.dtype, Kind.OTHER)
        return self.slot(tensor.shape, strides, known=kind is not Kind.NUMBERS, kind=kind)


class _WholeConversion(Conversion):
    """All of a graph as operations, each where the graph has it."""

    builder: _Builder

    def __init__(self, module: fx.GraphModule, builder: _Builder):
        inputs = [node.meta["val"] for node in module.graph.nodes if node.op == "placeholder"]
        self.attributes: dict[int, Tensor] = {}
        self.results: list[Place | None] = []
        self._module = module
        if not all(isinstance(value, Tensor) for value in inputs):
            raise UnsupportedError("sparse tensors")
        super().__init__(module, [builder.like(value, value.stride()) for value in inputs], builder)

    def weigh(self, work: int, relative_time: float) -> None:
        if relative_time > 1:
            raise UnsupportedError("what PyTorch is faster at")

    def indices(self, argument: fx.Node) -> Place:
        value = self._tensor(argument)
        is_index = value.region.slot is not None and self.builder.slots[value.region.slot].kind is Kind.INDEX
        flat = value.reshaped((value.numel,)) if is_index else None
        return super().indices(argument) if flat is None else flat

    def exponential(self, argument: fx.Node) -> Operand:
        return self.builder.combined(Code.EXPONENTIAL, [self.place(argument)], self.shape(argument))

    def _other(self, node: fx.Node) -> Place:
        tensor = getattr(self._module, str(node.target), None)
        if node.op != "get_attr" or not isinstance(tensor, Tensor):
            return super()._other(node)  # type: ignore[return-value]  # it raises
        place = self._slots[node] = self.builder.like(tensor, tensor.stride())
        self.attributes[place.region.slot or 0] = tensor.detach()
        node.meta.setdefault("val", tensor)
        return place

    def _output(self, argument: Any) -> Place:
        self.results.append(None if argument is None else self._tensor(argument))
        return self.results[-1]  # type: ignore[return-value]  # `results` are read instead

    def _known(self, node: fx.Node) -> Value:
        handler, value = HANDLERS.get(node.target), node.meta.get("val")
        results = value if isinstance(value, (tuple, list)) else [value]
        if node.target is operator.getitem:
            return self.part(*node.args)  # type: ignore[arg-type]  # as operator.getitem takes them
        if node.target is aten.clone.default and any(user.target not in HANDLERS for user in node.users):
            handler = None  # an operator of PyTorch may write to a copy: native_batch_norm updates its statistics
        there = [result for result in results if result is not None]
        if handler is not None and all(isinstance(r, Tensor) and r.dtype == self.builder.dtype for r in there):
            try:
                return handler(self, node)
            except UnsupportedError:  # nobody reads what it has emitted until then
                pass
        return self._called(node, results)

    def _called(self, node: fx.Node, results: Sequence[Any]) -> Value:
        there = [isinstance(result, Tensor) for result in results]
        if not all(one or result is None for one, result in zip(there, results, strict=True)):
            raise UnsupportedError(f"results of {node.target}")
        sources, target = list(node.all_input_nodes), node.target

        def compute(*tensors: Tensor) -> Any:
            known = dict(zip(sources, tensors, strict=True))
            args = fx.node.map_arg(node.args, lambda argument: known[argument])
            kwargs = fx.node.map_arg(node.kwargs, lambda argument: known[argument])
            found = target(*args, **kwargs)  # type: ignore[operator]  # a call_function
            return [part for part, one in zip(found, there, strict=True) if one] if several else found

        several = isinstance(node.meta["val"], (tuple, list))
        places = [
            self.builder.like(r, row_major(r.shape)) if one else None for r, one in zip(results, there, strict=True)
        ]
        made = [place for place in places if place is not None]
        self.builder.call(made, compute, [self._as_recorded(source) for source in sources])
        return tuple(places) if several else made[0]

    def _as_recorded(self, node: fx.Node) -> Place:
        """A node with the strides that PyTorch gave it, which some of its operators rely on."""
        place, recorded = self._tensor(node), node.meta["val"]
        pairs = zip(place.sizes, place.strides, recorded.stride(), strict=True)
        if recorded.dtype != self.builder.dtype or all(size == 1 or here == there for size, here, there in pairs):
            return place
        return self.builder.copied(
            place, in_order(place.sizes, sorted(range(recorded.dim()), key=lambda d: -recorded.stride(d)))
        )

    def _tensor(self, node: fx.Node) -> Place:
        """A node in memory, as it is."""
        value = self._values[node] = self.builder.stored(self._single(node))
        return value


class GraphProgram:
    """The values of a graph of known tensors, one call after another.

    Arguments:
        module: the graph; its placeholders' `meta` says what the inputs are like.
        dtypes: of all numbers that it computes with.

    Attributes:
        random: whether a call draws from the global generators.
        inputs, sees_inputs: how many there are, and whether all of them are numbers or indices, so that memory refuses
            what is not laid out as they were.
        slots, made, held, seen, segments: for :class:`BoundGraph`: what tensors look like; the slots of results, and at
            last that of the workspace; tensors of the graph's own; where results are; and what there is to run.

    Errors: :class:`UnsupportedError` says why there is no such program.
    """

    def __init__(self, module: fx.GraphModule, dtypes: Iterable[torch.dtype]):
        self._made_of = module, frozenset(dtypes)
        dtype = check(self._made_of[1])
        nodes = list(module.graph.nodes)
        self.random = any(is_random(node) for node in nodes)
        builder = _Builder(dtype)
        converted = _WholeConversion(module, builder)
        calls = [operation for operation in builder.operations if isinstance(operation, Call)]
        if len(calls) > max(_FEW_CALLS, _MOST_CALLS * sum(node.op == "call_function" for node in nodes)):
            raise UnsupportedError("most of its operators")
        self._results = converted.results
        self.made = [*self._slots_of_results(builder)]  # one after another, and then the workspace
        self.made += [builder.slot((plan(builder.operations, []),), (1,)).region.slot or 0]
        self.slots = Slots(builder.slots, dtype)
        self.segments = list(self._assembled(builder.operations))
        memory = self.slots.memory()
        self.held = {slot: self.slots.put(memory, slot, [t])[0] for slot, t in converted.attributes.items()}
        self._whole = [(tuple(slot.shape), tuple(slot.strides)) for slot in builder.slots]
        self.seen = [None if place is None else self.view(place) for place in self._results]
        inputs = builder.slots[: sum(node.op == "placeholder" for node in nodes)]
        self.inputs = len(inputs)
        self.sees_inputs = all(slot.kind is not Kind.OTHER for slot in inputs)

    def __getstate__(self) -> tuple[fx.GraphModule, frozenset[torch.dtype]]:
        """A copy is made anew."""
        return self._made_of

    def __setstate__(self, state: tuple[fx.GraphModule, frozenset[torch.dtype]]) -> None:
        self.__init__(*state)  # type: ignore[misc]  # as a new one

    def __call__(self, *inputs: Tensor) -> list[Tensor | None]:
        """The values, in new memory or as views of the `inputs`, which are detached; called without grad mode.

        New memory at each call is what lets that of a large graph go in between. It takes 40 us, and the page faults
        of large memory: 0.4 of the 6.6 ms of an MLP's gradient (784-784-10, batch 50); whoever calls a small graph
        again and again keeps what :meth:`bind` gives.
        """
        return self.bind()(*inputs)

    def bind(self, handed_out: Sequence[int] = ()) -> BoundGraph:
        """With memory that stays."""
        return BoundGraph(self, handed_out)

    def view(self, place: Place) -> _View | int:
        """A place as a view of its slot, or the slot that it is."""
        slot, offset = place.region.slot, place.offset
        if slot is None:
            return self.made[-1], place.sizes, place.strides, place.region.offset + offset
        whole = (place.sizes, place.strides) == self._whole[slot] and offset == 0
        return slot if whole else (slot, place.sizes, place.strides, offset)

    @property
    def elements(self) -> int:
        """Of the tensors that a call makes."""
        return sum(math.prod(self._whole[slot][0]) for slot in self.made)

    def _slots_of_results(self, builder: Builder) -> Iterator[int]:
        """Moves results from the workspace into slots of their own, one after another."""
        for place in self._results:
            if place is not None and place.region.slot is None:
                region, dense = place.region, in_order(place.sizes, nesting(place))
                whole = place.numel == region.numel and all(
                    size == 1 or here == there
                    for size, here, there in zip(place.sizes, place.strides, dense, strict=True)
                )
                slot = builder.slot(place.sizes, place.strides) if whole else builder.slot((region.numel,), (1,))
                region.slot = slot.region.slot
                yield region.slot or 0

    def _assembled(self, operations: Sequence[Operation | Call]) -> Iterator[tuple[Any, Call | None]]:
        """Operations of the extension, each time up to a call of PyTorch."""
        segment: list[Operation] = []
        for operation in [*operations, None]:
            if operation is None or isinstance(operation, Call):
                yield (self.slots.program(segment, self.made[-1]) if segment else None), operation
                segment = []
            else:
                segment.append(operation)


class BoundGraph:
    """A program with memory of its own, for one call at a time.

    What it gives lies in that memory, until the next call, or in that of the inputs.

    Arguments:
        handed_out: numbers of results that get new memory at each call.
    """

    def __init__(self, program: GraphProgram, handed_out: Sequence[int] = ()):
        self._program, self._memory = program, program.slots.memory()
        self._own = program.held | {slot: program.slots.new[slot]() for slot in program.made}
        for slot, tensor in self._own.items():
            self._memory.put(slot, [tensor])
        seen = [(one if isinstance(one, int) else one and one[0], one) for one in program.seen]
        self._results = [_shown(one, self._own) if slot in self._own else None for slot, one in seen]
        self._renewed = [slot for slot, _ in map(seen.__getitem__, handed_out) if slot in program.made]
        self._span = range(min(self._renewed, default=0), max(self._renewed, default=-1) + 1)
        self._inputs: Sequence[Tensor] = ()
        fixed = {*self._own} - {*self._renewed}
        self._moving = [(k, one) for k, (slot, one) in enumerate(seen) if one is not None and slot not in fixed]

    def take(self, inputs: Sequence[Tensor]) -> bool:
        """Put the inputs where :meth:`run` expects them; false if one of them is not laid out as in the graph."""
        self._inputs = inputs
        return self._memory.put(0, inputs) < 0

    def let_go(self) -> None:
        """Hold no inputs."""
        self._inputs = ()
        self._memory.clear(0, self._program.inputs)

    def __call__(self, *inputs: Tensor) -> list[Tensor | None]:
        """The results for these inputs, copies of those that are not laid out as in the graph."""
        if not self.take(inputs):
            self._inputs = self._program.slots.put(self._memory, 0, inputs)
        return self.run()

    def run(self) -> list[Tensor | None]:
        """The results for the inputs that have been put."""
        program, memory, tensors = self._program, self._memory, self._own.copy()
        tensors.update(enumerate(self._inputs))
        if self._renewed:
            tensors.update([(slot, program.slots.new[slot]()) for slot in self._renewed])
            memory.put(self._span.start, [tensors[slot] for slot in self._span])
        workspace = tensors[program.made[-1]]
        for native, call in program.segments:
            if native is not None:
                native.run(memory, [[]])
            if call is not None:
                found = call.compute(*(_shown(program.view(place), tensors) for place in call.reads))
                for slot, tensor in zip(call.slots, found if type(found) in (tuple, list) else [found], strict=True):
                    (tensors[slot],) = program.slots.put(memory, slot, [_kept(tensor, workspace)])
        results = self._results.copy()
        for index, seen in self._moving:
            results[index] = tensors[seen] if type(seen) is int else _shown(seen, tensors)
        return results


def _shown(seen: _View | int | None, tensors: dict[int, Tensor]) -> Tensor | None:
    """What is seen of tensors by slots."""
    if seen is None or isinstance(seen, int):
        return None if seen is None else tensors[seen]
    slot, sizes, strides, offset = seen
    return tensors[slot].as_strided(sizes, strides, tensors[slot].storage_offset() + offset)


def _kept(tensor: Tensor, workspace: Tensor) -> Tensor:
    """Dense, and no view of the workspace, as a reshape of what lies there is: that memory is written over later."""
    inside = tensor.untyped_storage().data_ptr() == workspace.untyped_storage().data_ptr()
    return tensor.clone(memory_format=torch.contiguous_format) if inside else tensor.contiguous()
