"""The truncated Neumann series (Algorithm 3), in its two forms, and its zeroth term, the identity."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from hvp_engine import ops
from hvp_engine._support.arguments import check_count, check_not_negative, check_or_auto, check_positive, replace_fields
from hvp_engine._support.flat_vector import FlatVector, Layout
from hvp_engine.differentiation.linear_map import Accumulation, Mixing
from hvp_engine.solvers.base import Solver
from hvp_engine.solvers.iteration import Iteration, Outcome, RightHandSide, scalar
from hvp_engine.solvers.preconditioning import MNorm, Preconditioner, check_preconditioner, precondition
from hvp_engine.solvers.solution import Status
from hvp_engine.solvers.spectrum import SpectralEstimate

Form = Literal["accumulate", "horner"]


@dataclass(frozen=True)
class Neumann(Solver):
    """Truncated Neumann series.

    x = alpha * sum_{j=0..i} (I - alpha (A + damping I))^j v, with i = `iterations`: i products and i + 1 terms.
    It converges to (A + damping I)^-1 v if A + damping I is positive definite and 0 < alpha < 2 / lambda_max. For an
    indefinite A no alpha converges: the terms grow, so only a short sum is of use.

    Arguments:
        iterations: number of products with A, >= 0; 0 gives alpha * v and makes no product.
        alpha: the step > 0, or "auto": 1 / lambda_max from a Lanczos estimate (8 products cold, 3 to refresh);
            smaller under negative curvature, so that `iterations` products let the residual grow at most tenfold.
        form: "accumulate" keeps the term and the sum (v <- v - alpha A v; p <- p + v); "horner" keeps the sum
            alone (p <- p + v_0 - alpha A p): the default, with less memory traffic and at least as accurate in
            float32, bfloat16 and float16 (bench/results/precision.csv). In float16 with a loss scaled by 1000 and
            100 terms its sum can overflow where "accumulate" does not.
        damping: added to the diagonal of A, >= 0.
        preconditioner: v -> M v on the list of the weights' leaves, symmetric positive definite, near A^-1; for example
            a :class:`DiagonalPreconditioner`. The sum then has M A and M v in place of A and v, and converges to the
            same limit for 0 < alpha < 2 / lambda_max(M A).

    Cost: `iterations` products; two flat vectors of weights, three with a preconditioner, for any `iterations`.

    Errors: `TypeError` or `ValueError` naming the argument, at construction.

    Source: Lorraine, Vicol and Duvenaud, Optimizing Millions of Hyperparameters by Implicit Differentiation, AISTATS
    2020, Algorithm 3 and Eq. 8 (which omits the final factor alpha).

    >>> import torch, hvp_engine as hvp
    >>> hvp.solve(lambda v: 4.0 * v, torch.ones(2), hvp.Neumann(30, alpha=0.2)).value
    tensor([0.2500, 0.2500])
    """

    iterations: int
    alpha: float | Literal["auto"] = "auto"
    form: Form = "horner"
    damping: float = 0.0
    preconditioner: Preconditioner | None = None

    needs_symmetry: ClassVar[bool] = False
    needs_fixed_operator: ClassVar[bool] = False

    def __post_init__(self) -> None:
        alpha = check_or_auto(check_positive, self.alpha, "alpha")
        iterations = check_count(self.iterations, "iterations", least=0)
        replace_fields(self, iterations=iterations, alpha=alpha, damping=check_not_negative(self.damping, "damping"))
        check_preconditioner(self.preconditioner)
        if self.form not in ("accumulate", "horner"):
            raise ValueError(f"form: expected 'accumulate' or 'horner'; got {self.form!r}")

    @property
    def estimates_spectrum(self) -> bool:
        return self.alpha == "auto"

    @property
    def quiet(self) -> bool:
        return self.preconditioner is None

    @property
    def makes_products(self) -> bool:
        return self.iterations > 0

    def without_estimate(self) -> Neumann:
        """With alpha = 1 / (1 + damping): a map that contracts makes of I - J a matrix near I."""
        return replace(self, alpha=1 / (1 + self.damping)) if self.alpha == "auto" else self

    def allocate(self, layout: Layout) -> Iteration:
        return _FORMS[self.form, self.preconditioner is not None](self, layout)

    def alpha_for(self, estimate: SpectralEstimate | None) -> float:
        """The step: the given one, or the estimate's."""
        if self.alpha != "auto":
            return float(self.alpha)
        assert estimate is not None
        return estimate.safe_alpha(self.damping if self.preconditioner is None else 0.0, self.iterations)


class _Accumulate(Iteration):
    """v <- v - alpha A v; p <- p + v."""

    def __init__(self, solver: Neumann, layout: Layout):
        self.limit, self.steps = solver.iterations, 0
        self.alpha: float = math.nan
        self._solver = solver
        self._alpha = scalar(self.alpha, layout.device)
        self._figures = torch.stack([layout.empty_partials(), layout.empty_partials()])
        of_b, self._partials = self._figures  # summed together
        self._b = RightHandSide(layout, of_b)
        self._bind(layout)

    def _bind(self, layout: Layout) -> None:
        self.direction = self._b.vector
        self.value = FlatVector.unset(layout)
        states, damping = (self.direction.data, self.value.data), self._solver.damping
        self._update = ops.bind("neumann_step", states, layout, (self._alpha,), damping, self._partials)

    @property
    def accumulation(self) -> Accumulation | None:
        return Accumulation(self.direction, self.direction, self.alpha, (Mixing(self.value, self._b.vector),))

    def adapt(self, estimate: SpectralEstimate | None) -> None:
        alpha = self._solver.alpha_for(estimate)
        if alpha != self.alpha:
            self.alpha = alpha
            self._alpha.fill_(alpha)

    def start(self, v: Sequence[Tensor]) -> None:
        self.steps = 0
        self._b.load(v)
        self.value.assign(self._b.vector)

    def step(self, product: Sequence[Tensor]) -> None:
        self._update(product)
        self.direction.refresh()
        self.steps += 1

    def finish(self) -> Tensor:
        self.value.data.mul_(self._alpha)
        return self.value.layout.total(self._figures.sum(1).reshape(-1))

    def unscaled(self) -> Outcome | None:
        # Torch's operations would take longer here than a short product: after one, their code is in no cache.
        return self.read([sum(column) for rows in self._figures.numpy().tolist() for column in zip(*rows, strict=True)])

    def read(self, figures: Sequence[float]) -> Outcome:
        return outcome_of(figures, self.steps, self.value.data.dtype)


class _Horner(_Accumulate):
    """p <- p + v - alpha A p, with v constant."""

    def _bind(self, layout: Layout) -> None:
        self.direction = self.value = FlatVector.unset(layout)
        states, damping = (self.value.data, self._b.vector.data), self._solver.damping
        self._update = ops.bind("neumann_step_horner", states, layout, (self._alpha,), damping, self._partials)


class _Preconditioned(_Accumulate):
    """r <- r - alpha A z; z <- M r; p <- p + z, where r is the residual of x = alpha p before the step."""

    @property
    def accumulation(self) -> Accumulation | None:
        return None

    def _bind(self, layout: Layout) -> None:
        assert self._solver.preconditioner is not None
        self._preconditioner = self._solver.preconditioner
        self._residual, self._image = self._b.vector, FlatVector(layout)
        self._m_norm = MNorm(self._residual, self._image)
        self.value, self.direction = FlatVector(layout), self._image
        self._minus, one = scalar(math.nan, layout.device), scalar(1.0, layout.device)
        states, scales = (self._residual.data,), (self._minus, one)
        self._update = ops.bind("scale_accumulate", states, layout, scales, 0.0, self._partials)

    def adapt(self, estimate: SpectralEstimate | None) -> None:
        super().adapt(estimate)
        self._minus.fill_(-self.alpha)

    def unscaled(self) -> Outcome | None:
        return None

    def start(self, v: Sequence[Tensor]) -> None:
        self.steps = 0
        self._b.load(v)
        precondition(self._preconditioner, self._residual, self._image)
        self._m_norm.start()
        self.value.assign(self._image)

    def step(self, product: Sequence[Tensor]) -> None:
        self._residual.data.addcmul_(self.direction.data, self._minus, value=self._solver.damping)
        self._update(product)
        precondition(self._preconditioner, self._residual, self._image)
        self.value.data.add_(self._image.data)
        self.direction.refresh()
        self.steps += 1

    def finish(self) -> Tensor:
        self.value.data.mul_(self._alpha)
        return torch.cat([self._b.sums(), self._m_norm.sums(self._partials, self.value)])


class _PreconditionedHorner(_Preconditioned):
    """p <- p + M (v - alpha A p), with v constant."""

    def _bind(self, layout: Layout) -> None:
        super()._bind(layout)
        self._v = FlatVector(layout)
        self.direction = self.value

    def start(self, v: Sequence[Tensor]) -> None:
        super().start(v)
        self._v.data.copy_(self._residual.data)

    def step(self, product: Sequence[Tensor]) -> None:
        self._residual.data.copy_(self._v.data)
        super().step(product)


def outcome_of(figures: Sequence[float], steps: int, dtype: torch.dtype) -> Outcome:
    """The outcome, from the figures ||v||^2, an unused one, flag; ||r||^2 (last residual), ||p||^2 (sum), flag; and,
    with a preconditioner, the squared M-norms of v and r. A flag is zero if everything is finite."""
    squared_v, _, bad_v, squared_residual, squared_sum, bad, *m_norms = figures
    epsilon = torch.finfo(dtype).eps
    if steps == 0:
        return Outcome(float(squared_v > 0), "none", Status.ITERATION_LIMIT, bad_v == 0, bad_v == 0)
    finite = bad == 0 and math.isfinite(squared_residual) and math.isfinite(squared_sum)
    residual = math.sqrt(squared_residual / squared_v) if squared_v and finite else 0.0 if finite else math.inf
    growth = residual
    if m_norms and min(m_norms) > 0 and math.isfinite(sum(m_norms)):  # otherwise M is not positive definite
        growth = math.sqrt(m_norms[1] / m_norms[0])
    if residual <= math.sqrt(epsilon):
        status = Status.CONVERGED
    else:
        status = Status.DIVERGED if growth > 1 else Status.ITERATION_LIMIT
    return Outcome(residual, "previous", status, finite, bad_v == 0, growth=growth)


_FORMS = {
    ("accumulate", False): _Accumulate,
    ("horner", False): _Horner,
    ("accumulate", True): _Preconditioned,
    ("horner", True): _PreconditionedHorner,
}


@dataclass(frozen=True)
class Identity(Solver):
    """x = v / (1 + damping): the solution if A were the identity, as in the T1-T2 method.

    Arguments:
        damping: added to the diagonal, >= 0; with 0, x = v.

    Cost: no product; exact only for A = I.

    Source: Luketina, Berglund, Greff and Raiko, Scalable Gradient-Based Tuning of Continuous Regularization
    Hyperparameters, ICML 2016.

    >>> import torch, hvp_engine as hvp
    >>> hvp.solve(lambda v: 4.0 * v, torch.ones(2), hvp.Identity()).value
    tensor([1., 1.])
    """

    damping: float = 0.0

    iterations: ClassVar[int] = 0
    needs_symmetry: ClassVar[bool] = False
    needs_fixed_operator: ClassVar[bool] = False

    def __post_init__(self) -> None:
        replace_fields(self, damping=check_not_negative(self.damping, "damping"))

    @property
    def makes_products(self) -> bool:
        return False

    def allocate(self, layout: Layout) -> Iteration:
        return _Accumulate(Neumann(0, 1.0 / (1.0 + self.damping)), layout)
