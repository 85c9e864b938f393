"""Applies rewrites to a traced graph: each of them wholly or not at all."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, fx

from hvp_engine._support.random_state import random_state_kept, seed_everything
from hvp_engine.differentiation.self_check import PROBE_SEED

Rewrite = Callable[[fx.Graph, set[fx.Node]], None]
"""Changes a graph in place, given the nodes that depend on the tangents; it may add to those."""

Result = TypeVar("Result")

_VERIFIED: ContextVar[bool] = ContextVar("verified rewrites", default=False)

_TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-3, torch.bfloat16: 1e-1, torch.float16: 5e-2}
"""Relative difference that rounding in another order may make, by the coarsest dtype in the graph."""


class WrongRewriteError(AssertionError):
    """A rewrite changed what a graph computes."""


@contextlib.contextmanager
def verified_rewrites() -> Iterator[None]:
    """Inside the block every rewrite must keep the numbers, and none may fail.

    The graph is evaluated on the recorded inputs before and after each rewrite: for tests, since it multiplies the
    time of a trace.
    """
    token = _VERIFIED.set(True)
    try:
        yield
    finally:
        _VERIFIED.reset(token)


class Attempts:
    """Runs steps that a trace can do without; one that fails is undone, and remembered with the reason."""

    def __init__(self) -> None:
        self.undone: list[str] = []

    def record(self, step: Callable[..., Any], error: Exception) -> None:
        """Remember that `step` failed; within :func:`verified_rewrites` that is an error."""
        if _VERIFIED.get():
            raise error
        self.undone.append(f"{step.__name__}: {type(error).__name__}: {error}")

    def call(self, step: Callable[..., Result], *arguments: Any, otherwise: Result) -> Result:
        """What `step` returns, which must not change its arguments; `otherwise` if it fails."""
        try:
            return step(*arguments)
        except Exception as error:
            self.record(step, error)
            return otherwise

    def rewrite(
        self,
        graph: fx.Graph,
        tangents: int,
        rewrites: Sequence[Rewrite],
        root: fx.GraphModule,
        values: Sequence[Tensor],
    ) -> fx.Graph:
        """A copy of `graph` after those of `rewrites` that succeed.

        After a failure all others are applied to a fresh copy: so nothing of what failed is left, and as long as
        nothing fails there is a single copy.

        Arguments:
            tangents: how many of the last placeholders are tangents.
            root: holds the tensors that the graph takes as attributes.
            values: recorded inputs, for :func:`verified_rewrites`.
        """
        failed: set[int] = set()
        while True:
            candidate = copied(graph)
            sources = set(placeholders(candidate)[-tangents:])
            verifier = _Verifier(root, values, tangents, candidate) if _VERIFIED.get() else None
            for index, rewrite in enumerate(rewrites):
                if index in failed:
                    continue
                try:
                    rewrite(candidate, dependents(candidate, sources))
                    candidate.eliminate_dead_code(is_impure_node=lambda node: node.op in ("placeholder", "output"))
                    candidate.lint()
                except Exception as error:
                    self.record(rewrite, error)
                    failed.add(index)
                    break
                if verifier is not None:
                    verifier.check(rewrite, candidate)
            else:
                return candidate


def copied(graph: fx.Graph) -> fx.Graph:
    """A copy whose nodes are new."""
    new = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        copies[node] = new.node_copy(node, lambda argument: copies[argument])
    return new


def placeholders(graph: fx.Graph) -> list[fx.Node]:
    """The graph's inputs, in order."""
    return [node for node in graph.nodes if node.op == "placeholder"]


def dependents(graph: fx.Graph, sources: set[fx.Node]) -> set[fx.Node]:
    """Every node whose value depends on `sources`, themselves included."""
    found = set(sources)
    for node in graph.nodes:
        if node.op == "call_function" and any(argument in found for argument in node.all_input_nodes):
            found.add(node)
    return found


@dataclass
class _Verifier:
    """Compares a graph's outputs on recorded inputs with those before the last rewrite."""

    root: fx.GraphModule
    inputs: Sequence[Tensor]
    tangents: int
    graph: fx.Graph

    def __post_init__(self) -> None:
        self.expected, self.outline = self._outputs(self.graph), _outline(self.graph)

    def check(self, rewrite: Rewrite, graph: fx.Graph) -> None:
        outline = _outline(graph)
        if outline == self.outline:
            return
        self.outline, found = outline, self._outputs(graph)
        dtypes = [value.dtype for value in _values(graph) if value.is_floating_point()]
        tolerance = max((_TOLERANCES.get(dtype, 0.5) for dtype in dtypes), default=0.0)
        scale = _norm([value for value in self.expected if isinstance(value, Tensor)])
        for index, (ours, theirs) in enumerate(zip(found, self.expected, strict=True)):
            if not (isinstance(ours, Tensor) and isinstance(theirs, Tensor)):
                if ours is not theirs:
                    raise WrongRewriteError(f"{rewrite.__name__}: output {index} is {ours} instead of {theirs}")
                continue
            if ours.shape != theirs.shape or ours.dtype != theirs.dtype:
                raise WrongRewriteError(
                    f"{rewrite.__name__}: output {index} is {tuple(ours.shape)}, {ours.dtype} instead of "
                    f"{tuple(theirs.shape)}, {theirs.dtype}"
                )
            distance, size = _norm([ours.double() - theirs.double()]), _norm([theirs])
            if size < float("inf") and not distance <= tolerance * (size + 1e-3 * scale):
                raise WrongRewriteError(f"{rewrite.__name__}: output {index} is off by {distance:.2g} of {size:.2g}")
        self.expected = found

    def _outputs(self, graph: fx.Graph) -> Sequence[Any]:
        with torch.no_grad(), random_state_kept(self.inputs[0].device):
            seed_everything(PROBE_SEED, self.inputs[0].device)
            points, tangents = self.inputs[: -self.tangents], self.inputs[-self.tangents :]
            inputs = [*(x.clone() for x in points), *(torch.randn_like(t) for t in tangents)]
            return fx.Interpreter(self.root, graph=graph).run(*inputs)


def _outline(graph: fx.Graph) -> list[tuple[Any, ...]]:
    """What the graph computes, for comparison with itself after a rewrite."""
    return [(node, node.target, node.args, node.kwargs) for node in graph.nodes]


def _values(graph: fx.Graph) -> Iterator[Tensor]:
    for node in graph.nodes:
        value = node.meta.get("val")
        yield from (v for v in (value if isinstance(value, (tuple, list)) else (value,)) if isinstance(v, Tensor))


def _norm(tensors: Sequence[Tensor]) -> float:
    finite = [t.double().norm() for t in tensors if t.isfinite().all()]
    return float(torch.stack(finite).norm()) if len(finite) == len(tensors) and tensors else float("inf")
