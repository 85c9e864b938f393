"""Every solver on every kind of problem, generated: definite, singular and indefinite, scaled, split into tensors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems_with_known_answers import DTYPE, flat, matrix_with, randn, relative_error, unflat
from torch import Tensor

import hvp_engine as hvp

TERMS = 40


@dataclass(frozen=True)
class Problem:
    """A x = b on tensors shaped `like`; `truth` the least-squares solution of smallest norm, `least` its residual."""

    kind: str
    values: Tensor
    matrix: Tensor
    b: Tensor
    like: list[Tensor]

    @property
    def truth(self) -> Tensor:
        return torch.linalg.pinv(self.matrix, hermitian=True, rtol=1e-9) @ self.b

    @property
    def least(self) -> float:
        return self.residual(self.truth)

    @property
    def condition(self) -> float:
        sizes = self.values.abs()
        return float(sizes.max() / sizes[sizes > 0].min())

    @property
    def largest(self) -> float:
        return float(self.values.abs().max())

    def residual(self, x: Tensor) -> float:
        norm = float(self.b.norm())
        return float((self.b - self.matrix @ x).norm()) / norm if norm else float((self.matrix @ x).norm())

    def solve(self, solver: object, scale: float = 1.0) -> hvp.Solution:
        b = unflat(scale * self.b, self.like)
        return hvp.solve(lambda v: unflat(self.matrix @ flat(v), self.like), b, solver)


@st.composite
def problems(draw: st.DrawFn, *kinds: str) -> Problem:
    kind, seed = draw(st.sampled_from(kinds)), draw(st.integers(0, 10**6))
    shapes = draw(st.lists(st.sampled_from([(), (1,), (3,), (2, 2), (2, 1, 3)]), min_size=1, max_size=3))
    like = [torch.zeros(shape, dtype=DTYPE) for shape in shapes]
    size = sum(tensor.numel() for tensor in like)
    exponent = draw(st.floats(0.0, 6.0))
    values = torch.logspace(-exponent, 0, size, dtype=DTYPE) if size > 1 else torch.ones(1, dtype=DTYPE)
    zeros = draw(st.integers(1, size))
    if kind.startswith("singular"):
        values[:zeros] = 0.0
        if zeros == size:
            values[-1] = 1.0
            values[: size - 1] = 0.0
    elif kind == "indefinite":
        values[:zeros] *= -1.0
    elif kind == "outlier":
        values = torch.cat([torch.full((size - 1,), 10.0**-exponent, dtype=DTYPE), torch.ones(1, dtype=DTYPE)])
    elif kind in ("identity", "twice the identity"):
        values = torch.full((size,), 2.0 if kind == "twice the identity" else 1.0, dtype=DTYPE)
    values = values * (1.0 if "identity" in kind else 10.0 ** draw(st.floats(-6.0, 6.0)))
    matrix, b = matrix_with(values, seed), randn(size, seed=seed + 1)
    if kind == "singular, consistent":
        b = matrix @ b / values.abs().max()
    b = b * draw(st.sampled_from([0.0, 1e-6, 1.0, 1.0, 1e6]))
    return Problem(kind, values, matrix, b, like)


DEFINITE = ("definite", "outlier", "identity", "twice the identity")
SEMIDEFINITE = (*DEFINITE, "singular, consistent", "singular, inconsistent")
ALL = (*SEMIDEFINITE, "indefinite")
thorough = settings(max_examples=20, deadline=None, derandomize=True)

SOLVERS: dict[str, Callable[[Problem], object]] = {
    "identity": lambda p: hvp.Identity(),
    "neumann": lambda p: hvp.Neumann(TERMS),
    "neumann, accumulated": lambda p: hvp.Neumann(TERMS, form="accumulate"),
    "chebyshev": lambda p: hvp.Chebyshev(TERMS),
    "heavy ball": lambda p: hvp.Chebyshev(TERMS, form="heavy_ball"),
    "conjugate gradient": lambda p: hvp.ConjugateGradient(400),
    "minres": lambda p: hvp.MINRES(400),
    "nystrom": lambda p: hvp.Nystrom(len(p.b)),
    "exact": lambda p: hvp.Exact(),
    "budget": lambda p: hvp.Budget(error=1e-6),
    "budget of products": lambda p: hvp.Budget(hvps=60),
}


@pytest.mark.parametrize("name", SOLVERS)
def test_whatever_the_problem(name: str) -> None:
    """Finite; x of s b is s x; b = 0 gives 0; the shapes of b; the reported residual is that of an iterate."""

    @thorough
    @given(problems(*ALL))
    def check(problem: Problem) -> None:
        solution = problem.solve(SOLVERS[name](problem))
        x = flat(solution.value)
        assert bool(torch.isfinite(x).all()) and [v.shape for v in solution.value] == [v.shape for v in problem.like]
        if not bool(problem.b.any()):
            assert not bool(x.any()) and solution.residual_norm == 0.0
            return
        scaled = problem.solve(SOLVERS[name](problem), scale=1024.0)
        torch.testing.assert_close(flat(scaled.value), 1024.0 * x, rtol=1e-9, atol=0)
        assert scaled.status is solution.status
        if solution.residual_of == "returned" and problem.condition * problem.residual(x) < 1e6:
            assert abs(problem.residual(x) - solution.residual_norm) < 1e-8 * max(problem.condition, 1.0)

    check()


@pytest.mark.parametrize("name", ["conjugate gradient", "minres", "exact", "nystrom", "budget", "budget of products"])
def test_definite_is_solved(name: str) -> None:
    """Condition 1 to 1e6, eigenvalues of any size: exact solvers converge, and say so."""

    @thorough
    @given(problems(*DEFINITE))
    def check(problem: Problem) -> None:
        solution = problem.solve(SOLVERS[name](problem))
        tolerance = {"budget": 1.01e-6, "nystrom": 1e-8 * problem.condition}.get(name, 1e-9 + 1e-14 * problem.condition)
        assert problem.residual(flat(solution.value)) <= tolerance
        assert solution.converged or (name == "nystrom" and problem.condition > 1)

    check()


@pytest.mark.parametrize("name", ["neumann", "neumann, accumulated", "chebyshev", "heavy ball"])
def test_semidefinite_never_diverges(name: str) -> None:
    """Truncated polynomials bring no residual above that of x = 0, whatever the condition, and claim nothing false."""

    @thorough
    @given(problems(*SEMIDEFINITE))
    def check(problem: Problem) -> None:
        solution = problem.solve(SOLVERS[name](problem))
        residual = problem.residual(flat(solution.value))
        assert residual <= 1 + 1e-9 and solution.residual_norm <= 1 + 1e-9
        assert solution.status in (hvp.Status.CONVERGED, hvp.Status.ITERATION_LIMIT)
        if solution.converged:
            assert residual <= 1.5e-8
        if problem.kind in DEFINITE and problem.condition < 1.5 and "heavy" not in name:
            assert solution.converged

    check()


def test_chebyshev_needs_no_more_terms_than_its_bound() -> None:
    @thorough
    @given(problems("definite"))
    def check(problem: Problem) -> None:
        low, high = float(problem.values.min()), float(problem.values.max())
        x = flat(problem.solve(hvp.Chebyshev(TERMS, bounds=(0.999 * low, 1.001 * high))).value)
        root = (1.003 * problem.condition) ** 0.5
        bound = 2 * ((root - 1) / (root + 1)) ** (TERMS + 1)
        assert float((x - problem.truth).norm()) <= (bound + 1e-12 * problem.condition) * float(problem.truth.norm())

    check()


@pytest.mark.parametrize("name", ["minres", "exact", "budget", "conjugate gradient"])
def test_singular_and_consistent_is_solved(name: str) -> None:
    @thorough
    @given(problems("singular, consistent"))
    def check(problem: Problem) -> None:
        solution = problem.solve(SOLVERS[name](problem))
        x = flat(solution.value)
        assert problem.residual(x) <= (1.01e-6 if name == "budget" else 1e-8)
        if bool(problem.b.any()) and problem.condition < 1e3:
            assert relative_error(x, problem.truth) < (1e-2 if name == "budget" else 1e-5)

    check()


@pytest.mark.parametrize("name", ["minres", "exact", "budget"])
def test_singular_and_inconsistent_gives_the_least_squares_solution(name: str) -> None:
    @thorough
    @given(problems("singular, inconsistent"))
    def check(problem: Problem) -> None:
        solution = problem.solve(SOLVERS[name](problem))
        if not bool(problem.b.any()) or problem.least < 1e-9:
            return
        x = flat(solution.value)
        assert solution.status is hvp.Status.SINGULAR
        assert problem.residual(x) <= problem.least * (1 + 1e-3) + 1e-8
        if problem.condition < 1e3:
            assert relative_error(x, problem.truth) < 1e-3

    check()


@pytest.mark.parametrize("name", ["minres", "exact", "budget"])
def test_indefinite_is_solved(name: str) -> None:
    @thorough
    @given(problems("indefinite"))
    def check(problem: Problem) -> None:
        solution = problem.solve(SOLVERS[name](problem))
        assert problem.residual(flat(solution.value)) <= (1.01e-6 if name == "budget" else 1e-9 * problem.condition)
        assert solution.converged

    check()


@pytest.mark.parametrize("name", ["neumann", "neumann, accumulated", "chebyshev", "heavy ball", "conjugate gradient"])
def test_indefinite_has_a_status_where_there_is_no_limit(name: str) -> None:
    @thorough
    @given(problems("indefinite"))
    def check(problem: Problem) -> None:
        solution = problem.solve(SOLVERS[name](problem))
        if bool(problem.b.any()) and float(problem.values.min()) < -1e-3 * problem.largest:
            assert solution.status is hvp.Status.NEGATIVE_CURVATURE
        if name != "conjugate gradient":
            assert problem.residual(flat(solution.value)) <= 11

    check()


# --- automatic steps and bounds --------------------------------------------------------------------------------------

AUTOMATIC = {
    "neumann": lambda terms: hvp.Neumann(terms),
    "chebyshev": lambda terms: hvp.Chebyshev(terms),
    "heavy ball": lambda terms: hvp.Chebyshev(terms, form="heavy_ball"),
    "conjugate gradient": lambda terms: hvp.ConjugateGradient(terms),
    "minres": lambda terms: hvp.MINRES(terms),
}


def quadratic(w: Tensor, matrix: Tensor) -> Tensor:
    return w @ matrix @ w / 2


def never_diverges(name: str, seeds: range) -> None:
    """Random definite problems with outliers; between two calls on one estimate an eigenvalue rises 13-fold."""
    for seed in seeds:
        generator = torch.Generator(torch.get_default_device()).manual_seed(seed)
        size = int(torch.randint(5, 120, (), generator=generator))
        exponent = 6 * float(torch.rand((), generator=generator, dtype=DTYPE))
        values = 10 ** (-exponent * torch.rand(size, generator=generator, dtype=DTYPE))
        outliers = int(torch.randint(0, 3, (), generator=generator))
        values[:outliers] = values.max() * (1 + 50 * torch.rand(outliers, generator=generator, dtype=DTYPE))
        basis, v = torch.linalg.qr(randn(size, size, seed=seed))[0], randn(size, seed=seed + 1)
        terms = int(torch.randint(1, 200, (), generator=generator))
        grown = values.clone()
        grown[int(torch.randint(0, size, (), generator=generator))] = 13 * values.max()
        matrices = [basis @ torch.diag(diagonal) @ basis.T for diagonal in (values, grown)]
        losses = [partial(quadratic, matrix=matrix) for matrix in matrices]
        operators = [hvp.HessianOperator(loss, torch.zeros_like(v), engine="eager") for loss in losses]
        operators[1].spectrum = operators[0].spectrum
        for operator, diagonal in zip(operators, (values, grown), strict=True):
            solution = operator.solve(v, AUTOMATIC[name](terms))
            coordinates = basis.T @ solution.value
            # What each of them shrinks: the residual, or, conjugate gradients, the error in the norm of A.
            weights = diagonal.rsqrt() if name == "conjugate gradient" else torch.ones_like(diagonal)
            rest, whole = weights * (basis.T @ v - diagonal * coordinates), weights * (basis.T @ v)
            assert float(rest.norm() / whole.norm()) <= 1 + 1e-9, (seed, terms)
            assert solution.status in (hvp.Status.CONVERGED, hvp.Status.ITERATION_LIMIT), seed


@pytest.mark.parametrize("name", AUTOMATIC)
def test_automatic_settings_never_diverge(name: str) -> None:
    never_diverges(name, range(50))


@pytest.mark.soak
@pytest.mark.parametrize("name", AUTOMATIC)
def test_automatic_settings_never_diverge_in_a_thousand_problems(name: str) -> None:
    never_diverges(name, range(50, 1050))
