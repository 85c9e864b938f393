"""A traced problem on fixed buffers, recorded piece by piece: its primal part, a product, whole solves."""

from __future__ import annotations

import time
import weakref
from collections import OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hvp_engine._support.flat_vector import FlatVector, Layout, detached
from hvp_engine._support.torch_compat import foreach_copy_
from hvp_engine.differentiation.linear_map import Linearization, LinearMap
from hvp_engine.differentiation.problem import Problem
from hvp_engine.differentiation.self_check import Schedule
from hvp_engine.engines.recording import Body, CaptureError, Recorder, Recording
from hvp_engine.engines.traced import Functions, TracedLinearization
from hvp_engine.ops import backend
from hvp_engine.solvers.base import Solver
from hvp_engine.solvers.iteration import FinishedIteration, Outcome
from hvp_engine.solvers.spectrum import SpectralEstimate

_MOST_SOLVES = 4
"""A problem keeps this many recorded solves, the most recently used."""


def copies(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Copies that no replay overwrites, made in few launches."""
    fresh = [torch.empty_like(tensor) for tensor in tensors]
    if fresh:
        foreach_copy_(fresh, list(tensors))
    return fresh


@dataclass
class Tally:
    """The cost of recording so far: how many graphs, for how many sets of buffers."""

    recordings: int = 0
    buffers: int = 0
    seconds: float = 0.0


class Replay:
    """A body that is recorded at its first call and replayed from then on, or just called if it cannot be recorded."""

    def __init__(self, recorder: Recorder, tally: Tally, body: Body):
        self._recorder, self._tally, self._body = recorder, tally, body
        self._recording: Recording | None = None
        self.refusal: str | None = None

    def __call__(self) -> Sequence[Tensor]:
        if not self.ready() or self._recording is None:
            return self._body()
        self._recording.replay()
        return self._recording.outputs

    def ready(self) -> bool:
        """Whether it is recorded; tries to record it if that has not been tried."""
        if self._recording is None and self.refusal is None:
            try:
                self.record()
            except CaptureError as error:
                self.refusal = str(error)
        return self._recording is not None

    def record(self) -> Recording:
        """Record now; :class:`CaptureError` if that is impossible."""
        start = time.perf_counter()
        try:
            self._recording = self._recorder.record(self._body)
            self._tally.recordings += 1
        finally:
            self._tally.seconds += time.perf_counter() - start
        return self._recording


class Graphs:
    """The recordings of one problem's shapes, and the buffers they read.

    Raises :class:`CaptureError` if not even the primal part can be recorded.
    """

    def __init__(
        self, functions: Functions, problem: Problem, tensors: Sequence[Tensor], recorder: Recorder, tally: Tally
    ):
        self.functions = functions
        self.layout = Layout.of(problem.weights)
        self._recorder, self._tally = recorder, tally
        self._inputs = [[t.detach().clone() for t in group] for group in _groups(problem, tensors)]
        self._tangents = FlatVector(self.layout)
        self._user: weakref.ref[Linearization] | None = None
        self._solves: OrderedDict[Hashable, Solve] = OrderedDict()
        self._refused: dict[str, str] = {}

        # Bodies refer to the buffers, not to this object: without a cycle, buffers are freed at once.
        inputs, tangents = [tensor for group in self._inputs for tensor in group], self._tangents.tangents
        self._primal = Replay(recorder, tally, torch.no_grad()(lambda: functions.primal(*inputs)))
        traced = TracedLinearization(functions, self.layout, problem.name, self._primal.record().outputs)
        self._traced = traced
        self._product = Replay(recorder, tally, lambda: traced.product(tangents))
        tally.buffers += 1
        self._mixed = Replay(recorder, tally, lambda: [t for t in traced.mixed(tangents) if t is not None])

    def __del__(self) -> None:
        recorder = vars(self).get("_recorder")  # None if an error in __init__ came first
        if recorder is not None:
            recorder.retire()

    @property
    def free(self) -> bool:
        """Whether no linearization depends on what the buffers hold."""
        return self._user is None or self._user() is None

    @property
    def bytes(self) -> int:
        """Size of the input buffers; what a graph computes is in its memory pool."""
        return sum(tensor.nbytes for group in self._inputs for tensor in group)

    def refusals(self) -> dict[str, str]:
        """The parts that are not replayed, each with the reason."""
        replays = {"product": self._product.refusal, "mixed product": self._mixed.refusal}
        found = replays | {solve.name: solve.refusal for solve in self._solves.values()}
        return self._refused | {name: reason for name, reason in found.items() if reason is not None}

    def evaluate(self, user: Linearization, problem: Problem, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The loss and the gradient at the problem's point, for `user`, which owns the buffers as long as it lives."""
        self._recorder.order()
        self._user = weakref.ref(user)
        for buffers, group in zip(self._inputs, _groups(problem, tensors), strict=True):
            if buffers:
                foreach_copy_(buffers, detached(group))
        return copies(self._primal()[: 1 + len(problem.weights)])

    def product(self, tangents: Sequence[Tensor]) -> list[Tensor]:
        """H t at the point evaluated last."""
        self._recorder.order()
        self._tangents.copy_(tangents)
        return copies(self._product())

    def mixed(self, tangents: Sequence[Tensor]) -> list[Tensor | None]:
        """(df/dlambda)^T t at the point evaluated last."""
        self._recorder.order()
        self._tangents.copy_(tangents)
        found = iter(copies(self._mixed()))
        return [next(found) if there else None for there in self.functions.partition.mixed.outputs]

    def solve(self, solver: Solver) -> Solve | None:
        """The recorded solve of `solver`; None, with the reason noted, if its terms have to go one by one."""
        name = type(solver).__name__
        if solver.preconditioner is not None:
            self._refused[name] = "its preconditioner is the caller's code, whose changes a graph would not see"
            return None
        if not isinstance(solver, Hashable):
            self._refused[name] = "it is not hashable, so a change of it would go unnoticed"
            return None
        self._recorder.order()
        key = solver, backend.select(self.layout.device)[0]
        if key not in self._solves:
            try:
                self._solves[key] = Solve(solver, self._traced, self._tangents, self._recorder, self._tally)
            except torch.OutOfMemoryError as error:
                self._refused[name] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
                return None
            if len(self._solves) > _MOST_SOLVES:
                self._recorder.retire()
                self._solves.popitem(last=False)
        self._solves.move_to_end(key)
        return self._solves[key]


class Solve:
    """All terms of a solver at once, on one problem's buffers."""

    def __init__(self, solver: Solver, operator: LinearMap, tangents: FlatVector, recorder: Recorder, tally: Tally):
        iteration = self._iteration = solver.allocate(operator.layout)
        self.name = type(solver).__name__
        self.schedule = Schedule()
        self.distrust: str | None = None
        self._tangents = tangents

        def all_terms() -> Sequence[Tensor]:
            iteration.start(tangents.tangents)
            while iteration.steps < iteration.limit:
                iteration.step(operator.product(iteration.direction.tangents))
            return [iteration.finish()]

        self._replay = Replay(recorder, tally, all_terms)

    @property
    def refusal(self) -> str | None:
        """Why the terms have to go one by one, if they do."""
        return self.distrust or self._replay.refusal

    def run(self, v: Sequence[Tensor], estimate: SpectralEstimate | None) -> Solved | None:
        """The finished solve for the right-hand side `v`; None if it cannot be recorded."""
        iteration = self._iteration
        iteration.adapt(estimate)
        self._tangents.copy_(v)
        if not self._replay.ready():
            return None
        (figures,) = copies(self._replay())
        value = FlatVector(iteration.value.layout, iteration.value.data.clone())
        return Solved(iteration, figures, value)


class Solved(FinishedIteration):
    """A finished solve with its own value and figures; a later solve in the same buffers overwrites its direction."""

    def __init__(self, iteration: FinishedIteration, figures: Tensor, value: FlatVector):
        self.value = value
        self.direction = iteration.direction
        self.alpha, self.bounds, self.steps = iteration.alpha, iteration.bounds, iteration.steps
        self._iteration, self._figures = iteration, figures

    def finish(self) -> Tensor:
        return self._figures

    def read(self, figures: Sequence[float]) -> Outcome:
        return self._iteration.read(figures)


class CapturedLinearization(Linearization):
    """A linearization whose parts are replayed; it owns its graphs as long as it lives."""

    def __init__(self, graphs: Graphs, problem: Problem, tensors: Sequence[Tensor]):
        self.layout = graphs.layout
        self.name = problem.name
        self.graphs = graphs
        self.loss, *self.gradient = graphs.evaluate(self, problem, tensors)

    def product(self, tangents: Sequence[Tensor]) -> Sequence[Tensor]:
        return self.graphs.product(tangents)

    def mixed(self, tangents: Sequence[Tensor]) -> list[Tensor | None]:
        return self.graphs.mixed(tangents)


def _groups(problem: Problem, tensors: Sequence[Tensor]) -> list[list[Tensor]]:
    """The inputs in the order of the trace, by kind: a kind of a single dtype is copied in one launch."""
    return [problem.weights, problem.hyperparameters, list(tensors)]
