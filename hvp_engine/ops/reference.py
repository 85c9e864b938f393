"""The reference backend: every op in plain torch, the executable specification.

Each function here has the name, the arguments and the meaning of the op in :mod:`hvp_engine.ops.schemas`; the C++,
CUDA and Triton versions are tested against it. State vectors are flat (see :mod:`hvp_engine._support.flat_vector`); the
product is the list of tensors that autograd returned, each read in row-major order.

`partials` receives one row for each chunk of each tensor: two squared norms (or inner products) and a flag that is 1
if the chunk holds a NaN or an infinity. `partials.sum(0)` gives the totals. The rows do not depend on the number of
threads or on the launch, so neither do the totals.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace

import torch
from torch import Tensor

from hvp_engine._support.flat_vector import CHUNK, offsets_of
from hvp_engine._support.pytree import check_like
from hvp_engine.ops.backend import Binding, Bound
from hvp_engine.ops.recurrences import RECURRENCES
from hvp_engine.ops.schemas import OPS


def _parts(tensors: Sequence[Tensor], *states: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """For each tensor: its elements in the state's dtype, and its part of every state vector."""
    offsets = offsets_of([t.numel() for t in tensors])
    for tensor, start in zip(tensors, offsets, strict=False):
        part = slice(start, start + tensor.numel())
        yield tensor.reshape(-1).to(states[0].dtype), *(state[part] for state in states)


Pair = tuple[Tensor, Tensor]


def _record(partials: Tensor, row: int, first: Pair, second: Pair) -> int:
    """Write the inner products of the two pairs, a row for each chunk, from `row` on; return the next free row."""
    for chunks in zip(*(part.split(CHUNK) for part in (*first, *second)), strict=True):
        if chunks[0].numel() == 0:
            continue
        a, b, c, d = (chunk.double() for chunk in chunks)
        partials[row, 0] = (a * b).sum()
        partials[row, 1] = (c * d).sum()
        partials[row, 2] = (~torch.isfinite(torch.stack([a, b, c, d])).all()).double()
        row += 1
    return row


def _squares(first: Tensor, second: Tensor) -> tuple[Pair, Pair]:
    return (first, first), (second, second)


def neumann_step(v: Tensor, p: Tensor, hv: Sequence[Tensor], alpha: Tensor, damping: float, partials: Tensor) -> None:
    """v <- v - alpha (Hv + damping v); p <- p + v. Partials: ||v||^2, ||p||^2 of the new v and p, non-finite."""
    step = alpha.to(v.dtype)
    partials.zero_()
    row = 0
    for product, residual, total in _parts(hv, v, p):
        residual.sub_(step * (product + damping * residual))
        total.add_(residual)
        row = _record(partials, row, *_squares(residual, total))


def neumann_step_horner(
    p: Tensor, v: Tensor, hp: Sequence[Tensor], alpha: Tensor, damping: float, partials: Tensor
) -> None:
    """p <- p + v - alpha (Hp + damping p), v constant. Partials: ||increment||^2, ||p||^2, non-finite."""
    step = alpha.to(p.dtype)
    partials.zero_()
    row = 0
    for product, total, start in _parts(hp, p, v):
        increment = start - step * (product + damping * total)
        total.add_(increment)
        row = _record(partials, row, *_squares(increment, total))


def scale_accumulate(p: Tensor, x: Sequence[Tensor], alpha: Tensor, beta: Tensor, partials: Tensor) -> None:
    """p <- alpha x + beta p; p is not read where beta is 0. Partials: ||x||^2, ||p||^2 of the new p, non-finite."""
    scale, keep = alpha.to(p.dtype), beta.to(p.dtype)
    partials.zero_()
    row = 0
    for source, target in _parts(x, p):
        target.copy_(torch.where(keep == 0, scale * source, scale * source + keep * target))
        row = _record(partials, row, *_squares(source, target))


def cg_step(
    x: Tensor, r: Tensor, d: Tensor, ad: Sequence[Tensor], rho: Tensor, damping: float, partials: Tensor
) -> None:
    """x <- x + a d; r <- r - a (Ad + damping d) with a = rho / c if c > 0 else 0, c = d . (Ad + damping d).

    d constant. Partials: ||r||^2 of the new r, the chunk's share of c, non-finite r, d or product.
    """
    partials.zero_()
    row = 0
    for product, residual, direction in _parts(ad, r, d):
        row = _record(partials, row, (residual, residual), (direction, product + damping * direction))
    curvature = partials[:, 1].sum()
    step = torch.where(curvature > 0, rho / curvature, 0.0).to(x.dtype)
    row = 0
    for product, solution, residual, direction in _parts(ad, x, r, d):
        curved = product + damping * direction
        solution.add_(step * direction)
        residual.sub_(step * curved)
        row = _record(partials, row, (residual, residual), (direction, curved))


def chebyshev_step(
    x: Tensor, r: Tensor, d: Tensor, ad: Sequence[Tensor], alpha: Tensor, beta: Tensor, damping: float, partials: Tensor
) -> None:
    """r <- r - (Ad + damping d); d <- beta d + alpha r; x <- x + d. Partials: ||r||^2, ||x||^2, non-finite."""
    scale, keep = alpha.to(x.dtype), beta.to(x.dtype)
    partials.zero_()
    row = 0
    for product, solution, residual, direction in _parts(ad, x, r, d):
        residual.sub_(product + damping * direction)
        direction.copy_(keep * direction + scale * residual)
        solution.add_(direction)
        row = _record(partials, row, *_squares(residual, solution))


STEPS: dict[str, Callable[..., None]] = {
    step.__name__: step for step in (neumann_step, neumann_step_horner, scale_accumulate, cg_step, chebyshev_step)
}


def cg_recurrence(s: SimpleNamespace) -> None:
    """The next beta and rho of conjugate gradients; rho is 0 from where the tolerance is reached.

    `squared` = r . r, `metric` = r . M r, and `curvature` = d . A d for the last direction d. `size` is the largest
    inverse step so far, at most the largest eigenvalue of A (of M A).
    """
    s.size = torch.where(s.rho > 0, torch.maximum(s.size, s.curvature / s.rho), s.size)
    s.negative = s.negative | ((s.rho > 0) & ~(s.curvature > 0))
    s.bad = s.bad | (s.nonfinite > 0)
    s.bad_metric = s.bad_metric | (s.preconditioned & (s.squared > 0) & ~(s.metric > 0) & ~s.bad)
    following = torch.where(s.preconditioned, s.metric, s.squared)
    moving = (s.squared > s.enough) & ~s.negative
    s.beta = torch.where(s.rho > 0, following / s.rho, 0.0)
    s.rho = torch.where(moving, following, 0.0)


def minres_lanczos(s: SimpleNamespace) -> None:
    """After alpha = z . A z: what the last reflection makes of the new column of the tridiagonal matrix."""
    s.bad = s.bad | (s.nonfinite > 0)
    delta = s.cosine * s.delta_bar + s.sine * s.alpha
    s.gamma_bar = s.sine * s.delta_bar - s.cosine * s.alpha
    s.minus_alpha, s.minus_delta, s.minus_epsilon = -s.alpha, -delta, -s.epsilon_k


def minres_reflection(s: SimpleNamespace) -> None:
    """beta = `norm`, or sqrt(`norm`) if that is u . M u, and 0 if only rounding is left of u; the next reflection."""
    s.bad_metric = s.bad_metric | (s.preconditioned & (s.scale > 0) & ~(s.norm > -s.epsilon * s.scale) & ~s.bad)
    beta = torch.where(s.preconditioned, s.norm.clamp_min(0).sqrt(), s.norm)
    beta = beta * (beta > 100 * s.epsilon * torch.hypot(torch.hypot(s.alpha, s.beta), beta))
    s.inverse = torch.where(beta > 0, 1 / beta, 0.0)
    s.size = torch.maximum(s.size, torch.hypot(torch.hypot(s.alpha, beta), s.beta))
    s.epsilon_k, s.delta_bar = s.sine * beta, -s.cosine * beta
    gamma = torch.hypot(s.gamma_bar, beta)
    s.inverse_gamma = torch.where(gamma > 0, 1 / gamma, 0.0)
    s.cosine, s.sine = s.gamma_bar * s.inverse_gamma, beta * s.inverse_gamma
    s.phi = s.cosine * s.phi_bar
    s.beta, s.minus_beta = beta, -beta


def minres_update(s: SimpleNamespace) -> None:
    """Whether the iterate is a least-squares solution; if not, its step and that of the residual.

    ||A r|| of the current iterate is phi_bar * slope: where slope vanishes it is a least-squares solution. A step so
    long that the rounding error of its product exceeds the residual goes along the null space.
    """
    slope = torch.hypot(s.gamma_bar, s.delta_bar)
    reach = s.phi.abs() * s.search_norm + s.value_norm
    stop = s.moving & ((slope <= s.flat * s.size) | (s.epsilon * s.size * reach > s.squared.sqrt()))
    s.slope = torch.where(stop, slope, s.slope)
    s.least, s.moving = s.least | stop, s.moving & ~stop
    s.phi_bar = s.sine * s.phi_bar
    s.step = torch.where(s.moving, s.phi, 0.0)
    s.keep = torch.where(s.moving, s.sine.square(), 1.0)
    s.minus_shift = torch.where(s.moving, -s.phi_bar * s.cosine, 0.0)


def minres_residual(s: SimpleNamespace) -> None:
    """After the residual's new norm: whether the tolerance is reached, or rounding has taken over.

    Without a preconditioner the 2-norm decreases until it stagnates; with one only the M-norm does.
    """
    lowest = torch.minimum(s.lowest, s.squared)
    s.squared = s.residual_norm.square()
    risen = ~s.preconditioned & s.moving & (s.squared > (1 + s.epsilon.sqrt()) ** 2 * lowest)
    s.lowest = torch.where(s.preconditioned, s.lowest, lowest)
    s.least, s.moving = s.least | risen, s.moving & ~risen & (s.squared > s.enough)


_RECURRENCES: dict[str, Callable[[SimpleNamespace], None]] = {
    step.__name__: step for step in (cg_recurrence, minres_lanczos, minres_reflection, minres_update, minres_residual)
}
_FLAGS = ("preconditioned", "negative", "moving", "least", "bad", "bad_metric")


def missing(device_type: str) -> str | None:
    """None: plain torch runs on every device."""
    return None


def bind(given: Binding) -> Bound:
    """The op `given.name`, bound."""
    name, states, layout, scalars, damping, partials = given
    op, step = OPS[name], STEPS[name]
    trailing = (*scalars, damping, partials) if op.damped else (*scalars, partials)

    def run(products: Sequence[Tensor]) -> None:
        check_like(products, layout, f"{name}: {op.product}", "weights", states[0].dtype)
        step(*states, layout.rows(products, apart_from=(*states, partials)), *trailing)

    return run


def bind_recurrence(name: str, state: Tensor) -> Callable[[], None]:
    """The recurrence `name`, bound."""
    names, step = RECURRENCES[name], _RECURRENCES[name]

    def run() -> None:
        numbers = dict(zip(names, state.unbind(), strict=True))
        s = SimpleNamespace(**{name: number > 0 if name in _FLAGS else number for name, number in numbers.items()})
        step(s)
        state.copy_(torch.stack([getattr(s, name).double() for name in names]))

    return run
