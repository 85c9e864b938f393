"""Every method of the paper's Tables 1 and 2, and those beyond it: formula, memory, cost, source, and how to make it.

The documentation, the comparison command and the tests all go by this list. In it P is the number of weights, H of
hyperparameters, i of products or steps, L of the steps that are differentiated, K of units of the network, T of trials.
Memory is what a hypergradient needs beyond the weights, the batch and the graph of one gradient; in O(P i) P stands for
a graph, and with checkpointing for a copy of the weights.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from baselines import search
from baselines.estimators import AtMinimum, FittedResponse, LinearResponse, StructuredResponse, larsen
from baselines.estimators.gauss_newton import Model, OutputLoss
from hvp_engine.hypergradients import SGD, Unrolled
from hvp_engine.hypergradients.estimator import Estimator
from hvp_engine.hypergradients.implicit import Hypergradient
from hvp_engine.solvers import MINRES, Chebyshev, ConjugateGradient, Exact, Identity, Neumann, Nystrom, Solver
from hvp_engine.solvers.preconditioning import Preconditioner

Loss = Callable[[Any, Any, Any], Tensor]
Kind = Literal["implicit", "unrolled", "response", "search"]


@dataclass(frozen=True)
class Setting:
    """The problem and the settings that a method's estimator is made from.

    Attributes:
        train_loss, val_loss: `loss(weights, hyper, batch)` -> scalar tensor.
        rate: alpha of a Neumann series, and the learning rate of unrolled steps.
        model, loss_of_outputs: the training loss in two parts, as :func:`larsen` takes it.
        preconditioner: v -> M v for the preconditioned solvers.
        scale: standard deviation of the perturbations that responses are fitted to. Responses are fitted by steps of
            rate / 2, for which it may be at most 1, and about half of that for a structured response, which is a
            product of parameters.
    """

    train_loss: Loss
    val_loss: Loss
    rate: float
    model: Model
    loss_of_outputs: OutputLoss
    preconditioner: Preconditioner | None = None
    scale: float = 0.1


@dataclass(frozen=True)
class Method:
    """A way to compute a hypergradient, or to find hyperparameters without one.

    Attributes:
        name: its name in tables and plots.
        kind: implicit (a solver in `Hypergradient`), unrolled, response (hypernetworks), or search.
        formula: what it puts in place of [d2L_T/dw dw^T]^-1, or of the whole hypergradient.
        point: where it is evaluated: w* (a minimum), w (the weights at hand), or w_0 (where steps start).
        memory, cost: of one hypergradient, or of the whole search.
        source: who published it.
        iterative: whether it depends on i.
        gradients: a function of (i, P, H): how many gradients one hypergradient takes, a product counting as two.
            Spectral estimates (8 products, or 3 to refresh) and the making of a preconditioner come on top.
        make: a function that makes the estimator from a setting and i; None for a search.
        search: the class of a search.
    """

    name: str
    kind: Kind
    formula: str
    point: str
    memory: str
    cost: str
    source: str
    iterative: bool = True
    gradients: Callable[[int, int, int], int] = lambda i, weights, hyper: 0
    make: Callable[[Setting, int], Estimator] | None = None
    search: type | None = None


def _implicit(
    name: str, solver: Callable[[Setting, int], Solver], formula: str, source: str, cost: str = "i HVPs"
) -> Method:
    """An iterative solver in `Hypergradient`, on the eager engine so that time and memory can be compared."""

    def make(setting: Setting, i: int) -> Estimator:
        return Hypergradient(setting.train_loss, setting.val_loss, solver(setting, i), engine="eager")

    return Method(name, "implicit", formula, "w", "O(P + H)", cost, source, True, lambda i, p, h: 3 + 2 * i, make)


def _dense(name: str, make: Callable[[Setting], Estimator], formula: str, point: str, source: str) -> Method:
    def estimator(setting: Setting, i: int) -> Estimator:
        return make(setting)

    cost = "P HVPs, P^3 operations"
    return Method(
        name, "implicit", formula, point, "O(P^2 + H)", cost, source, False, lambda i, p, h: 3 + 2 * p, estimator
    )


def _exact(setting: Setting) -> Hypergradient:
    return Hypergradient(setting.train_loss, setting.val_loss, Exact(), engine="eager")


def _nystrom(setting: Setting, i: int) -> Estimator:
    return Hypergradient(setting.train_loss, setting.val_loss, Nystrom(i), engine="eager")


def _unrolled(setting: Setting, i: int, momentum: float = 0.0, **options: Any) -> Estimator:
    return Unrolled(setting.train_loss, setting.val_loss, i, SGD(setting.rate, momentum), **options)


def _truncated(setting: Setting, i: int) -> Estimator:
    return _unrolled(setting, i, truncation=half(i))


def half(i: int) -> int:
    """How many of i steps the truncated unrolling of the comparisons differentiates: L."""
    return (i + 1) // 2


def _fitted(response: Any, setting: Setting, i: int) -> Estimator:
    def optimizer(phi: Sequence[Tensor]) -> torch.optim.Optimizer:
        return torch.optim.SGD(phi, lr=setting.rate / 2)

    return FittedResponse(setting.train_loss, setting.val_loss, i, optimizer, scale=setting.scale, response=response)


_SUM = "sum_{j<i} [prod_{k<j} I - a H(w_{i-k})]"
_TRIALS = "T trainings"
_WITH_M = "i HVPs, and what M is made from"

METHODS = (
    _dense("exact IFT", lambda s: AtMinimum(s.train_loss, _exact(s)), "H^-1", "w*", "implicit function theorem"),
    _dense(
        "Larsen", lambda s: larsen(s.model, s.loss_of_outputs, s.val_loss), "Gauss-Newton^-1", "w", "Larsen et al. 1996"
    ),
    _dense("Bengio", _exact, "H^-1", "w", "Bengio 2000"),
    Method(
        "T1-T2", "implicit", "I", "w", "O(P + H)", "1 mixed product", "Luketina et al. 2016", False,
        lambda i, p, h: 3, lambda s, i: Hypergradient(s.train_loss, s.val_loss, Identity(), engine="eager"),
    ),
    _implicit(
        "Neumann", lambda s, i: Neumann(i, s.rate), "a sum_{j<=i} (I - a H)^j", "Lorraine, Vicol, Duvenaud 2019"
    ),
    _implicit(
        "CG", lambda s, i: ConjugateGradient(i, tol=0.0), "argmin_x x^T H x / 2 - v^T x, Krylov", "Pedregosa 2016"
    ),
    Method(
        "unrolled", "unrolled", f"a {_SUM}", "w_0", "O(P i + H)", "i steps and back", "Domke 2012", True,
        lambda i, p, h: 3 * i + 1, _unrolled,
    ),
    Method(
        "unrolled, momentum", "unrolled", "the same through SGD with momentum 0.9", "w_0", "O(P i + H)",
        "i steps and back", "Maclaurin et al. 2015", True, lambda i, p, h: 3 * i + 1, partial(_unrolled, momentum=0.9),
    ),
    Method(
        "unrolled, truncated", "unrolled", "the last L terms of unrolled", "w_0", "O(P L + H), here L = i / 2",
        "i steps, L of them back", "Shaban et al. 2019", True, lambda i, p, h: i + 2 * half(i) + 1, _truncated,
    ),
    Method(
        "unrolled, checkpointing", "unrolled", "as unrolled", "w_0", "O(P i + H), copies of the weights for graphs",
        "i steps, again, and back", "Chen et al. 2016", True, lambda i, p, h: 5 * i + 1,
        partial(_unrolled, checkpointing=True),
    ),
    Method(
        "unrolled, forward", "unrolled", "as unrolled", "w_0", "O(P + H), a hyperparameter at a time; O(P H) at once",
        "H times i steps with tangents", "Franceschi et al. 2017", True, lambda i, p, h: 3 * i * h,
        partial(_unrolled, mode="forward"),
    ),
    Method(
        "linear hypernetwork", "response", "dL_V/dw dw_phi/dlambda, w_phi linear", "w", "O(P H)", "i steps of phi",
        "Lorraine and Duvenaud 2018", True, lambda i, p, h: i + 2, partial(_fitted, LinearResponse),
        search.LinearHypernetwork,
    ),
    Method(
        "self-tuning network", "response", "dL_V/dw dw_phi/dlambda, w_phi structured", "w", "O((P + H) K)",
        "i steps of phi", "MacKay et al. 2019", True, lambda i, p, h: i + 2, partial(_fitted, StructuredResponse),
        search.SelfTuningNetwork,
    ),
    # Beyond the paper's tables.
    _implicit("Neumann, auto alpha", lambda s, i: Neumann(i), "a sum_{j<=i} (I - a H)^j, a from Lanczos", "here"),
    _implicit("Chebyshev", lambda s, i: Chebyshev(i), "Chebyshev polynomial of H, bounds from Lanczos", "Saad 2003"),
    _implicit("heavy ball", lambda s, i: Chebyshev(i, form="heavy_ball"), "nu-method polynomial of H", "Brakhage 1987"),
    _implicit("MINRES", lambda s, i: MINRES(i, tol=0.0), "argmin_x norm(v - H x), Krylov", "Paige and Saunders 1975"),
    _implicit(
        "CG, preconditioned", lambda s, i: ConjugateGradient(i, tol=0.0, preconditioner=s.preconditioner),
        "as CG, with M near (diag H)^-1", "Hestenes and Stiefel 1952", _WITH_M,
    ),
    _implicit(
        "Neumann, preconditioned", lambda s, i: Neumann(i, preconditioner=s.preconditioner),
        "a sum_{j<=i} (I - a M H)^j M", "here", _WITH_M,
    ),
    Method(
        "Nystrom", "implicit", "(A_i + rho I)^-1, A_i of rank i, rho fitted to the rest", "w", "O(P i + H)",
        "i + 2 HVPs", "Hataya and Yamada 2023", True, lambda i, p, h: 7 + 2 * i, _nystrom,
    ),
    # Without a hypergradient.
    Method(
        "random search", "search", "uniform draws", "w*", "O(P + H)", _TRIALS, "Bergstra and Bengio 2012", False,
        search=search.RandomSearch,
    ),
    Method(
        "grid search", "search", "a regular grid", "w*", "O(P + H)", f"{_TRIALS}, T = points^H", "-", False,
        search=search.GridSearch,
    ),
    Method(
        "Bayesian optimization", "search", "expected improvement of a Gaussian process of L_V", "w*", "O(P + H + T^2)",
        f"{_TRIALS}, T^3 operations", "Snoek et al. 2012", False, search=search.BayesianOptimization,
    ),
    Method(
        "Algorithm 1", "search", "steps along a hypergradient while w trains", "w", "O(P + H), or the estimator's",
        "one training", "Lorraine, Vicol, Duvenaud 2019", False, search=search.HypergradientDescent,
    ),
)  # fmt: skip
"""All methods, those of the paper first."""


def find(name: str) -> Method:
    """The method of this name; `ValueError` for an unknown one."""
    for method in METHODS:
        if method.name == name:
            return method
    raise ValueError(f"name: expected one of {', '.join(method.name for method in METHODS)}; got {name!r}")


def markdown() -> str:
    """The list as a Markdown table."""
    head = ["method", "kind", "in place of the exact expression", "at", "memory", "cost of one", "source"]
    rows = [[m.name, m.kind, f"`{m.formula}`", m.point, m.memory, m.cost, m.source] for m in METHODS]
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
