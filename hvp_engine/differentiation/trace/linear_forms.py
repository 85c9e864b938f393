"""Sums of sources with known factors, number by number and tensor by tensor, and the operations that compute them.

A source depends on the tangents; it may be broadcast, as the mean of a row is to the row.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from hvp_engine._support.torch_compat import broadcast_shapes
from hvp_engine.differentiation.trace.patterns import Builder, alike, same_dtype

aten = torch.ops.aten

Factor = tuple[float, fx.Node | None]
"""A number times a known tensor, if there is one."""

Form = dict[fx.Node, Factor]
"""Sources with their factors: the sum of the products, in which everything is broadcast."""


class Arithmetic:
    """Makes the nodes of factors and sums; of equal ones of known tensors only one.

    Attributes:
        slopes: for a factor that an operation makes of ones, which of its arguments these are.
    """

    def __init__(self, build: Builder):
        self.build = build
        self.slopes: dict[fx.Node, int] = {}
        self._known: dict[Any, fx.Node] = {}

    def computed(self, target: Any, *args: Any, **keywords: Any) -> fx.Node:
        return self.build(target, args, target(*map(_meta, args), **keywords), **keywords)

    def known(self, target: Any, *args: Any, **keywords: Any) -> fx.Node:
        """The operation, once for the same arguments."""
        key = target, args, tuple(map(type, args)), tuple(keywords.items())
        return self._once(key, lambda: self.computed(target, *args, **keywords))

    def filled(self, like: Tensor, number: float) -> fx.Node:
        key = tuple(like.shape), like.dtype, like.device, repr(number)
        return self._once(key, lambda: self.build.filled(like, number))

    def converted(self, known: fx.Node, like: fx.Node) -> fx.Node:
        """A mask or whole numbers in the dtype of what they multiply."""
        if same_dtype(known, like):
            return known
        dtype = like.meta["val"].dtype
        value = torch.empty_like(_meta(known), dtype=dtype)
        return self._once((known, dtype), lambda: self.build(aten._to_copy.default, (known,), value, dtype=dtype))

    def _once(self, key: Any, make: Callable[[], fx.Node]) -> fx.Node:
        if key not in self._known:
            self._known[key] = make()
        return self._known[key]

    def times(self, a: fx.Node | None, b: fx.Node) -> fx.Node | None:
        """Their product; None where it is larger than they are: a column times a row."""
        if a is None:
            return b
        return self.known(aten.mul.Tensor, a, b) if _fits(a, b) else None

    def as_tensor(self, factor: Factor, like: fx.Node) -> fx.Node:
        number, known = factor
        if known is None:
            return self.filled(like.meta["val"].new_empty(()), number)
        return known if number == 1.0 else self.known(aten.mul.Scalar, known, number)

    def in_full(self, factor: Factor, like: fx.Node) -> fx.Node:
        """The factor in the shape of what it multiplies."""
        node = self.as_tensor(factor, like)
        if alike(node, like):
            return node
        ones = self.filled(like.meta["val"], 1.0)
        return ones if factor == (1.0, None) else self.known(aten.mul.Tensor, ones, node)

    def wide(self, known: fx.Node, like: fx.Node) -> fx.Node:
        """A factor broadcast to what it is one of."""
        return self.known(aten.expand.default, known, tuple(shape_of(like)))

    def multiplied(self, form: Form, number: float, known: fx.Node | None = None) -> Form | None:
        """Times what is known; None if a product of factors is larger than they are."""
        result: Form = {}
        for source, (own, factor) in form.items():
            product = factor if known is None else self.times(factor, known)
            if known is not None and product is None:
                return None
            result[source] = own * number, product
        return result

    def added(self, a: Form | None, b: Form | None, like: fx.Node) -> Form | None:
        """a + b; None if a sum of factors is larger than they are."""
        if a is None or b is None:
            return None
        form = dict(a)
        for source, (number, known) in b.items():
            own, factor = form.get(source, (0.0, known))
            if known is factor:
                form[source] = own + number, known
                continue
            x, y = self.as_tensor((own, factor), like), self.as_tensor((number, known), like)
            if not _fits(x, y):
                return None
            form[source] = 1.0, self.known(aten.add.Tensor, x, y)
        return {source: factor for source, factor in form.items() if factor[0] != 0.0} or form

    def total(self, form: Form, like: fx.Node) -> fx.Node:
        """The sum of the products; sources of one factor are added up before they are multiplied by it."""
        groups: dict[fx.Node | None, list[tuple[fx.Node, float]]] = defaultdict(list)
        for source, (number, known) in sorted(form.items(), key=lambda one: -math.prod(shape_of(one[0]))):
            groups[known].append((source, number))
        total: fx.Node | None = None
        for known, ((part, first), *others) in groups.items():
            for source, number in others:
                operation = aten.sub.Tensor if number == -first else aten.add.Tensor
                scaled = source if abs(number) == abs(first) else self.computed(aten.mul.Scalar, source, number / first)
                part = self.computed(operation, part, scaled)
            part = self._times_factor(part, (first, known), like)
            total = part if total is None else self.computed(aten.add.Tensor, total, part)
        assert total is not None
        if shape_of(total) != shape_of(like):
            total = self.computed(aten.expand.default, total, tuple(shape_of(like)))
        return total

    def _times_factor(self, part: fx.Node, factor: Factor, like: fx.Node) -> fx.Node:
        number, known = factor
        if known in self.slopes and number == 1.0 and alike(part, known):  # by what it reads, which is held anyway
            args = list(known.args)
            args[self.slopes[known]] = part
            return self.computed(known.target, *args, **known.kwargs)
        # Weight decay is a diagonal of the Hessian, known by being a tensor that multiplies a weight's tangent.
        if known is not None or part.op == "placeholder":
            return self.computed(aten.mul.Tensor, part, self.as_tensor(factor, like))
        return part if number == 1.0 else self.computed(aten.mul.Scalar, part, number)


def _meta(argument: Any) -> Any:
    return argument.meta["val"] if isinstance(argument, fx.Node) else argument


def _fits(a: fx.Node, b: fx.Node) -> bool:
    """Whether what they make is no larger than they are."""
    sizes = math.prod(shape_of(a)), math.prod(shape_of(b))
    return math.prod(broadcast_shapes(shape_of(a), shape_of(b))) <= max(sizes)


def shape_of(node: Any) -> torch.Size:
    return node.meta["val"].shape


def same_along(source: fx.Node, dims: Sequence[int], node: fx.Node) -> bool:
    """Whether a source of the node is the same along these of the node's dimensions, of which one is no single one."""
    missing = len(shape_of(node)) - len(shape_of(source))
    same = all(d < missing or shape_of(source)[d - missing] == 1 for d in dims)
    return same and any(shape_of(node)[d] != 1 for d in dims)
