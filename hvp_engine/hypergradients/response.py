"""Rows of the best response's Jacobian: how each hyperparameter changes given functions of the trained weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hvp_engine import engines
from hvp_engine._support.isolation import Draws, isolated
from hvp_engine._support.pytree import check_like, flatten
from hvp_engine.differentiation.linear_map import Linearization
from hvp_engine.differentiation.problem import Problem
from hvp_engine.errors import GraphError
from hvp_engine.hypergradients.estimator import check_functions
from hvp_engine.operators.hessian import engine_for_operator
from hvp_engine.solvers import ConjugateGradient, Solver
from hvp_engine.solvers.base import LinearSystem, check_solver, worst_of
from hvp_engine.solvers.right_hand_sides import unstacked
from hvp_engine.solvers.solution import Solution
from hvp_engine.solvers.spectrum import Spectrum


@dataclass(frozen=True)
class ResponseJacobian:
    """What :func:`response_jacobian` returns.

    Attributes:
        rows: u_k^T dw*/dlambda, in the container of the hyperparameters; each leaf has an extra first
            dimension, one entry per cotangent.
        solution: the solves of H x = u_k: products of all, and the largest residual norm with its status; no value.
    """

    rows: Any
    solution: Solution


def response_jacobian(
    train_loss: Callable[[Any, Any, Any], Tensor],
    weights: Any,
    hyper: Any,
    train_batch: Any,
    cotangents: Any,
    solver: Solver | None = None,
    *,
    engine: str | engines.Engine = "auto",
) -> ResponseJacobian:
    """u_k^T dw*/dlambda = -u_k^T [d2L_T/dw dw^T]^-1 d2L_T/dw dlambda^T, for several u_k at once.

    With u_k the gradient of a function f_k of the weights, row k is the derivative of f_k(w*(lambda)): of a
    weight, a prediction, or one of several validation losses (if that also depends on the hyperparameters directly, add
    its direct derivative).

    Arguments:
        train_loss: `loss(weights, hyper, batch)` -> scalar tensor.
        weights, hyper: any tree of real floating tensors, the weights at the minimum of the training loss.
        train_batch: passed on to the loss.
        cotangents: the u_k, a tree like the weights whose leaves have an extra first dimension, as for
            `solve(..., batched=True)`.
        solver: default `ConjugateGradient(100)`; add damping if the Hessian is indefinite or nearly singular.
        engine: how products are executed: "auto", or a name from `hvp_engine.engines`.

    Returns a :class:`ResponseJacobian`. The caller's tensors, buffers and random state stay as they were.

    Validity: as a hypergradient's, at a minimum w* of the training loss with a positive definite Hessian.

    Cost: one solve for each cotangent, as `solve(..., batched=True)` does it, and one mixed product for each.
    Memory: one vector of weights for each cotangent, beside the solver's.

    Errors: `TypeError`/`ValueError` naming the argument; :class:`GraphError` if no hyperparameter reaches the training
    gradient; as :func:`solve`.

    Source: Lorraine, Vicol and Duvenaud, Optimizing Millions of Hyperparameters by Implicit Differentiation, AISTATS
    2020, Theorem 1.

    >>> import torch, hvp_engine as hvp
    >>> target = torch.tensor([1.0, 2.0])
    >>> train = lambda w, decay, batch: ((w - batch) ** 2).sum() / 2 + decay * (w ** 2).sum() / 2
    >>> w, decay = target / 2, torch.tensor(1.0)                 # w* = target / (1 + decay)
    >>> hvp.response_jacobian(train, w, decay, target, torch.eye(2)).rows
    tensor([-0.2500, -0.5000])
    """
    check_functions(train_loss=train_loss)
    solver = ConjugateGradient(100) if solver is None else solver
    check_solver(solver)
    weight_list, weight_structure = flatten(weights, "weights")
    hyper_list, hyper_structure = flatten(hyper, "hyper")
    vs = unstacked(flatten(cotangents, "cotangents")[0], "cotangents")
    names = [f"cotangents[{index}]" for index in range(len(vs))]
    problem = Problem(
        train_loss, weight_list, weight_structure, hyper_list, hyper_structure, (train_batch,), "train_loss"
    )
    runner = engine_for_operator(engine, train_loss)
    with isolated(Draws().next_seed(), weight_list[0].device):
        linearization = runner.linearize(problem)
        check_like(vs[0], linearization.layout, names[0], "weights")
        results = list(LinearSystem(linearization, runner, Spectrum()).solve_all(vs, solver, names))
        rows = [_row(linearization, value, hyper_list) for value, _ in results]
    stacked = [torch.stack(parts) for parts in zip(*rows, strict=True)]
    return ResponseJacobian(hyper_structure.rebuild(stacked), worst_of([solution for _, solution in results]))


def _row(linearization: Linearization, value: Sequence[Tensor], hyperparameters: Sequence[Tensor]) -> list[Tensor]:
    """-(d2L/dlambda dw^T) value."""
    mixed = linearization.mixed(value)
    if all(part is None for part in mixed):
        raise GraphError(
            "hyper: expected at least one hyperparameter that the training gradient depends on; got none: pass the "
            "tensors that the loss uses"
        )
    pairs = zip(mixed, hyperparameters, strict=True)
    return [torch.zeros_like(h) if part is None else part.detach().neg() for part, h in pairs]
