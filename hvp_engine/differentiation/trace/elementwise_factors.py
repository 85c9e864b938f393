"""What elementwise operations make of the tangents, as a sum of few sources with known factors.

What depends on the tangents is linear in them. A loss written out is a chain of such operations, whose factors the
primal part multiplies and adds up once:

    u = t * 2;  u * a + tanh_backward(u * b, y)      is   t * (2 * a + tanh_backward(2 * b, y))

A source may be broadcast, as a mean is to its row; :mod:`hvp_engine.differentiation.trace.row_factors` has what is made
of rows. Without this a term of a tanh written as (e^2x - 1) / (e^2x + 1) reads 14 known tensors, with it one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from hvp_engine.differentiation.trace import row_factors
from hvp_engine.differentiation.trace.linear_forms import Arithmetic, Factor, Form, same_along, shape_of
from hvp_engine.differentiation.trace.patterns import Builder, alike, is_number, same_dtype, same_layout
from hvp_engine.differentiation.trace.view_chains import shown

aten = torch.ops.aten

_PRODUCTS = (aten.mul.Tensor, aten.mul.Scalar)
_QUOTIENTS = (aten.div.Tensor, aten.div.Scalar)
_SUMS = (aten.add.Tensor, aten.sub.Tensor)
_MASKS = (aten.masked_fill.Scalar, aten.where.self)

SLOPES = (
    aten.gelu_backward.default,
    aten.silu_backward.default,
    aten.mish_backward.default,
    aten.elu_backward.default,
    aten.leaky_relu_backward.default,
    aten.softplus_backward.default,
    aten.hardtanh_backward.default,
    aten.hardsigmoid_backward.default,
    aten.hardswish_backward.default,
    aten.log_sigmoid_backward.default,
    aten.softshrink_backward.default,
    aten.hardshrink_backward.default,
    aten.native_dropout_backward.default,
)
"""Operations that multiply their first argument by what the others say, and of which the extension has none."""

_ALL_SLOPES = (aten.tanh_backward.default, aten.sigmoid_backward.default, aten.threshold_backward.default, *SLOPES)
"""Those of the extension, too."""

_READS_SOURCES = (
    *(*_PRODUCTS, *_QUOTIENTS, *_SUMS, *_MASKS, *_ALL_SLOPES, aten.neg.default, aten.expand.default),
    *(*row_factors.SCATTERED, *row_factors.CHOICES),
)
"""Operations on a sum of products that can read its sources instead."""

_MOST_SOURCES = 5
"""A sum with more sources than this is made, if it is read several times."""


def fold_factors(graph: fx.Graph, linear: set[fx.Node]) -> None:
    """Replace what elementwise operations make by the sum of its sources with known factors, where it is read."""
    folding = _Folding(graph, linear)
    for node in list(graph.nodes):
        if node in linear and node.op != "placeholder":
            with graph.inserting_before(node):
                folding.visit(node)


class _Folding:
    """The forms of the nodes up to the one that is visited; a sum is made where something reads it as a whole."""

    def __init__(self, graph: fx.Graph, linear: set[fx.Node]):
        self._linear = linear
        self._build = Arithmetic(Builder(graph, linear))
        self._forms: dict[fx.Node, Form] = {}
        self._there: set[fx.Node] = set()
        self._visited: set[fx.Node] = set()

    def visit(self, node: fx.Node) -> None:
        form = self._form(node) if node.op == "call_function" else None
        if form is None or any(alike(source, node) and not same_layout(source, node) for source in form):
            for x in node.all_input_nodes:
                self._made(x)
        else:
            self._forms[node] = form
            whole = [source for source in form if shape_of(source) == shape_of(node)]
            many = len(node.users) > 1 and (len(whole) > 1 or len(form) > _MOST_SOURCES)
            if many or _adds_a_bias(form) or not all(_reads_sources(user, node, form) for user in node.users):
                self._made(node)
        self._visited.add(node)

    def _made(self, node: fx.Node) -> fx.Node:
        """The node, made of its sources; what reads it from now on reads a single source in its place, no others."""
        form = self._forms.get(node)
        if form is None or node in self._there:
            return node
        (first, (_, known)), *others = form.items()
        decay = first.op == "placeholder" and known is None and not others
        direct = node.target in row_factors.STACKS or all(x in form for x in node.all_input_nodes if x in self._linear)
        del self._forms[node]
        if decay or not direct:
            new = self._build.total(form, node)
            if same_layout(new, node):
                node.replace_all_uses_with(new, delete_user_cb=lambda user: user not in self._visited)
                node = new
        if not others:
            self._forms[node] = form
        self._there.add(node)
        return node

    def _sources(self, x: fx.Node, node: fx.Node) -> Form:
        """The form of an argument of the node; what is broadcast counts as one source."""
        form = self._forms.get(x)
        if form is None or (len(form) > 1 and shape_of(x) != shape_of(node)):
            return {self._made(x): (1.0, None)}
        return form

    def _form(self, node: fx.Node) -> Form | None:
        """The node as a sum of products; None if it is none, or would be slower as one."""
        target: Any = node.target
        args: tuple[Any, ...] = node.args
        if target is aten.stack.default:
            entries = [self._made(x) if x in self._linear else None for x in args[0]]
            return row_factors.of_stack(self._build, node, entries)
        moving = [place for place, x in enumerate(args) if isinstance(x, fx.Node) and x in self._linear]
        if not moving or (node.kwargs and target not in _ALL_SLOPES) or not _is_tensor(node):
            return None
        if not all(_is_tensor(args[place]) and same_dtype(args[place], node) for place in moving):
            return None
        if target in _SUMS and len(moving) == 2:
            a, b = (self._sources(x, node) for x in args)
            sign = -1.0 if target is aten.sub.Tensor else 1.0
            return self._build.added(a, self._build.multiplied(b, sign), node)
        if target is aten.where.self and moving == [1, 2]:
            chosen = [self._multiplied(node, args[place], place) for place in moving]
            return self._build.added(chosen[0], chosen[1], node)
        return self._of_one(node, moving[0]) if len(moving) == 1 else None

    def _of_one(self, node: fx.Node, place: int) -> Form | None:
        """What is made of one argument and of what is known."""
        target: Any = node.target
        x: Any = node.args[place]
        form = self._forms.get(x)
        if target is row_factors.SUM:
            return row_factors.of_sum(self._build, node, form) if form else None
        if target in row_factors.CHOICES:
            return row_factors.of_choice(self._build, node, form) if form and place == 0 else None
        if target in row_factors.SOFTMAXES:
            opened = form and place == 0 and row_factors.is_opened(node, form)
            return row_factors.of_softmax(self._build, node, form) if form and opened else None
        if target in row_factors.SCATTERED:
            return row_factors.of_scatter(self._build, node, self._sources(x, node)) if place == 3 else None
        if target is aten.select_backward.default:
            return row_factors.of_entry(self._build, node, self._made(x))
        return self._sources(x, node) if target is aten.expand.default else self._multiplied(node, x, place)

    def _multiplied(self, node: fx.Node, x: fx.Node, place: int) -> Form | None:
        """Each source of the argument at this place, with what the operation makes of its factor."""
        factors = {source: self._applied(node, place, factor) for source, factor in self._sources(x, node).items()}
        if None in factors.values():
            alone = self._applied(node, place, (1.0, None))
            return None if alone is None else {self._made(x): alone}
        return factors  # type: ignore[return-value]  # without None

    def _applied(self, node: fx.Node, place: int, factor: Factor) -> Factor | None:
        """What the operation makes of a factor; None if it does not multiply, or a factor would be larger."""
        target: Any = node.target
        args: list[Any] = list(node.args)
        number, known = factor
        if target is aten.neg.default:
            return -number, known
        if target in _PRODUCTS or (target in _QUOTIENTS and place == 0 and len(args) == 2):
            other = args[1 - place]
            if isinstance(other, fx.Node):
                other = self._build.converted(other, node)
                if target in _QUOTIENTS:
                    other = self._build.known(aten.reciprocal.default, other)
                product = self._build.times(known, other)
                return None if product is None else (number, product)
            if target in _PRODUCTS:
                return number * float(other), known
            return None if other == 0 or abs(1.0 / other) > 1e30 else (number / other, known)
        if target is aten.where.self and place and args[3 - place] in self._linear:
            args[3 - place] = self._build.filled(node.meta["val"].new_empty(()), 0.0)
        hides = (target is aten.where.self and place and is_number(args[3 - place], 0)) or (
            target is aten.masked_fill.Scalar and not place and args[2] == 0
        )
        if not hides and (target not in _ALL_SLOPES or place):
            return None
        args[place] = self._build.in_full(factor, node)
        slope = self._build.known(target, *args, **node.kwargs)
        if factor == (1.0, None):
            self._build.slopes[slope] = place
        return 1.0, slope


def _reads_sources(user: fx.Node, node: fx.Node, form: Form) -> bool:
    """Whether the user of the node reads its sources."""
    if user.target is row_factors.SUM:
        return any(same_along(source, row_factors.summed_dims(user), node) for source in form)
    if user.target in row_factors.SOFTMAXES:
        return row_factors.is_opened(user, form)
    return user.op == "call_function" and user.target in _READS_SOURCES


def _adds_a_bias(form: Form) -> bool:
    """Whether it is a plain sum with a weight's tangent, which a matrix product adds while it is computed."""
    plain = len(form) > 1 and all(factor == (1.0, None) for factor in form.values())
    return plain and any(shown(source)[0].op == "placeholder" for source in form)


def _is_tensor(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), Tensor)
