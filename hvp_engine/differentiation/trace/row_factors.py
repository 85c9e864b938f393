"""Sums, entries, stacks and softmaxes of sums of sources, as such sums again.

A source that is the same along the dimension in question stays, with the sum or the entry of its factor. So what is a
number for each row costs no pass over the rows:

    u = t - m;  v = sum(u * a, -1)                   is   sum(t * a, -1) - m * sum(a, -1)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from hvp_engine.differentiation.trace.linear_forms import Arithmetic, Form, same_along, shape_of
from hvp_engine.differentiation.trace.patterns import is_number, same_layout
from hvp_engine.differentiation.trace.view_chains import reshaped

aten = torch.ops.aten

CHOICES = (aten.gather.default, aten.select.int)
SCATTERED = (aten.scatter_add.default, aten.scatter.src)
STACKS = (aten.stack.default, aten.select_backward.default)
SOFTMAXES = (aten._softmax_backward_data.default, aten._log_softmax_backward_data.default)
SUM = aten.sum.dim_IntList

_FEW = 2
"""Most entries of a stack that are products of the entries with a one among zeros."""


def summed_dims(node: Any) -> list[int]:
    """The dimensions of a sum; none for one over all."""
    return [d % len(shape_of(node.args[0])) for d in node.args[1] or ()]


def of_sum(build: Arithmetic, node: fx.Node, form: Form) -> Form | None:
    """None if no source is the same along the sum."""
    x: Any = node.args[0]
    if not any(same_along(source, summed_dims(node), x) for source in form):
        return None
    return _summed(build, form, x, summed_dims(node), bool((*node.args[2:], False)[0]))


def _summed(build: Arithmetic, form: Form, x: fx.Node, dims: Sequence[int], keep: bool) -> Form:
    """The sum of x."""
    moving = {source: factor for source, factor in form.items() if not same_along(source, dims, x)}
    result: Form = {}
    if moving:
        result[build.computed(SUM, build.total(moving, x), list(dims), keep)] = 1.0, None
    for source, (number, known) in form.items():
        if source in moving:
            continue
        place = source if keep else _without(build, source, dims, x)
        if known is None:
            result[place] = number * math.prod(shape_of(x)[d] for d in dims), None
        else:
            result[place] = number, build.known(SUM, build.wide(known, x), tuple(dims), keep)
    return result


def _without(build: Arithmetic, source: fx.Node, dims: Sequence[int], x: fx.Node) -> fx.Node:
    """A source of x without the dimensions along which it is the same."""
    shape = [1] * (len(shape_of(x)) - len(shape_of(source))) + list(shape_of(source))
    return reshaped(build.build, source, tuple(size for d, size in enumerate(shape) if d not in dims))


def of_choice(build: Arithmetic, node: fx.Node, form: Form) -> Form | None:
    """One entry of each row."""
    x: Any = node.args[0]
    args: tuple[Any, ...] = node.args
    dim, index = args[1] % len(shape_of(x)), args[2]
    gathers = node.target is aten.gather.default
    if len(args) > 3 or (gathers and not _is_one_along(index, dim, x)):
        return None
    result: Form = {}
    for source, (number, known) in form.items():
        if known is not None:
            known = build.known(node.target, build.wide(known, x), dim, index)
        if not same_along(source, (dim,), x):
            if shape_of(source) != shape_of(x):
                return None
            source = build.known(node.target, source, dim, index)
        elif not gathers:
            source = _without(build, source, (dim,), x)
        if source in result:
            return None
        result[source] = number, known
    return result


def of_scatter(build: Arithmetic, node: fx.Node, form: Form) -> Form | None:
    """One value for each row of zeros: the value times a one among zeros."""
    zeros, dim, index, values = node.args
    if not is_number(zeros, 0) or not _is_one_along(index, dim, node) or shape_of(index) != shape_of(values):
        return None
    return build.multiplied(form, 1.0, build.known(aten.scatter.value, zeros, dim, index, 1.0))


def of_stack(build: Arithmetic, node: fx.Node, sources: Sequence[Any]) -> Form | None:
    """Few entries; None stands for one that is known, and therefore zero."""
    found = [x for x in sources if x is not None]
    if len(sources) > _FEW or len({*found}) < len(found) or not all(same_layout(x, found[0]) for x in found):
        return None
    result: Form = {}
    for k, x in enumerate(sources):
        if x is not None:
            result |= _entry(build, node, x, (*node.args, 0)[1], k)
    return result


def of_entry(build: Arithmetic, node: fx.Node, x: fx.Node) -> Form | None:
    """Zeros except for one of few entries."""
    _, sizes, dim, k = node.args
    few = sizes[dim] <= _FEW  # type: ignore[index, operator]  # a list
    return _entry(build, node, x, dim, k) if few else None


def _entry(build: Arithmetic, node: fx.Node, x: fx.Node, dim: Any, k: Any) -> Form:
    """Entry number k of the node, times a one among zeros."""
    dim %= len(shape_of(node))
    before, after = shape_of(x)[:dim], shape_of(x)[dim:]
    ones = build.filled(node.meta["val"].new_empty([1] * len(shape_of(x))), 1.0)
    shape = (*[1] * len(before), shape_of(node)[dim], *[1] * len(after))
    one = build.known(aten.select_backward.default, ones, shape, dim, k)
    return {reshaped(build.build, x, (*before, 1, *after)): (1.0, one)}


def is_opened(node: fx.Node, form: Form) -> bool:
    """Whether the derivative of a softmax is taken apart: as long as that saves nothing, it is a single operation."""
    return len(form) > 1 or any(user.target is aten.gather.default for user in node.users)


def of_softmax(build: Arithmetic, node: fx.Node, form: Form) -> Form | None:
    """The derivative of a softmax p, which is p * (x - sum(p * x)); that of its logarithm is x - p * sum(x)."""
    x, p, dim, _ = node.args
    logarithm = node.target is not SOFTMAXES[0]
    p = build.known(aten.exp.default, p) if logarithm else p
    first = form if logarithm else build.multiplied(form, 1.0, p)  # type: ignore[arg-type]  # a node
    if first is None:
        return None
    total = _summed(build, first, x, (dim % len(shape_of(x)),), True)  # type: ignore[arg-type, operator]  # as above
    return build.added(first, build.multiplied(total, -1.0, p), node)  # type: ignore[arg-type]  # a node


def _is_one_along(index: Any, dim: Any, node: fx.Node) -> bool:
    """Whether there is one index for each row along the dimension of the node."""
    shape = list(shape_of(node))
    if shape:
        shape[dim % len(shape)] = 1
    return bool(shape) and list(shape_of(index)) == shape
