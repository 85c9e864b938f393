"""Hypergradients by the implicit function theorem: the formula, applied to loss functions.

dL_V*/dlambda = dL_V/dlambda - (d2L_T/dlambda dw^T) [d2L_T/dw dw^T]^-1 dL_V/dw      (Algorithm 2)

:mod:`hvp_engine.hypergradients.autograd_api` applies it to losses that autograd has already recorded.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hvp_engine import engines
from hvp_engine._support.flat_vector import detached
from hvp_engine._support.isolation import Company, Draws
from hvp_engine._support.precision import float32_arithmetic
from hvp_engine._support.pytree import flatten
from hvp_engine.differentiation.closing import Closing
from hvp_engine.differentiation.gradient import DIRECT_ALONE, Gradient
from hvp_engine.differentiation.linear_map import Linearization
from hvp_engine.differentiation.problem import Problem, is_constant
from hvp_engine.distributed import DataParallel, for_loss
from hvp_engine.engines.base import Parts, Whole
from hvp_engine.engines.replays import Counted
from hvp_engine.errors import GraphError
from hvp_engine.hypergradients.estimator import Estimate, Estimator, check_functions
from hvp_engine.solvers import Neumann, Solver
from hvp_engine.solvers.base import LinearSystem, Runner, check_solver
from hvp_engine.solvers.solution import Solution
from hvp_engine.solvers.spectrum import Spectrum

_KEPT_WHOLES, _PATIENCE = 4, 32
"""Kinds of calls, such as shapes of batches, whose memory is kept; and how many calls that none of these serves come
before one of them is given up for another."""

_FAR = 0.5
"""The weights count as far away if further training would change the validation loss by more than this share of it."""


@dataclass(frozen=True)
class HypergradientResult(Estimate):
    """What a :class:`Hypergradient` call returns: an :class:`Estimate`, in which these are never None.

    Attributes:
        unfinished: -(H^-1 dL_V/dw) . dL_T/dw as a 0-dim float64 tensor: by how much the validation loss would
            change if training ran to convergence, to first order.
        solution: the solve of H x = dL_V/dw; its value is in the container of the weights.
    """

    unfinished: Tensor
    solution: Solution


class Hypergradient(Estimator):
    """dL_V*/dlambda as a function of (weights, hyperparameters, training batch, validation batch).

    Arguments:
        train_loss, val_loss: `loss(weights, hyper, batch)` -> scalar tensor. They must be functions of their
            arguments: an engine may trace them once and reuse the trace. It watches the variables, attributes and
            items that their code names, and gives the trace up, with a warning, where one has changed.
        solver: how to invert the Hessian of the training loss; default `Neumann(20)`, which estimates alpha.
        engine: how products are executed: "auto", or a name from `hvp_engine.engines`.
        warm_start: start each solve at the solution of the previous call, for one more product and one more vector of
            memory. If the problem changes slowly, a truncated series then continues from call to call, and a
            tolerance is reached in fewer products.

    It is called with `(weights, hyper, train_batch, val_batch)`. Weights and hyper are any trees of real floating
    tensors (a module stands for its named parameters that require grad). Batches may be anything, but only tensors,
    numbers and strings in tuples, lists and dicts can be traced. It returns a :class:`HypergradientResult` and changes
    none of the caller's tensors, `.grad`, buffers and random state.

    What the losses draw (dropout, noise) is one draw for all terms of a solve and another in the next call. It follows
    from torch's seed when this object was made and from the number of its calls, not from a `torch.manual_seed` before
    a call. To repeat the numbers, make the object anew after `torch.manual_seed`, or load its `state_dict()`; for draws
    of your own, pass the mask or the noise in the batch.

    Cost of a call: one gradient of each loss, the solver's products, one mixed product. Memory: the graph of the
    training gradient and the solver's vectors, whatever the number of products.

    Errors: as :func:`hypergradient`. It warns once if the weights are too far from stationary for the implicit function
    theorem, that is, if the result's `unfinished` exceeds half of the validation loss. Only calls 1, 2, 4, 8, ... check
    this, since checking waits for the device.

    Source: Lorraine, Vicol and Duvenaud, Optimizing Millions of Hyperparameters by Implicit Differentiation, AISTATS
    2020, Theorem 1 and Algorithm 2.

    >>> import torch, hvp_engine as hvp
    >>> target = torch.tensor([1.0, 2.0])
    >>> train = lambda w, decay, batch: ((w - batch) ** 2).sum() / 2 + decay * (w ** 2).sum() / 2
    >>> val = lambda w, decay, batch: (w ** 2).sum() / 2
    >>> hg = hvp.Hypergradient(train, val, solver=hvp.Neumann(60))
    >>> hg(target / 2, torch.tensor(1.0), target, None).grads
    tensor(-0.6250)
    """

    def __init__(
        self,
        train_loss: Callable[[Any, Any, Any], Tensor],
        val_loss: Callable[[Any, Any, Any], Tensor],
        solver: Solver | None = None,
        engine: str | engines.Engine = "auto",
        warm_start: bool = False,
    ):
        remedy = "; for losses that are already computed use hvp.hypergradient"
        check_functions(remedy, train_loss=train_loss, val_loss=val_loss)
        if isinstance(train_loss, DataParallel) != isinstance(val_loss, DataParallel):
            raise ValueError(
                "train_loss, val_loss: expected both or none as hvp.DataParallel, so that an error in either reaches "
                "all processes; got one: wrap the other too (of the same batch in each process it is the same loss)"
            )
        self.train_loss, self.val_loss = train_loss, val_loss
        self.solver: Solver = Neumann(20) if solver is None else solver
        check_solver(self.solver)
        if engine == "auto" and not self.solver.makes_products:
            engine = engines.AutoEngine(terms=0)
        self.engine = for_loss(train_loss, engines.create(engine))
        self.spectrum = Spectrum()
        self.draws = Draws()
        self._company = Company(train_loss, val_loss)
        self.warm_start = warm_start
        self._previous: list[Tensor] | None = None
        self._stationarity = Stationarity()
        self._wholes: tuple[Whole, ...] = ()
        self._unserved = 0

    def __call__(self, weights: Any, hyper: Any, train_batch: Any, val_batch: Any) -> HypergradientResult:
        weight_list, weight_structure = flatten(weights, "weights", sharded=True)
        hyper_list, hyper_structure = flatten(hyper, "hyper", sharded=True)

        point = weight_list, weight_structure, hyper_list, hyper_structure
        train = Problem(self.train_loss, *point, (train_batch,), "train_loss")
        val = Problem(self.val_loss, *point, (val_batch,), "val_loss")

        x0 = self._previous if _alike(self._previous, weight_list) else None

        def solved(runner: Runner, direct: Gradient, linearization: Linearization) -> Parts:
            system = LinearSystem(linearization, runner, self.spectrum)
            vector, ours = direct.weights, direct.hyperparameters
            grads, solution, closing = implicit_gradient(system, vector, ours, hyper_list, self.solver, x0)
            loss, value = linearization.loss, solution.value
            assert loss is not None
            return Parts(loss, direct.loss, grads, value, solution, closing.gradient_norm, closing.unfinished)

        def part_by_part() -> Parts:
            if self._previous is None:
                self.engine.foresee(train, val, self.solver)
            return solved(self.engine, self.engine.gradient(val), self.engine.linearize(train))

        whole = self._begun(train, val)
        if whole is not None:
            self.draws.count += 1
            try:
                parts = (whole.at_once() if x0 is None else None) or solved(whole, *whole.differentiated())
            finally:
                whole.end()
        else:
            estimates = self.spectrum.state_dict()
            parts = self._company.run(
                self.draws.next_seed(),
                weight_list[0].device,
                part_by_part,
                owners=(self, self.engine),
                # Processes that wait for one another's messages must all do the same, once.
                repeatable=not isinstance(self.train_loss, DataParallel)
                and all(map(is_constant, (*train.split[1], *val.split[1]))),
                undo=lambda: self.spectrum.load_state_dict(estimates),
            )
        if self.warm_start:
            self._previous = [part.clone() for part in parts.value]
        result = HypergradientResult(
            grads=hyper_structure.rebuild(parts.grads),
            train_loss=parts.train_loss,
            val_loss=parts.val_loss,
            gradient_norm=parts.gradient_norm,
            unfinished=parts.unfinished,
            solution=parts.solution.of(weight_structure.rebuild(parts.value)),
        )
        if parts.solution.iterations:  # without iterations, `unfinished` stands for no training
            self._stationarity.check(result.unfinished, result.val_loss, result.gradient_norm)
        return result

    def __getstate__(self) -> dict[str, Any]:
        """A copy keeps memory of its own."""
        return self.__dict__ | {"_wholes": ()}

    def _begun(self, train: Problem, val: Problem) -> Whole | None:
        """What makes this hypergradient all at once, ready to; None if nothing can."""
        kept = self._wholes  # another thread may replace them
        for whole in kept:
            if whole.begin(train, val, self.solver):
                return whole
        if not self.solver.quiet:
            return None
        self._unserved += 1
        if len(kept) == _KEPT_WHOLES and self._unserved % _PATIENCE:
            return None
        made = self.engine.whole(train, val, self.solver)
        if made is None or not made.begin(train, val, self.solver):
            return None
        self._wholes = (made, *kept[: _KEPT_WHOLES - 1])
        return made

    def recorder(self, device: torch.device) -> Counted | None:
        return self.engine.recorder(device)

    def report(self) -> str:
        """What the engine did and why, and how precise float32 is."""
        device = "cuda" if torch.cuda.is_available() else "cpu"
        lines = [f"engine {self.engine.name}", self.engine.report()]
        return "\n".join([*lines, f"float32 products on {device}: {float32_arithmetic(device)}"])

    def state_dict(self) -> dict[str, Any]:
        return {
            "draws": self.draws.state_dict(),
            "spectrum": self.spectrum.state_dict(),
            "previous": self._previous,
            "engine": self.engine.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.draws.load_state_dict(state["draws"])
        self.spectrum.load_state_dict(state["spectrum"])
        self._previous = state["previous"]
        self.engine.load_state_dict(state["engine"])
        self._wholes = ()


def _alike(previous: Sequence[Tensor] | None, weights: Sequence[Tensor]) -> bool:
    """Whether a previous solution fits weights like these."""
    return previous is not None and [(t.shape, t.device) for t in previous] == [(w.shape, w.device) for w in weights]


def implicit_gradient(
    system: LinearSystem,
    vector: Sequence[Tensor],
    direct: Sequence[Tensor | None],
    hyperparameters: Sequence[Tensor],
    solver: Solver,
    x0: Sequence[Tensor] | None = None,
) -> tuple[list[Tensor], Solution, Closing]:
    """direct - mixed(H^-1 vector) for each hyperparameter: the core of all implicit hypergradients.

    The system's operator is a :class:`Linearization`, which has the mixed product.
    """
    linearization = system.operator
    assert isinstance(linearization, Linearization)
    value, solution = system.solve(detached(vector), solver, "dL_V/dw, the gradient of val_loss", x0)
    closing = linearization.closing(value)
    indirect = closing.indirect
    unreached = all(term is None for term in indirect)
    if unreached and all(term is None for term in direct):
        raise GraphError(
            "hyperparameters: expected at least one that the training gradient or the validation loss depends on; "
            "got none: pass the tensors the losses use (a setting of the optimizer, such as its learning rate, does "
            "not change the loss surface and has no implicit gradient)"
        )
    if unreached:
        warnings.warn(
            f"no hyperparameter reaches the training gradient: {DIRECT_ALONE}",
            stacklevel=3,
        )
    grads = []
    for hyperparameter, first, second in zip(hyperparameters, direct, indirect, strict=True):
        if second is None:
            grads.append(torch.zeros_like(hyperparameter) if first is None else first.detach().clone())
        else:
            grads.append(second if first is None else second.add_(first.detach()))
    return grads, solution.of(value), closing


class Stationarity:
    """Warns once if the weights are too far from their goal for the implicit function theorem.

    The criterion: training to convergence would change the validation loss by more than half of it, to first order.
    Only calls 1, 2, 4, 8, ... check, since that waits for the device.

    Arguments:
        goal: where the weights should be, in words.
        distance: the measure, in words, of how far away they are.
    """

    def __init__(self, goal: str = "a minimum of the training loss", distance: str = "||dL_T/dw||") -> None:
        self._goal, self._distance = goal, distance
        self._calls = 0
        self._warned = False

    def check(self, unfinished: Tensor, val_loss: Tensor, gradient_norm: Tensor) -> None:
        """Count a call, and perhaps warn."""
        self._calls += 1
        if self._warned or self._calls & (self._calls - 1):  # zero for powers of two: 8 & 7 = 0, but 6 & 5 = 4
            return
        change, loss, norm = torch.stack([unfinished, val_loss.double(), gradient_norm]).tolist()
        if abs(change) > _FAR * abs(loss):
            self._warned = True
            warnings.warn(
                f"the weights are far from {self._goal}: {self._distance} is {norm:.3g}, and finishing "
                f"the training would change the validation loss, {loss:.3g}, by about {change:.3g}; the hypergradient "
                "assumes that they have reached it: train longer before and between hypergradients (warmup_steps and "
                "inner_steps of a Tuner)",
                stacklevel=3,
            )
