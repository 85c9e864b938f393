"""Runs a function by the extension: its graph as a native program, with the results copied out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain

import torch
from torch import Tensor, fx

from hvp_engine.differentiation.native import handlers  # noqa: F401, without it there are none
from hvp_engine.differentiation.native.builder import Builder
from hvp_engine.differentiation.native.conversion import Conversion
from hvp_engine.differentiation.native.extension import Slots
from hvp_engine.differentiation.native.memory_plan import plan
from hvp_engine.differentiation.native.places import row_major
from hvp_engine.differentiation.trace.graph_recorder import record_graph

Function = Callable[..., Tensor | tuple[Tensor, ...]]


def by_extension(
    function: Function | fx.GraphModule, known: Sequence[Tensor], tangents: Sequence[Tensor], times: int = 2
) -> list[Tensor]:
    """function(*known, *tangents), computed `times` times on workspace full of NaN."""
    traced = function if isinstance(function, fx.GraphModule) else graph_of(function, known, tangents)
    inputs = [node for node in traced.graph.nodes if node.op == "placeholder"]
    for node, tensor in zip(inputs, [*known, *tangents], strict=True):
        node.meta["val"] = tensor
    dtype = tangents[0].dtype
    builder = Builder(dtype)
    conversion = Conversion(traced, [builder.given(tensor) for tensor in known], builder)
    body = list(builder.operations)
    slots = [builder.slot(place.sizes, row_major(place.sizes)) for place in conversion.outputs]
    builder.operations = []
    for place, slot in zip(conversion.outputs, slots, strict=True):
        builder.stored(place, slot)
    size = plan([*builder.preparation, *body], conversion.outputs)
    workspace = builder.slot((size,), (1,)).region.slot
    assert workspace is not None
    layout = Slots(builder.slots, dtype)
    program = layout.program(chain(body, builder.operations), workspace)
    preparation, memory = layout.program(builder.preparation, workspace), layout.memory()
    results = [torch.full(place.sizes, torch.nan, dtype=dtype) for place in slots]
    tensors = dict(enumerate([*known, *tangents]))
    for derived in builder.derived:
        tensors[derived.slot] = derived.compute(*(tensors[source] for source in derived.sources)).contiguous()
    for slot, result in zip(slots, results, strict=True):
        tensors[slot.region.slot] = result  # type: ignore[index]  # it has a slot
    tensors |= {slot: torch.full(builder.slots[slot].shape, torch.nan, dtype=dtype) for slot in builder.prepared}
    tensors[workspace] = torch.full((size,), torch.nan, dtype=dtype)
    for slot, tensor in tensors.items():
        assert memory.put(slot, [tensor]) == -1, (slot, tensor.shape, tensor.stride(), builder.slots[slot])
    preparation.run(memory, [[]])
    program.run(memory, [[]] * times)
    return results


def graph_of(function: Function, known: Sequence[Tensor], tangents: Sequence[Tensor]) -> fx.GraphModule:
    """The function as a graph of PyTorch's operators."""
    return record_graph(lambda *arguments: _as_tuple(function(*arguments)), [*known, *tangents])


def _as_tuple(value: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return value if isinstance(value, tuple) else (value,)
