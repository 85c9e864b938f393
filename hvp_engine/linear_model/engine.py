"""The engine of a linear model: a whole Neumann series or Chebyshev iteration in one call."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from hvp_engine._support.flat_vector import FlatVector, Layout
from hvp_engine.differentiation.linear_map import Linearization, LinearMap
from hvp_engine.engines.eager import EagerEngine
from hvp_engine.linear_model import reference as linear_model_reference
from hvp_engine.linear_model.reference import Factors
from hvp_engine.ops import backend
from hvp_engine.solvers.base import Solver
from hvp_engine.solvers.chebyshev import Chebyshev
from hvp_engine.solvers.iteration import FinishedIteration, Outcome
from hvp_engine.solvers.neumann import Neumann, outcome_of
from hvp_engine.solvers.spectrum import SpectralEstimate


class FactoredLinearization(Linearization):
    """A linearization whose Hessian has known factors."""

    factors: Factors


class AllTerms(FinishedIteration):
    """All terms of one right-hand side, finished: of a Neumann series (`alpha`) or a Chebyshev iteration (`bounds`)."""

    def __init__(
        self,
        value: FlatVector,
        direction: FlatVector,
        steps: int,
        figures: Tensor,
        alpha: float | None = None,
        bounds: tuple[float, float] | None = None,
    ):
        self.value, self.direction, self.steps, self.figures = value, direction, steps, figures
        self.alpha, self.bounds = alpha, bounds

    def finish(self) -> Tensor:
        return self.figures

    def read(self, figures: Sequence[float]) -> Outcome:
        return outcome_of(figures, self.steps, self.value.data.dtype)


class LinearModelEngine(EagerEngine):
    """Runs all terms of `Neumann`, and on a CPU of `Chebyshev`, in one call for all right-hand sides, on the factors of
    a linear model. Other solvers, and those with a preconditioner, go product by product."""

    name = "linear_model"

    def __init__(self) -> None:
        super().__init__()
        self._last = "not used yet"

    def run(
        self, operator: LinearMap, v: Sequence[Tensor], solver: Solver, estimate: SpectralEstimate | None
    ) -> FinishedIteration:
        [iteration] = self.run_all(operator, [v], solver, estimate)
        return iteration

    def run_all(
        self, operator: LinearMap, vs: Sequence[Sequence[Tensor]], solver: Solver, estimate: SpectralEstimate | None
    ) -> Iterable[FinishedIteration]:
        if isinstance(operator, FactoredLinearization) and solver.preconditioner is None:
            factors = operator.factors
            if isinstance(solver, Neumann):
                return self._all_terms(factors, vs, solver, solver.alpha_for(estimate))
            if isinstance(solver, Chebyshev) and (kernel := chebyshev_kernel(factors)) is not None:
                return self._chebyshev(kernel, factors, vs, solver, estimate)
        return [super(LinearModelEngine, self).run(operator, v, solver, estimate) for v in vs]

    def report(self) -> str:
        """How the last one-call solve ran."""
        return self._last

    def _all_terms(
        self, factors: Factors, vs: Sequence[Sequence[Tensor]], solver: Neumann, alpha: float
    ) -> Sequence[AllTerms]:
        layout, iterations, horner = factors.layout, solver.iterations, solver.form == "horner"
        v = _rows(layout, vs)
        p = torch.empty_like(v)
        dual = prefers_dual(factors, len(vs), iterations)
        forms, where = kernels_for(factors, dual)
        run = forms.linear_model_dual if dual else forms.linear_model_direct
        figures = run(v, p, factors, alpha, solver.damping, iterations, horner)
        self._last = f"{'dual' if dual else 'direct'} form in {where}"
        values = [FlatVector(layout, row) for row in p]
        directions = values if horner else [FlatVector(layout, row) for row in v]
        return [
            AllTerms(value, direction, iterations, row, alpha=alpha)
            for value, direction, row in zip(values, directions, figures, strict=True)
        ]

    def _chebyshev(
        self,
        kernel: Callable[..., Tensor],
        factors: Factors,
        vs: Sequence[Sequence[Tensor]],
        solver: Chebyshev,
        estimate: SpectralEstimate | None,
    ) -> Sequence[AllTerms]:
        layout = factors.layout
        bounds, coefficients = solver.coefficients_for(estimate)
        residual = _rows(layout, vs)
        direction, x = torch.empty_like(residual), torch.empty_like(residual)
        table = torch.tensor(coefficients, dtype=torch.float64, device="cpu")
        figures = kernel(residual, direction, x, factors, table, solver.damping)
        self._last = "direct form in C++"
        return [
            AllTerms(FlatVector(layout, value), FlatVector(layout, last), solver.iterations, row, bounds=bounds)
            for value, last, row in zip(x, direction, figures, strict=True)
        ]


def _rows(layout: Layout, vs: Sequence[Sequence[Tensor]]) -> Tensor:
    """The right-hand sides as flat vectors, one per row."""
    rows = torch.zeros(len(vs), layout.size, dtype=layout.state_dtype, device=layout.device)
    for row, leaves in zip(rows, vs, strict=True):
        FlatVector(layout, row).copy_(leaves)
    return rows


def kernels_on(device: torch.device) -> tuple[str, Any]:
    """The selected backend, and the module that has its functions for linear models."""
    name, module = backend.select(device, among=("cpp", "triton", "reference"))
    if name == "cpp":
        from hvp_engine.linear_model import native  # here, since the extension may be missing

        return name, native
    return name, module if name == "triton" else linear_model_reference


def chebyshev_kernel(factors: Factors) -> Callable[..., Tensor] | None:
    """The C++ function that runs all terms; None on other backends, which gain nothing."""
    name, kernels = kernels_on(factors.layout.device)
    return kernels.linear_model_chebyshev if name == "cpp" else None


def kernels_for(factors: Factors, dual: bool) -> tuple[Any, str]:
    """The module whose functions run all terms, and what to call it in a report."""
    name, kernels = kernels_on(factors.layout.device)
    if name == "cpp":
        return kernels, "C++"
    limit = kernels.linear_model_limit(factors, dual) if name == "triton" else None
    if name == "triton" and limit is None:
        return kernels, "Triton"
    return linear_model_reference, f"plain torch: {limit}" if limit else "plain torch"


def prefers_dual(factors: Factors, batch: int, iterations: int) -> bool:
    """Whether the dual form is possible and takes fewer multiplications, including those for the Gram matrix.

    For 100 samples, 784 features, 10 outputs and 20 terms, direct takes 2 * 20 * 10 * 100 * 784 = 31 million and dual
    100 * 100 * 784 + 10 * 100 * (3 * 784 + 20 * 100) = 12 million.
    """
    samples, features = factors.inputs.shape
    rows = batch * factors.outputs
    direct = 2 * iterations * rows * samples * features
    gram = 0 if "gram" in vars(factors) else samples * samples * features
    dual = gram + rows * samples * (3 * features + iterations * samples)
    return factors.uniform and dual < direct
