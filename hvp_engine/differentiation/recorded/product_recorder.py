"""Writes a product down while autograd computes it.

A dispatch mode sees every operation of a backward pass. Those that depend on the tangents are written down as entries;
what they take from elsewhere are the constants. For f = 3 x^2 and a tangent t the product is H t = 6 x t, computed as
t * 3 * (2 x): the entries are mul(t, 3) and mul(that, constant), and 2 x is a constant, which is computed as usual.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from hvp_engine._support.torch_compat import (
    DispatchMode,
    is_zero_tensor,
    shares_storage,
    version_of,
    without_torch_functions,
)
from hvp_engine.differentiation.operations import FILLS, METADATA, TRANSPOSES, WITH_MEMORY, kind_of_operation
from hvp_engine.differentiation.recorded.python_watch import HANDED_OUT, PythonWatch
from hvp_engine.differentiation.recorded.tensor_kinds import is_plain, kind_of, whereabouts

aten = torch.ops.aten

_MARK = "_hvp_engine_value"
"""Attribute of a tensor that an entry gave or that is a tangent: (the recorder's token, the value's number)."""

_FILL = "_hvp_engine_fill"
"""Attribute of a known tensor that is filled with one number: (the recorder's token, the number; None if not yet)."""

_TRANSPOSED = "_hvp_engine_transposed"
"""Attribute of a known tensor that is another one transposed: (the recorder's token, the operation, its arguments)."""


class Value:
    """A tangent or an entry's result, by its number; there is one object for each number."""

    __slots__ = ("number",)

    def __init__(self, number: int):
        self.number = number


class Constant(Value):
    """A constant, by its number."""

    __slots__ = ()


value_of = cache(Value)
constant_of = cache(Constant)


@dataclass(frozen=True)
class Entry:
    """One operation.

    Attributes:
        arguments: :class:`Value`, :class:`Constant`, tuples in place of lists, or anything plain.
        size: of a result whose shape known values decide.
        dtype: of a result that is a single tensor.
    """

    operation: Any
    arguments: tuple[Any, ...]
    keywords: tuple[tuple[str, Any], ...] = ()
    size: tuple[int, ...] | None = None
    dtype: torch.dtype | None = None

    @property
    def text(self) -> Hashable:
        """What distinguishes this entry from others; 1, 1.0 and True are told apart by their types."""
        return self.operation, self.arguments, tuple(map(type, self.arguments)), self.keywords, self.size, self.dtype


@dataclass(frozen=True)
class RecordedProduct:
    """A product that was written down.

    Attributes:
        tangents: shape, strides, dtype and device of each.
        entries: the operations, in order. The tangents are the first values, the entries' results follow.
        constants: tensors that entries take, `fills` the number that one is filled with, if it is.
        outputs: for each product and mixed product its value, None where there is no path.
    """

    tangents: tuple[Hashable, ...]
    entries: list[Entry]
    constants: list[Tensor]
    fills: list[int | None]
    outputs: list[Value | None]

    def text(self) -> Hashable:
        """What the function of (constants, tangents) depends on."""
        kinds = tuple([kind_of(constant) for constant in self.constants])
        texts = tuple([entry.text for entry in self.entries])
        return self.tangents, texts, kinds, tuple(self.fills), tuple(self.outputs)


class ProductRecorder(DispatchMode):
    """Writes down what depends on the tangents; with `whole`, everything that happens.

    Attributes:
        refused: why the product cannot be written down; its numbers are right all the same.
    """

    supports_higher_order_operators = False

    def __init__(self, tangents: Sequence[Tensor], whole: bool):
        super().__init__()
        self.refused = ""
        self._whole = whole
        self._tangents = tuple([kind_of(tangent) for tangent in tangents])
        self._entries: list[Entry] = []
        self._constants: list[Tensor] = []
        self._fills: list[int | None] = []
        self._versions: list[int] = []
        self._places: dict[Any, Value] = {}
        self._kept: list[Tensor] = []
        self._token = object()
        self._count = 0
        for tangent in tangents:
            self._mark(tangent)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        with without_torch_functions():
            return self._written(func, args, kwargs)

    def python_calls(self, name: str, args: tuple[Any, ...]) -> None:
        """Python code takes part: what it does another time, the graph does not show."""
        if self._whole:
            self.refused = self.refused or "Python code that takes part in products, as a hook on an inner tensor does"
        elif name in HANDED_OUT and self._varies(args):
            self.refused = self.refused or f"Tensor.{name} of a tangent, in Python code that takes part in products"

    def _written(self, func: Any, args: tuple[Any, ...], kwargs: Any) -> Any:
        keywords = kwargs or {}
        func = WITH_MEMORY.get(func, func)
        if _has_zero_tensor(args):
            args = tuple([self._with_memory(argument) for argument in args])
        if not self._whole and not (self._varies(args) or self._varies(keywords.values())):
            result = func(*args, **keywords)
            if func in FILLS:
                setattr(result, _FILL, (self._token, FILLS[func]))
            elif func in TRANSPOSES:
                setattr(result, _TRANSPOSED, (self._token, func, args))
            return result
        kind = kind_of_operation(func)
        if kind.refused:
            self.refused = self.refused or kind.refused
        if self.refused:
            return func(*args, **keywords)
        if kind.mutates:
            self._prepare_write(args[0])
        encode = self._encode
        arguments = tuple([encode(argument) for argument in args])
        named = tuple([(name, encode(argument)) for name, argument in keywords.items()]) if keywords else ()
        result = func(*args, **keywords)
        if func in METADATA:
            return result
        if isinstance(result, Tensor):
            size = tuple(result.shape) if kind.sized else None
            self._entries.append(Entry(func, arguments, named, size, result.dtype))
            self._mark(result)
        elif isinstance(result, (tuple, list)):
            self._entries.append(Entry(func, arguments, named))
            for tensor in result:
                if isinstance(tensor, Tensor):
                    self._mark(tensor)
                else:
                    self._count += 1
        else:
            self.refused = f"{func} gives Python something to look at"
        return result

    def finish(self, products: Sequence[Tensor | None]) -> RecordedProduct | None:
        """What was written down; None if the product was refused."""
        if any(version_of(t) != version for t, version in zip(self._constants, self._versions, strict=True)):
            self.refused = self.refused or "a known tensor was changed in place after it had been used"
        outputs = [None if product is None else self._value(product) for product in products]
        if any(product is not None and value is None for product, value in zip(products, outputs, strict=True)):
            self.refused = self.refused or "a product does not seem to depend on the tangents"
        if self.refused:
            return None
        return RecordedProduct(self._tangents, self._entries, self._constants, self._fills, outputs)

    def _mark(self, tensor: Tensor) -> None:
        setattr(tensor, _MARK, (self._token, self._count))
        self._count += 1

    def _value(self, tensor: Tensor) -> Value | None:
        mark = getattr(tensor, _MARK, None)
        return value_of(mark[1]) if mark is not None and mark[0] is self._token else None

    def _varies(self, arguments: Any) -> bool:
        """Whether one of `arguments`, or of lists among them, depends on the tangents."""
        token = self._token
        for argument in arguments:
            if isinstance(argument, Tensor):
                mark = getattr(argument, _MARK, None)
                if mark is not None and mark[0] is token:
                    return True
            elif type(argument) in (list, tuple) and argument and self._varies(argument):
                return True
        return False

    def _prepare_write(self, target: Tensor) -> None:
        """Make sure that what overwrites `target` can be written down.

        A known tensor is replaced by a value that is a copy of it, so that the constant stays as it is: z.add_(t) with
        a known z becomes clone(z).add_(t).
        """
        value = self._value(target)
        if value is not None:
            return
        if shares_storage(target):
            self.refused = "a known tensor that others show is changed in place"
            return
        constant = self._constant(target.clone(), new=True)
        self._entries.append(Entry(aten.clone.default, (constant,), dtype=target.dtype))
        self._mark(target)

    def _encode(self, argument: Any) -> Any:
        if isinstance(argument, Tensor):
            value = self._value(argument)
            return self._constant(argument) if value is None else value
        if type(argument) in (list, tuple):
            return tuple([self._encode(part) for part in argument])
        return argument

    def _constant(self, tensor: Tensor, new: bool = False) -> Value:
        """The constant, or the value that is one transposed."""
        known = self._places.get(id(tensor))
        if known is not None:
            return known
        transposed = getattr(tensor, _TRANSPOSED, None)
        if transposed is not None and transposed[0] is self._token:
            _, operation, (base, *rest) = transposed
            self._entries.append(Entry(operation, (self._constant(base), *map(self._encode, rest)), dtype=tensor.dtype))
            self._kept.append(tensor)
            self._places[id(tensor)] = value = value_of(self._count)
            self._count += 1
            return value
        self._kept.append(tensor)  # so that its id stays its own
        if not is_plain(tensor):
            self.refused = self.refused or f"a {type(tensor).__name__} that is not strided, or is a lazy view"
            return constant_of(0)
        number = self._fill(tensor)
        place = whereabouts(tensor), number
        constant = None if new else self._places.get(place)
        if constant is None:
            constant = self._places[place] = constant_of(len(self._constants))
            self._constants.append(tensor)
            self._fills.append(number)
            self._versions.append(version_of(tensor))
        self._places[id(tensor)] = constant
        return constant

    def _with_memory(self, argument: Any) -> Any:
        """`argument` with memory, if it is a tensor of zeros that has none, which would crash some operations."""
        if type(argument) in (list, tuple):
            return [self._with_memory(part) for part in argument]
        if not isinstance(argument, Tensor) or not is_zero_tensor(argument):
            return argument
        zeros = torch.zeros(argument.shape, dtype=argument.dtype, device=argument.device)
        setattr(zeros, _FILL, (self._token, 0))
        return zeros

    def _fill(self, tensor: Tensor) -> int | None:
        """The number that all of a constant is, if it has been made so; memory may have been written unseen since."""
        fill = getattr(tensor, _FILL, None)
        if fill is None or fill[0] is not self._token or version_of(tensor):
            return None
        number: int | None = fill[1]
        if number is None and tensor.numel() or number is not None and bool(tensor.ne(number).any()):
            self.refused = self.refused or "memory that is filled by code which autograd does not see"
        return number


def _has_zero_tensor(arguments: Any) -> bool:
    for argument in arguments:
        if isinstance(argument, Tensor):
            if is_zero_tensor(argument):
                return True
        elif type(argument) in (list, tuple) and _has_zero_tensor(argument):
            return True
    return False


def record(
    pullback: Callable[[Sequence[Tensor]], Sequence[Tensor | None]], tangents: Sequence[Tensor], whole: bool
) -> tuple[Sequence[Tensor | None], RecordedProduct | str]:
    """The products at `tangents`, and what was written down, or why not."""
    fresh = [tangent.detach() for tangent in tangents]
    recorder = ProductRecorder(fresh, whole)
    with recorder, PythonWatch(recorder.python_calls):
        products = pullback(fresh)
    found = recorder.finish(products)
    return products, recorder.refused if found is None else found
