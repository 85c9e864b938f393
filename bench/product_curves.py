"""The error of a hypergradient after each number of Hessian-vector products, by every solver: a table and its plot.

    python -m bench.product_curves [--only PROBLEM] [--plot]

The problems and settings are those of `bench.products`: automatic, from a cold estimate, all products counted. Each
point is a solve of its own, since settings depend on its length; the lengths grow by a quarter or a half until
the error is below 1e-4. The Neumann series with its best alpha is computed from the eigenvalues, without a limit.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Iterator, Sequence
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure
from torch import Tensor

import hvp_engine as hvp
from bench.product_problems import PROBLEMS, Eigenbasis, Problem, Solve, eigenbasis, solvers
from bench.products import ERROR, MOST, best_neumann
from bench.results import FOLDER

matplotlib.use("Agg")

FILE = FOLDER / "product-curves.csv"
ENOUGH, FLOOR = ERROR / 10, ERROR / 100
LONGEST_NEUMANN = 10**10
BEST = "Neumann, best alpha"

Point = tuple[int, float]
"""(products, error)."""
Curves = dict[str, dict[str, list[Point]]]
"""Points by problem and solver."""


def lengths(most: int) -> Iterator[int]:
    """1, 2, 3, 4, 5, 6, 7, 8, 10, ...: by a quarter up to 100 and by a half from there, `most` the last."""
    length = 1
    while length < most:
        yield length
        length += max(1, length // (4 if length < 100 else 2))
    yield most


def curve(problem: Problem, truth: Tensor, solve: Solve, most: int = MOST) -> Iterator[Point]:
    """The points of one solver. A solve that stops of its own accord, say at full rank, is there once."""
    last = -1
    for length in lengths(most):
        x, products = solve(length)
        if products <= last:
            return
        error = problem.error(x, truth)
        yield products, error
        if error <= ENOUGH:
            return
        last = products


def best_curve(problem: Problem, basis: Eigenbasis) -> Iterator[Point]:
    """The points of the Neumann series with its best alpha."""
    truth, (_, share) = basis.solution(), best_neumann(problem, basis)
    for products in lengths(LONGEST_NEUMANN):
        error = problem.error(basis.series(share, products + 1), truth)
        yield products, error
        if error <= ENOUGH:
            return


def curves(problem: Problem) -> Iterator[tuple[str, Point]]:
    """(solver, point) of every solver, the Neumann series at its best first."""
    basis = eigenbasis(problem)
    truth = basis.solution()
    for point in best_curve(problem, basis):
        yield BEST, point
    for name, solve in solvers(problem).items():
        for point in curve(problem, truth, solve, 300 if name.startswith("Nystrom") else MOST):
            yield name, point
    solution = problem.fresh().operator.solve(problem.v, hvp.Budget(error=ENOUGH, damping=problem.damping))
    yield f"Budget(error={ENOUGH:g})", (solution.hvps, problem.error(solution.value, truth))


def read(file: Path = FILE) -> Curves:
    found: Curves = {}
    with file.open(newline="") as lines:
        for row in csv.DictReader(lines):
            points = found.setdefault(row["problem"], {}).setdefault(row["solver"], [])
            points.append((int(row["products"]), float(row["error"])))
    return found


def write(found: Curves, file: Path) -> None:
    with file.open("w", newline="") as lines:
        writer = csv.writer(lines)
        writer.writerow(["problem", "solver", "products", "error"])
        for problem, points_of in found.items():
            for solver, points in points_of.items():
                writer.writerows([problem, solver, products, f"{error:.3g}"] for products, error in points)


def draw(found: Curves, file: Path) -> None:
    """One panel for each problem, error against products; errors below a floor are drawn on it."""
    figure = Figure(figsize=(13, 8.5), layout="constrained")
    names = list(dict.fromkeys(_label(name) for solvers_of in found.values() for name in solvers_of))
    for index, (problem, points_of) in enumerate(found.items()):
        axes = figure.add_subplot(2, (len(found) + 1) // 2, index + 1)
        for name, points in points_of.items():
            place = names.index(_label(name))
            best = name == BEST
            axes.plot(
                [products for products, _ in points],
                [max(error, FLOOR) for _, error in points],
                linestyle="--" if name.startswith("Budget") else "-",
                color="black" if best else f"C{(place - 1) % 10}",
                linewidth=2.5 if best else 1.3,
                marker="*" if len(points) == 1 else None if best else "o",
                markersize=13 if len(points) == 1 else 3,
                label=_label(name),
            )
        axes.axhline(ERROR, color="gray", linestyle="--", linewidth=1)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_ylim(FLOOR / 2, 20)
        axes.set_title(problem)
        axes.set_xlabel("Hessian-vector products, those of estimates and preconditioners counted")
        axes.set_ylabel("relative error of the hypergradient")
    labels = {line.get_label(): line for axes in figure.axes for line in axes.get_lines() if line.get_label() in names}
    figure.legend([labels[name] for name in names], names, loc="outside lower center", ncols=4, fontsize=9)
    figure.savefig(file, dpi=80)


def _label(name: str) -> str:
    """A solver's name on all problems: without the rank, which differs."""
    return name.split(", Nystrom of")[0] + ", Nystrom" if ", Nystrom of" in name else name


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--only", choices=PROBLEMS, action="append", help="problems to run anew; the others stay in the table"
    )
    parser.add_argument("--plot", action="store_true", help="draw what the file has, and run nothing")
    parser.add_argument("--out", type=Path, default=FILE, help="the table; the plot is beside it")
    options = parser.parse_args(arguments)
    if not options.plot:
        found = read(options.out) if options.only and options.out.exists() else {}
        for name in options.only or PROBLEMS:
            problem = PROBLEMS[name]()
            found[problem.name] = {}
            for solver, point in curves(problem):
                print(f"{problem.name}  {solver}  {point[0]}  {point[1]:.2e}", flush=True)
                found[problem.name].setdefault(solver, []).append(point)
            write(found, options.out)
    draw(read(options.out), options.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
