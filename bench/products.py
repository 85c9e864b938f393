"""Hessian-vector products that solvers need for a hypergradient to 1e-3, against a Neumann series at its best.

    python -m bench.products [--out FILE.csv]

Automatic settings throughout, and every product counted, those of estimates and preconditioners included, on the
problems of product_problems.py. The Neumann series is given what no user has: its best alpha, found by trying 60 of
them with the eigenvalues known. The errors on the way are `python -m bench.product_curves`'s.
"""

from __future__ import annotations

import argparse
import csv
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

import hvp_engine as hvp
from bench.product_problems import PROBLEMS, Eigenbasis, Problem, Solve, eigenbasis, solvers
from bench.report import README, grid, put
from bench.results import FOLDER

ERROR = 1e-3
MOST = 1500


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


def best_neumann(problem: Problem, basis: Eigenbasis) -> tuple[float, float]:
    """(products, alpha lambda_max) of a series with the best of 60 steps."""
    truth = basis.solution()
    best = math.inf, math.nan
    for share in torch.linspace(0.5, 1.999, 60, dtype=torch.float64).tolist():

        def error(terms: float, share: float = share) -> float:
            return problem.error(basis.series(share, terms), truth)

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


def rows(problem: Problem) -> Iterator[dict[str, object]]:
    """One row for each solver, the Neumann series at its best first."""
    basis = eigenbasis(problem)
    truth = basis.solution()
    products, share = best_neumann(problem, basis)
    common = {"problem": problem.name, "weights": len(problem.v), "condition": f"{basis.condition:.3g}"}
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
