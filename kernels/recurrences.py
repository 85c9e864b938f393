"""The scalar recurrences of Krylov methods; see their functions of the same names in hvp_engine.ops.reference.

One program works on the numbers of `state`, which stand in the order of the lists in hvp_engine.ops.recurrences.
"""

from collections.abc import Callable

import triton
import triton.language as tl
from torch import Tensor

from hvp_engine.kernels.launch import device_of
from hvp_engine.ops.recurrences import CG, MINRES


def _place(name: str, names: tuple[str, ...] = MINRES) -> tl.constexpr:
    """Where a number stands, as a constant that kernels may read."""
    return tl.constexpr(names.index(name))


CG_SQUARED, CG_CURVATURE, CG_NONFINITE = _place("squared", CG), _place("curvature", CG), _place("nonfinite", CG)
CG_METRIC, CG_PRECONDITIONED, CG_ENOUGH = _place("metric", CG), _place("preconditioned", CG), _place("enough", CG)
CG_RHO, CG_BETA, CG_SIZE = _place("rho", CG), _place("beta", CG), _place("size", CG)
CG_NEGATIVE, CG_BAD, CG_BAD_METRIC = _place("negative", CG), _place("bad", CG), _place("bad_metric", CG)

ALPHA, NONFINITE, NORM, SCALE = _place("alpha"), _place("nonfinite"), _place("norm"), _place("scale")
SEARCH_NORM, VALUE_NORM, RESIDUAL_NORM = _place("search_norm"), _place("value_norm"), _place("residual_norm")
EPSILON, FLAT, PRECONDITIONED, ENOUGH = _place("epsilon"), _place("flat"), _place("preconditioned"), _place("enough")
COSINE, SINE, DELTA_BAR, EPSILON_K = _place("cosine"), _place("sine"), _place("delta_bar"), _place("epsilon_k")
SIZE, BETA, MINUS_BETA, GAMMA_BAR = _place("size"), _place("beta"), _place("minus_beta"), _place("gamma_bar")
PHI, PHI_BAR, SLOPE, SQUARED = _place("phi"), _place("phi_bar"), _place("slope"), _place("squared")
LOWEST, MOVING, LEAST = _place("lowest"), _place("moving"), _place("least")
BAD, BAD_METRIC, MINUS_ALPHA = _place("bad"), _place("bad_metric"), _place("minus_alpha")
MINUS_DELTA, MINUS_EPSILON, INVERSE = _place("minus_delta"), _place("minus_epsilon"), _place("inverse")
INVERSE_GAMMA, STEP, KEEP, MINUS_SHIFT = _place("inverse_gamma"), _place("step"), _place("keep"), _place("minus_shift")


@triton.jit
def _hypotenuse(a, b):
    """sqrt(a^2 + b^2) without overflow on the way: of 3e200 and 4e200 it is 4e200 sqrt(1 + 0.75^2) = 5e200."""
    a, b = tl.abs(a), tl.abs(b)
    large, small = tl.where(a > b, a, b), tl.where(a > b, b, a)
    ratio = small / tl.where(large == 0, 1.0, large)
    infinite = (a == float("inf")) | (b == float("inf"))
    return tl.where(infinite, float("inf"), large * tl.sqrt(1 + ratio * ratio))


@triton.jit
def _flag(condition):
    return tl.where(condition, 1.0, 0.0).to(tl.float64)


@triton.jit
def _inverse(x):
    """1 / x where x is positive, else 0."""
    return tl.where(x > 0, 1 / tl.where(x > 0, x, 1.0), 0.0)


@triton.jit
def cg_recurrence(state):
    squared, metric = tl.load(state + CG_SQUARED), tl.load(state + CG_METRIC)
    rho, bad = tl.load(state + CG_RHO), tl.load(state + CG_BAD)
    preconditioned = tl.load(state + CG_PRECONDITIONED) > 0
    curvature, size = tl.load(state + CG_CURVATURE), tl.load(state + CG_SIZE)
    inverse_step = tl.where(rho > 0, curvature / tl.where(rho > 0, rho, 1.0), 0.0)
    tl.store(state + CG_SIZE, tl.where((inverse_step > size) | (inverse_step != inverse_step), inverse_step, size))
    straight = (curvature > 0) | (rho <= 0) | (rho != rho)
    negative = tl.where(straight, tl.load(state + CG_NEGATIVE), 1.0)
    bad = tl.where(tl.load(state + CG_NONFINITE) > 0, 1.0, bad)
    suspect = preconditioned & (squared > 0) & (bad == 0)
    definite = tl.where(suspect, _flag(metric > 0), 1.0)
    bad_metric = tl.where(definite > 0, tl.load(state + CG_BAD_METRIC), 1.0)
    following = tl.where(preconditioned, metric, squared)
    moving = (squared > tl.load(state + CG_ENOUGH)) & (negative == 0)
    tl.store(state + CG_NEGATIVE, negative)
    tl.store(state + CG_BAD, bad)
    tl.store(state + CG_BAD_METRIC, bad_metric)
    tl.store(state + CG_BETA, tl.where(rho > 0, following / tl.where(rho > 0, rho, 1.0), 0.0))
    tl.store(state + CG_RHO, tl.where(moving, following, 0.0))


@triton.jit
def minres_lanczos(state):
    cosine, sine, alpha = tl.load(state + COSINE), tl.load(state + SINE), tl.load(state + ALPHA)
    delta_bar = tl.load(state + DELTA_BAR)
    tl.store(state + BAD, tl.where(tl.load(state + NONFINITE) > 0, 1.0, tl.load(state + BAD)))
    tl.store(state + GAMMA_BAR, sine * delta_bar - cosine * alpha)
    tl.store(state + MINUS_ALPHA, -alpha)
    tl.store(state + MINUS_DELTA, -(cosine * delta_bar + sine * alpha))
    tl.store(state + MINUS_EPSILON, -tl.load(state + EPSILON_K))


@triton.jit
def minres_reflection(state):
    norm, scale, epsilon = tl.load(state + NORM), tl.load(state + SCALE), tl.load(state + EPSILON)
    preconditioned = tl.load(state + PRECONDITIONED) > 0
    suspect = preconditioned & (scale > 0) & (tl.load(state + BAD) == 0)
    definite = tl.where(suspect, _flag(norm > -epsilon * scale), 1.0)
    tl.store(state + BAD_METRIC, tl.where(definite > 0, tl.load(state + BAD_METRIC), 1.0))

    alpha, old = tl.load(state + ALPHA), tl.load(state + BETA)
    beta = tl.where(preconditioned, tl.sqrt(tl.where(norm < 0, 0.0, norm)), norm)
    beta *= _flag(beta > 100 * epsilon * _hypotenuse(_hypotenuse(alpha, old), beta))
    tl.store(state + INVERSE, _inverse(beta))
    row, size = _hypotenuse(_hypotenuse(alpha, beta), old), tl.load(state + SIZE)
    tl.store(state + SIZE, tl.where((row > size) | (row != row), row, size))

    cosine, sine, gamma_bar = tl.load(state + COSINE), tl.load(state + SINE), tl.load(state + GAMMA_BAR)
    tl.store(state + EPSILON_K, sine * beta)
    tl.store(state + DELTA_BAR, -cosine * beta)
    inverse = _inverse(_hypotenuse(gamma_bar, beta))
    cosine, sine = gamma_bar * inverse, beta * inverse
    tl.store(state + INVERSE_GAMMA, inverse)
    tl.store(state + COSINE, cosine)
    tl.store(state + SINE, sine)
    tl.store(state + PHI, cosine * tl.load(state + PHI_BAR))
    tl.store(state + BETA, beta)
    tl.store(state + MINUS_BETA, -beta)


@triton.jit
def minres_update(state):
    phi, sine, size = tl.load(state + PHI), tl.load(state + SINE), tl.load(state + SIZE)
    slope = _hypotenuse(tl.load(state + GAMMA_BAR), tl.load(state + DELTA_BAR))
    reach = tl.abs(phi) * tl.load(state + SEARCH_NORM) + tl.load(state + VALUE_NORM)
    endless = tl.load(state + EPSILON) * size * reach > tl.sqrt(tl.load(state + SQUARED))
    moving = tl.load(state + MOVING) > 0
    stop = moving & ((slope <= tl.load(state + FLAT) * size) | endless)
    tl.store(state + SLOPE, tl.where(stop, slope, tl.load(state + SLOPE)))
    tl.store(state + LEAST, tl.where(stop, 1.0, tl.load(state + LEAST)))
    moving = tl.where(stop, 0.0, _flag(moving))
    phi_bar = sine * tl.load(state + PHI_BAR)
    tl.store(state + MOVING, moving)
    tl.store(state + PHI_BAR, phi_bar)
    tl.store(state + STEP, tl.where(moving > 0, phi, 0.0))
    tl.store(state + KEEP, tl.where(moving > 0, sine * sine, 1.0))
    tl.store(state + MINUS_SHIFT, tl.where(moving > 0, -phi_bar * tl.load(state + COSINE), 0.0))


@triton.jit
def minres_residual(state):
    norm, before, lowest = tl.load(state + RESIDUAL_NORM), tl.load(state + SQUARED), tl.load(state + LOWEST)
    plain, moving = tl.load(state + PRECONDITIONED) == 0, tl.load(state + MOVING) > 0
    squared = norm * norm
    lowest = tl.where(plain, tl.where((before < lowest) | (before != before), before, lowest), lowest)
    limit = 1 + tl.sqrt(tl.load(state + EPSILON))
    risen = plain & moving & (squared > limit * limit * lowest)
    tl.store(state + SQUARED, squared)
    tl.store(state + LOWEST, lowest)
    tl.store(state + LEAST, tl.where(risen, 1.0, tl.load(state + LEAST)))
    going = tl.where(risen, 0.0, _flag(moving))
    tl.store(state + MOVING, tl.where(squared > tl.load(state + ENOUGH), going, 0.0))


RECURRENCE_KERNELS = {
    kernel.__name__: kernel
    for kernel in (cg_recurrence, minres_lanczos, minres_reflection, minres_update, minres_residual)
}


def bind_recurrence(name: str, state: Tensor) -> Callable[[], None]:
    """The recurrence `name`, bound."""
    kernel = RECURRENCE_KERNELS[name]

    def run() -> None:
        with device_of(state):
            kernel[(1,)](state, num_warps=1)

    return run
