"""A trace, split by partial evaluation: a primal part that runs once, a tangent part that runs once per term."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from hvp_engine._support.torch_compat_traces import graph_module
from hvp_engine.differentiation.trace.broadcasting import expand_last
from hvp_engine.differentiation.trace.combining import combine_sums, share_factors
from hvp_engine.differentiation.trace.contractions import contract
from hvp_engine.differentiation.trace.elementwise_factors import fold_factors
from hvp_engine.differentiation.trace.fused_update import Terms, decompose
from hvp_engine.differentiation.trace.inplace import written_over
from hvp_engine.differentiation.trace.memory_format import compact_factors, copy_tangents_for_strides
from hvp_engine.differentiation.trace.point_convolutions import contract_convolutions
from hvp_engine.differentiation.trace.rematerialize import pointwise, recomputable
from hvp_engine.differentiation.trace.rewrites import accumulate, fold_linear, kernel_derivatives, simplify
from hvp_engine.differentiation.trace.rewriting import Attempts, Rewrite, WrongRewriteError, dependents, placeholders
from hvp_engine.differentiation.trace.tracing import Trace
from hvp_engine.differentiation.trace.view_chains import compose_views
from hvp_engine.errors import BackendError

_WORTHWHILE = 1 << 14
"""Weights from which adding matrix products to the solver's vector is faster than a fused step over all weights."""


@dataclass(frozen=True)
class Part:
    """A graph on (residuals..., tangents...), and which of the primal part's residuals it takes.

    `in_place` computes the same as `module`, with buffers reused: not under vmap, nor for a compiler.
    """

    module: fx.GraphModule
    in_place: fx.GraphModule
    residuals: tuple[int, ...]
    outputs: tuple[bool, ...]
    """For each product, whether there is a path; the graph returns those that have one."""


@dataclass(frozen=True)
class Partition:
    """Graphs of a linearization.

    `primal`: known tensors -> (values..., residuals...), for a loss (weights, hyperparameters, batch tensors) -> (loss,
    gradient..., residuals...).
    `tangent`: the product with H. `mixed`: the mixed product. `accumulating`: the summands of the product with H,
    `terms` of them for each weight, with the residuals that are its `diagonals`.
    """

    primal: fx.GraphModule
    gradients: int
    tangent: Part
    mixed: Part
    accumulating: Part
    terms: tuple[tuple[int, int], ...]
    diagonals: tuple[tuple[int, ...], ...]
    accumulates: bool
    """Whether matrix products make up most of the weights, so that accumulating pays."""
    dtypes: frozenset[torch.dtype]
    """Floating dtypes of the arithmetic: those of the weights, and what autocast or the loss casts to."""
    undone: tuple[str, ...]
    """Rewrites that failed and were undone, each with the reason."""


REWRITES: tuple[Rewrite, ...] = (
    simplify,
    kernel_derivatives,
    contract_convolutions,
    compose_views,
    contract,
    compose_views,
    fold_factors,
    fold_linear,
    compose_views,
    share_factors,
    combine_sums,
    accumulate,
    compact_factors,
    expand_last,
    copy_tangents_for_strides,
)


def partition(trace: Trace) -> Partition:
    """Simplify the trace and split it by what depends on the tangents."""
    try:
        return _partition(trace)
    except WrongRewriteError:
        raise
    except Exception as error:
        raise BackendError(
            f"engine: splitting a traced graph failed: {type(error).__name__}: {error}; this is a fault of hvp_engine "
            "and not of the loss: please report it, and use engine='eager' until it is mended"
        ) from error


def _partition(trace: Trace) -> Partition:
    attempts = Attempts()
    root = trace.root
    graph = attempts.rewrite(trace.graph, trace.weights, REWRITES, root, trace.arguments)
    inputs = placeholders(graph)
    tangents = inputs[-trace.weights :]
    linear = dependents(graph, set(tangents))
    outputs: list[Any] = list(_output(graph).args[0])  # type: ignore[arg-type]  # our traces return a list
    first = trace.values
    values, products, mixed = outputs[:first], outputs[first : first + trace.weights], outputs[first + trace.weights :]

    known = _live(products, lambda node: node not in linear) - linear
    nothing: set[fx.Node] = set()
    every_term = linear | attempts.call(recomputable, known, otherwise=nothing)
    residuals: dict[fx.Node, int] = {}  # each with its place
    tangent_part = _part(root, graph, products, every_term, tangents, residuals, attempts)
    once = attempts.call(pointwise, _live(mixed, lambda node: False) - linear, otherwise=nothing)
    mixed_part = _part(root, graph, mixed, every_term | once, tangents, residuals, attempts)
    whole = [Terms((), (), (output,) if isinstance(output, fx.Node) else ()) for output in products]
    terms = attempts.call(_terms, products, tangents, linear, otherwise=whole)
    summands = [node for term in terms for node in term.nodes]
    accumulating_part = _part(root, graph, summands, every_term, tangents, residuals, attempts)
    diagonals = tuple(tuple(_index(residuals, node) for node in term.diagonals) for term in terms)
    sizes = [tangent.meta["val"].numel() for tangent in tangents]
    by_product = sum(size for size, term in zip(sizes, terms, strict=True) if term.products)
    primal = _subgraph(root, graph, [*values, *residuals], inputs[: -trace.weights])
    return Partition(
        primal,
        trace.weights,
        tangent_part,
        mixed_part,
        accumulating_part,
        tuple((len(term.products), len(term.rest)) for term in terms),
        diagonals,
        accumulates=by_product > sum(sizes) / 2 and by_product >= _WORTHWHILE,
        dtypes=floating_dtypes(graph),
        undone=(*trace.undone, *attempts.undone),
    )


def _terms(products: Sequence[Any], tangents: Sequence[fx.Node], linear: set[fx.Node]) -> list[Terms]:
    """Each weight's product, taken apart."""
    return [
        decompose(output, tangent, tangents, linear) if isinstance(output, fx.Node) else Terms((), (), ())
        for output, tangent in zip(products, tangents, strict=True)
    ]


def floating_dtypes(graph: fx.Graph) -> frozenset[torch.dtype]:
    """The floating dtypes of all values."""
    values = [node.meta.get("val") for node in graph.nodes]
    return frozenset(v.dtype for v in values if isinstance(v, torch.Tensor) and v.is_floating_point())


def _index(residuals: dict[fx.Node, int], node: fx.Node) -> int:
    """The place of `node` in `residuals`, to which it is added if it is missing."""
    return residuals.setdefault(node, len(residuals))


def _output(graph: fx.Graph) -> fx.Node:
    return next(node for node in reversed(graph.nodes) if node.op == "output")


def _live(outputs: Sequence[Any], stop: Callable[[fx.Node], bool]) -> set[fx.Node]:
    """The nodes that `outputs` need, without what is needed only by nodes for which `stop` holds."""
    live: set[fx.Node] = set()
    stack = [node for node in outputs if isinstance(node, fx.Node)]
    while stack:
        node = stack.pop()
        if node in live:
            continue
        live.add(node)
        if not stop(node):
            stack.extend(node.all_input_nodes)
    return live


def _part(
    root: fx.GraphModule,
    graph: fx.Graph,
    outputs: Sequence[Any],
    every_term: set[fx.Node],
    tangents: Sequence[fx.Node],
    residuals: dict[fx.Node, int],
    attempts: Attempts,
) -> Part:
    """The part of `graph` that computes `outputs` from residuals and tangents by nodes of `every_term`.

    Other nodes that it needs are added to `residuals`.
    """
    live = _live(outputs, lambda node: node not in every_term)
    needed = [node for node in graph.nodes if node in live and node not in every_term]
    places = tuple(_index(residuals, node) for node in needed)
    present = tuple(isinstance(node, fx.Node) for node in outputs)
    module = _subgraph(root, graph, [node for node in outputs if isinstance(node, fx.Node)], [*needed, *tangents])
    return Part(module, attempts.call(written_over, module, otherwise=module), places, present)


def _subgraph(
    root: fx.GraphModule, graph: fx.Graph, outputs: Sequence[fx.Node], inputs: Sequence[fx.Node]
) -> fx.GraphModule:
    """The graph that computes `outputs` from `inputs`."""
    new = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in inputs:
        copies[node] = new.placeholder(node.name)
        copies[node].meta = dict(node.meta)
    wanted = set(inputs)
    live = _live(outputs, lambda node: node in wanted)
    for node in graph.nodes:
        if node in live and node not in copies:
            copies[node] = new.node_copy(node, lambda argument: copies[argument])
    new.output(tuple(copies[node] for node in outputs))
    return graph_module(root, new)
