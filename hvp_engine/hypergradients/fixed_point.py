"""Hypergradients through a fixed point w = Phi(w, lambda), whose Jacobian need not be symmetric.

Differentiating w* = Phi(w*, lambda) gives, with both derivatives of Phi taken at w*,

dL_V*/dlambda = dL_V/dlambda + (dPhi/dlambda)^T [I - (dPhi/dw)^T]^-1 dL_V/dw
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hvp_engine._support.isolation import Draws, isolated
from hvp_engine._support.pytree import Structure, flatten
from hvp_engine.differentiation.double_backward import leaves
from hvp_engine.differentiation.gradient import by_autograd
from hvp_engine.differentiation.problem import Problem
from hvp_engine.differentiation.recorded.owned import OwnedLinearization
from hvp_engine.engines.eager import EagerEngine
from hvp_engine.errors import DivergenceError, NonFiniteError
from hvp_engine.hypergradients.estimator import Estimator, check_functions
from hvp_engine.hypergradients.implicit import (
    HypergradientResult,
    Stationarity,
    implicit_gradient,
)
from hvp_engine.solvers import Neumann, Solver
from hvp_engine.solvers.base import LinearSystem, check_solver
from hvp_engine.solvers.spectrum import Spectrum


class FixedPointHypergradient(Estimator):
    """dL_V*/dlambda where the weights solve w = Phi(w, lambda): implicit layers, momentum maps, any fixed iteration.

    dL_V/dlambda + (dPhi/dlambda)^T x, where x solves (I - (dPhi/dw)^T) x = dL_V/dw. With `Neumann(i)`, x is the
    sum of ((dPhi/dw)^T)^j dL_V/dw over j = 0..i, as reverse mode through i + 1 applications of Phi from w* would give.

    Arguments:
        phi: `phi(weights, hyper, batch)` -> a tree like weights; a function of its arguments.
        val_loss: `val_loss(weights, hyper, batch)` -> scalar tensor.
        solver: default `Neumann(20)`. Only solvers that do not need a symmetric operator: :class:`Neumann` and
            :class:`Identity`. alpha="auto" stands for 1 / (1 + damping).

    Calling it takes `(weights, hyper, train_batch, val_batch)`, as :class:`Hypergradient` does, with `train_batch` for
    phi, and returns a :class:`HypergradientResult`: its `gradient_norm` is ||w - Phi(w)|| and its `train_loss` half
    of the square, since a map has no loss. It can be the estimator of a :class:`Tuner`, whose own training loss may be
    any that leads to the fixed point. If Phi is a step w - eta dL_T/dw, it equals `Hypergradient` with alpha = eta. It
    changes nothing of the caller's.

    Validity: the series converges if the spectral radius of dPhi/dw at w* is below 1, that is, if iterating Phi
    converges there. If all eigenvalues have real parts below 1, it converges for a small enough alpha.

    Cost of a call: one Phi with its graph, `iterations` + 1 vector-Jacobian products of it (first derivatives are
    enough), one gradient of `val_loss`. Memory: the graph of one Phi and the solver's vectors.

    Errors: `TypeError`/`ValueError` naming the argument for a solver that needs symmetry, or a phi that does not
    return a tree like the weights; :class:`DivergenceError` if the series grows.

    Source: Liao et al., Reviving and Improving Recurrent Back-Propagation, ICML 2018; for layers: Bai, Kolter and
    Koltun, Deep Equilibrium Models, NeurIPS 2019.

    >>> import torch, hvp_engine as hvp
    >>> A = torch.tensor([[0.0, 0.5], [-0.5, 0.0]])                       # w* = (I - A)^-1 lambda
    >>> hg = hvp.FixedPointHypergradient(lambda w, h, batch: A @ w + h, lambda w, h, batch: w.sum(), hvp.Neumann(60))
    >>> hyper = torch.tensor([1.0, 2.0])
    >>> hg(torch.linalg.solve(torch.eye(2) - A, hyper), hyper, None, None).grads
    tensor([0.4000, 1.2000])
    """

    def __init__(
        self,
        phi: Callable[[Any, Any, Any], Any],
        val_loss: Callable[[Any, Any, Any], Tensor],
        solver: Solver | None = None,
    ):
        check_functions(phi=phi, val_loss=val_loss)
        self.phi, self.val_loss = phi, val_loss
        self.solver = _for_nonsymmetric(Neumann(20) if solver is None else solver)
        self.draws = Draws()
        self._stationarity = Stationarity("a fixed point of phi", "||w - phi(w)||")

    def __call__(self, weights: Any, hyper: Any, train_batch: Any, val_batch: Any) -> HypergradientResult:
        weight_list, weight_structure = flatten(weights, "weights")
        hyper_list, hyper_structure = flatten(hyper, "hyper")
        point = (weight_list, weight_structure, hyper_list, hyper_structure)
        with isolated(self.draws.next_seed(), weight_list[0].device):
            direct = by_autograd(Problem(self.val_loss, *point, (val_batch,), "val_loss"))
            # f = w - Phi(w) takes the place of dL_T/dw: f = 0 defines w*, and the tape multiplies by (df/dw)^T.
            tape = self._record(*point, train_batch)
            try:
                system = LinearSystem(tape, EagerEngine(), Spectrum())
                grads, solution, closing = implicit_gradient(
                    system, direct.weights, direct.hyperparameters, hyper_list, self.solver
                )
            except NonFiniteError:
                raise
            except DivergenceError as error:
                raise DivergenceError(
                    f"phi: expected a map that contracts near the weights; got a series that grew beyond bounds with "
                    f"{self.solver}: iterate phi further if the weights are no fixed point, and otherwise use a "
                    "smaller alpha, more damping, or fewer iterations"
                ) from error
        distance = closing.gradient_norm
        result = HypergradientResult(
            grads=hyper_structure.rebuild(grads),
            train_loss=distance.square() / 2,
            val_loss=direct.loss,
            gradient_norm=distance,
            unfinished=closing.unfinished,
            solution=solution.of(weight_structure.rebuild(solution.value)),
        )
        if solution.iterations:
            self._stationarity.check(result.unfinished, direct.loss, distance)
        return result

    def state_dict(self) -> dict[str, Any]:
        return {"draws": self.draws.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.draws.load_state_dict(state["draws"])

    def _record(
        self,
        weight_list: list[Tensor],
        weight_structure: Structure,
        hyper_list: list[Tensor],
        hyper_structure: Structure,
        batch: Any,
    ) -> OwnedLinearization:
        weights, hyperparameters = leaves(weight_list), leaves(hyper_list)
        with torch.enable_grad():
            image = self.phi(weight_structure.rebuild(weights), hyper_structure.rebuild(hyperparameters), batch)
            images, structure = flatten(image, "phi(weights)")
            if structure != weight_structure:
                raise ValueError(
                    f"phi(weights): expected the container of weights, {weight_structure.spec}; got {structure.spec}"
                )
            for index, (tensor, weight) in enumerate(zip(images, weights, strict=True)):
                if tensor.shape != weight.shape or tensor.dtype != weight.dtype:
                    raise ValueError(
                        f"phi(weights)[{index}]: expected shape {tuple(weight.shape)} and {weight.dtype} as weights; "
                        f"got {tuple(tensor.shape)} and {tensor.dtype}"
                    )
            differences = [weight - tensor for weight, tensor in zip(weights, images, strict=True)]
        return OwnedLinearization(differences, weights, hyperparameters, name="phi", symmetric=False)


def _for_nonsymmetric(solver: Solver) -> Solver:
    """The solver, checked to accept a nonsymmetric operator, with a number for alpha."""
    check_solver(solver)
    if solver.needs_symmetry:
        raise ValueError(
            "solver: expected one that does not need a symmetric operator, such as hvp.Neumann(20); got "
            f"{type(solver).__name__}, while the Jacobian of a map is not symmetric in general"
        )
    return solver.without_estimate()
