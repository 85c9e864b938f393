"""The errors of failed solves: each says what went wrong and which settings would have worked."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from hvp_engine._support.flat_vector import FlatVector
from hvp_engine.differentiation.linear_map import Linearization, LinearMap
from hvp_engine.errors import DivergenceError, NonFiniteError
from hvp_engine.solvers.iteration import FinishedIteration, Outcome
from hvp_engine.solvers.spectrum import HEADROOM, Estimates

_SCALE_OR_WIDEN = "multiply the training loss by a constant such as 1024 (loss scaling), use bfloat16 or float32"

_CHECK = "check the inputs and weights for NaN and Inf, or lower the learning rates that led here"
_AT_A_POINT = "as of norm, sqrt or a power below 2 at zero"
_SMOOTHED = (
    f"add a small constant under the root, as in sqrt(x.square().sum() + 1e-12), or square the norm; otherwise {_CHECK}"
)


def any_bad(tensors: Sequence[Tensor]) -> bool:
    return not all(bool(torch.isfinite(tensor).all()) for tensor in tensors)


def refusal(operator: LinearMap, bad: str | None) -> NonFiniteError:
    """The error for NaN or Inf that was there before the solve: in the argument named `bad`, or in the operator."""
    if bad is not None:
        return NonFiniteError(f"{bad}: expected finite values; got NaN or Inf: check the loss whose gradient it is")
    loss = operator.loss
    what, remedy = "the product A v of a finite v is NaN or Inf", _CHECK
    if loss is not None and not bool(torch.isfinite(loss)):
        what = f"the loss is {float(loss)} at these weights"
    elif isinstance(operator, Linearization):
        if any_bad(operator.gradient):
            what, remedy = f"the loss is finite, but its gradient is NaN or Inf, {_AT_A_POINT}", _SMOOTHED
        else:
            what = (
                "the loss and its gradient are finite, but some operator in the loss has no finite second derivative "
                f"at this point, {_AT_A_POINT}"
            )
            remedy = _SMOOTHED
    return NonFiniteError(f"{operator.name}: expected finite products; {what}: {remedy}")


def divergence(
    operator: LinearMap, outcome: Outcome, iteration: FinishedIteration, solver: object, estimates: Estimates
) -> DivergenceError:
    """The error for a failed solve, with settings that would have worked."""
    estimate = estimates.restart()
    if not estimate.finite:
        return refusal(operator, None)
    alpha = iteration.alpha
    happened = (
        f"the residual grew {outcome.grown:.3g}-fold (limit {outcome.growth_limit:.3g})"
        if outcome.finite and math.isfinite(outcome.grown)
        else "the sum became NaN or Inf"
    )
    bounds = iteration.bounds
    step = "alpha" if bounds is None else "bounds"
    used = "" if alpha is None else f" with alpha={alpha:.6g}"
    if bounds is not None:
        used = f" with bounds=({bounds[0]:.6g}, {bounds[1]:.6g})"
    bound = estimate.bound(estimates.damping)
    if alpha is None and bounds is None and outcome.grown < math.inf:
        advice = (
            "the operator is singular and v is not in its range, as when the validation loss depends on a weight that "
            "the training loss does not use: leave such weights out, or use hvp.MINRES or damping"
        )
    elif alpha is None and bounds is None:
        advice = "scale the loss, or use a wider dtype"
    elif estimate.indefinite(estimates.damping) and estimates.preconditioned:
        advice = f"M (A + damping I) has a negative eigenvalue, so no {step} converges: use more damping or fewer terms"
    elif estimate.indefinite(estimates.damping):
        needed = -1.5 * estimate.smallest
        works = f"alpha={1 / estimate.bound(needed):.3g}" if bounds is None else "bounds='auto'"
        advice = (
            f"its smallest eigenvalue is about {estimate.smallest:.3g}, so no {step} converges: use "
            f"damping={needed:.3g} with {works}, fewer iterations, or a Gauss-Newton operator"
        )
    elif bounds is not None:
        advice = f"an upper bound of {HEADROOM * bound:.3g} or bounds='auto' would converge"
    else:
        advice = f"alpha={1 / bound:.3g} or alpha='auto' would converge" if bound > 0 else "use a smaller alpha"
    return DivergenceError(
        f"{type(solver).__name__} diverged after {iteration.steps} products{used}: {happened}; "
        f"lambda_max is estimated as {estimate.largest + estimates.damping:.3g}; {advice}"
    )


def overflow(operator: LinearMap, value: FlatVector) -> DivergenceError:
    """The error for a solution that its dtype cannot hold."""
    largest = float(value.data.abs().max())
    dtype = min(operator.layout.dtypes, key=lambda dtype: torch.finfo(dtype).max)
    most = "65,504" if dtype == torch.float16 else f"{torch.finfo(dtype).max:.3g}"
    return DivergenceError(
        f"{operator.name}: expected a solution that {str(dtype)[6:]} can hold, of entries up to {most}; got entries "
        f"up to {largest:.3g}, because the curvature is small or v is large; {_SCALE_OR_WIDEN}, or give a smaller "
        "fixed alpha"
    )


def underflow(operator: LinearMap, products: int) -> DivergenceError:
    """The error for curvature that float16 cannot hold."""
    return DivergenceError(
        f"{operator.name}: expected curvature that float16 can hold; got only zeros in {products} "
        "products, so alpha='auto' cannot be determined: second derivatives below 6e-8 become zero in "
        f"float16; {_SCALE_OR_WIDEN}, or give a fixed alpha"
    )
