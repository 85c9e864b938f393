"""Gradients and whole hypergradients as CUDA graphs: both gradients, the solve and what follows it, in one launch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from hvp_engine._support.flat_vector import Layout, detached
from hvp_engine._support.torch_compat import foreach_copy_
from hvp_engine.differentiation.closing import Closing
from hvp_engine.differentiation.gradient import Gradient
from hvp_engine.differentiation.problem import Problem
from hvp_engine.differentiation.self_check import Schedule
from hvp_engine.differentiation.trace.functionalize import is_random
from hvp_engine.engines.functions import Functions, TracedLinearization
from hvp_engine.engines.recording import copies
from hvp_engine.engines.replays import Counted
from hvp_engine.engines.solves import Pieces, Record, Solved
from hvp_engine.solvers.base import Solver


class CapturedGradient:
    """The traced gradient of a loss, recorded. Raises :class:`CaptureError` if that is impossible.

    Attributes:
        graph: gives the loss and its derivatives by weights and hyperparameters, None where there is no path.
    """

    def __init__(self, graph: fx.GraphModule, inputs: Sequence[Tensor], recorder: Counted):
        self.graph = graph
        self.random = any(is_random(node) for node in graph.graph.nodes)
        buffers = self._buffers = [tensor.detach().clone() for tensor in inputs]
        self._there: list[bool] = []

        def body() -> list[Tensor]:
            with torch.no_grad():
                found = graph(*buffers)
            self._there[:] = [tensor is not None for tensor in found]
            return [tensor for tensor in found if tensor is not None]

        self._recorder, self._recording = recorder, recorder.record(body)

    def __call__(self, *inputs: Tensor) -> list[Tensor | None]:
        self._recorder.order()
        for buffer, tensor in zip(self._buffers, inputs, strict=True):
            buffer.copy_(tensor)
        self._recording.replay()
        found = iter(copies(self._recording.outputs))
        return [next(found) if there else None for there in self._there]


@dataclass
class Foreseen:
    """The parts of a whole hypergradient, each kept for who asks for it."""

    train: Problem
    val: Problem
    solver: Solver
    whole: CapturedHypergradient
    loss: Tensor
    train_gradient: list[Tensor]
    gradient: Gradient
    solved: Solved
    closing: Closing

    def is_of(self, v: Sequence[Tensor], solver: Solver) -> bool:
        """Whether the solve is that of this solver, for this right-hand side."""
        return solver == self.solver and _same_memory(v, self.gradient.weights)

    def follows(self, x: Sequence[Tensor]) -> bool:
        """Whether x is the solution."""
        return _same_memory(x, self.solved.value.views)


class CapturedHypergradient:
    """The recordings of a hypergradient, on the buffers of a training loss and those of a batch of its own.

    Arguments:
        solver: one whose steps need no estimate of the spectrum, which the host would have to see in between.
        functions, layout, name, inputs: of the training loss.
        gradient: the graph of the validation loss and its derivatives.
        batch: the tensors of the validation batch.
    """

    def __init__(
        self,
        solver: Solver,
        functions: Functions,
        layout: Layout,
        name: str,
        inputs: Sequence[Sequence[Tensor]],
        gradient: fx.GraphModule,
        batch: Sequence[Tensor],
        record: Record,
    ):
        self.name = f"whole hypergradient by {type(solver).__name__}"
        self.schedule = Schedule()
        self.distrust: str | None = None
        self.graph = gradient
        weights, hyperparameters, _ = inputs
        buffers = self._batch = [tensor.detach().clone() for tensor in batch]
        iteration = self._iteration = solver.allocate(layout)
        parts: dict[str, list[Tensor | None]] = {}
        traced: list[TracedLinearization] = []
        self._shape = parts  # which of them are there, once it is recorded
        count = len(weights)

        @torch.no_grad()
        def begin() -> None:
            loss, *found = gradient(*weights, *hyperparameters, *buffers)
            vector = [torch.zeros_like(w) if g is None else g for g, w in zip(found, weights, strict=False)]
            values = functions.primal(*(tensor for group in inputs for tensor in group))
            traced[:] = [TracedLinearization(functions, layout, name, values)]
            parts["values"], parts["val"] = [*values[: 1 + count]], [loss, *vector]
            parts["direct"] = found[count:]
            iteration.start(vector)

        def term() -> None:
            iteration.step(traced[0].product(iteration.direction.tangents))

        @torch.no_grad()
        def end() -> list[Tensor]:
            figures = iteration.finish()
            closing = traced[0].closing(iteration.value.in_dtypes())
            parts["indirect"] = closing.indirect
            parts["figures"] = [figures, closing.unfinished, closing.gradient_norm]
            return [tensor for part in parts.values() for tensor in part if tensor is not None]

        self._pieces = Pieces([iteration], begin, term, end, record)

    @property
    def refusal(self) -> str | None:
        """Why a hypergradient is made of several recordings, if it is."""
        return self.distrust or self._pieces.refusal

    def run(self, train: Problem, val: Problem, solver: Solver, batch: Sequence[Tensor]) -> Foreseen | None:
        """The hypergradient at what the buffers of the training loss hold; None if it cannot be recorded."""
        if batch:
            foreach_copy_(self._batch, detached(batch))
        self._iteration.adapt(None)
        if not self._pieces.ready():
            return None
        found = iter(copies(self._pieces.run()))
        parts = {name: list(_filled(shape, found)) for name, shape in self._shape.items()}
        loss, *gradient = map(_there, parts["values"])
        val_loss, *vector = map(_there, parts["val"])
        figures, unfinished, norm = map(_there, parts["figures"])
        solved = Solved(self._iteration, figures)
        closing = Closing(parts["indirect"], solved.value.views, gradient, solved.value.layout)
        closing.unfinished, closing.gradient_norm = unfinished, norm
        direct = Gradient(val_loss.reshape(()), vector, parts["direct"])
        return Foreseen(train, val, solver, self, loss, gradient, direct, solved, closing)


def _filled(shape: Sequence[Tensor | None], found: Iterator[Tensor]) -> Iterator[Tensor | None]:
    return (None if part is None else next(found) for part in shape)


def _there(tensor: Tensor | None) -> Tensor:
    assert tensor is not None
    return tensor


def _same_memory(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> bool:
    pairs = list(zip(ours, theirs, strict=False))
    same: Callable[[Tensor, Tensor], bool] = lambda a, b: (  # noqa: E731
        a.data_ptr() == b.data_ptr() and a.dtype == b.dtype and a.stride() == b.stride()
    )
    return len(ours) == len(theirs) and all(same(a, b) for a, b in pairs)
