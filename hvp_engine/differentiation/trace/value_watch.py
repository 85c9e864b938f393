"""What asks for the values of tensors while a graph is recorded: the graph would use those of that moment for good.

Python reads them from memory (`tolist`, `numpy`) and by operators (`.item()`, `bool`); the result of `x[mask]` has as
many elements as the mask has ones. A graph of the first batch would use its numbers and sizes for all others. Values of
tensors that are no inputs hold as long as nobody writes into them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.overrides import TorchFunctionMode

from hvp_engine._support.torch_compat import is_wrapped, tags_of
from hvp_engine.differentiation.operations import SIZED_BY_KNOWN_VALUES, kind_of_operation, may_be_view
from hvp_engine.differentiation.trace.alias_recorder import AliasRecorder
from hvp_engine.differentiation.trace.graph_recorder import ValueDependenceError

aten = torch.ops.aten

KEPT = "tensors whose values the graph keeps"
"""Where the `meta` of a recorded module has them; other values in them make the graph wrong."""

_READ_OUT = {"tolist", "numpy", "__array__", "__dlpack__"}

_MAKERS = {"tensor", "as_tensor", "asarray", "new_tensor"}
"""Functions that make a tensor of numbers, and read those of them that are tensors from memory."""


class WatchfulRecorder(AliasRecorder):
    """Records graphs that hold for other inputs, or raises :class:`ValueDependenceError`.

    Attributes:
        kept: tensors from outside whose values the graph keeps.
    """

    def __init__(self) -> None:
        super().__init__()
        self.kept: list[Tensor] = []
        self._writes: dict[fx.Node, list[fx.Node]] = {}

    def record(self, function: Callable[..., Any], arguments: Sequence[Tensor]) -> fx.GraphModule:
        with _Reads(self._keep):
            module = super().record(function, arguments)
        module.meta[KEPT] = self.kept
        return module

    def done(
        self, func: Any, node: fx.Node | None, args: tuple[Any, ...], keywords: dict[str, Any], result: Any
    ) -> None:
        if node is not None and kind_of_operation(func).mutates:
            self._note_write(node)
        self._keep(*_asked(func, args, keywords, result))

    def _keep(self, tensors: Sequence[Tensor], asks: str) -> None:
        """Note what these tensors, whose values the graph keeps, are computed from; an error if inputs or random
        numbers are among that."""
        if any(map(is_wrapped, tensors)):
            raise ValueDependenceError(asks)
        nodes, seen = [self.node_of(tensor) for tensor in tensors], set[fx.Node]()
        while nodes:
            node = nodes.pop()
            if node.op == "placeholder" or torch.Tag.nondeterministic_seeded in tags_of(node.target):
                raise ValueDependenceError(asks)
            if node.op == "get_attr":
                self.kept.append(getattr(self.root, str(node.target)))
            if node not in seen:
                seen.add(node)
                nodes += [*node.all_input_nodes, *self._writes.get(node, ())]

    def _note_write(self, node: fx.Node) -> None:
        """Remember it for what it writes to, and for what that is a view of: x[0] = w changes x by select(x, 0)."""
        kind = kind_of_operation(node.target)
        targets = [part for place, part in enumerate(node.args) if place in kind.written]
        targets += [part for name, part in node.kwargs.items() if name in kind.written]
        while targets:
            target = targets.pop()
            if isinstance(target, (list, tuple)):
                targets += target
            elif isinstance(target, fx.Node):
                self._writes.setdefault(target, []).append(node)
                if target.op == "call_function" and may_be_view(target.target):
                    targets.append(target.args[0])


class _Reads(TorchFunctionMode):
    """Tells `keep` (tensors, what asks) what Python reads from memory."""

    def __init__(self, keep: Callable[[Sequence[Tensor], str], None]):
        super().__init__()
        self._keep = keep

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in _READ_OUT:
            self._keep([args[0]], f"Python asks for the values of a tensor, by Tensor.{name},")
        elif name in _MAKERS:
            data = args[1:] if name == "new_tensor" else args[:1]
            asks = f"Python makes a tensor of the values of others, by torch.{name} (torch.stack keeps them tensors),"
            self._keep(_in_lists(data or ((kwargs or {}).get("data"),)), asks)
        elif name == "tensor_split":
            sizes = [value for value in (*args[1:], *(kwargs or {}).values()) if isinstance(value, Tensor)]
            self._keep(sizes, "values decide the sizes that torch.tensor_split gives")
        return func(*args, **(kwargs or {}))


def _in_lists(data: Sequence[Any]) -> list[Tensor]:
    """The tensors in the lists and tuples of `data`, at any depth."""
    lists, found = [part for part in data if isinstance(part, (list, tuple))], list[Tensor]()
    while lists:
        for part in lists.pop():
            if isinstance(part, Tensor):
                found.append(part)
            elif isinstance(part, (list, tuple)):
                lists.append(part)
    return found


def _asked(func: Any, args: tuple[Any, ...], keywords: dict[str, Any], result: Any) -> tuple[Sequence[Tensor], str]:
    """The tensors whose values decide what Python sees of an operator's result, and how."""
    tags = tags_of(func)
    if torch.Tag.data_dependent_output in tags:
        return [one for one in args if isinstance(one, Tensor)], f"Python asks for a value by {func}"
    if func is aten._pack_padded_sequence.default:
        return [args[1]], f"values decide the size of what {func} gives"
    if torch.Tag.dynamic_output_shape in tags and not _is_fixed(func, args, keywords, result):
        return _deciding(func, args), f"values decide the size of what {func} gives"
    return (), ""


def _deciding(func: Any, args: tuple[Any, ...]) -> list[Tensor]:
    """The tensors whose values decide the size of a result."""
    if func not in SIZED_BY_KNOWN_VALUES:
        return [args[0]]
    indices = args[1] if isinstance(args[1], (list, tuple)) else [args[1]]
    return [index for index in indices if index is not None and index.dtype in (torch.bool, torch.uint8)]


def _is_fixed(func: Any, args: tuple[Any, ...], keywords: dict[str, Any], result: Any) -> bool:
    """Whether the size is the same for all values, or the caller has given it."""
    if func is aten.bincount.default:  # of classes, if none of them is beyond the last
        return len(result) in (args[2:] or (keywords.get("minlength"),))
    if func is aten.repeat_interleave.Tensor:
        return keywords.get("output_size") is not None
    return func is aten.linalg_lstsq.default  # of the solution; there are no residuals of a matrix without full rank
