"""MINRES: the smallest residual, for symmetric operators that need not be definite."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hvp_engine import ops
from hvp_engine._support.flat_vector import FlatVector, Layout
from hvp_engine.solvers.base import KrylovSolver
from hvp_engine.solvers.iteration import (
    Iteration,
    Outcome,
    RightHandSide,
    Tolerance,
    krylov_residual,
    scalar,
    tolerance_of,
)
from hvp_engine.solvers.preconditioning import precondition
from hvp_engine.solvers.solution import Status

CHECK_EVERY = 5
"""The host asks the device once per this many products whether the tolerance is reached."""

_FLAT = {torch.float32: 6e-5, torch.float64: 1e-8}
"""If ||A r|| / (||A|| ||r||) is below this, r counts as in the null space: rounding lets the ratio fall no further."""

_STRAY = 0.01
"""The last step, along the presumed null space, may change the residual by at most this share of it."""


@dataclass(frozen=True)
class MINRES(KrylovSolver):
    """The minimal residual method for a symmetric operator, definite or not.

    Of all x in the span of b, A b, A^2 b, ... that `iterations` products reach, it finds the one with the smallest
    ||b - A x||, so the residual never grows, whatever the signs of the eigenvalues. For a positive definite operator it
    needs about as many products as conjugate gradients; for eigenvalues in [-b, -a] and [a, b] about b / a. If a
    singular system has no solution, the result is the least-squares solution of smallest norm, and the status SINGULAR.

    This applies the exact inverse of an indefinite Hessian, which at a saddle does not describe the response of a
    minimum. For a hypergradient near a minimum, `damping` larger than the negative curvature may be what you want.

    Arguments:
        iterations: number of products with A, >= 0.
        tol: stop when ||v - A x|| <= max(tol ||v||, atol); with 0 for both, at rounding alone; None is eps^(2/3) of
            the dtype that is solved in, 2.4e-5 in float32 and 3.7e-11 in float64, or, if rounding stops it earlier,
            eps^(1/2).
        damping: added to the diagonal of A, >= 0.
        preconditioner: v -> M v on the list of the weights' leaves, symmetric positive definite, near |A|^-1. It
            then minimizes the residual in the M-norm, and a least-squares solution is the one of smallest M^-1-norm.
        atol: the absolute tolerance of the residual in the 2-norm, >= 0, without the preconditioner and in the units of
            v; `atol=1e-5, tol=0.0` is an absolute tolerance alone.

    Cost: up to `iterations` products; six flat vectors of weights, seven with a preconditioner. The tolerance is
    checked every 5 products, so up to 4 may follow after it is reached; they do not change x.

    Errors: `TypeError` or `ValueError` naming the argument, at construction; `ValueError` in a solve with a
    preconditioner that is not positive definite.

    Source: Paige and Saunders, Solution of Sparse Indefinite Systems of Linear Equations, SIAM Journal on Numerical
    Analysis 1975; stopping on singular systems and the residual vector: Choi, Paige and Saunders, MINRES-QLP: A Krylov
    Subspace Method for Indefinite or Singular Symmetric Systems, SIAM Journal on Scientific Computing 2011; the last
    step to the smallest norm: Liu, Milzarek and Roosta, Obtaining Pseudo-inverse Solutions With MINRES, arXiv 2023.

    >>> import torch, hvp_engine as hvp
    >>> A = torch.tensor([[1.0, 2.0], [2.0, 1.0]])                  # eigenvalues 3 and -1
    >>> solution = hvp.solve(lambda v: A @ v, torch.tensor([3.0, 0.0]), hvp.MINRES(2))
    >>> solution.value, solution.status.name
    (tensor([-1.0000,  2.0000]), 'CONVERGED')
    """

    def allocate(self, layout: Layout) -> Iteration:
        return _MINRES(self, layout)


class _MINRES(Iteration):
    """State: Lanczos vectors u, z = M u, and reflections (c, s) that make their tridiagonal matrix triangular."""

    def __init__(self, solver: MINRES, layout: Layout):
        self.limit, self.steps = solver.iterations, 0
        self._preconditioner, self._damping = solver.preconditioner, solver.damping
        self._epsilon = torch.finfo(layout.state_dtype).eps
        self._tolerance = Tolerance(tolerance_of(solver.tol, layout), solver.atol)
        stagnation = self._tolerance.relative if solver.tol is not None else math.sqrt(self._epsilon)
        self._stagnation_tolerance = Tolerance(stagnation, solver.atol)
        self._b = RightHandSide(layout)
        self._residual = self._b.vector
        self.value = FlatVector(layout)
        self._basis = FlatVector(layout), FlatVector(layout)
        self._searches = FlatVector(layout), FlatVector(layout)
        self._image = None if self._preconditioner is None else FlatVector(layout)
        self.direction = self._basis[0] if self._image is None else self._image
        vectors = [self._residual, self.value, *self._basis, *self._searches]
        self._vectors = vectors if self._image is None else [*vectors, self._image]
        self._partials = layout.empty_partials()
        one, self._minus_beta = scalar(1.0, layout.device), scalar(0.0, layout.device)
        self._no = torch.zeros((), dtype=torch.bool, device=layout.device)
        self._recurrences = [
            ops.bind("scale_accumulate", (u.data,), layout, (one, self._minus_beta), 0.0, self._partials)
            for u in self._basis
        ]

    def start(self, v: Sequence[Tensor]) -> None:
        self.steps = 0
        for vector in self._vectors:  # including the gaps, which the ops do not write
            vector.data.zero_()
        self._b.load(v)
        self._squared_b, _, self._bad_b = self._b.sums().unbind()
        self._squared = self._lowest = self._squared_b
        self._enough = self._tolerance.squared(self._squared_b)
        self._bad = self._bad_metric = self._least = self._no
        zero = torch.zeros_like(self._squared_b)
        self._cosine, self._sine = zero - 1, zero
        self._delta_bar = self._epsilon_k = self._size = zero
        self._slope = zero + math.inf  # of the iterate accepted as a least-squares solution
        self._moving = (self._squared_b > 0) & (self._squared_b > self._tolerance.absolute**2)
        self._minus_beta.zero_()
        self._basis[0].data.copy_(self._residual.data)
        self._beta, self._phi_bar = zero, self._normalize(0, zero)
        self._bad_metric = self._bad_metric | (self._moving & ~(self._phi_bar > 0))

    def step(self, product: Sequence[Tensor]) -> None:
        now, other = self.steps % 2, 1 - self.steps % 2
        self.steps += 1
        u, following = self._basis[now], self._basis[other]
        image = self.direction
        self._recurrences[other](product)  # following <- A z - beta (the one before u)
        self._bad = self._bad | (self.value.layout.total(self._partials[:, 2].sum()) > 0)
        if self._damping:
            following.data.add_(image.data, alpha=self._damping)
        alpha = following.dot(image).double()
        following.data.addcmul_(u.data, -alpha)

        # The search direction needs z before its buffer is overwritten; it is scaled further down.
        search, previous = self._searches[now], self._searches[other]
        delta = self._cosine * self._delta_bar + self._sine * alpha
        gamma_bar = self._sine * self._delta_bar - self._cosine * alpha
        search.data.mul_(-self._epsilon_k).addcmul_(previous.data, -delta).add_(image.data)

        beta = self._normalize(other, torch.hypot(alpha, self._beta))
        self._size = torch.maximum(self._size, torch.hypot(torch.hypot(alpha, beta), self._beta))
        self._epsilon_k, self._delta_bar = self._sine * beta, -self._cosine * beta
        gamma = torch.hypot(gamma_bar, beta)
        inverse = torch.where(gamma > 0, 1 / gamma, 0.0)
        self._cosine, self._sine = gamma_bar * inverse, beta * inverse
        phi = self._cosine * self._phi_bar
        search.data.mul_(inverse)

        # ||A r|| of the current iterate is phi_bar * slope: where slope vanishes it is a least-squares solution. A step
        # so long that the rounding error of its product exceeds the residual goes along the null space.
        slope = torch.hypot(gamma_bar, self._delta_bar)
        reach = phi.abs() * search.norm() + self.value.norm()
        flat = slope <= _FLAT[search.data.dtype] * self._size
        endless = self._epsilon * self._size * reach > self._squared.sqrt()
        stop = self._moving & (flat | endless)
        self._slope = torch.where(stop, slope, self._slope)
        self._least = self._least | stop
        self._moving = self._moving & ~stop

        self._phi_bar = self._sine * self._phi_bar
        self.value.data.addcmul_(search.data, torch.where(self._moving, phi, 0.0))
        self._residual.data.mul_(torch.where(self._moving, self._sine.square(), 1.0))
        shift = torch.where(self._moving, self._phi_bar * self._cosine, 0.0)
        self._residual.data.addcmul_(following.data, -shift)
        before, self._squared = self._squared, self._residual.norm().double().square()
        if self._preconditioner is None:  # then the 2-norm decreases until stagnation: rounding takes over
            self._lowest = torch.minimum(self._lowest, before)
            risen = self._squared > (1 + self._epsilon**0.5) ** 2 * self._lowest
            self._least, self._moving = self._least | (self._moving & risen), self._moving & ~risen
        self._moving = self._moving & (self._squared > self._enough)
        self._beta = beta
        self._minus_beta.copy_(-beta)

    def _normalize(self, index: int, size: Tensor) -> Tensor:
        """u <- u / beta and z <- M u, with beta = sqrt(u . M u), or 0 if only rounding is left of u."""
        u = self._basis[index]
        if self._preconditioner is None:
            self.direction = u
            beta = u.norm().double()
        else:
            assert self._image is not None
            precondition(self._preconditioner, u, self._image)
            squared = u.dot(self._image).double()
            scale = u.dot(u)
            self._bad_metric = self._bad_metric | ((scale > 0) & ~(squared > -self._epsilon * scale) & ~self._bad)
            beta = squared.clamp_min(0).sqrt()
        beta = beta * (beta > 100 * self._epsilon * torch.hypot(size, beta))
        inverse = torch.where(beta > 0, 1 / beta, 0.0)
        for vector in {id(u): u, id(self.direction): self.direction}.values():
            vector.data.mul_(inverse)
            vector.refresh()
        return beta

    def finished(self) -> bool:
        return self.steps % CHECK_EVERY == 1 and not bool(self._moving)

    def finish(self) -> Tensor:
        # The component of x in the null space of a singular A is a multiple of (M times) the least-squares residual.
        image = self._residual
        if self._preconditioner is not None:
            image = self._basis[0]
            precondition(self._preconditioner, self._residual, image)
        norm = self._residual.dot(image)
        share = self._residual.dot(self.value) / norm
        null = self._least & (norm > 0) & (share.abs() * self._slope <= _STRAY)
        self.value.data.addcmul_(image.data, -torch.where(null, share, 0.0))
        bad = self._bad | ~self.value.all_finite()
        figures = [self._squared_b, self._bad_b, self._squared, self._least, bad, self._bad_metric]
        return torch.stack([figure.double() for figure in figures])

    def read(self, figures: Sequence[float]) -> Outcome:
        squared_b, bad_b, squared, least, bad, bad_metric = figures
        residual = krylov_residual(squared_b, bad_b, squared, bad, bad_metric)
        if (self._stagnation_tolerance if least else self._tolerance).reached(residual, squared_b):
            status = Status.CONVERGED
        else:
            status = Status.SINGULAR if least else Status.ITERATION_LIMIT
        return Outcome(residual, "returned" if self.steps else "none", status, math.isfinite(residual), bad_b == 0)
