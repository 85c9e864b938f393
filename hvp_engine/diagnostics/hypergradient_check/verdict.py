"""The result of checking a hypergradient: the verdict, the figures behind it, and advice."""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass


class Verdict(enum.Enum):
    """What :func:`hvp_engine.check` found; the value is the message."""

    CORRECT = "correct: the hypergradient agrees with finite differences"
    NOT_DETERMINISTIC = "not deterministic: a loss has two values at the same point"
    NOT_STATIONARY = "not stationary: the weights are too far from a minimum of the training loss"
    TOO_FEW_ITERATIONS = "iterations too few: the solve is far from its limit"
    DAMPED = "damped: the solve converged, to a solution that the damping has moved"
    DIVERGED = "diverged: the solve went to infinity"
    INDEFINITE = "indefinite: the Hessian has negative curvature, so the solve has no limit"
    LOW_PRECISION = "low precision: the same hypergradient in float64 is another one"
    NOISY = "finite-difference noise: the differences themselves are not known well enough"
    FIT_NOT_STATIONARY = "fit: the re-solved weights are too far from a minimum of the training loss"
    WRONG_DERIVATIVE = "wrong derivative: autograd and finite differences disagree about a loss"
    UNEXPLAINED = "unexplained: the hypergradient and the finite differences disagree"


@dataclass(frozen=True)
class Point:
    """The training loss at some weights.

    Attributes:
        gradient_norm: ||dL_T/dw||.
        largest, smallest: the Hessian's largest eigenvalue by magnitude and its smallest one, as found by 30 steps of
            Lanczos.
        residual: ||v - H x|| / ||v|| of the solver's x, without damping; NaN where the solver diverged.
    """

    gradient_norm: float
    largest: float
    smallest: float
    residual: float

    @property
    def indefinite(self) -> bool:
        return self.smallest < -1e-4 * self.largest


@dataclass(frozen=True)
class CheckResult:
    """What :func:`hvp_engine.check` returns; `print` shows all of it.

    Attributes:
        verdict: the one cause that explains most of the error, or that there is none.
        advice: sentences, the most important one first.
        hypergradients: <hypergradient, direction> for each direction.
        finite_differences: the central differences of the re-solved validation loss.
        errors: |difference of the two|, relative to the root mean square over the directions.
        causes: the part of the worst error that each suspect accounts for.
        given: the point the hypergradient was computed at.
        refitted: the re-solved point; None if the check ended before.
        step: the step of the differences, relative to the size of each hyperparameter tensor.
        tolerance: the largest relative error that passes.
    """

    verdict: Verdict
    advice: tuple[str, ...]
    hypergradients: tuple[float, ...] = ()
    finite_differences: tuple[float, ...] = ()
    errors: tuple[float, ...] = ()
    causes: tuple[tuple[str, float], ...] = ()
    given: Point | None = None
    refitted: Point | None = None
    step: float = math.nan
    tolerance: float = math.nan

    @property
    def passed(self) -> bool:
        return self.verdict is Verdict.CORRECT

    def __str__(self) -> str:
        lines = [f"hypergradient check: {self.verdict.value}"]
        if self.errors:
            lines += [f"  {'direction':<24}{'hypergradient':>15}{'difference':>15}{'relative error':>16}"]
            rows = zip(self.hypergradients, self.finite_differences, self.errors, strict=True)
            lines += [f"  {number:<24}{g:>15.5g}{d:>15.5g}{e:>16.1e}" for number, (g, d, e) in enumerate(rows, 1)]
            lines += [f"  tolerance {self.tolerance:g}, step of the differences {self.step:.1e}"]
        if self.given and self.refitted:
            lines += [f"  {'':<24}{'your weights':>15}{'re-solved':>15}"]
            for name, field in _FIGURES.items():
                lines += [f"  {name:<24}{getattr(self.given, field):>15.3g}{getattr(self.refitted, field):>15.3g}"]
        if self.causes:
            lines += ["  error from " + ", ".join(f"{name} {error:.1e}" for name, error in self.causes)]
        return "\n".join([*lines, *(f"  - {sentence}" for sentence in self.advice)])


_FIGURES = {
    "||dL_T/dw||": "gradient_norm",
    "largest curvature": "largest",
    "smallest curvature seen": "smallest",
    "residual of the solve": "residual",
}


@dataclass(frozen=True)
class Evidence:
    """The measurements from which advice is derived: at both points, of the solve at the re-solved one, and of a
    reference solve there."""

    given: Point
    refitted: Point
    dtype: str = ""
    tolerance: float = 0.0
    hvps: int = 0
    alpha: float | None = None
    damping: float = 0.0
    reference_residuals: tuple[float, ...] = ()
    details: tuple[str, ...] = ()

    def advice(self, verdict: Verdict) -> list[str]:
        """What to do about `verdict`, in sentences."""
        if verdict is Verdict.NOT_STATIONARY:
            sentence = (
                f"train longer before asking for a hypergradient: ||dL_T/dw|| is {self.given.gradient_norm:.2g} at "
                f"your weights and {self.refitted.gradient_norm:.2g} after re-solving"
            )
            if self.given.indefinite:
                sentence += (
                    f"; until then the Hessian has negative curvature ({self.given.smallest:.2g}): "
                    f"use damping={-1.5 * self.given.smallest:.2g} or more"
                )
            return [sentence]
        if verdict is Verdict.TOO_FEW_ITERATIONS:
            return self._more_iterations()
        if verdict is Verdict.DAMPED:
            return [
                f"lower damping={self.damping:g}, which is to be compared with the smallest curvature, "
                f"{self.refitted.smallest:.2g}; or add the same decay to the training loss, so that both agree"
            ]
        if verdict is Verdict.INDEFINITE:
            return [
                f"the smallest curvature seen is {self.refitted.smallest:.2g}, where a minimum has none below zero: "
                f"train to a minimum, or use damping={-1.5 * self.refitted.smallest:.2g} or a Gauss-Newton operator, "
                "whose hypergradients are then approximate"
            ]
        if verdict is Verdict.DIVERGED:
            return [f"use alpha='auto', or alpha={1 / max(self.refitted.largest, 1e-300):.2g} or less"]
        if verdict is Verdict.LOW_PRECISION:
            return ["compute the hypergradient in float32 or float64: its own rounding is what differs"]
        if verdict is Verdict.NOISY:
            more = "try another step=" if self.dtype == "float64" else f"use float64 instead of {self.dtype}"
            return [f"{more}, and a fit that ends closer to the minimum: differences at two steps disagree"]
        if verdict is Verdict.FIT_NOT_STATIONARY:
            return [
                f"let fit run to a minimum of train_loss itself, with every hyperparameter in it: it leaves "
                f"||dL_T/dw|| = {self.refitted.gradient_norm:.2g}, too much for differences of this step; "
                "with fit=None, give one that follows your training"
            ]
        if verdict is Verdict.WRONG_DERIVATIVE:
            return [
                f"{detail}: look for .detach(), .data, .item(), float() or an own backward" for detail in self.details
            ]
        if verdict is Verdict.UNEXPLAINED:
            return ["all derivatives agree locally: look for a fit that jumps between minima, or one of another loss"]
        return []

    def _more_iterations(self) -> list[str]:
        """How many products would be enough, for the series and for conjugate gradients."""
        sentence = f"the residual is {self.refitted.residual:.2g} after {self.hvps} products"
        largest, smallest = self.refitted.largest, self.refitted.smallest
        best = 1 / largest if largest > 0 else 1.0
        remedies = []
        if self.alpha is not None and self.alpha < 0.3 * best:
            remedies.append(f"a larger step (alpha={self.alpha:.2g}, while alpha={best:.2g} would converge)")
        if smallest > 1e-12 * largest:
            terms = math.ceil(math.log(1 / self.tolerance) / -math.log1p(-min(smallest / largest, 0.999)))
            remedies.append(f"hvp.Neumann({terms}), roughly")
        products = next((n for n, r in enumerate(self.reference_residuals, 1) if r <= self.tolerance), None)
        if products is None:
            sentence += "; even conjugate gradients do not converge: the Hessian is nearly singular"
            remedies.append("a decay in the training loss, or damping")
        else:
            remedies.append(f"hvp.ConjugateGradient({products})")
        return [f"{sentence}; use {', or '.join(remedies)}"]
