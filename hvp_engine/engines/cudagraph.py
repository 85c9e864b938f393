"""The cudagraph engine: traced parts and whole solves, recorded as CUDA graphs and replayed."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterable, Sequence
from itertools import chain

import torch
from torch import Tensor, fx

from hvp_engine._support.flat_vector import Layout
from hvp_engine._support.random_state import random_state_kept
from hvp_engine.differentiation.gradient import Gradient
from hvp_engine.differentiation.linear_map import Linearization, LinearMap
from hvp_engine.differentiation.problem import Problem
from hvp_engine.differentiation.self_check import difference, probe
from hvp_engine.differentiation.trace.partial_evaluation import Partition
from hvp_engine.engines.base import side_by_side
from hvp_engine.engines.compiled import CompiledFunctions, estimated_seconds
from hvp_engine.engines.functions import Functions, Refused, TracedLinearization
from hvp_engine.engines.gradients import Gradients
from hvp_engine.engines.graphs import CapturedLinearization, Graphs
from hvp_engine.engines.recording import CaptureError, CudaRecorder, Recorder
from hvp_engine.engines.replays import Counted, Tally
from hvp_engine.engines.solves import Solve, Solved, recordable
from hvp_engine.engines.surroundings import Surroundings
from hvp_engine.engines.traced import LinearizedEngine
from hvp_engine.engines.whole import CapturedGradient, CapturedHypergradient, Foreseen
from hvp_engine.errors import BackendError, TraceError
from hvp_engine.solvers.base import Solver
from hvp_engine.solvers.batched import MOST, pays
from hvp_engine.solvers.iteration import FinishedIteration
from hvp_engine.solvers.spectrum import SpectralEstimate


class CudaGraphEngine(LinearizedEngine):
    """Traces like the linearized engine, then records the primal part, a product, the mixed product and all terms of a
    solve as CUDA graphs, each replayed by one launch.

    Weights, hyperparameters, batch and right-hand side are copied into buffers that the graphs read, the solver's
    step is set in device memory, and results are copied out, so later calls do not change them. Random layers draw new
    masks for every call, one mask for all terms of a solve.

    A problem that cannot be recorded falls back to eager; if only a solver's loop cannot (it waits for the device, it
    has a preconditioner), its terms go one by one. :meth:`report` says which and why. As with the linearized engine,
    the first call of each problem and, more and more rarely, later ones are checked against eager. So is each recorded
    solve, also at its second call, against one that goes term by term. A loop that can stop early is recorded in
    pieces, between which the host looks whether to go on. Several right-hand sides of a small problem advance together.

    A :class:`~hvp_engine.Tuner` whose hypergradients this engine makes has its training and hyper steps recorded, too.

    From the second call on a whole hypergradient is one recording, if the solver needs no estimate of the spectrum;
    otherwise the gradient of the validation loss, the primal part, the estimate, the solve and the mixed product are.

    Pays off for launch-bound problems: small batches, many layers. Memory: a copy of all inputs, and for each shape the
    intermediate results of its parts, twice with whole hypergradients. A linearization in use keeps its buffers;
    another one then gets new buffers.

    Arguments:
        most_shapes: recorded problems to keep, the most recently used; each new shape is recorded anew.
        linearized: an engine whose traces are reused where it has them.
        compile_budget_s: seconds that compiling one problem may be expected to take: its parts then go through
            inductor as with the compiled engine before they are recorded, so that a term has fewer kernels. 0 never
            compiles.
        recorder: what makes the recordings.
    """

    name = "cudagraph"

    def __init__(
        self,
        most_shapes: int = 8,
        linearized: LinearizedEngine | None = None,
        compile_budget_s: float = 0.0,
        recorder: type[Recorder] = CudaRecorder,
    ):
        if isinstance(most_shapes, bool) or not isinstance(most_shapes, int) or most_shapes < 1:
            raise ValueError(f"most_shapes: expected an int >= 1; got {most_shapes!r}")
        super().__init__(None if linearized is None else linearized._eager)
        self.most_shapes = most_shapes
        self.compile_budget_s = compile_budget_s
        self.tally = Tally()
        self._not_compiled: set[str] = set()
        self._linearized = linearized
        self._recorder = recorder
        self._kept: list[Graphs] = []
        self._foreseen: Foreseen | None = None
        self.gradients = Gradients(self._captured_gradient, "CUDA graphs", recorder.missing, most_shapes)

    def linearize(self, problem: Problem) -> Linearization:
        linearization = super().linearize(problem)
        if linearization.fallback is not None:  # what is not trusted is not used again
            self._kept = [graphs for graphs in self._kept if graphs.functions.distrust is None]
        return linearization

    def foresee(self, train: Problem, val: Problem, solver: Solver) -> None:
        """From the second call on, where nothing is checked then, and no estimate comes between. Not with random
        numbers, which would be drawn again where more is asked for than was foreseen."""
        self._foreseen = None
        functions, settled = self.known(train), self.gradients.settled(val)
        gradient = None if settled is None else settled.program
        if functions is None or functions.distrust or not isinstance(gradient, CapturedGradient):
            return
        if gradient.random or not functions.calm:
            return
        if functions.schedule.next_is_due() or solver.estimates_spectrum or not recordable(solver):
            return
        with contextlib.suppress(CaptureError, torch.OutOfMemoryError):  # linearize meets it again, and says so
            graphs = self._graphs_of(functions, train, train.split[0])
            self._foreseen = graphs.foresee(train, val, solver, gradient.graph)

    def gradient(self, problem: Problem) -> Gradient:
        if self._foreseen is not None and self._foreseen.val is problem:
            self.gradients.counted(problem)
            return self._foreseen.gradient
        return super().gradient(problem)

    def run(
        self, operator: LinearMap, v: Sequence[Tensor], solver: Solver, estimate: SpectralEstimate | None
    ) -> FinishedIteration:
        """All terms by few replays, or one by one if that is impossible."""
        if not isinstance(operator, CapturedLinearization):
            return super().run(operator, v, solver, estimate)
        return self._solved(operator, [v], solver, estimate)[0]

    def run_all(
        self, operator: LinearMap, vs: Sequence[Sequence[Tensor]], solver: Solver, estimate: SpectralEstimate | None
    ) -> Iterable[FinishedIteration]:
        if not isinstance(operator, CapturedLinearization) or not pays(operator, len(vs)):
            return super().run_all(operator, vs, solver, estimate)
        groups = (vs[start : start + MOST] for start in range(0, len(vs), MOST))
        return chain.from_iterable(self._solved(operator, group, solver, estimate) for group in groups)

    def _solved(
        self,
        operator: CapturedLinearization,
        vs: Sequence[Sequence[Tensor]],
        solver: Solver,
        estimate: SpectralEstimate | None,
    ) -> Sequence[FinishedIteration]:
        """The finished solves for right-hand sides that advance together."""
        foreseen = operator.foreseen
        solve: Solve | CapturedHypergradient | None
        solved: Sequence[Solved] | None
        if foreseen is not None and len(vs) == 1 and foreseen.is_of(vs[0], solver):
            solve, solved = foreseen.whole, [foreseen.solved]
        else:
            solve, solved = operator.graphs.solved(solver, vs, estimate)
        if solve is None or not solved:
            return self._term_by_term(operator, vs, solver, estimate)
        due = solve.schedule.due()
        if not due and solve.schedule.calls != 2:  # 2: the first with values other than recorded
            return solved
        iterations = self._term_by_term(operator, vs, solver, estimate)
        one_by_one = [Solved(iteration, iteration.finish()) for iteration in iterations]
        ours, theirs = ([view for one in side for view in one.value.views] for side in (solved, one_by_one))
        if foreseen is not None and solve is foreseen.whole:
            mixed = operator.mixed(foreseen.solved.value.in_dtypes())
            ours += [-term for term in foreseen.closing.indirect if term is not None]
            theirs += [term for term in mixed if term is not None]
        found = difference(ours, theirs, operator.graphs.functions.partition.dtypes)
        if found is None:
            return solved
        solve.distrust = f"its graph gives a result that differs by {found:.2g} (relative)"
        warnings.warn(f"{solve.name} goes term by term from now on: {solve.distrust}", stacklevel=5)
        return one_by_one

    def _term_by_term(
        self, operator: LinearMap, vs: Sequence[Sequence[Tensor]], solver: Solver, estimate: SpectralEstimate | None
    ) -> list[FinishedIteration]:
        if len(vs) == 1:
            return [super().run(operator, vs[0], solver, estimate)]
        return list(side_by_side(operator, vs, solver, estimate))

    def forget(self, problem: Problem) -> None:
        """Drop what was recorded of a problem of these shapes: graphs, buffers and pools, once nothing uses them."""
        functions = self._cache.pop(problem.signature, None)
        self._kept = [graphs for graphs in self._kept if graphs.functions is not functions]

    def missing(self, device: torch.device) -> str | None:
        """Why this engine cannot do more than eager does on `device`, or None if it can."""
        return self._recorder.missing(device)

    def recorder(self, device: torch.device) -> Counted | None:
        return None if self.missing(device) else Counted(self._recorder(device), self.tally)

    def report(self) -> str:
        """What was recorded, what was not, and why."""
        kept, inputs = len(self._kept), sum(graphs.bytes for graphs in self._kept) / 1e6
        lines = [
            f"{super().report()}; {self.tally.buffers} shapes recorded in {self.tally.recordings} graphs and "
            f"{self.tally.seconds:.2f} s; {kept} kept (at most {self.most_shapes}), {inputs:.3g} MB of inputs"
        ]
        lines += [f"recorded as traced: {reason}" for reason in sorted(self._not_compiled)]
        reasons = {f.distrust for f in self._cache.values() if f.distrust}
        lines += [f"eager instead: {reason}" for reason in sorted(reasons)]
        refusals = {f"{name} term by term: {reason}" for g in self._kept for name, reason in g.refusals().items()}
        return "\n".join([*lines, *sorted(refusals)])

    def _trace(self, problem: Problem) -> Functions | Refused:
        reason = self._why_not(problem)
        if reason is not None:
            return Refused(reason)
        known = None if self._linearized is None else self._linearized.known(problem)
        if known is not None:
            return self._functions(known.partition, known.surroundings)
        try:
            return super()._trace(problem)
        except TraceError as error:
            return Refused(str(error))

    def _functions(self, parts: Partition, surroundings: Surroundings) -> Functions:
        expected = estimated_seconds(parts) if self.compile_budget_s else 0.0
        if expected <= self.compile_budget_s:
            return CompiledFunctions(parts, surroundings) if self.compile_budget_s else Functions(parts, surroundings)
        self._not_compiled.add(f"compiling would take about {expected:.0f} s")
        return Functions(parts, surroundings)

    def _why_not(self, problem: Problem) -> str | None:
        """Why the inputs alone rule out recording, if they do."""
        device = problem.weights[0].device
        reason = self.missing(device)
        if reason is not None:
            return reason
        tensors = [*problem.weights, *problem.hyperparameters, *problem.split[0]]
        others = sorted({str(tensor.device) for tensor in tensors if tensor.device != device})
        if others:
            return f"{problem.name}: weights on {device} and inputs on {', '.join(others)}, which a graph cannot read"
        return None

    def _linearization(self, functions: Functions, problem: Problem, tensors: Sequence[Tensor]) -> Linearization:
        try:
            self._compile(functions, problem, tensors)
        except BackendError as error:
            self._not_compiled.add(str(error))
            functions = self._cache[problem.signature] = Functions(functions.partition, functions.surroundings)
        try:
            return self._captured(functions, problem, tensors)
        except CaptureError as error:
            reason = str(error)
        except torch.OutOfMemoryError as error:  # as the buffers are made
            reason = f"{type(error).__name__}: {str(error).splitlines()[0]}"
        functions.distrust = f"{problem.name} cannot be recorded: {reason}"
        return self._instead(problem, functions.distrust)

    @staticmethod
    def _compile(functions: Functions, problem: Problem, tensors: Sequence[Tensor]) -> None:
        """Compile what is not compiled yet, outside of a recording; :class:`BackendError` if that fails."""
        if isinstance(functions, CompiledFunctions) and not functions.seconds:
            layout = Layout.of(problem.weights)
            with random_state_kept(layout.device):
                TracedLinearization(functions, layout, "", functions.at(problem, tensors)).product(probe(layout))

    def _captured(self, functions: Functions, problem: Problem, tensors: Sequence[Tensor]) -> Linearization:
        foreseen, self._foreseen = self._foreseen, None
        if foreseen is not None and foreseen.train is problem and self._kept[-1].functions is functions:
            return CapturedLinearization(self._kept[-1], problem, tensors, foreseen)
        return CapturedLinearization(self._graphs_of(functions, problem, tensors), problem, tensors)

    def _captured_gradient(self, graph: fx.GraphModule, inputs: Sequence[Tensor]) -> CapturedGradient:
        return CapturedGradient(graph, inputs, Counted(self._recorder(inputs[0].device), self.tally))

    def _graphs_of(self, functions: Functions, problem: Problem, tensors: Sequence[Tensor]) -> Graphs:
        """Unused recordings of the problem, made now if there are none; they are kept in order of use."""
        graphs = next((g for g in self._kept if g.functions is functions and g.free), None)
        if graphs is None:
            graphs = Graphs(functions, problem, tensors, self._recorder(problem.weights[0].device), self.tally)
        else:
            self._kept.remove(graphs)
        self._kept = [*self._kept, graphs][-self.most_shapes :]
        return graphs
