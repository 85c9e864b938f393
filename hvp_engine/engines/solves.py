"""Solves that are recorded in pieces, between which the host looks whether to go on."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from functools import partial

from torch import Tensor

from hvp_engine._support.flat_vector import FlatVector
from hvp_engine.differentiation.linear_map import LinearMap
from hvp_engine.differentiation.self_check import Schedule
from hvp_engine.engines.base import advance_together
from hvp_engine.engines.recording import Body, CaptureError, Recording, copies
from hvp_engine.solvers.base import Solver
from hvp_engine.solvers.iteration import FinishedIteration, Iteration, Outcome
from hvp_engine.solvers.spectrum import SpectralEstimate

Record = Callable[[Body], Recording]
"""Makes a recording of a body."""

_END = "end"


def recordable(solver: Solver) -> bool:
    """Whether a solver has terms that may be recorded, runs no code of the caller's, and tells of its changes."""
    iterates = type(solver).allocate is not Solver.allocate
    return iterates and solver.preconditioner is None and isinstance(solver, Hashable)


class Pieces:
    """Recordings of the terms of a solve, or of several of one solver that advance together.

    A loop that makes all its products is one piece. One that can stop early ends a piece where the host looks, and
    pieces that begin at the same phase and make as many products are the same: 1,000 products of conjugate gradients
    take some ten recordings. All are made before the first solve, since to record a piece runs it.

    Arguments:
        iterations: what is solved.
        begin: starts all iterations.
        term: makes a product for each, and its step.
        end: finishes all; its results are those of :meth:`run`.
    """

    def __init__(
        self,
        iterations: Sequence[Iteration],
        begin: Callable[[], None],
        term: Callable[[], None],
        end: Body,
        record: Record,
    ):
        self._iterations = iterations
        self._begin, self._term, self._end, self._record = begin, term, end, record
        self._recordings: dict[Hashable, Recording] = {}
        self.refusal: str | None = None

    def ready(self) -> bool:
        """Whether everything is recorded; tries to record it if that has not been tried."""
        if not self._recordings and self.refusal is None:
            try:
                self._recordings = self._recorded()
            except CaptureError as error:
                self.refusal = str(error)
        return self.refusal is None

    def run(self) -> Sequence[Tensor]:
        """Replay until all iterations have finished."""
        steps = 0
        while True:
            key, steps = self._piece(steps)
            recording = self._recordings[key]
            recording.replay()
            for one in self._iterations:
                one.seek(steps)
            if _END not in self._recordings:
                return recording.outputs
            if steps >= self._limit or all(one.finished() for one in self._iterations):
                self._recordings[_END].replay()
                return self._recordings[_END].outputs

    @property
    def _limit(self) -> int:
        return self._iterations[0].limit

    def _piece(self, begin: int) -> tuple[Hashable, int]:
        """What the piece that begins after so many steps is known by, and after how many it ends."""
        first = self._iterations[0]
        first.seek(begin)
        end = min(first.next_look(), self._limit)
        return (first.phase if begin else "start", end - begin), end

    def _recorded(self) -> dict[Hashable, Recording]:
        begin, found = 0, dict[Hashable, Recording]()
        while begin < self._limit or not found:
            key, end = self._piece(begin)
            if key not in found:
                found[key] = self._record(partial(self._body, begin, end))
            begin = end
        if len(found) > 1:
            found[_END] = self._record(self._end)
        return found

    def _body(self, begin: int, end: int) -> Sequence[Tensor]:
        if begin == 0:
            self._begin()
        for one in self._iterations:
            one.seek(begin)
        for _ in range(begin, end):
            self._term()
        return self._end() if (begin, end) == (0, self._limit) else []


class Solve:
    """All terms of a solver on one problem's buffers, for one right-hand side, or for some that advance together."""

    def __init__(self, solver: Solver, operator: LinearMap, targets: Sequence[FlatVector], record: Record):
        self.name = type(solver).__name__ + (f" for {len(targets)} right-hand sides" if len(targets) > 1 else "")
        self.schedule = Schedule()
        self.distrust: str | None = None
        iterations = self._iterations = [solver.allocate(operator.layout) for _ in targets]
        self._targets = targets

        def begin() -> None:
            for iteration, target in zip(iterations, targets, strict=True):
                iteration.start(target.tangents)

        def end() -> list[Tensor]:
            return [iteration.finish() for iteration in iterations]

        self._pieces = Pieces(iterations, begin, partial(advance_together, iterations, operator), end, record)

    @property
    def refusal(self) -> str | None:
        """Why the terms have to go one by one, if they do."""
        return self.distrust or self._pieces.refusal

    def run(self, vs: Sequence[Sequence[Tensor]], estimate: SpectralEstimate | None) -> list[Solved] | None:
        """The finished solves for the right-hand sides `vs`; None if they cannot be recorded."""
        for iteration, target, v in zip(self._iterations, self._targets, vs, strict=True):
            iteration.adapt(estimate)
            target.copy_(v)
        if not self._pieces.ready():
            return None
        figures = copies(self._pieces.run())
        return list(map(Solved, self._iterations, figures))


class Solved(FinishedIteration):
    """A finished solve with its own value and figures; a later solve in the same buffers overwrites its direction."""

    def __init__(self, iteration: FinishedIteration, figures: Tensor):
        self.value = FlatVector(iteration.value.layout, iteration.value.data.clone())
        self.direction = iteration.direction
        self.alpha, self.bounds, self.steps = iteration.alpha, iteration.bounds, iteration.steps
        self._iteration, self._figures = iteration, figures

    def finish(self) -> Tensor:
        return self._figures

    def read(self, figures: Sequence[float]) -> Outcome:
        outcome = self._iteration.read(figures)
        self.explanation = self._iteration.explanation
        return outcome
