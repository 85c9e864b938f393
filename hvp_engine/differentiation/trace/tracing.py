"""A problem's gradient and its vector-Jacobian product, traced once into one graph of aten operations.

Reverse over reverse: the trace runs the loss, its gradient f = dL/dw, and `autograd.grad(f, (w, lambda), tangents)`
in one graph. Everything that varies between calls is an input of the graph: weights, hyperparameters, the tensors of
the batch, the tangents. Other tensors that the loss uses (module buffers, closures) are read by reference. Python
values, and which tensor a closure is bound to, are fixed by the trace: engines watch what a loss reads.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from hvp_engine._support.random_state import global_generators
from hvp_engine._support.torch_compat import REGISTER_PYTREE
from hvp_engine._support.torch_compat_traces import graph_module
from hvp_engine._support.user_code import innermost_line
from hvp_engine.differentiation.differentiable_kernels import plain_kernels, traceable_kernels
from hvp_engine.differentiation.double_backward import Pullback, Tape, gradients, leaves
from hvp_engine.differentiation.gradient import derivatives
from hvp_engine.differentiation.missing_derivatives import ThirdDerivativeError, explained
from hvp_engine.differentiation.problem import Problem, is_constant
from hvp_engine.differentiation.trace.alias_recorder import of_own_memory
from hvp_engine.differentiation.trace.functionalize import functionalized, refuse_side_effects, retraced
from hvp_engine.differentiation.trace.graph_recorder import (
    ControlFlowError,
    LayoutError,
    ValueDependenceError,
    record_graph,
)
from hvp_engine.differentiation.trace.memory_format import (
    NoStatistics,
    channels_last,
    layout_matters,
    prefer_channels_last,
)
from hvp_engine.differentiation.trace.rewriting import Attempts, copied
from hvp_engine.differentiation.trace.value_watch import KEPT, WatchfulRecorder
from hvp_engine.errors import TraceError

aten = torch.ops.aten

TRACING = threading.RLock()
"""One thread traces at a time: kernels with second derivatives take the place of torch's for all threads."""

_HOOKS = (
    "saved-tensor hooks (gradient checkpointing, save_on_cpu), which compute again with the module's own weights "
    "while the trace runs backwards"
)


@dataclass(frozen=True)
class Trace:
    """A graph of operations on known tensors and tangents.

    Inputs, in order: known tensors (of a loss: weights, hyperparameters, batch tensors), tangents. Outputs, in order:
    values that do not depend on the tangents (of a loss: itself and its gradient), products with H, mixed products;
    None for a product that is zero because there is no path.

    Attributes:
        root: holds the tensors that the graph takes as attributes.
        weights: how many of the last inputs are tangents, one for each weight.
        values: how many outputs come before the products.
        arguments: the inputs that were recorded.
        undone: steps that failed and were undone, each with the reason.
    """

    graph: fx.Graph
    root: fx.GraphModule
    weights: int
    values: int
    arguments: tuple[Tensor, ...]
    undone: tuple[str, ...] = ()


def trace(problem: Problem) -> Trace:
    """Trace `problem`; :class:`TraceError` naming the remedy where the loss depends on data in Python.

    Convolution kernels are laid out as they are fastest, unless the loss takes its images for contiguous.
    """
    _, others, _ = problem.split
    for leaf in others:
        if not is_constant(leaf):
            raise TraceError(
                f"{problem.name}: expected a batch of tensors, numbers and texts in tuples, lists and dicts; got one "
                f"with a {type(leaf).__name__}, whose content a trace would keep: hand over the tensors in it, "
                f"register it with {REGISTER_PYTREE}, or use engine='eager'"
            )
    if prefer_channels_last(problem.weights):
        with contextlib.suppress(RuntimeError), NoStatistics():
            found = _traced(problem, channels_last)
            if not layout_matters(found.graph):
                return found
    return _traced(problem, list)


def trace_gradient(problem: Problem) -> fx.GraphModule:
    """The graph of a loss and its derivatives by weights and hyperparameters, None where there is no path; errors as
    :func:`trace`."""

    def function(*arguments: Tensor) -> list[Tensor | None]:
        here, weights, hyperparameters = _at(problem, arguments)
        with torch.enable_grad():
            loss = here.evaluate(weights, hyperparameters)
            return [loss.detach(), *derivatives(loss, weights, hyperparameters, problem.name)]

    graph, root, _ = _recorded(problem, function, _known(problem), traceable_kernels())
    graph.eliminate_dead_code(is_impure_node=lambda node: node.op in ("placeholder", "output"))
    module = graph_module(root, graph)
    module.meta[KEPT] = root.meta[KEPT]
    return module


def _known(problem: Problem) -> list[Tensor]:
    tensors, _, _ = problem.split
    return [*(t.detach() for t in (*problem.weights, *problem.hyperparameters)), *map(of_own_memory, tensors)]


def _at(problem: Problem, arguments: Sequence[Tensor]) -> tuple[Problem, list[Tensor], list[Tensor]]:
    """The problem with a batch of arguments, and new leaves for weights and hyperparameters."""
    count_w, count_h = len(problem.weights), len(problem.hyperparameters)
    weights, hyperparameters = leaves(arguments[:count_w]), leaves(arguments[count_w : count_w + count_h])
    return problem.at(problem.inputs_of(arguments[count_w + count_h :])), weights, hyperparameters


def _traced(problem: Problem, laid_out: Callable[[Sequence[Tensor]], list[Tensor]], thrice: bool = False) -> Trace:
    """The trace of the loss on `laid_out(weights)`, and of its products on tangents that are laid out alike."""
    known = _known(problem)

    def function(*arguments: Tensor) -> list[Tensor | None]:
        here, weights, hyperparameters = _at(problem, arguments[: len(known)])
        tangents = arguments[len(known) :]
        with torch.enable_grad():
            loss = here.evaluate(laid_out(weights), hyperparameters)
            gradient = gradients(loss, weights, problem.name)
            tape = Tape(gradient, weights, (), loss)
        products = Pullback(gradient, weights + hyperparameters)(laid_out(tangents))
        return [tape.loss, *tape.gradient, *products]

    arguments = [*known, *(torch.ones_like(w) for w in problem.weights)]
    try:
        graph, root, undone = _recorded(problem, function, arguments, plain_kernels(thrice))
    except ThirdDerivativeError:
        if thrice:
            raise
        return _traced(problem, laid_out, thrice=True)
    count = len(problem.weights)
    return Trace(graph, root, count, 1 + count, tuple(arguments), undone)


def _recorded(
    problem: Problem,
    function: Callable[..., list[Tensor | None]],
    arguments: list[Tensor],
    kernels: contextlib.AbstractContextManager[Any],
) -> tuple[fx.Graph, fx.GraphModule, tuple[str, ...]]:
    """The function of the problem's loss as a graph without side effects, what holds its attributes, and the steps that
    failed and were undone."""
    attempts = Attempts()
    try:
        with TRACING, kernels, torch.autograd.graph.disable_saved_tensors_hooks(_HOOKS), explained():
            before = _drawn_on_host()
            root = record_graph(function, arguments, WatchfulRecorder)
            if _drawn_on_host() != before:
                raise TraceError(
                    f"{problem.name}: expected a loss that draws random numbers by torch alone; it draws by Python's "
                    "random or numpy.random, which a trace would keep: draw them by torch (torch.rand, torch.randperm; "
                    "a number as a 0-dim tensor), or use engine='recorded' or engine='eager'"
                )
            graph = copied(root.graph)
            if not attempts.call(functionalized, graph, otherwise=False):
                kept, root = root.meta[KEPT], _retraced(root, arguments, problem.name)
                root.meta[KEPT], graph = kept, root.graph
            refuse_side_effects(graph)
    except ControlFlowError as error:
        here = leaves(problem.weights)
        with torch.enable_grad():  # it names an operator without a second derivative
            gradients(problem.evaluate(here, leaves(problem.hyperparameters)), here, problem.name)
        raise TraceError(
            f"{problem.name}: expected a loss without control-flow operators (scan, map, while_loop, cond); got one at "
            f"{innermost_line(error)}, which a trace cannot follow: write it as a Python loop, or use engine='eager'"
        ) from error
    except RuntimeError as error:
        if str(error) == _HOOKS:
            raise TraceError(
                f"{problem.name}: expected a loss without saved-tensor hooks; got some: {_HOOKS}: "
                "switch checkpointing off, since a trace keeps what it needs anyway, or use engine='eager'"
            ) from error
        if isinstance(error, LayoutError):
            raise TraceError(
                f"{problem.name}: expected tensors with values that have strides, or are sparse in COO format; got "
                f"{error} at {innermost_line(error)}: make it one of these (a compressed sparse one by "
                "Tensor.to_sparse_coo or to_dense), or use engine='recorded' or engine='eager'"
            ) from error
        if isinstance(error, ValueDependenceError):
            raise TraceError(
                f"{problem.name}: expected a loss without control flow and sizes that depend on tensor values; {error} "
                f"at {innermost_line(error)}: keep it a tensor (torch.where in place of if and of indexing by a mask, "
                "one_hot with num_classes), or use engine='recorded' or engine='eager'"
            ) from error
        raise
    return graph, root, tuple(attempts.undone)


def _drawn_on_host() -> tuple[Any, ...] | None:
    """The states of Python's and numpy's generators."""
    states = global_generators()
    return None if states is None else states[1:]


def _retraced(recorded: fx.GraphModule, arguments: list[Tensor], name: str) -> fx.GraphModule:
    try:
        return retraced(recorded, recorded.graph, arguments)
    except RuntimeError as error:
        raise TraceError(
            f"{name}: expected a loss that changes no tensors in place, or only such as it makes itself; torch could "
            f"not replace what it changes: {error}; compute new tensors instead, or use engine='eager'"
        ) from error
