"""Problems of which products are counted, their exact hypergradients, and the solvers with automatic settings.

Real data in float64: Boston housing, standardized and raw, softmax regression on digits, and a trained network with
damping. The measure is a hypergradient of one decay e^h for each weight, whose term beside the direct one is
w e^h H^-1 v, against a solve to rounding.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

import hvp_engine as hvp
from examples import datasets

DECAY = 1e-3


@dataclass(frozen=True)
class Problem:
    """`operator` and `v` of one hypergradient; `scale` is w e^h, so that the indirect term is -scale * H^-1 v."""

    name: str
    operator: hvp.HessianOperator
    damping: float
    v: Tensor
    scale: Tensor

    def error(self, x: Tensor, truth: Tensor) -> float:
        difference, norm = self.scale * (x - truth), torch.linalg.vector_norm(self.scale * truth)
        return float(torch.linalg.vector_norm(difference) / norm)

    def fresh(self) -> Problem:
        """Without an estimate from before: the first call, whose estimate costs most."""
        self.operator.spectrum = type(self.operator.spectrum)()
        return self


def _problem(
    name: str,
    train: Callable[[Tensor], Tensor],
    val: Callable[[Tensor], Tensor],
    w: Tensor,
    damping: float = 0.0,
    newton: int = 0,
) -> Problem:
    for _ in range(newton):  # to the minimum, where the theorem holds
        operator = hvp.HessianOperator(train, w)
        step = operator.solve(operator.gradient, hvp.ConjugateGradient(500, tol=1e-10)).value
        w = w - step
    leaf = w.detach().requires_grad_()
    (v,) = torch.autograd.grad(val(leaf), leaf)
    return Problem(name, hvp.HessianOperator(train, w), damping, v, DECAY * w)


def _boston(standardized: bool) -> Problem:
    table = datasets.boston()
    x, y = table.features, table.targets
    if standardized:
        x, y = (x - x.mean(0)) / x.std(0), (y - y.mean()) / y.std()
    x = torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], 1)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    train, val = order[: len(x) // 2], order[len(x) // 2 :]
    half = partial(_half_squares, decay=DECAY)
    gram = x[train].T @ x[train] / len(train) + DECAY * torch.eye(x.shape[1], dtype=x.dtype)
    w = torch.linalg.solve(gram, x[train].T @ y[train] / len(train))
    name = "Boston, standardized" if standardized else "Boston, raw"
    return _problem(name, lambda w: half(w, x[train], y[train]), lambda w: _half_squares(w, x[val], y[val]), w)


def _half_squares(w: Tensor, x: Tensor, y: Tensor, decay: float = 0.0) -> Tensor:
    return (x @ w - y).square().mean() / 2 + decay * w.square().sum() / 2


def _digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    images = datasets.digits()
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    train, val = order[:1000], order[1000:2000]
    x = images.images.double().flatten(1)
    return x[train], images.labels[train], x[val], images.labels[val]


def _softmax() -> Problem:
    x, y, x_val, y_val = _digits()

    def loss(w: Tensor, x: Tensor, y: Tensor, decay: float = 0.0) -> Tensor:
        return nn.functional.cross_entropy(x @ w.view(784, 10), y) + decay * w.square().sum() / 2

    start = torch.zeros(7840, dtype=torch.float64)
    train, val = (lambda w: loss(w, x, y, DECAY)), (lambda w: loss(w, x_val, y_val))
    return _problem("digits, softmax regression", train, val, start, newton=8)


def _network() -> Problem:
    """A small tanh network on digits, trained by Adam; damped by twice its negative curvature."""
    x, y, x_val, y_val = _digits()
    shapes = [(784, 32), (32,), (32, 10), (10,)]
    sizes = [math.prod(shape) for shape in shapes]
    generator = torch.Generator().manual_seed(1)

    def outputs(w: Tensor, x: Tensor) -> Tensor:
        a, b, c, d = (part.view(shape) for part, shape in zip(w.split(sizes), shapes, strict=True))
        return torch.tanh(x @ a + b) @ c + d

    def train(w: Tensor) -> Tensor:
        return nn.functional.cross_entropy(outputs(w, x), y) + DECAY * w.square().sum() / 2

    w = torch.cat([torch.randn(n, generator=generator, dtype=torch.float64) * 0.05 for n in sizes]).requires_grad_()
    optimizer = torch.optim.Adam([w], lr=1e-2)
    for _ in range(400):
        optimizer.zero_grad()
        train(w).backward()
        optimizer.step()
    w = w.detach()
    lowest = hvp.extreme_eigenvalues(hvp.HessianOperator(train, w), max_hvps=60).smallest[0]
    damping = max(DECAY, -2 * lowest)
    return _problem(
        "digits, trained network",
        train,
        lambda w: nn.functional.cross_entropy(outputs(w, x_val), y_val),
        w,
        damping,
    )


PROBLEMS: dict[str, Callable[[], Problem]] = {
    "boston": lambda: _boston(True),
    "boston-raw": lambda: _boston(False),
    "softmax": _softmax,
    "network": _network,
}

Solve = Callable[[int], tuple[Tensor, int]]
"""A setting (terms, rank) -> (x, products)."""


def solvers(problem: Problem) -> dict[str, Solve]:
    """Every solver with automatic settings, from a cold estimate."""
    damping = problem.damping

    def run(make: Callable[[int], object], extra: int = 0) -> Solve:
        def solve(count: int) -> tuple[Tensor, int]:
            solution = problem.fresh().operator.solve(problem.v, make(count))
            return solution.value, solution.hvps + extra

        return solve

    jacobi = hvp.JacobiPreconditioner(problem.operator, probes=5, shift=damping)
    rank = min(20, len(problem.v))
    # The smallest value of the approximation is what is left to the solver, so rho is only there for safety.
    low_rank = hvp.NystromPreconditioner(problem.operator, rank, rho=max(damping, 1e-4))
    return {
        "Neumann, alpha auto": run(lambda k: hvp.Neumann(k, damping=damping)),
        "Chebyshev": run(lambda k: hvp.Chebyshev(k, damping=damping)),
        "Chebyshev, heavy ball": run(lambda k: hvp.Chebyshev(k, form="heavy_ball", damping=damping)),
        "ConjugateGradient": run(lambda k: hvp.ConjugateGradient(k, tol=0.0, damping=damping)),
        "ConjugateGradient, Jacobi of 5": run(
            lambda k: hvp.ConjugateGradient(k, tol=0.0, damping=damping, preconditioner=jacobi), jacobi.hvps
        ),
        f"ConjugateGradient, Nystrom of {rank}": run(
            lambda k: hvp.ConjugateGradient(k, tol=0.0, damping=damping, preconditioner=low_rank), low_rank.hvps
        ),
        "MINRES": run(lambda k: hvp.MINRES(k, tol=0.0, damping=damping)),
        "Nystrom": run(lambda k: hvp.Nystrom(k, damping=damping)),
        "Budget of products": run(lambda k: hvp.Budget(hvps=k, damping=damping)),
    }


@dataclass(frozen=True)
class Eigenbasis:
    """`values` and `vectors` of the damped operator within the Krylov space of v, and v's `coordinates` in them."""

    values: Tensor
    coordinates: Tensor
    vectors: Tensor

    @property
    def condition(self) -> float:
        return float(self.values.max() / self.values.min())

    def solution(self) -> Tensor:
        """(A + damping I)^-1 v."""
        return self.vectors @ (self.coordinates / self.values)

    def series(self, share: float, terms: float) -> Tensor:
        """The Neumann series of `terms` terms, which are terms - 1 products, with alpha = share / lambda_max."""
        rates = 1 - share / self.values.max() * self.values
        sums = (1 - rates.abs() ** terms * rates.sign() ** (terms % 2)) / self.values
        return self.vectors @ (sums * self.coordinates)


def eigenbasis(problem: Problem) -> Eigenbasis:
    """By Lanczos steps with full orthogonalization: for a polynomial of A applied to v only the span of v counts."""
    steps = min(len(problem.v), 400)
    vectors, diagonal, off = [problem.v / problem.v.norm()], [], []
    for _ in range(steps):
        image = problem.operator @ vectors[-1] + problem.damping * vectors[-1]
        diagonal.append(image @ vectors[-1])
        known = torch.stack(vectors)
        for _ in range(2):
            image = image - (known @ image) @ known
        off.append(image.norm())
        if off[-1] < 1e-13 * diagonal[0].abs():
            break
        vectors.append(image / off[-1])
    count = len(diagonal)
    offs = torch.stack(off[: count - 1]) if count > 1 else torch.zeros(0, dtype=problem.v.dtype)
    values, rotation = torch.linalg.eigh(torch.diag(torch.stack(diagonal)) + torch.diag(offs, 1) + torch.diag(offs, -1))
    return Eigenbasis(values, rotation[0] * problem.v.norm(), torch.stack(vectors[:count]).T @ rotation)
