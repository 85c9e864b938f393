"""The compiled engine: traced graphs through inductor, fused with the solver's update."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from hvp_engine._support.torch_compat_traces import compile_graph, function_of
from hvp_engine.differentiation.linear_map import Accumulation, Terms
from hvp_engine.differentiation.trace.evaluated import Function
from hvp_engine.differentiation.trace.functionalize import is_random
from hvp_engine.differentiation.trace.graph_recorder import record_graph
from hvp_engine.differentiation.trace.inplace import written_over
from hvp_engine.differentiation.trace.partial_evaluation import Partition
from hvp_engine.differentiation.trace.regions import Regions, distinct, lazily
from hvp_engine.differentiation.trace.rewriting import Attempts
from hvp_engine.engines.eager import EagerEngine
from hvp_engine.engines.functions import Functions, TracedLinearization
from hvp_engine.engines.surroundings import Surroundings
from hvp_engine.engines.traced import LinearizedEngine
from hvp_engine.errors import BackendError

_FIXED_SECONDS = 2.0
_SECONDS_PER_NODE = 0.04
_SECONDS_PER_REGION = 1.0
"""Rough compile times of inductor (measured on a 2.4 GHz core; a cached graph takes a tenth)."""

_LARGEST_WHOLE = 500
"""Both parts are compiled whole up to this many operations together: beyond, that takes more than 20 s."""


def _size(parts: Partition) -> int:
    return sum(len(module.graph.nodes) for module in (parts.tangent.module, parts.primal))


def estimated_seconds(parts: Partition) -> float:
    """How long compiling `parts` takes, roughly."""
    if _size(parts) <= _LARGEST_WHOLE:
        return _FIXED_SECONDS + _SECONDS_PER_NODE * _size(parts)
    return _FIXED_SECONDS + _SECONDS_PER_REGION * distinct((parts.tangent.module, parts.primal))


def _miscompiled(node: fx.Node) -> bool:
    """Whether inductor would change the primal part's values: it draws other dropout masks than eager.

    In torch 2.13 on a CPU, its max-pooling backward after a channels-last convolution is wrong.
    """
    return is_random(node) or node.target is torch.ops.aten.max_pool2d_with_indices_backward.default


class CompiledFunctions(Functions):
    """A partition whose graphs are compiled at their first call; inductor caches them on disk.

    Small graphs are compiled whole, with the solver's update; of large graphs only the elementwise regions are.
    """

    def __init__(self, parts: Partition, surroundings: Surroundings):
        super().__init__(parts, surroundings)
        self.seconds = 0.0
        self.whole = _size(parts) <= _LARGEST_WHOLE
        if self.whole:
            self.tangent = lazily(self._compile, parts.tangent.module)
            if not any(_miscompiled(node) for node in parts.primal.graph.nodes):
                self.primal = lazily(self._compile, parts.primal)
        else:
            attempts, outline = Attempts(), Regions(self._compile).outline

            def outlined(module: fx.GraphModule) -> fx.GraphModule:
                return attempts.call(outline, module, otherwise=module)

            def reusing(module: fx.GraphModule) -> Function:
                return function_of(attempts.call(written_over, module, otherwise=module))

            self.tangent = reusing(outlined(parts.tangent.module))
            self.accumulating = reusing(outlined(parts.accumulating.module))
            self.primal = function_of(outlined(parts.primal))
            self.undone = (*parts.undone, *attempts.undone)
        self._terms: dict[tuple[bool, float], Callable[..., Any]] = {}

    def _compile(self, module: fx.GraphModule, arguments: Sequence[Tensor]) -> Callable[..., Any]:
        start = time.perf_counter()
        try:
            with torch.no_grad():
                return compile_graph(module, arguments, size_asserts=self.whole)
        except Exception as error:  # many causes, such as a missing C++ compiler; reported to the user
            what = str(error).strip().partition("\n")[0]  # what follows is how to debug inductor
            raise BackendError(
                f"engine 'compiled': inductor failed on the traced graph: {type(error).__name__}: {what}; "
                "use engine='linearized'"
            ) from error
        finally:
            self.seconds += time.perf_counter() - start

    def term(self, in_place: bool, damping: float, arguments: Sequence[Tensor], residuals: int) -> Callable[..., Any]:
        """target <- target - scale (A d + damping d) on (residuals..., directions..., [targets...], scale)."""
        key = (in_place, damping)
        if key not in self._terms:
            module, count = self.partition.tangent.module, self.partition.gradients
            present = self.partition.tangent.outputs

            def function(*values: Tensor) -> tuple[()]:
                known, directions = values[:residuals], values[residuals : residuals + count]
                targets = directions if in_place else values[residuals + count : residuals + 2 * count]
                products = iter(module(*known, *directions))
                updated = []
                for target, direction, there in zip(targets, directions, present, strict=True):
                    product = next(products) if there else torch.zeros_like(direction)
                    scale = values[-1].to(target.dtype)
                    updated.append(target - scale * (product + damping * direction))
                for target, value in zip(targets, updated, strict=True):
                    target.copy_(value)
                return ()

            with torch.no_grad():
                graph = record_graph(function, [argument.clone() for argument in arguments])  # it runs: on copies
            self._terms[key] = self._compile(graph, arguments)
        return self._terms[key]


class CompiledLinearization(TracedLinearization):
    """The traced linearization with compiled graphs, and with a compiled term if they are compiled whole."""

    functions: CompiledFunctions

    def product(self, tangents: Sequence[Tensor]) -> Sequence[Tensor]:
        """H t; compiled code needs tangents with the weights' own strides."""
        laid_out = [
            t if t.stride() == stride else torch.empty_strided(t.shape, stride, dtype=t.dtype, device=t.device).copy_(t)
            for t, stride in zip(tangents, self.layout.strides, strict=True)
        ]
        return super().product(laid_out)

    def accumulating_terms(self, accumulation: Accumulation, damping: float) -> Terms | None:
        if not self.functions.whole:
            return super().accumulating_terms(accumulation, damping)
        if self.layout.low_precision:
            return None
        in_place = accumulation.target is accumulation.direction
        scale = torch.tensor(accumulation.scale, dtype=torch.float64, device=self.layout.device)
        arguments = [*self._tangent_residuals, *accumulation.direction.views]
        arguments += [] if in_place else accumulation.target.views
        arguments.append(scale)
        term = self.functions.term(in_place, damping, arguments, len(self._tangent_residuals))

        def run(steps: range) -> None:
            for step in steps:
                with torch.no_grad():
                    term(*arguments)
                accumulation.complete(step)

        return run


class CompiledEngine(LinearizedEngine):
    """Traces like the linearized engine, then compiles.

    Arguments:
        compile_budget_s: seconds that compiling one problem may take, estimated from the size of its graph; beyond it
            :class:`BackendError` is raised (and "auto" does not try).
        eager: the eager engine to check against.

    Pays off for recurrent networks and those with many elementwise operations; large matrix products and convolutions
    gain nothing. Of a large graph only what lies between its matrix products, convolutions and lookups is compiled, and
    what recurs, as in a Python loop over time, is compiled once. A solve raises the resident set by less than with
    eager: in MB, MLP 784-784-10 13 (eager 42), LeNet 15 (17), LSTM 8 (13), transformer 83 (91).

    Tried for such loops (an LSTM of two layers, 64 units and 20 steps on a 2.4 GHz core, torch 2.13): compiling the
    whole graph takes 152 s; its elementwise regions, each kind once, take 22 to 28 s and run as fast. Written as
    `torch._higher_order_ops.scan`, the loop has the right gradient but a silently wrong second derivative (relative
    error 0.8), and can be traced neither twice backwards nor forward over reverse.
    """

    name = "compiled"
    linearization = CompiledLinearization

    def __init__(self, compile_budget_s: float = 120.0, eager: EagerEngine | None = None) -> None:
        super().__init__(eager)
        self.compile_budget_s = compile_budget_s

    def report(self) -> str:
        """One line on what was traced and compiled."""
        seconds = sum(f.seconds for f in self._cache.values() if isinstance(f, CompiledFunctions))
        return f"{super().report()}; compiled in {seconds:.1f} s"

    def _functions(self, parts: Partition, surroundings: Surroundings) -> Functions:
        expected = estimated_seconds(parts)
        if expected > self.compile_budget_s:
            raise BackendError(
                f"compile_budget_s: compiling would take about {expected:.0f} s, more than the budget of "
                f"{self.compile_budget_s:g} s: raise it by engine=hvp.engines.CompiledEngine(compile_budget_s=...), "
                "or use engine='linearized'"
            )
        return CompiledFunctions(parts, surroundings)
