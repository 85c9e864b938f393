"""Whole hypergradients by native programs: both gradients, the solve and what follows it, on memory that stays.

What :mod:`hvp_engine.engines.whole` is on a GPU. A call whose losses are traced, checked and calm runs none of the
caller's code and draws nothing, so it needs no turn of its own and leaves nothing to put back. If the memory is small
it is kept, and the next call of the same kind has only to bind its tensors: whether they are laid out as the trace saw
them, the extension sees on the way.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from hvp_engine._support.flat_vector import Layout, detached
from hvp_engine._support.torch_compat import below_autograd
from hvp_engine.differentiation.gradient import Gradient
from hvp_engine.differentiation.linear_map import LinearMap
from hvp_engine.differentiation.native.closing import closing_graph
from hvp_engine.differentiation.native.graph_program import BoundGraph, GraphProgram
from hvp_engine.differentiation.native.partition_programs import BoundPrograms, PartOnce
from hvp_engine.differentiation.native.program import Rehearsed
from hvp_engine.differentiation.problem import Problem
from hvp_engine.engines.base import Parts, begin, make_steps
from hvp_engine.engines.functions import Functions, TracedLinearization
from hvp_engine.engines.gradients import Known
from hvp_engine.ops import backend
from hvp_engine.solvers.base import Solver
from hvp_engine.solvers.iteration import FinishedIteration, Iteration
from hvp_engine.solvers.spectrum import SpectralEstimate

_LARGEST = 1 << 22
"""Elements of memory that is kept between calls; more is the process's again, as allocating it takes a small part of
the time of such a call. Of a multilayer perceptron with 615,000 weights and a decay for each, which has 3.3 million, a
call takes 0.96 times as long on memory that stays."""


class NativeWhole:
    """A hypergradient's programs on memory of their own, which is also what runs the terms of its solve.

    Arguments:
        train, val: problems as all those that follow, by what they look like.
        functions, gradient: the settled trace of the training loss, and the settled gradient of the validation loss.
        primal, program: the program of each.
    """

    @classmethod
    def of(
        cls, train: Problem, val: Problem, solver: Solver, functions: Functions, gradient: Known
    ) -> NativeWhole | None:
        """None where a part is not made by a program, or draws, or where it would keep too much."""
        primal, program = functions.primal, gradient.program
        if not isinstance(primal, PartOnce) or primal.program is None or not isinstance(program, GraphProgram):
            return None
        if program.random or not (program.sees_inputs and primal.program.sees_inputs):
            return None
        if program.elements + primal.program.elements > _LARGEST:
            return None
        return cls(train, val, solver, functions, gradient, primal.program, program)

    def __init__(
        self,
        train: Problem,
        val: Problem,
        solver: Solver,
        functions: Functions,
        gradient: Known,
        primal: GraphProgram,
        program: GraphProgram,
    ):
        self._functions, self._gradient, self._program = functions, gradient, program
        self._solver, self._name = solver, train.name
        self._losses, self._look = (train.loss, val.loss), _look(train, val)
        assert gradient.surroundings is not None
        self._read_by_train, self._read_by_val = functions.surroundings, gradient.surroundings
        self._layout = Layout.of(train.weights)
        self._val, self._primal = program.bind(handed_out=[0]), primal.bind(handed_out=[0])
        self._holders: list[BoundGraph | BoundPrograms] = [self._val, self._primal]
        self._zeros = [torch.zeros_like(weight) for weight in detached(train.weights)]
        self._native: BoundPrograms | None = None
        self._closing: BoundGraph | None = None
        self._solved: Rehearsed | None = None
        self._finishing: BoundGraph | None = None
        self._in_steps = solver.estimates_spectrum
        self._lock = threading.Lock()

    def begin(self, train: Problem, val: Problem, solver: Solver) -> bool:
        """Bind the problems' tensors, for the calling thread alone until :meth:`end`; false, with nothing bound, if it
        cannot be used for them now. With them it counts as a call of both losses."""
        if not self._lock.acquire(blocking=False):
            return False
        functions, gradient = self._functions, self._gradient
        if (
            self._losses[0] is train.loss
            and self._losses[1] is val.loss
            and self._solver is solver
            and functions.distrust is None
            and gradient.program is self._program
            and self._look == _look(train, val)
            and self._read_by_train.settled(functions.schedule)
            and self._read_by_val.settled(gradient.schedule)
            and self._val.take([*train.weights, *train.hyperparameters, *val.split[0]])
            and self._primal.take([*train.weights, *train.hyperparameters, *train.split[0]])
        ):
            functions.schedule.calls += 1
            gradient.schedule.calls += 1
            return True
        self.end()
        return False

    def end(self) -> None:
        """Let the problems' tensors go."""
        for holder in self._holders:
            holder.let_go()
        self._lock.release()

    def differentiated(self) -> tuple[Gradient, TracedLinearization]:
        """The validation gradient and the training loss's linearization at what is bound."""
        with below_autograd():
            loss, *found = [one if one is None else one.detach() for one in self._val.run()]
            values = detached(_present(self._primal.run()))
        count = len(self._zeros)
        linearization = TracedLinearization(self._functions, self._layout, self._name, values)
        if self._native is None:
            self._native = linearization.native
            self._holders += [] if self._native is None else [self._native]
        else:
            linearization.native = self._native
            self._native.move(values[1 + count :])
        if self._closing is None:
            closing = self._functions.closing(linearization.gradient)
            self._closing = None if closing is None else closing.bind(handed_out=range(len(closing.seen)))
            self._holders += [] if self._closing is None else [self._closing]
        linearization.closed_by = self._closing
        assert loss is not None
        return Gradient(_scalar(loss), self._filled(found), found[count:]), linearization

    def at_once(self) -> Parts | None:
        if self._in_steps:
            return None
        count, iteration = len(self._zeros), self._vectors
        with below_autograd():
            val_loss, *found = self._val.run()
            train_loss, *values = _present(self._primal.run())
            gradient, residuals = values[:count], values[count:]
            if self._solved is None and not self._rehearse(gradient, residuals, found[count:]):
                self._in_steps = True
                return None
            assert self._solved is not None and self._finishing is not None and val_loss is not None
            iteration.start(self._filled(found))
            iteration.steps = iteration.limit - 1
            iteration.step(self._solved(residuals))
            outcome = iteration.unscaled()
            if outcome is None or outcome.failed:
                return None
            mixed = map(residuals.__getitem__, self._functions.partition.mixed.residuals)
            parts = self._finishing(*mixed, *iteration.value.views, *gradient, self._alpha, *_present(found[count:]))
            *results, change, norm = _present(parts)
            change, norm = change.double(), norm.double()
        solution = iteration.solution(outcome, iteration.steps, self._solver.damping)
        return Parts(_scalar(train_loss), _scalar(val_loss), results[count:], results[:count], solution, norm, change)

    def _rehearse(self, gradient: list[Tensor], residuals: list[Tensor], direct: list[Tensor | None]) -> bool:
        """Make what :meth:`at_once` needs; false if the solve has to be made in steps."""
        functions, iteration = self._functions, self._vectors
        mixed, programs = functions.partition.mixed, functions.native
        if programs is None or not iteration.limit or not all(mixed.outputs):
            return False
        iteration.adapt(None)
        graph, accumulation = closing_graph(mixed, gradient, direct), iteration.accumulation
        program = programs.timed(lambda: GraphProgram(graph, functions.partition.dtypes))[0]
        if program is None or accumulation is None:
            return False
        steps = range(iteration.limit - 1)
        self._solved = programs.rehearsed(residuals, accumulation, self._solver.damping, steps)
        self._finishing = program.bind(handed_out=range(len(program.seen)))
        self._holders.append(self._finishing)
        self._alpha = gradient[0].new_tensor(iteration.alpha)
        return self._solved is not None

    @cached_property
    def _vectors(self) -> Iteration:
        """The solver's, which stay."""
        iteration = self._solver.allocate(self._layout)
        iteration.taken_back = _stays
        return iteration

    def _filled(self, found: Sequence[Tensor | None]) -> list[Tensor]:
        """The gradient by the weights."""
        return [zero if part is None else part for part, zero in zip(found, self._zeros, strict=False)]

    def run(
        self, operator: LinearMap, v: Sequence[Tensor], solver: Solver, estimate: SpectralEstimate | None
    ) -> FinishedIteration:
        """The terms; in vectors that stay as well, if this is the solver that they were made for."""
        if solver is not self._solver:
            return make_steps(begin(operator, v, solver, estimate), operator, solver.damping)
        self._vectors.adapt(estimate)
        self._vectors.start(v)
        return make_steps(self._vectors, operator, solver.damping)

    def run_all(
        self, operator: LinearMap, vs: Sequence[Sequence[Tensor]], solver: Solver, estimate: SpectralEstimate | None
    ) -> Iterable[FinishedIteration]:
        """One after another, each to be read before the next."""
        return (self.run(operator, v, solver, estimate) for v in vs)


def _present(tensors: Sequence[Tensor | None]) -> list[Tensor]:
    return [tensor for tensor in tensors if tensor is not None]


def _scalar(loss: Tensor) -> Tensor:
    """The loss, which may be an argument itself, on its own."""
    loss = loss.detach() if loss.requires_grad else loss
    return loss.reshape(()) if loss.dim() else loss


def _stays(iteration: Iteration) -> None:
    """Where it is."""


def _look(train: Problem, val: Problem) -> tuple[Any, ...]:
    """What is no tensor in the arguments of both losses, and what decides how programs run."""
    others = train.split[1:], val.split[1:]
    types = *map(type, others[0][0]), *map(type, others[1][0])  # 1 and True are equal
    structures = train.weight_structure, train.hyperparameter_structure
    return *structures, *others, types, torch.get_num_threads(), backend.CHOICE.get()
