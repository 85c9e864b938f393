"""Eigenvalues of an operator: the extreme ones with error bounds, and the density of all."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hvp_engine._support.arguments import check_count, check_positive
from hvp_engine._support.pytree import flatten
from hvp_engine.differentiation.linear_map import LinearMap, check_fixed
from hvp_engine.errors import NonFiniteError
from hvp_engine.operators.base import CallableMap
from hvp_engine.solvers.lanczos import LanczosBasis, RitzPairs, random_unit_vector, tridiagonalize

_CHECK_EVERY = 5
"""The error bounds are checked once per this many products, since each check waits for the device."""


@dataclass(frozen=True)
class ExtremeEigenvalues:
    """What :func:`extreme_eigenvalues` returns.

    Attributes:
        largest: the algebraically largest eigenvalues, descending.
        largest_errors: a bound for each: an eigenvalue of the operator lies within it of the value.
        smallest: the algebraically smallest ones, ascending.
        smallest_errors: their bounds.
        converged: whether all bounds are below the tolerance.
        hvps: products spent.
    """

    largest: tuple[float, ...]
    largest_errors: tuple[float, ...]
    smallest: tuple[float, ...]
    smallest_errors: tuple[float, ...]
    converged: bool
    hvps: int


def extreme_eigenvalues(
    operator: Any, count: int = 1, *, tol: float = 1e-3, max_hvps: int = 100, like: Any = None, seed: int = 0
) -> ExtremeEigenvalues:
    """The `count` largest and smallest eigenvalues of a symmetric operator, with error bounds, by Lanczos.

    With a Ritz pair (theta, y), ||y|| = 1, the operator has an eigenvalue within ||A y - theta y|| of theta; once the
    bound is below the distance to the other eigenvalues, the error is of the order of its square.

    Arguments:
        operator: a :class:`HessianOperator`, :class:`GaussNewtonOperator` or another operator of this package; or any
            callable v -> A v that is linear and symmetric, together with `like`.
        count: how many at either end, >= 1.
        tol: stop when all bounds are below tol * max |eigenvalue|.
        max_hvps: most products; the bounds tell how accurate the values are then.
        like: for a callable: a tensor or tree of tensors of the shapes it takes.
        seed: of the random start.

    Validity: a repeated eigenvalue is found once. One farther out may have been missed, though only if the random start
    is almost orthogonal to its eigenvector; no bound can exclude that. Small eigenvalues in a dense cluster, such as
    those of networks near 0, converge slowly.

    Cost: at most `max_hvps` products, and as many flat vectors of weights.

    Errors: `TypeError`/`ValueError` naming the argument; :class:`NonFiniteError` for a product with NaN or Inf.

    Source: Golub and Van Loan, Matrix Computations, 4th edition, Johns Hopkins University Press 2013, section 10.1;
    Parlett, The Symmetric Eigenvalue Problem, SIAM 1998, section 4.5.

    >>> import torch, hvp_engine as hvp
    >>> H = hvp.HessianOperator(lambda w: (torch.tensor([-1.0, 1.0, 3.0]) * w**2).sum(), torch.ones(3))
    >>> found = hvp.extreme_eigenvalues(H)
    >>> [round(value, 4) for value in found.largest + found.smallest], found.converged
    ([6.0, -2.0], True)
    """
    linear = _linear_map(operator, like)
    max_hvps, tol = check_count(max_hvps, "max_hvps"), check_positive(tol, "tol")
    count = min(check_count(count, "count"), max(1, linear.layout.numel))
    basis = LanczosBasis(linear.product, random_unit_vector(linear.layout, seed), max_hvps)
    while True:
        basis.extend(min(_CHECK_EVERY, basis.capacity - basis.steps))
        pairs = _finite(basis.tridiagonalization.ritz_pairs())
        size = float(pairs.values.abs().max())
        ends = [*range(min(count, len(pairs.values))), *range(max(0, len(pairs.values) - count), len(pairs.values))]
        converged = len(pairs.values) >= 2 * count and bool((pairs.bounds[ends] <= tol * size).all())
        exhausted = len(pairs.values) < basis.steps or len(pairs.values) == linear.layout.numel
        if converged or exhausted or basis.steps == basis.capacity:
            break
    values, bounds = pairs.values.tolist(), pairs.bounds.tolist()
    return ExtremeEigenvalues(
        largest=tuple(values[::-1][:count]),
        largest_errors=tuple(bounds[::-1][:count]),
        smallest=tuple(values[:count]),
        smallest_errors=tuple(bounds[:count]),
        converged=converged or exhausted,
        hvps=basis.steps,
    )


@dataclass(frozen=True)
class SpectralDensity:
    """The distribution of an operator's eigenvalues, as weighted points; see :func:`spectral_density`.

    Attributes:
        nodes: the points, float64 (probes, steps).
        weights: the fraction of all eigenvalues that each point represents; each row adds up to 1.
        size: the number of eigenvalues, which is the number of weights.
        hvps: products spent.
    """

    nodes: Tensor
    weights: Tensor
    size: int
    hvps: int

    def __call__(self, points: Tensor, width: float | None = None) -> Tensor:
        """The density at `points` (any shape), each node smoothed by a Gaussian of standard deviation `width`.

        Its integral is 1. `width` is 1/100 of the range of the nodes if None. To plot it:

            points = torch.linspace(density.nodes.min(), density.nodes.max(), 1000)
            axes.semilogy(points, density(points))
        """
        width = check_positive(self._width() if width is None else width, "width")
        distances = (points.double().reshape(-1, 1) - self.nodes.reshape(1, -1)) / width
        smoothed = torch.exp(-distances.square() / 2) @ self.weights.reshape(-1)
        return (smoothed / (width * math.sqrt(2 * math.pi) * len(self.nodes))).reshape(points.shape)

    def mean(self, function: Callable[[Tensor], Tensor] = lambda values: values) -> tuple[float, float]:
        """The mean of `function` (of a tensor, element by element) over all eigenvalues, and its standard error.

        Times `size`, it is the trace of function(A). With one probe the error is NaN.
        """
        rows = (self.weights * function(self.nodes)).sum(1)
        error = float(rows.std()) / math.sqrt(len(rows)) if len(rows) > 1 else math.nan
        return float(rows.mean()), error

    def _width(self) -> float:
        spread = float(self.nodes.max() - self.nodes.min())
        return spread / 100 or max(abs(float(self.nodes.max())), 1.0) / 100


def spectral_density(
    operator: Any, probes: int = 10, steps: int = 50, *, like: Any = None, seed: int = 0
) -> SpectralDensity:
    """The density of the eigenvalues of a symmetric operator, by stochastic Lanczos quadrature.

    For a random unit vector v, `steps` of Lanczos give nodes theta_k and weights tau_k with
    sum_k tau_k g(theta_k) = v . g(A) v for every polynomial g of degree below 2 steps; the mean over `probes` random
    vectors estimates trace(g(A)) / size.

    Arguments:
        operator, like: as for :func:`extreme_eigenvalues`.
        probes: random vectors, >= 1; the error falls as 1 / sqrt(probes * size).
        steps: products for each, >= 1: the resolution.
        seed: of the random vectors.

    Returns a :class:`SpectralDensity`: call it at points for the density, or use `.mean(function)`.

    Validity: outliers appear as separate nodes, a bulk as its outline. A fraction of the eigenvalues below
    1 / (probes * size) goes unnoticed.

    Cost: `probes` * `steps` products; `steps` + 2 flat vectors of weights.

    Errors: as :func:`extreme_eigenvalues`.

    Source: Ubaru, Chen and Saad, Fast Estimation of tr(f(A)) via Stochastic Lanczos Quadrature, SIAM Journal on Matrix
    Analysis and Applications 2017; for networks Ghorbani, Krishnan and Xiao, An Investigation into Neural Net
    Optimization via Hessian Eigenvalue Density, ICML 2019.

    >>> import torch, hvp_engine as hvp
    >>> H = hvp.HessianOperator(lambda w: (w**2).sum(), torch.ones(20))           # twice the identity
    >>> density = hvp.spectral_density(H, probes=2, steps=3)
    >>> density.nodes.round(decimals=4).unique()
    tensor([2.], dtype=torch.float64)
    >>> density(torch.tensor([1.0, 2.0]), width=0.1).round(decimals=3)
    tensor([0.0000, 3.9890], dtype=torch.float64)
    """
    linear = _linear_map(operator, like)
    probes = check_count(probes, "probes")
    steps = min(check_count(steps, "steps"), max(1, linear.layout.numel))
    nodes, weights = torch.zeros(2, probes, steps, dtype=torch.float64, device="cpu")
    hvps = 0
    for probe in range(probes):
        start = random_unit_vector(linear.layout, seed * probes + probe)
        pairs = _finite(tridiagonalize(linear, start, steps).ritz_pairs())
        found = len(pairs.values)
        nodes[probe] = pairs.values[-1]  # after an invariant subspace, the missing nodes repeat the last with weight 0
        nodes[probe, :found], weights[probe, :found] = pairs.values, pairs.coordinates[0].square()
        hvps += steps
    return SpectralDensity(nodes, weights, linear.layout.numel, hvps)


def _linear_map(operator: Any, like: Any) -> LinearMap:
    if isinstance(operator, LinearMap):
        check_fixed(operator, "operator")
        return operator.linear_map
    if not callable(operator):
        raise TypeError(f"operator: expected an operator or a callable v -> A v; got {type(operator).__name__}")
    if like is None:
        raise TypeError(
            "like: expected a tensor or tree of tensors of the shapes that a callable operator takes; got None"
        )
    leaves, structure = flatten(like, "like")
    return CallableMap(operator, leaves, structure)


def _finite(pairs: RitzPairs | None) -> RitzPairs:
    if pairs is None:
        raise NonFiniteError("operator: expected finite products; got NaN or Inf: check the weights and the loss")
    return pairs
