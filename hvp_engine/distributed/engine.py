"""The engine for data-parallel losses: another engine for the batch of this process, and sums over processes."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from hvp_engine._support.random_state import random_state_kept
from hvp_engine.differentiation.linear_map import Linearization, LinearMap
from hvp_engine.differentiation.problem import Problem
from hvp_engine.distributed.collectives import Processes, Summands, note
from hvp_engine.distributed.data_parallel import DataParallel, total_examples
from hvp_engine.distributed.sharding import ShardedList
from hvp_engine.engines import AutoEngine, Engine
from hvp_engine.solvers.base import Solver
from hvp_engine.solvers.iteration import FinishedIteration
from hvp_engine.solvers.spectrum import SpectralEstimate


class DataParallelEngine(Engine):
    """Linearizes a :class:`DataParallel` loss: by another engine for this process's batch, then by sums over processes.

    If the other engine is "auto", all processes agree on the simplest engine that any of them has chosen.

    Arguments:
        part: the engine for this process's batch.
    """

    def __init__(self, part: Engine):
        self._part = part
        self._processes: Processes | None = None
        self.name = part.name

    def linearize(self, problem: Problem) -> Linearization:
        union = problem.loss
        assert isinstance(union, DataParallel)
        self._processes = union.processes
        weights, hyperparameters = _sharded_lists(problem, union.processes)
        union.compare([*weights.replicated(problem.weights), *hyperparameters.replicated(problem.hyperparameters)])
        structure = problem.hyperparameter_structure
        part = replace(
            problem,
            loss=union.loss,
            weights=weights.gathered(problem.weights),
            weight_structure=problem.weight_structure.whole,
            hyperparameters=hyperparameters.gathered(problem.hyperparameters),
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
        total = total_examples(figures[1])
        gradient = [part.div_(total).to(dtype) for part, dtype in zip(sums, weights.layout.dtypes, strict=True)]
        reduced = _MeanLinearization(
            problem.name, weights, hyperparameters, share / total, figures[0] / total, gradient, own
        )
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
        """As every engine does; the terms are credited to the engine of this process."""
        assert self._processes is not None
        start = time.perf_counter()
        with self._processes.ahead():
            iteration = super().run(operator, v, solver, estimate)
        if isinstance(operator, _MeanLinearization) and operator.own is not None and isinstance(self._part, AutoEngine):
            self._part.credit(operator.own, iteration.steps, time.perf_counter() - start)
        return iteration

    def report(self) -> str:
        """What the engine of this process did, and how much the processes have exchanged."""
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


class _MeanLinearization(Linearization):
    """The linearization of the mean loss over all processes.

    `own` is the linearization of this process's loss, None if its batch is empty; `share` is its weight in the mean.
    """

    def __init__(
        self,
        name: str,
        weights: ShardedList,
        hyperparameters: ShardedList,
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
        """Take the linearization that `make` returns; an error in it is raised at the next product, which tells the
        other processes."""
        try:
            self.own = make()
        except BaseException as error:
            self._failure = error

    def product(self, tangents: Sequence[Tensor]) -> Sequence[Tensor]:
        """H t, in the state's dtype."""
        whole = self._weights.gathered(tangents)

        def compute(_: Tensor) -> Summands:
            own = self._usable()
            return [None] * len(whole) if own is None else own.product(whole), self._share

        return self._weights.sum(0, compute)[0]

    def mixed(self, tangents: Sequence[Tensor]) -> list[Tensor | None]:
        """(df/dlambda)^T t; None for a hyperparameter that the loss of no process reaches."""
        whole, dtypes = self._weights.gathered(tangents), self._hyperparameters.layout.dtypes

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


def _sharded_lists(problem: Problem, processes: Processes) -> tuple[ShardedList, ShardedList]:
    structure = problem.hyperparameter_structure
    return (
        ShardedList(processes, problem.weights, problem.weight_structure.shards),
        ShardedList(
            processes,
            problem.hyperparameters,
            None if structure is None else structure.shards,
            problem.weights[0].device,
        ),
    )


def for_loss(loss: Callable[..., Tensor], engine: Engine) -> Engine:
    """`engine`, wrapped in a :class:`DataParallelEngine` if the loss is a :class:`DataParallel`."""
    return DataParallelEngine(engine) if isinstance(loss, DataParallel) else engine
