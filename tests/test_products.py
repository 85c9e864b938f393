"""Products counted to an error: the Neumann series at its best in closed form, and the curves of the solvers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from problems_with_known_answers import DTYPE, matrix_with, randn

import hvp_engine as hvp
from bench import product_curves, products
from bench.product_problems import Problem, eigenbasis, solvers

MATRIX = matrix_with([0.1, 0.4, 1.0, 1.7, 3.0, 9.0], seed=1)


@pytest.fixture(scope="module")
def problem() -> Problem:
    w, v = randn(6, seed=2), randn(6, seed=3)
    operator = hvp.HessianOperator(lambda w: w @ MATRIX @ w / 2, w)
    return Problem("quadratic", operator, 0.2, v, torch.ones(6, dtype=DTYPE))


def test_eigenbasis_gives_the_solution_and_the_series(problem: Problem) -> None:
    basis = eigenbasis(problem)
    torch.testing.assert_close(
        basis.solution(), torch.linalg.solve(MATRIX + 0.2 * torch.eye(6, dtype=DTYPE), problem.v)
    )
    alpha = 1.3 / float(basis.values.max())
    series = problem.operator.solve(problem.v, hvp.Neumann(7, alpha=alpha, damping=0.2)).value
    torch.testing.assert_close(basis.series(1.3, 8), series)


def test_best_series_is_where_its_curve_crosses(problem: Problem) -> None:
    basis = eigenbasis(problem)
    count, share = products.best_neumann(problem, basis)
    errors = [problem.error(basis.series(share, count + 1 + more), basis.solution()) for more in (-1, 0)]
    assert errors[0] > products.ERROR >= errors[1]
    curve = list(product_curves.best_curve(problem, basis))
    assert all((error <= products.ERROR) == (made >= count) for made, error in curve)


@pytest.mark.parametrize("name", ["Chebyshev", "ConjugateGradient", "Budget of products"])
def test_curve_counts_all_products_and_ends_when_close_enough(name: str, problem: Problem) -> None:
    points = list(product_curves.curve(problem, eigenbasis(problem).solution(), solvers(problem)[name]))
    made, errors = zip(*points, strict=True)
    assert list(made) == sorted(set(made))
    assert made[0] == (7 if name == "Chebyshev" else 1)  # 6 of the estimate: there are no more in 6 dimensions
    assert errors[-1] <= product_curves.ENOUGH < min(errors[:-1])


def test_lengths_grow_and_end() -> None:
    assert list(product_curves.lengths(12)) == [1, 2, 3, 4, 5, 6, 7, 8, 10, 12]
    assert list(product_curves.lengths(1)) == [1]


def test_table_and_plot(tmp_path: Path, problem: Problem) -> None:
    found: product_curves.Curves = {}
    for name, point in product_curves.curves(problem):
        found.setdefault(problem.name, {}).setdefault(name, []).append(point)
    assert set(found[problem.name]) == {product_curves.BEST, *solvers(problem), "Budget(error=0.0001)"}
    file = tmp_path / "curves.csv"
    product_curves.write(found, file)
    read = product_curves.read(file)
    assert list(read[problem.name]) == list(found[problem.name])
    for (made, error), (expected, exact) in zip(
        read[problem.name]["MINRES"], found[problem.name]["MINRES"], strict=True
    ):
        assert made == expected and error == pytest.approx(exact, rel=1e-2)
    product_curves.draw(read, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 1000
