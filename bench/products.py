"""Hessian-vector products that solvers need for a hypergradient to 1e-3, against a Neumann series at its best.

    python -m bench.products [--out FILE.csv]

Automatic settings throughout, and every product counted, those of estimates and preconditioners included, on real data
in float64: Boston housing, standardized and raw, softmax regression on digits, and a trained network with damping. The
measure is a hypergradient of one decay e^h for each weight, whose term beside the direct one is w e^h H^-1 v, against
a solve to rounding. The Neumann series is given what no user has: its best alpha, found by trying 60 of them with
the eigenvalues known.
"""

from __future__ import annotations

import argparse
import csv
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

import hvp_engine as hvp
from bench.report import README, grid, put
from bench.results import FOLDER
from hvp_engine import datasets

ERROR = 1e-3
DECAY = 1e-3
MOST = 1500


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
        "Nystrom, rho = decay": run(lambda k: hvp.Nystrom(k, rho=DECAY, damping=damping)),
        "Budget of products": run(lambda k: hvp.Budget(hvps=k, damping=damping)),
    }


def fewest(problem: Problem, truth: Tensor, solve: Solve, most: int = MOST) -> tuple[int | None, float]:
    """The products of the shortest solve that is good enough, None if `most` is not; and the error of the last try."""
    low, high = 0, 1
    while True:
        x, products = solve(high)
        error = problem.error(x, truth)
        if error <= ERROR or high >= most:
            break
        low, high = high, min(2 * high, most)
    if error > ERROR:
        return None, error
    best = products, error
    while high - low > max(1, high // 50):
        middle = (low + high) // 2
        x, products = solve(middle)
        error = problem.error(x, truth)
        if error <= ERROR:
            high, best = middle, (products, error)
        else:
            low = middle
    return best


def best_neumann(problem: Problem, truth: Tensor) -> tuple[float, float]:
    """(products, alpha lambda_max) of a series with the best of 60 steps, by the eigenvalues of the dense matrix, or of
    a long Lanczos run where there are too many weights: for the series only the span of v counts."""
    values, coordinates, basis = _eigenbasis(problem)
    best = math.inf, math.nan
    for share in torch.linspace(0.5, 1.999, 60, dtype=torch.float64).tolist():
        rates = 1 - share / values.max() * values

        def error(terms: float, rates: Tensor = rates) -> float:
            x = basis @ ((1 - rates.abs() ** terms * rates.sign() ** (terms % 2)) / values * coordinates)
            return problem.error(x, truth)

        if error(1e12) > ERROR:
            continue
        low, high = 0, 1
        while error(high) > ERROR:
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if error(middle) <= ERROR else (middle, high)
        best = min(best, (high - 1, share))
    return best


def _eigenbasis(problem: Problem) -> tuple[Tensor, Tensor, Tensor]:
    """Eigenvalues of the damped operator, coordinates of v and eigenvectors, within the Krylov space of v."""
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
    return values, rotation[0] * problem.v.norm(), torch.stack(vectors[:count]).T @ rotation


def rows(problem: Problem) -> Iterator[dict[str, object]]:
    """One row for each solver, the Neumann series at its best first."""
    values, coordinates, basis = _eigenbasis(problem)
    truth = basis @ (coordinates / values)
    products, share = best_neumann(problem, truth)
    common = {"problem": problem.name, "weights": len(problem.v), "condition": f"{values.max() / values.min():.3g}"}
    neumann = f"Neumann, best alpha = {share:.3f} / lambda_max"
    yield {**common, "solver": neumann, "products": int(products), "error": f"{ERROR:.1e}", "fewer": "1.0"}
    for name, solve in solvers(problem).items():
        most = min(MOST, 300) if name.startswith("Nystrom") else MOST
        count, error = fewest(problem, truth, solve, most)
        fewer = "" if count is None else f"{products / count:.1f}"
        yield {**common, "solver": name, "products": count, "error": f"{error:.1e}", "fewer": fewer}
    solution = problem.fresh().operator.solve(problem.v, hvp.Budget(error=ERROR / 10, damping=problem.damping))
    error = problem.error(solution.value, truth)
    fewer = f"{products / solution.hvps:.1f}" if error <= ERROR else ""
    name = f"Budget(error={ERROR / 10:g}): {solution.explanation.split(':')[0]}"
    yield {**common, "solver": name, "products": solution.hvps, "error": f"{error:.1e}", "fewer": fewer}


_COLUMNS = {
    "Chebyshev": "Chebyshev",
    "ConjugateGradient": "CG",
    "MINRES": "MINRES",
    "Budget of products": "Budget(hvps)",
}


def markdown(file: Path = FOLDER / "products.csv") -> str:
    """The results as a table: products of the Neumann series at its best and of the solvers that need few of them."""
    problems: dict[str, dict[str, dict[str, str]]] = {}
    with file.open(newline="") as lines:
        for row in csv.DictReader(lines):
            name = "Neumann" if row["solver"].startswith("Neumann, best") else row["solver"]
            problems.setdefault(row["problem"], {})[name] = row
    body = []
    for problem, found in problems.items():
        neumann = found["Neumann"]
        fewer = max(float(found[name]["fewer"] or 0) for name in _COLUMNS)
        body.append([
            problem, *(_figure(neumann[name]) for name in ("weights", "condition", "products")),
            *(_figure(found[name]["products"]) for name in _COLUMNS), f"{_figure(fewer)}x",
        ])  # fmt: skip
    return grid(["problem", "weights", "condition", "Neumann, best alpha", *_COLUMNS.values(), "fewer"], body)


def _figure(value: float | str) -> str:
    if value == "":
        return "-"
    return f"{float(value):,.0f}" if float(value) < 1e5 else f"{float(value):.2g}"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=PROBLEMS, action="append", help="problems to run, all of them by default")
    parser.add_argument("--out", type=Path, default=FOLDER / "products.csv")
    options = parser.parse_args(arguments)
    found: list[dict[str, object]] = []
    for name in options.only or PROBLEMS:
        for row in rows(PROBLEMS[name]()):
            print("  ".join(f"{value if value is not None else '-'}" for value in row.values()), flush=True)
            found.append(row)
    with options.out.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(found[0]))
        writer.writeheader()
        writer.writerows(found)
    if options.out == FOLDER / "products.csv" and README.exists():
        put(markdown(), "products", README)


if __name__ == "__main__":
    main()
