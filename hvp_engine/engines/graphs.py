"""A traced problem on fixed buffers, recorded piece by piece: its primal part, a product, whole solves."""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Hashable, Sequence

import torch
from torch import Tensor, fx

from hvp_engine._support.flat_vector import FlatVector, Layout, detached
from hvp_engine._support.torch_compat import foreach_copy_
from hvp_engine.differentiation.closing import Closing
from hvp_engine.differentiation.linear_map import Linearization, Work
from hvp_engine.differentiation.problem import Problem
from hvp_engine.engines.functions import Functions, TracedLinearization
from hvp_engine.engines.recording import Recorder, copies
from hvp_engine.engines.replays import Counted, Replay, Tally
from hvp_engine.engines.solves import Solve, Solved
from hvp_engine.engines.whole import CapturedHypergradient, Foreseen
from hvp_engine.ops import backend
from hvp_engine.solvers.base import Solver
from hvp_engine.solvers.batched import LEAST, MOST
from hvp_engine.solvers.spectrum import SpectralEstimate

_MOST_SOLVES = 4
"""A problem keeps this many recorded solves, the most recently used."""

_LARGEST_GROUP = 1 << 24
"""Numbers in the right-hand sides of a recorded group: its buffers, some four times as large, stay where they are."""


class Graphs:
    """The recordings of one problem's shapes, and the buffers they read.

    Raises :class:`CaptureError` if not even the primal part can be recorded.
    """

    def __init__(
        self, functions: Functions, problem: Problem, tensors: Sequence[Tensor], recorder: Recorder, tally: Tally
    ):
        self.functions = functions
        self.layout = Layout.of(problem.weights)
        counted = self._recorder = Counted(recorder, tally)
        self._inputs = [[t.detach().clone() for t in group] for group in _groups(problem, tensors)]
        self._tangents = FlatVector(self.layout)
        self._user: weakref.ref[Linearization] | None = None
        self._solves: OrderedDict[Hashable, Solve] = OrderedDict()
        self._wholes: dict[Hashable, CapturedHypergradient] = {}
        self._works: dict[Hashable, tuple[FlatVector, Replay]] = {}
        self._stale = False
        self._products: dict[int, tuple[list[Tensor], Replay]] = {}
        self._refused: dict[str, str] = {}

        # Bodies refer to the buffers, not to this object: without a cycle, buffers are freed at once.
        inputs, tangents = [tensor for group in self._inputs for tensor in group], self._tangents.tangents
        self._primal = Replay(counted, torch.no_grad()(lambda: functions.primal(*inputs)))
        traced = TracedLinearization(functions, self.layout, problem.name, self._primal.record().outputs)
        self._traced = traced
        self._product = Replay(counted, lambda: traced.product(tangents))
        tally.buffers += 1
        self._mixed = Replay(counted, lambda: [t for t in traced.mixed(tangents) if t is not None])

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
        replays |= {str(key): replay.refusal for key, (_, replay) in self._works.items()}
        replays |= {f"{count} products": replay.refusal for count, (_, replay) in self._products.items()}
        found = replays | {solve.name: solve.refusal for solve in self._solves.values()}
        found |= {whole.name: whole.refusal for whole in self._wholes.values()}
        return self._refused | {name: reason for name, reason in found.items() if reason is not None}

    def evaluate(self, user: Linearization, problem: Problem, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The loss and the gradient at the problem's point, for `user`, which owns the buffers as long as it lives."""
        self._recorder.order()
        self._user = weakref.ref(user)
        self._load(problem, tensors)
        return copies(self._primal()[: 1 + len(problem.weights)])

    def foresee(self, train: Problem, val: Problem, solver: Solver, gradient: fx.GraphModule) -> Foreseen | None:
        """The whole hypergradient, if it can be recorded; it leaves the primal part to who asks for more."""
        self._recorder.order()
        tensors, batch = train.split[0], val.split[0]
        key = solver, id(gradient), backend.select(self.layout.device)[0]
        whole = self._wholes.get(key)
        if whole is None:
            self._recorder.retire()  # of one that is replaced: each keeps the vectors of a solve
            self._wholes.clear()
            try:
                record = self._recorder.record
                whole = CapturedHypergradient(
                    solver, self.functions, self.layout, train.name, self._inputs, gradient, batch, record
                )
            except torch.OutOfMemoryError as error:
                self._refuse("whole hypergradient", error)
                return None
            self._wholes[key] = whole
        if whole.refusal is not None:
            return None
        self._load(train, tensors)
        return whole.run(train, val, solver, batch)

    def adopt(self, user: Linearization) -> None:
        """`user` is the linearization at what :meth:`foresee` has loaded."""
        self._user, self._stale = weakref.ref(user), True

    def _load(self, problem: Problem, tensors: Sequence[Tensor]) -> None:
        self._stale = False
        for buffers, group in zip(self._inputs, _groups(problem, tensors), strict=True):
            if buffers:
                foreach_copy_(buffers, detached(group))

    def _in_order(self) -> None:
        """Before anything is replayed that reads what the primal part gives."""
        self._recorder.order()
        if self._stale:
            self._primal()
            self._stale = False

    def product(self, tangents: Sequence[Tensor]) -> list[Tensor]:
        """H t at the point evaluated last."""
        self._in_order()
        self._tangents.copy_(tangents)
        return copies(self._product())

    @property
    def batches(self) -> bool:
        """Whether :meth:`products` does more than one product after another."""
        return self._traced.batches

    def products(self, stacked: Sequence[Tensor]) -> Sequence[Tensor]:
        """H t for several t. A recording serves all counts up to the next multiple of :data:`LEAST`."""
        self._in_order()
        count, traced = len(stacked[0]), self._traced
        size = -(-count // LEAST) * LEAST
        if count > MOST or size * self.layout.size > _LARGEST_GROUP:
            return traced.products(stacked)
        if size not in self._products:
            try:
                buffers = [torch.zeros(size, *part.shape[1:], dtype=part.dtype, device=part.device) for part in stacked]
            except torch.OutOfMemoryError as error:
                self._refuse("several products", error)
                return traced.products(stacked)
            self._products[size] = buffers, Replay(self._recorder, lambda: traced.products(buffers))
        targets, replay = self._products[size]
        for target, part in zip(targets, stacked, strict=True):
            target[:count].copy_(part)
        return copies([product[:count] for product in replay()])

    def mixed(self, tangents: Sequence[Tensor]) -> list[Tensor | None]:
        """(df/dlambda)^T t at the point evaluated last."""
        self._in_order()
        self._tangents.copy_(tangents)
        found = iter(copies(self._mixed()))
        return [next(found) if there else None for there in self.functions.partition.mixed.outputs]

    def at_once(self, key: Hashable, work: Work, vector: FlatVector) -> Sequence[Tensor]:
        """What `work` makes of products at the point evaluated last; the first time compared with what it makes when it
        is not recorded."""
        self._in_order()
        traced = self._traced
        known = self._works.get(key)
        if known is None:
            try:
                buffer = FlatVector(self.layout)
            except torch.OutOfMemoryError as error:
                self._refuse(str(key), error)
                return work(traced.product, vector)
            known = self._works[key] = buffer, Replay(self._recorder, lambda: work(traced.product, buffer))
            buffer.data.copy_(vector.data)
            known[1].check(self.functions.partition.dtypes)
        known[0].data.copy_(vector.data)
        return copies(known[1]())

    def solve(self, solver: Solver, count: int = 1) -> Solve | None:
        """The recorded solve of `solver` for so many right-hand sides that advance together; None, with the reason
        noted, if its terms have to go one by one."""
        name = type(solver).__name__
        if solver.preconditioner is not None:
            self._refused[name] = "its preconditioner is the caller's code, whose changes a graph would not see"
            return None
        if not isinstance(solver, Hashable):
            self._refused[name] = "it is not hashable, so a change of it would go unnoticed"
            return None
        if count > 1 and count * self.layout.size > _LARGEST_GROUP:
            self._refused[f"{name} for {count} right-hand sides"] = "their buffers would be too large to keep"
            return None
        self._in_order()
        key = solver, count, backend.select(self.layout.device)[0]
        if key not in self._solves:
            try:
                targets = [self._tangents] if count == 1 else [FlatVector(self.layout) for _ in range(count)]
                self._solves[key] = Solve(solver, self._traced, targets, self._recorder.record)
            except torch.OutOfMemoryError as error:
                self._refuse(name, error)
                return None
            if len(self._solves) > _MOST_SOLVES:
                self._recorder.retire()
                self._solves.popitem(last=False)
        self._solves.move_to_end(key)
        return self._solves[key]

    def _refuse(self, name: str, error: Exception) -> None:
        self._refused[name] = f"{type(error).__name__}: {str(error).splitlines()[0]}"

    def solved(
        self, solver: Solver, vs: Sequence[Sequence[Tensor]], estimate: SpectralEstimate | None
    ) -> tuple[Solve | None, list[Solved] | None]:
        """The recorded solve and what it gives; None where it cannot be recorded or is not trusted."""
        solve = self.solve(solver, len(vs))
        return solve, None if solve is None or solve.distrust else solve.run(vs, estimate)


class CapturedLinearization(Linearization):
    """A linearization whose parts are replayed; it owns its graphs as long as it lives.

    Attributes:
        foreseen: the hypergradient that it is part of, if that has been made already.
    """

    def __init__(self, graphs: Graphs, problem: Problem, tensors: Sequence[Tensor], foreseen: Foreseen | None = None):
        self.layout = graphs.layout
        self.name = problem.name
        self.graphs = graphs
        self.foreseen = foreseen
        if foreseen is None:
            self.loss, *self.gradient = graphs.evaluate(self, problem, tensors)
        else:
            graphs.adopt(self)
            self.loss, self.gradient = foreseen.loss, foreseen.train_gradient

    def closing(self, x: Sequence[Tensor]) -> Closing:
        if self.foreseen is not None and self.foreseen.follows(x):
            return self.foreseen.closing
        return super().closing(x)

    def product(self, tangents: Sequence[Tensor]) -> Sequence[Tensor]:
        return self.graphs.product(tangents)

    def at_once(self, key: Hashable, work: Work, vector: FlatVector) -> Sequence[Tensor]:
        return self.graphs.at_once(key, work, vector)

    @property
    def batches(self) -> bool:
        return self.graphs.batches

    def products(self, stacked: Sequence[Tensor]) -> Sequence[Tensor]:
        return self.graphs.products(stacked)

    def mixed(self, tangents: Sequence[Tensor]) -> list[Tensor | None]:
        return self.graphs.mixed(tangents)


def _groups(problem: Problem, tensors: Sequence[Tensor]) -> list[list[Tensor]]:
    """The inputs in the order of the trace, by kind: a kind of a single dtype is copied in one launch."""
    return [problem.weights, problem.hyperparameters, list(tensors)]
