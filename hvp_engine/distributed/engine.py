"""The engine for losses that are spread over processes: another engine for this process's part, and the sums."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from hvp_engine._support.random_state import random_state_kept
from hvp_engine.differentiation.linear_map import Linearization, LinearMap
from hvp_engine.differentiation.problem import Problem
from hvp_engine.distributed.collectives import Processes, Summands, note
from hvp_engine.distributed.data_parallel import DataParallel, of_all
from hvp_engine.distributed.sharding import Held
from hvp_engine.engines import AutoEngine, Engine
from hvp_engine.solvers.base import Solver
from hvp_engine.solvers.iteration import FinishedIteration
from hvp_engine.solvers.spectrum import SpectralEstimate


class DataParallelEngine(Engine):
    """Linearizes this process's part of a :class:`DataParallel` loss by another engine, and sums over processes.

    Where the other engine chooses ("auto"), all processes take the simplest engine that one of them wants.

    Arguments:
        part: the engine for this process's part.
    """

    def __init__(self, part: Engine):
        self._part = part
        self._processes: Processes | None = None
        self.name = part.name

    def linearize(self, problem: Problem) -> Linearization:
        union = problem.loss
        assert isinstance(union, DataParallel)
        self._processes = union.processes
        weights, hyperparameters = _held(problem, union.processes)
        union.compare([*weights.wholes(problem.weights), *hyperparameters.wholes(problem.hyperparameters)])
        structure = problem.hyperparameter_structure
        part = replace(
            problem,
            loss=union.loss,
            weights=weights.full(problem.weights),
            weight_structure=problem.weight_structure.whole,
            hyperparameters=hyperparameters.full(problem.hyperparameters),
            hyperparameter_structure=None if structure is None else structure.whole,
        )
        device = problem.weights[0].device
        engine = self._part
        own: Linearization | None = None
        share = 0.0

        def compute(figures: Tensor) -> Summands:
            nonlocal own, share
            share = 1.0 if union.examples is None else union.share(problem.inputs[-1])
            if share == 0:
                return [None] * len(problem.weights), share
            with random_state_kept(device):
                own = engine.linearize(part)
            assert own.loss is not None
            figures[0], figures[1] = share * own.loss.reshape(()), share
            if isinstance(engine, AutoEngine):
                figures[2 + AutoEngine.ORDER.index(engine.engine_of(own))] = 1.0
            return own.gradient, share

        sums, figures = weights.sum(2 + len(AutoEngine.ORDER), compute)
        total = of_all(figures[1])
        gradient = [part.div_(total).to(dtype) for part, dtype in zip(sums, weights.layout.dtypes, strict=True)]
        reduced = _Reduced(problem.name, weights, hyperparameters, share / total, figures[0] / total, gradient, own)
        if own is not None and isinstance(engine, AutoEngine):
            wanted = zip(AutoEngine.ORDER, figures[2:].tolist(), strict=True)
            agreed = next(name for name, votes in wanted if votes)
            if agreed != engine.engine_of(own):
                with random_state_kept(device):
                    reduced.replace(lambda: engine.linearize_by(agreed, part))
        return reduced

    def run(
        self, operator: LinearMap, v: Sequence[Tensor], solver: Solver, estimate: SpectralEstimate | None
    ) -> FinishedIteration:
        """As any engine does; the terms count for the engine of this process."""
        iteration = super().run(operator, v, solver, estimate)
        if isinstance(operator, _Reduced) and operator.own is not None and isinstance(self._part, AutoEngine):
            self._part.credit(operator.own, iteration.steps)
        return iteration

    def report(self) -> str:
        """What the engine of this process did, and what was exchanged."""
        if self._processes is None:
            return "not used yet"
        p = self._processes
        return (
            f"{self._part.report()}\nprocess {p.rank} of {p.count}: {p.messages} messages, {p.sent / 1e6:.3g} MB sent"
        )

    def state_dict(self) -> dict[str, Any]:
        """The state of the engine of this process."""
        return self._part.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a saved state."""
        self._part.load_state_dict(state)


class _Reduced(Linearization):
    """The linearization of the mean over all processes.

    `own` is that of this process's part, which counts by `share`; None without a batch.
    """

    def __init__(
        self,
        name: str,
        weights: Held,
        hyperparameters: Held,
        share: float,
        loss: Tensor,
        gradient: Sequence[Tensor],
        own: Linearization | None,
    ):
        self.layout = weights.vector_layout
        self.name = name
        self.loss = loss
        self.gradient = gradient
        self.own = own
        self._weights, self._hyperparameters, self._share = weights, hyperparameters, share
        self._failure: BaseException | None = None

    def replace(self, make: Callable[[], Linearization]) -> None:
        """Hold what `make` makes; what it raises is raised at the next product, where the others hear of it."""
        try:
            self.own = make()
        except BaseException as error:
            self._failure = error

    def product(self, tangents: Sequence[Tensor]) -> Sequence[Tensor]:
        """H t, in the state's dtype."""

        whole = self._weights.full(tangents)

        def compute(_: Tensor) -> Summands:
            own = self._usable()
            return [None] * len(whole) if own is None else own.product(whole), self._share

        return self._weights.sum(0, compute)[0]

    def mixed(self, tangents: Sequence[Tensor]) -> list[Tensor | None]:
        """(df/dlambda)^T t; None where no process has a path."""
        whole, dtypes = self._weights.full(tangents), self._hyperparameters.layout.dtypes

        def compute(figures: Tensor) -> Summands:
            own = self._usable()
            found = [None] * len(dtypes) if own is None else own.mixed(whole)
            note(figures, found)
            return found, self._share

        sums, figures = self._hyperparameters.sum(len(dtypes), compute)
        present = figures.tolist()
        return [part.to(dtype) if there else None for part, dtype, there in zip(sums, dtypes, present, strict=True)]

    def _usable(self) -> Linearization | None:
        if self._failure is not None:
            raise self._failure
        return self.own


def _held(problem: Problem, processes: Processes) -> tuple[Held, Held]:
    structure = problem.hyperparameter_structure
    return (
        Held(processes, problem.weights, problem.weight_structure.shards),
        Held(
            processes,
            problem.hyperparameters,
            None if structure is None else structure.shards,
            problem.weights[0].device,
        ),
    )


def for_loss(loss: Callable[..., Tensor], engine: Engine) -> Engine:
    """`engine`, or what makes it an engine for a loss that is spread over processes."""
    return DataParallelEngine(engine) if isinstance(loss, DataParallel) else engine
