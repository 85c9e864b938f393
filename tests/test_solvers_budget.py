"""Budgets: what they choose, that they keep to it, and that they say so."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
from problems_with_known_answers import BILEVEL, DTYPE, matrix_with, randn, relative_error
from torch import Tensor

import hvp_engine as hvp
from hvp_engine.solvers.spectrum import COLD_STEPS, REFRESH_STEPS

V = randn(200, seed=1)


class Diagonal:
    """v -> d * v in a random basis, counting its calls."""

    def __init__(self, values: Tensor):
        self.matrix, self.calls = matrix_with(values, seed=2), 0

    def __call__(self, v: Tensor) -> Tensor:
        self.calls += 1
        return self.matrix.to(v.dtype) @ v


def residual_of(operator: Diagonal, v: Tensor, x: Tensor) -> float:
    return float((v - operator.matrix @ x).norm() / v.norm())


POSITIVE = torch.logspace(-2, 1, 200, dtype=DTYPE)
SIGNED = torch.cat([-torch.logspace(-1, 0, 20, dtype=DTYPE), torch.logspace(-1, 1, 180, dtype=DTYPE)])


@pytest.mark.parametrize("error", [0.1, 1e-3, 1e-8])
@pytest.mark.parametrize("values, name", [(POSITIVE, "ConjugateGradient"), (SIGNED, "MINRES")])
def test_an_error_is_reached_and_checked(values: Tensor, name: str, error: float) -> None:
    operator = Diagonal(values)
    solution = hvp.solve(operator, V, hvp.Budget(error=error))
    assert solution.explanation.startswith(name)
    assert solution.converged and residual_of(operator, V, solution.value) <= 1.01 * error
    assert solution.hvps == operator.calls


@pytest.mark.parametrize("seed", range(12))
def test_the_solution_is_as_close_as_was_asked_for(seed: int) -> None:
    """Of spectra with outliers, with v random or more of it where eigenvalues are large; of both signs every fourth."""
    condition, signed = (
        10.0 ** (1 + 2 * torch.rand((), generator=torch.Generator(torch.get_default_device()).manual_seed(seed))),
        seed % 4 == 3,
    )
    values = torch.logspace(0, 1, 500, base=float(condition), dtype=DTYPE) / float(condition)
    values[-2:] = torch.tensor([10.0, 30.0], dtype=DTYPE)
    if signed:
        values[::7] *= -1
    v = randn(500, seed=seed) * (values.abs().sqrt() if seed % 2 else 1.0)
    truth = v / values
    for error in (1e-1, 1e-2, 1e-4, 1e-6):
        solution = hvp.solve(lambda x: values * x, v, hvp.Budget(error=error))
        assert solution.converged and solution.residual_norm <= error
        assert relative_error(solution.value, truth) <= error, solution.explanation


def test_a_small_residual_alone_is_no_small_error() -> None:
    """Conjugate gradients stopped by their residual are off by more than 3 times as much here; the budget goes on."""
    values = torch.logspace(-3, 0, 500, dtype=DTYPE)
    v = randn(500, seed=1) * values.sqrt()
    stopped = hvp.solve(lambda x: values * x, v, hvp.ConjugateGradient(400, tol=1e-2))
    assert stopped.converged and relative_error(stopped.value, v / values) > 3e-2
    solution = hvp.solve(lambda x: values * x, v, hvp.Budget(error=1e-2))
    assert solution.converged and relative_error(solution.value, v / values) <= 1e-2
    short = hvp.solve(lambda x: values * x, v, hvp.Budget(error=1e-2, hvps=stopped.hvps + 8))
    assert short.status is hvp.Status.ITERATION_LIMIT and short.residual_norm <= 1e-2
    assert re.search(
        r"error 0.01 not reached: residual 0\.00\d+, x still moving by 0\.\d+ of its norm", short.explanation
    )


@pytest.mark.parametrize("hvps", [1, 5, 23, 24, 60, 150])
@pytest.mark.parametrize("values", [POSITIVE, SIGNED])
def test_products_are_counted_and_kept_to(values: Tensor, hvps: int) -> None:
    operator = Diagonal(values)
    solution = hvp.solve(operator, V, hvp.Budget(hvps=hvps))
    assert solution.hvps == operator.calls <= hvps
    assert operator.calls == hvps or solution.converged
    assert solution.residual_norm <= 3.0
    assert solution.explanation.startswith("MINRES: ") or hvps >= 3 * COLD_STEPS
    assert ("too few" in solution.explanation) == (hvps < 3 * COLD_STEPS)


def test_an_error_out_of_reach_of_the_products_is_told() -> None:
    solution = hvp.solve(Diagonal(POSITIVE), V, hvp.Budget(error=1e-9, hvps=30))
    assert solution.status is hvp.Status.ITERATION_LIMIT and solution.hvps == 30
    assert "22 allowed" in solution.explanation


def test_few_weights_are_solved_exactly() -> None:
    operator = Diagonal(torch.logspace(-7, 0, 20, dtype=DTYPE))
    v = randn(20, seed=3)
    solution = hvp.solve(operator, v, hvp.Budget(error=1e-3))
    assert solution.explanation == "Exact: the matrix of 20 weights takes 20 products" and operator.calls == 20
    assert relative_error(solution.value, torch.linalg.solve(operator.matrix, v)) < 1e-8
    short = hvp.solve(operator, v, hvp.Budget(hvps=10))
    assert short.explanation.startswith("MINRES") and short.hvps == 10


def test_exact_where_the_condition_asks_for_more_products_than_there_are_weights() -> None:
    operator = Diagonal(torch.cat([torch.full((100,), 1e-6, dtype=DTYPE), torch.logspace(-4, 0, 100, dtype=DTYPE)]))
    solution = hvp.solve(operator, V, hvp.Budget(error=1e-8))
    assert solution.explanation.startswith("Exact: eigenvalues between") and solution.hvps == COLD_STEPS + 200


def test_later_estimates_are_cheaper() -> None:
    operator = hvp.HessianOperator(lambda w: (POSITIVE * w.square()).sum() / 2, torch.zeros(200, dtype=DTYPE))
    first, second = (operator.solve(V, hvp.Budget(error=1e-3)) for _ in range(2))
    assert first.iterations == second.iterations
    assert first.hvps - second.hvps == COLD_STEPS - REFRESH_STEPS
    assert operator.solve(V, hvp.Budget(hvps=9)).explanation.startswith("ConjugateGradient"), "3 of 9 are affordable"


def test_negative_curvature_that_the_estimate_misses() -> None:
    values = torch.linspace(0.05, 1.0, 400, dtype=DTYPE)
    values[0] = -0.03
    v = randn(400, seed=4)
    calls = 0

    def operator(x: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return values * x

    solution = hvp.solve(operator, v, hvp.Budget(error=1e-4))
    assert "then MINRES: the estimate had missed negative curvature" in solution.explanation
    assert solution.converged and float((v - values * solution.value).norm() / v.norm()) <= 1.01e-4
    assert solution.hvps == calls
    limited = hvp.solve(operator, v, hvp.Budget(hvps=60))
    assert limited.hvps <= 60


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_singular_operator_gets_its_least_squares_solution(dtype: torch.dtype) -> None:
    operator = Diagonal(torch.cat([torch.zeros(196, dtype=DTYPE), torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=DTYPE)]))
    truth = torch.linalg.pinv(operator.matrix, hermitian=True, rtol=1e-10) @ V
    for v, status in ((operator.matrix @ V, hvp.Status.CONVERGED), (V, hvp.Status.SINGULAR)):
        solution = hvp.solve(operator, v.to(dtype), hvp.Budget(error=1e-6))
        assert solution.status is status and "singular in this precision" in solution.explanation
        truth = torch.linalg.pinv(operator.matrix, hermitian=True, rtol=1e-10) @ v
        assert relative_error(solution.value.double(), truth) < (1e-2 if dtype == torch.float32 else 1e-5)


def test_damping_is_named_and_left_to_the_caller() -> None:
    plain = hvp.solve(Diagonal(SIGNED), V, hvp.Budget(error=1e-6))
    found = re.search(r"of both signs \(damping=(\S+) would make them positive\)", plain.explanation)
    assert found is not None and 1.0 <= float(found[1]) < 3.0
    damped = hvp.solve(Diagonal(SIGNED), V, hvp.Budget(error=1e-6, damping=1.5))
    assert damped.explanation.startswith("ConjugateGradient") and damped.converged
    truth = torch.linalg.solve(Diagonal(SIGNED).matrix + 1.5 * torch.eye(200, dtype=DTYPE), V)
    assert relative_error(damped.value, truth) < 1e-4


@pytest.mark.parametrize("hvps", [None, 300])
def test_automatic_damping_makes_the_operator_positive(hvps: int | None) -> None:
    operator = Diagonal(SIGNED)
    solution = hvp.solve(operator, V, hvp.Budget(error=1e-6, hvps=hvps, damping="auto"))
    assert solution.converged and solution.hvps == operator.calls
    assert 1.0 < solution.damping < 4.0, "the smallest eigenvalue is -1"
    assert f"with damping={solution.damping:.3g} against negative curvature, all positive" in solution.explanation
    truth = torch.linalg.solve(operator.matrix + solution.damping * torch.eye(200, dtype=DTYPE), V)
    assert relative_error(solution.value, truth) < 1e-6


@pytest.mark.parametrize("values", [POSITIVE, torch.linspace(1.0, 3.0, 20, dtype=DTYPE)], ids=["many", "few"])
def test_automatic_damping_adds_nothing_to_a_positive_operator(values: Tensor) -> None:
    v = V[: len(values)]
    solution, plain = (hvp.solve(Diagonal(values), v, hvp.Budget(error=1e-6, damping=d)) for d in ("auto", 0.0))
    assert solution.damping == 0.0 and solution.converged
    torch.testing.assert_close(solution.value, plain.value, rtol=1e-9, atol=1e-12)


def test_automatic_damping_of_few_weights() -> None:
    operator = Diagonal(torch.linspace(-1.0, 3.0, 20, dtype=DTYPE))
    solution = hvp.solve(operator, V[:20], hvp.Budget(error=1e-6, damping="auto"))
    assert solution.explanation.startswith("Exact") and solution.hvps == COLD_STEPS + 20 == operator.calls
    assert 1.0 < solution.damping < 2.1
    short = hvp.solve(operator, V[:20], hvp.Budget(hvps=10, damping="auto"))
    assert short.damping == 0.0 and "too few for an estimate" in short.explanation


@pytest.mark.parametrize("lowest, seen", [(-0.3, True), (-0.03, False)])
def test_automatic_damping_grows_where_the_estimate_missed_negative_curvature(lowest: float, seen: bool) -> None:
    values = torch.linspace(0.05, 1.0, 400, dtype=DTYPE)
    values[0] = lowest
    v, calls = randn(400, seed=4), []

    def operator(x: Tensor) -> Tensor:
        calls.append(1)
        return values * x

    solution = hvp.solve(operator, v, hvp.Budget(error=1e-6, damping="auto"))
    assert ("against negative curvature" in solution.explanation) == seen
    assert ("; then damping=" in solution.explanation) != seen
    assert solution.converged and -lowest < solution.damping < -10 * lowest and solution.hvps == len(calls)
    assert relative_error(solution.value, v / (values + solution.damping)) < 1e-6
    limited = hvp.solve(operator, v, hvp.Budget(hvps=30, damping="auto"))
    assert limited.hvps <= 30


def test_a_first_guess_counts_and_is_for_the_damped_system() -> None:
    matrix = matrix_with(SIGNED, seed=2)
    operator = hvp.HessianOperator(lambda w: w @ (matrix @ w) / 2, torch.zeros(200, dtype=DTYPE))
    cold = operator.solve(V, hvp.Budget(error=1e-6, damping="auto"))
    warm = operator.solve(V, hvp.Budget(error=1e-6, damping="auto"), x0=cold.value)
    truth = torch.linalg.solve(matrix + warm.damping * torch.eye(200, dtype=DTYPE), V)
    assert warm.hvps < cold.hvps and relative_error(warm.value, truth) < 1e-5
    assert operator.solve(V, hvp.Budget(hvps=60), x0=cold.value).hvps <= 60


def test_several_right_hand_sides_share_the_estimate() -> None:
    operator, vs = Diagonal(POSITIVE), randn(3, 200, seed=5)
    solution = hvp.solve(operator, vs, hvp.Budget(error=1e-6), batched=True)
    assert solution.hvps == operator.calls
    assert relative_error(solution.value, torch.linalg.solve(operator.matrix, vs.T).T) < 1e-3


# Decays


U = randn(1200, seed=9)


def decayed(spread: float, mean: float = -4.0) -> tuple[Callable[[Tensor], Tensor], Tensor, Tensor]:
    """The loss of a logistic regression with decays that differ by e^spread on average, its Hessian, and the decays."""
    x, w = randn(60, 1200, seed=6) / 4, randn(1200, seed=7) / 10
    decays = (mean + spread * randn(1200, seed=8)).exp()
    p = torch.sigmoid(x @ w)
    hessian = x.T @ ((p * (1 - p) / 60)[:, None] * x) + decays.diag()

    def loss(w: Tensor) -> Tensor:
        scores = x @ w
        return (torch.nn.functional.softplus(scores) - scores).mean() + (decays * w.square()).sum() / 2

    return loss, w, hessian


@pytest.mark.parametrize("engine", ["recorded", "linearized"])
@pytest.mark.parametrize("error", [1e-2, 1e-6])
def test_decays_that_differ_precondition_the_solve(error: float, engine: str) -> None:
    """With a third or more fewer products than a callable needs, which shows no decays; and as close to the truth."""
    loss, w, hessian = decayed(2.0)
    plain = hvp.solve(lambda v: hessian @ v, U, hvp.Budget(error=error))
    solution = hvp.HessianOperator(loss, w, engine=engine).solve(U, hvp.Budget(error=error))
    assert solution.explanation.endswith("fewer with the decays as a preconditioner")
    assert solution.converged and plain.converged and solution.hvps <= 2 / 3 * plain.hvps
    assert relative_error(solution.value, torch.linalg.solve(hessian, U)) <= error
    few = hvp.HessianOperator(loss, w, engine=engine).solve(U, hvp.Budget(hvps=30))
    assert few.hvps == 30 and few.residual_norm < 0.3


def test_equal_decays_and_those_of_some_weights_only_do_not() -> None:
    loss, w, _ = decayed(0.1)
    plain = hvp.HessianOperator(loss, w, engine="linearized").solve(U, hvp.Budget(error=1e-3))
    assert plain.converged and "decays" not in plain.explanation
    other, w, _ = decayed(2.0)
    pair = hvp.HessianOperator(lambda w: other(w["a"]) + w["b"].sum().square(), {"a": w, "b": U[:50]})
    assert pair.decays() is None


def test_damping_is_part_of_the_preconditioner() -> None:
    """Damping far above all decays leaves nothing to precondition; below, the damped system is solved."""
    loss, w, hessian = decayed(2.0)
    operator = hvp.HessianOperator(loss, w, engine="linearized")
    assert "decays" not in operator.solve(U, hvp.Budget(error=1e-3, damping=100.0)).explanation
    solution = operator.solve(U, hvp.Budget(error=1e-6, damping=1e-3))
    assert "decays" in solution.explanation
    truth = torch.linalg.solve(hessian + 1e-3 * torch.eye(1200, dtype=DTYPE), U)
    assert relative_error(solution.value, truth) <= 1e-6


@pytest.mark.parametrize("engine", ["eager", "linearized", "auto"])
@pytest.mark.parametrize("name", BILEVEL)
def test_hypergradient(name: str, engine: str) -> None:
    problem = BILEVEL[name]()
    result = hvp.Hypergradient(problem.train_loss, problem.val_loss, solver=hvp.Budget(error=1e-8), engine=engine)(
        problem.weights, problem.hyper, None, None
    )
    torch.testing.assert_close(result.grads, problem.hypergradient, rtol=1e-7, atol=1e-10)
    assert result.solution.explanation


@pytest.mark.parametrize(
    "error, argument, arguments",
    [
        (ValueError, "error", {}),
        (ValueError, "error", {"error": 0.0}),
        (TypeError, "error", {"error": "1e-3"}),
        (TypeError, "hvps", {"hvps": 2.0}),
        (ValueError, "hvps", {"hvps": 0}),
        (ValueError, "damping", {"hvps": 2, "damping": -1.0}),
        (TypeError, "damping", {"hvps": 2, "damping": "much"}),
    ],
)
def test_bad_arguments(error: type[Exception], argument: str, arguments: dict) -> None:
    with pytest.raises(error, match=f"{argument}: expected.*got"):
        hvp.Budget(**arguments)


def test_an_operator_that_gives_nan_is_refused() -> None:
    with pytest.raises(hvp.NonFiniteError, match="^operator: expected finite products"):
        hvp.solve(lambda v: v * torch.nan, torch.ones(40), hvp.Budget(error=0.1))
