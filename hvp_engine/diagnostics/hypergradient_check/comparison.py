"""`hvp.check`: a hypergradient compared with finite differences of re-solved inner problems."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from hvp_engine._support.arguments import check_count, check_positive
from hvp_engine._support.isolation import isolated
from hvp_engine._support.pytree import flatten
from hvp_engine.diagnostics.hypergradient_check.experiment import Experiment, Fit, Solved
from hvp_engine.diagnostics.hypergradient_check.local_derivatives import step_of, wrong_derivatives
from hvp_engine.diagnostics.hypergradient_check.refitting import Pair, reference_hypergradient
from hvp_engine.diagnostics.hypergradient_check.verdict import CheckResult, Evidence, Point, Verdict
from hvp_engine.differentiation.problem import Problem
from hvp_engine.solvers import Neumann, Solver
from hvp_engine.solvers.base import check_solver

Loss = Callable[[Any, Any, Any], Tensor]


def check(
    train_loss: Loss,
    val_loss: Loss,
    weights: Any,
    hyper: Any,
    batches: tuple[Any, Any],
    *,
    fit: Fit | None = None,
    solver: Solver | None = None,
    directions: int = 3,
    step: float | None = None,
    tolerance: float = 1e-2,
    engine: str = "auto",
    seed: int = 0,
) -> CheckResult:
    """Test a hypergradient on your own problem: print the result to read the verdict, the figures and the advice.

    For random directions d, <hypergradient, d> is compared with
    (L_V(w*(h + e d), h + e d) - L_V(w*(h - e d), h - e d)) / 2e, where w*(h) minimizes the training loss anew. If
    they disagree, the error is split into the parts that come from the weights, the solve and the derivatives.

    Arguments:
        train_loss, val_loss: `loss(weights, hyper, batch)` -> scalar tensor, as for :class:`Hypergradient`.
        weights, hyper: trees of tensors, where the hypergradient is wanted. float64 gives the sharpest test.
        batches: (train_batch, val_batch).
        fit: `fit(weights, hyper)` -> weights, training from `weights` to a minimum; it must not change its
            arguments. None: Newton's method from `weights`, in float64 if the losses accept weights,
            hyperparameters and batches of that dtype, otherwise in theirs.
        solver: the one to test; default `Neumann(20)`.
        directions: how many random directions, each scaled like the hyperparameter tensors.
        step: e above, > 0; default eps^(1/3) of the dtype.
        tolerance: the relative error that passes.
        engine: as for :class:`Hypergradient`.
        seed: of the directions and of what is random inside the losses.

    Returns a :class:`CheckResult`. The caller's tensors, buffers and random state stay as they were.

    Validity: a test of one point. A training loss with several minima is followed from the re-solved weights.

    Cost: 4 fits for each direction, up to 2,000 products for a reference solve, and 30 flat vectors of weights:
    meant for a small version of the problem.

    Errors: `TypeError`/`ValueError` naming the argument; what the losses and `fit` raise.

    Source: Lorraine, Vicol, Duvenaud 2019, Theorem 1, as a test.

    >>> import torch, hvp_engine as hvp
    >>> data = torch.tensor([1.0, 2.0], dtype=torch.float64)
    >>> train = lambda w, decay, batch: ((w - batch) ** 2).sum() / 2 + decay * (w ** 2).sum() / 2
    >>> val = lambda w, decay, batch: (w ** 2).sum() / 2
    >>> decay = torch.tensor(1.0, dtype=torch.float64)
    >>> hvp.check(train, val, data / 2, decay, (data, None)).verdict.value
    'correct: the hypergradient agrees with finite differences'
    >>> print(hvp.check(train, val, data, decay, (data, None)))               # w* is data / 2
    hypergradient check: not stationary: ...
    """
    solver = Neumann(20) if solver is None else solver
    check_solver(solver)
    tolerance, directions = check_positive(tolerance, "tolerance"), check_count(directions, "directions")
    if fit is not None and not callable(fit):
        raise TypeError(f"fit: expected a function of (weights, hyper) or None; got {type(fit).__name__}")
    if not (isinstance(batches, Sequence) and len(batches) == 2):
        raise ValueError("batches: expected the pair (train_batch, val_batch); got something else")
    weight_list, weight_structure = flatten(weights, "weights")
    hyper_list, hyper_structure = flatten(hyper, "hyper")
    point = ([w.detach() for w in weight_list], weight_structure, [h.detach() for h in hyper_list], hyper_structure)
    pair = Pair(
        Problem(train_loss, *point, (batches[0],), "train_loss"),
        Problem(val_loss, *point, (batches[1],), "val_loss"),
        seed,
    )
    if different := _two_values(pair):
        return CheckResult(Verdict.NOT_DETERMINISTIC, (different,))
    precise = (pair.widened() if fit is None else None) or pair
    if step is None:
        step = step_of(precise.weights[0].dtype)
    step = check_positive(step, "step")
    experiment = Experiment(fit, solver, engine, step, torch.Generator().manual_seed(seed))
    return _compare(experiment, pair, precise, directions, tolerance)


def _two_values(pair: Pair) -> str | None:
    """Which loss changes from one evaluation to the next, or with the random state; None if neither does."""
    for problem in (pair.train, pair.val):
        values = []
        for seed in (pair.seed, pair.seed, pair.seed + 1):
            with isolated(seed, pair.weights[0].device), torch.no_grad():
                values.append(float(problem.evaluate(problem.weights, problem.hyperparameters)))
        rounding = 100 * torch.finfo(pair.weights[0].dtype).eps * abs(values[0])
        if max(values) - min(values) > rounding:
            return (
                f"{problem.name} is {values[0]:.6g}, then {values[2]:.6g}: call module.eval() to switch dropout off, "
                "or fix the noise, and keep random augmentation out of the loss while checking"
            )
    return None


def _compare(experiment: Experiment, pair: Pair, precise: Pair, directions: int, tolerance: float) -> CheckResult:
    """Measure, split the error into its causes, and decide."""
    base = experiment.refit(precise)
    own, refitted = experiment.solve(pair), experiment.solve(base)
    given = own if precise is pair else experiment.solve(precise)
    points = experiment.describe(precise, given), experiment.describe(base, refitted)
    if own.grads is None or given.grads is None:
        return _of_divergence(own.failure or given.failure, *points)
    reference, solve = reference_hypergradient(base)
    rows = [experiment.difference(base, solve.value) for _ in range(directions)]
    along = torch.stack([row.direction for row in rows])
    truth, coarse, bend, fit_error, rounding = torch.tensor([row.figures for row in rows], dtype=torch.float64).T
    # Differences cannot tell a derivative from zero if it is smaller than its own change within a step.
    scale = max(*(float(t.square().mean().sqrt()) for t in (truth, along @ reference, bend)), 1e-300)

    def error(difference: Tensor) -> Tensor:
        """|difference| beyond rounding, relative to the size of the derivative along random directions."""
        return ((difference.abs() - rounding).clamp_min(0) / scale).nan_to_num(math.inf)

    def worst(a: Tensor, b: Tensor | None) -> float:
        return math.inf if b is None else float(error(along @ (a - b)).max())

    stationarity, series = worst(given.grads, refitted.grads), worst(reference, refitted.grads)
    # Re-solved weights that are farther from a minimum than the given ones are the fit's fault.
    moved = Verdict.FIT_NOT_STATIONARY if points[1].gradient_norm > points[0].gradient_norm else Verdict.NOT_STATIONARY
    causes = {moved: stationarity, _of_solve(refitted, tolerance): series}
    if precise is not pair:
        causes[Verdict.LOW_PRECISION] = worst(own.grads, given.grads)
    errors = error(along @ own.grads - truth)
    resolved = float(rounding.max()) <= tolerance * scale
    passed = resolved and bool((errors <= tolerance).all())
    details = [] if passed else wrong_derivatives(base, max(tolerance, 1e-3), experiment.generator)
    unexplained = float(error(along @ reference - truth).max())
    if unexplained > tolerance:
        suspects = {Verdict.FIT_NOT_STATIONARY: fit_error, Verdict.NOISY: truth - coarse}
        likely = [v for v, difference in suspects.items() if float(error(difference).max()) > unexplained / 3]
        cause = likely[0] if likely else Verdict.UNEXPLAINED
        causes[cause] = max(unexplained, causes.get(cause, 0.0))
    fatal = {
        Verdict.WRONG_DERIVATIVE: bool(details),
        Verdict.INDEFINITE: points[1].indefinite,
        Verdict.NOISY: not resolved,
    }
    found = [Verdict.CORRECT] if passed else _judge(fatal, causes, tolerance)
    evidence = Evidence(
        *points,
        dtype=str(base.weights[0].dtype).removeprefix("torch."),
        tolerance=tolerance,
        hvps=refitted.solution.iterations if refitted.solution else 0,
        alpha=refitted.solution.alpha if refitted.solution else None,
        damping=refitted.solution.damping if refitted.solution else 0.0,
        reference_residuals=solve.residuals,
        details=tuple(details),
    )
    return CheckResult(
        verdict=found[0],
        advice=tuple(sentence for verdict in found for sentence in evidence.advice(verdict)),
        hypergradients=tuple((along @ own.grads).tolist()),
        finite_differences=tuple(truth.tolist()),
        errors=tuple(errors.tolist()),
        causes=tuple((verdict.value.split(":")[0], part) for verdict, part in causes.items()),
        given=points[0],
        refitted=points[1],
        step=experiment.step,
        tolerance=tolerance,
    )


def _judge(fatal: dict[Verdict, bool], causes: dict[Verdict, float], tolerance: float) -> list[Verdict]:
    """The verdict, then other causes worth mentioning; a fatal one stands alone."""
    if found := [verdict for verdict, present in fatal.items() if present]:
        return found[:1]
    order = sorted(causes, key=lambda verdict: -causes[verdict])
    return [verdict for verdict in order if causes[verdict] > tolerance] or order[:1]


def _of_divergence(failure: str, given: Point, refitted: Point) -> CheckResult:
    """The result if the solve diverged, which leaves nothing to compare."""
    verdict = Verdict.DIVERGED
    if refitted.indefinite:
        verdict = Verdict.INDEFINITE
    elif given.indefinite:
        verdict = Verdict.NOT_STATIONARY
    return CheckResult(verdict, (*Evidence(given, refitted).advice(verdict), failure), given=given, refitted=refitted)


def _of_solve(solved: Solved, tolerance: float) -> Verdict:
    """The verdict about a wrong solve at a minimum."""
    if solved.solution is None:
        return Verdict.DIVERGED
    if solved.solution.damping > 0 and solved.solution.residual_norm <= tolerance:
        return Verdict.DAMPED
    return Verdict.TOO_FEW_ITERATIONS
