"""Conjugate gradients in blocks, against dense float64 solves: what blocks share, where they stop, what they leave."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems_with_known_answers import DTYPE, NETWORKS, flat, matrix_with, randn, relative_error, unflat
from torch import Tensor

import hvp_engine as hvp
from hvp_engine.engines.functions import TracedLinearization
from hvp_engine.solvers import block_conjugate_gradient
from hvp_engine.solvers.base import LinearSystem
from hvp_engine.solvers.block_conjugate_gradient import BlockConjugateGradientSolve
from hvp_engine.solvers.iteration import REFRESH_EVERY

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
SIZE = 60
SPREAD = matrix_with(torch.logspace(-3, 0, SIZE, dtype=DTYPE), seed=1)


class Matrix:
    """v -> A v, which keeps what it is called with."""

    def __init__(self, matrix: Tensor):
        self.matrix, self.taken = matrix, []

    def __call__(self, v: Tensor) -> Tensor:
        self.taken.append(v.clone())
        return self.matrix.to(v.dtype) @ v

    @property
    def calls(self) -> int:
        return len(self.taken)


def columns(matrix: Tensor, vs: Tensor, solver: Any, dtype: torch.dtype = DTYPE) -> list[tuple[Tensor, hvp.Solution]]:
    """Value and solution of each right-hand side, solved together."""
    operator = hvp.HessianOperator(lambda w: w @ matrix.to(dtype) @ w / 2, torch.zeros(len(matrix), dtype=dtype))
    system = LinearSystem(operator.linear_map, operator.engine, operator.spectrum)
    names = [f"v[{index}]" for index in range(len(vs))]
    return [(value, one) for [value], one in system.solve_all([[v] for v in vs.to(dtype)], solver, names)]


def residuals(matrix: Tensor, vs: Tensor, xs: Tensor) -> Tensor:
    return (vs - xs.double() @ matrix).norm(dim=1) / vs.norm(dim=1)


@pytest.fixture
def blocks(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many columns each block had."""
    widths: list[int] = []
    original = BlockConjugateGradientSolve._solve_together

    def counting(self: BlockConjugateGradientSolve, vs: Sequence[Any], names: Sequence[str]) -> Any:
        widths.append(len(vs))
        return original(self, vs, names)

    monkeypatch.setattr(BlockConjugateGradientSolve, "_solve_together", counting)
    return widths


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many columns blocks have left to the solve of single ones."""
    counts: list[int] = []
    original = block_conjugate_gradient.IterativeSolve.run

    def counting(self: Any, vs: Sequence[Any], names: Sequence[str]) -> Any:
        counts.append(len(vs))
        return original(self, vs, names)

    monkeypatch.setattr(block_conjugate_gradient.IterativeSolve, "run", counting)
    return counts


# --- against dense solves --------------------------------------------------------------------------------------------


KINDS: dict[str, Callable[[Tensor], Tensor]] = {
    "independent": lambda vs: vs,
    "scaled apart": lambda vs: vs * torch.logspace(-6, 6, len(vs), dtype=DTYPE)[:, None],
    "duplicates": lambda vs: vs[torch.arange(len(vs)) % max(1, len(vs) // 2)],
    "dependent": lambda vs: randn(len(vs), 2, seed=5) @ vs[:2] if len(vs) > 2 else vs,
    "nearly dependent": lambda vs: vs[:1] + 1e-6 * vs,
    "a zero": lambda vs: torch.cat([vs[:-1], torch.zeros_like(vs[:1])]),
    "smooth and rough": lambda vs: torch.stack(
        [torch.linalg.matrix_power(SPREAD, i % 3) @ v for i, v in enumerate(vs)]
    ),
}


@pytest.mark.parametrize("count", [2, 7, SIZE, SIZE + 25])
@pytest.mark.parametrize("kind", KINDS)
@DTYPES
def test_every_column_is_solved(kind: str, count: int, dtype: torch.dtype, alone: list[int]) -> None:
    vs = KINDS[kind](randn(count, SIZE, seed=2))
    results = columns(SPREAD, vs, hvp.ConjugateGradient(400), dtype)
    truth = torch.linalg.solve(SPREAD, vs.T).T
    loss_of_digits = {torch.float64: 1e-7, torch.float32: 2e-2}[dtype]
    claimed = {torch.float64: 3.7e-11, torch.float32: 2.5e-5}[dtype]
    for v, expected, (value, solution) in zip(vs, truth, results, strict=True):
        assert solution.converged and solution.residual_norm <= claimed
        assert relative_error(value.double(), expected) < loss_of_digits if v.any() else not value.any()
    if kind not in ("dependent", "nearly dependent"):  # whose rounding errors are independent
        assert not any(alone), "the blocks need no help"


@DTYPES
@pytest.mark.parametrize("count", [3, 10, 20])
def test_exact_after_its_share_of_products_and_not_before(count: int, dtype: torch.dtype) -> None:
    """Blocks of s directions span all n dimensions after n / s products, for any matrix."""
    matrix, vs = matrix_with(torch.linspace(1.0, 9.0, SIZE, dtype=DTYPE), seed=3), randn(count, SIZE, seed=4)
    enough, tolerance = SIZE // count, {torch.float32: 1e-5, torch.float64: 1e-12}[dtype]
    truth = torch.linalg.solve(matrix, vs.T).T
    errors = []
    for iterations in (enough, enough - 1):
        results = columns(matrix, vs, hvp.ConjugateGradient(iterations, tol=0.0), dtype)
        errors.append(max(relative_error(x.double(), t) for (x, _), t in zip(results, truth, strict=True)))
        if count > 3:  # with 3 directions the residual is at rounding before they span everything
            assert all(solution.iterations == iterations for _, solution in results)
            assert sum(solution.hvps for _, solution in results) == iterations * count
    if count > 3:
        assert errors[1] > 20 * tolerance
        assert {solution.status for _, solution in results} == {hvp.Status.ITERATION_LIMIT}
    assert errors[0] < tolerance


@pytest.mark.parametrize("preconditioned", [False, True])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_each_iterate_is_the_best_of_the_shared_krylov_space(count: int, preconditioned: bool) -> None:
    vs, diagonal = randn(4, SIZE, seed=6), torch.logspace(0, 1, SIZE, dtype=DTYPE)
    m = torch.diag(1 / diagonal) if preconditioned else torch.eye(SIZE, dtype=DTYPE)
    space = torch.cat([torch.linalg.matrix_power(m @ SPREAD, power) @ m @ vs.T for power in range(count)], 1)
    basis = torch.linalg.qr(space)[0]
    truth = (basis @ torch.linalg.solve(basis.T @ SPREAD @ basis, basis.T @ vs.T)).T
    preconditioner = hvp.DiagonalPreconditioner(diagonal) if preconditioned else None
    solver = hvp.ConjugateGradient(count, tol=0.0, preconditioner=preconditioner)
    for v, expected, (value, solution) in zip(vs, truth, columns(SPREAD, vs, solver), strict=True):
        assert relative_error(value, expected) < 1e-9
        assert solution.residual_norm == pytest.approx(float(residuals(SPREAD, v[None], value[None])), rel=1e-9)


def test_fewer_products_than_one_by_one() -> None:
    vs = randn(20, SIZE, seed=7)
    counts = []
    for batched in (True, False):
        operator = Matrix(SPREAD)
        for part in [vs] if batched else vs:
            assert hvp.solve(operator, part, hvp.ConjugateGradient(400, tol=1e-6), batched=batched).converged
        counts.append(operator.calls)
    assert 5 * counts[0] < counts[1]


@st.composite
def problems(draw: st.DrawFn) -> tuple[Tensor, Tensor, list[Tensor]]:
    """A definite matrix of condition 1 to 1e6, right-hand sides of all kinds, and the shapes of the weights."""
    seed = draw(st.integers(0, 10**6))
    shapes = draw(st.lists(st.sampled_from([(), (1,), (3,), (2, 2), (2, 1, 3)]), min_size=1, max_size=3))
    like = [torch.zeros(shape, dtype=DTYPE) for shape in shapes]
    size = sum(tensor.numel() for tensor in like)
    values = torch.logspace(-draw(st.floats(0.0, 6.0)), 0, size, dtype=DTYPE) * 10 ** draw(st.floats(-6.0, 6.0))
    vs = randn(draw(st.integers(2, 2 * size + 2)), size, seed=seed + 1)
    kind = draw(st.sampled_from([kind for kind in KINDS if kind != "smooth and rough"]))
    return matrix_with(values, seed), KINDS[kind](vs), like


@settings(max_examples=60, deadline=None, derandomize=True)
@given(problems(), st.sampled_from([1e-2, 1e-6, None]))
def test_whatever_the_problem(problem: tuple[Tensor, Tensor, list[Tensor]], tol: float | None) -> None:
    """Each column reaches its tolerance; x of s b is s x; b = 0 gives 0; shapes stay; all products are counted."""
    matrix, vs, like = problem
    calls = 0

    def product(parts: list[Tensor]) -> list[Tensor]:
        nonlocal calls
        calls += 1
        return unflat(matrix @ flat(parts), like)

    stacked = [torch.stack(list(parts)) for parts in zip(*(unflat(v, like) for v in vs), strict=True)]
    solver = hvp.ConjugateGradient(2000, tol=tol)
    solution = hvp.solve(product, stacked, solver, batched=True)
    assert [part.shape for part in solution.value] == [(len(vs), *part.shape) for part in like]
    assert solution.hvps == calls and solution.converged
    xs = torch.cat([part.reshape(len(vs), -1) for part in solution.value], 1)
    there = vs.norm(dim=1) > 0
    assert not xs[~there].any()
    found = residuals(matrix, vs[there], xs[there])
    assert float(found.max()) <= 1.01 * max(tol or 3.7e-11, 1e-15 * float(torch.linalg.cond(matrix)))
    again = hvp.solve(product, [1024.0 * part for part in stacked], solver, batched=True)
    torch.testing.assert_close(again.value, [1024.0 * part for part in solution.value], rtol=1e-9, atol=0)


# --- tolerances, limits, counts --------------------------------------------------------------------------------------


def test_a_converged_column_leaves_the_block() -> None:
    """An eigenvector is solved by one product; only the other columns go on."""
    values, basis = torch.linalg.eigh(SPREAD)
    vs = torch.cat([basis.T[[5, 30]], randn(3, SIZE, seed=8)])
    operator = Matrix(SPREAD)
    solution = hvp.solve(operator, vs, hvp.ConjugateGradient(400, tol=1e-8), batched=True)
    singles = columns(SPREAD, vs, hvp.ConjugateGradient(400, tol=1e-8))
    assert [one.iterations for _, one in singles][:2] == [1, 1]
    assert all(one.iterations > 5 for _, one in singles[2:])
    assert operator.calls == solution.hvps <= 2 + 3 * solution.iterations


def test_tolerances_hold_for_each_column() -> None:
    vs = KINDS["scaled apart"](randn(6, SIZE, seed=9))
    for tol, atol in ((1e-2, 0.0), (1e-5, 0.0), (0.0, 1e-3), (1e-4, 1e-2)):
        results = columns(SPREAD, vs, hvp.ConjugateGradient(400, tol=tol, atol=atol))
        absolute = residuals(SPREAD, vs, torch.stack([value for value, _ in results])) * vs.norm(dim=1)
        bound = torch.clamp(max(tol, 1e-15) * vs.norm(dim=1), min=atol)
        assert bool((absolute <= 1.01 * bound).all()) and all(one.converged for _, one in results)
        if atol:
            assert [one.iterations for _, one in results][0] == 0, "zero is within the absolute tolerance"


def test_too_few_iterations_are_not_enough_and_say_so() -> None:
    vs = randn(5, SIZE, seed=10)
    needed = max(one.iterations for _, one in columns(SPREAD, vs, hvp.ConjugateGradient(400, tol=1e-6)))
    short = columns(SPREAD, vs, hvp.ConjugateGradient(needed - 1, tol=1e-6))
    worst = max(short, key=lambda pair: pair[1].residual_norm)[1]
    assert worst.status is hvp.Status.ITERATION_LIMIT and worst.residual_norm > 1e-6
    assert worst.iterations == needed - 1 and worst.residual_of == "returned"
    none = columns(SPREAD, vs, hvp.ConjugateGradient(0))
    assert all(not value.any() and one.residual_of == "none" for value, one in none)


def test_the_residual_is_recomputed() -> None:
    """The 51st block of products is taken at x, and what it shows is what the solve goes on with."""
    matrix = matrix_with(torch.logspace(-7, 0, 400, dtype=DTYPE), seed=11)
    vs, solver = randn(2, 400, seed=12), hvp.ConjugateGradient(REFRESH_EVERY, tol=0.0)
    before = hvp.solve(Matrix(matrix), vs, solver, batched=True)
    operator = Matrix(matrix)
    after = hvp.solve(operator, vs, replace(solver, iterations=REFRESH_EVERY + 1), batched=True)
    assert torch.equal(after.value, before.value) and after.hvps == operator.calls == 2 * (REFRESH_EVERY + 1)
    taken = torch.stack(operator.taken[-2:]) * vs.norm(dim=1, keepdim=True)
    torch.testing.assert_close(taken, after.value, rtol=1e-12, atol=1e-12)
    exact = float(residuals(matrix, vs, after.value).max())
    assert after.residual_norm == pytest.approx(exact, rel=1e-12)


def test_long_runs_in_single_precision_reach_what_rounding_allows() -> None:
    matrix, vs = matrix_with(torch.logspace(-3, 0, 400, dtype=DTYPE), seed=13), randn(4, 400, seed=14)
    results = columns(matrix, vs, hvp.ConjugateGradient(2000), torch.float32)
    assert all(one.converged for _, one in results) and results[0][1].iterations > REFRESH_EVERY
    assert float(residuals(matrix, vs, torch.stack([value for value, _ in results])).max()) < 1e-3


@pytest.mark.parametrize("damping", [0.3, 4.0])
def test_damping_is_a_multiple_of_the_identity(damping: float) -> None:
    vs, solver = randn(5, SIZE, seed=15), hvp.ConjugateGradient(4, tol=0.0)
    damped = columns(SPREAD, vs, replace(solver, damping=damping))
    plain = columns(SPREAD + damping * torch.eye(SIZE, dtype=DTYPE), vs, solver)
    for (value, one), (expected, _) in zip(damped, plain, strict=True):
        assert relative_error(value, expected) < 1e-10 and one.damping == damping


def test_warm_starts() -> None:
    vs = randn(6, SIZE, seed=16)
    truth = torch.linalg.solve(SPREAD, vs.T).T
    guesses = truth + 1e-6 * randn(6, SIZE, seed=17)
    solver = hvp.ConjugateGradient(200, tol=1e-9)
    cold = hvp.solve(Matrix(SPREAD), vs, solver, batched=True)
    operator = Matrix(SPREAD)
    warm = hvp.solve(operator, vs, solver, batched=True, x0=guesses)
    assert warm.converged and warm.hvps == operator.calls < cold.hvps
    assert float(residuals(SPREAD, vs, warm.value).max()) <= 1.01e-9


# --- preconditioners -------------------------------------------------------------------------------------------------


@DTYPES
def test_a_preconditioner_of_large_condition(dtype: torch.dtype) -> None:
    """Decays from 1e-4 to 1e4: directions orthonormal in the 2-norm would lose the small ones in float32."""
    decay = torch.logspace(-4, 4, SIZE, dtype=DTYPE)
    root = decay.sqrt()
    matrix = root[:, None] * matrix_with(torch.linspace(1.0, 20.0, SIZE, dtype=DTYPE), seed=18) * root
    vs = randn(6, SIZE, seed=19) * root
    solver = hvp.ConjugateGradient(60, tol=1e-5, preconditioner=hvp.DiagonalPreconditioner(decay.to(dtype)))
    results = columns(matrix, vs, solver, dtype)
    assert all(one.converged and one.iterations <= 15 for _, one in results)
    truth = torch.linalg.solve(matrix, vs.T).T
    for value, expected in zip([value.double() for value, _ in results], truth, strict=True):
        error = value - expected
        assert float((error @ matrix @ error) / (expected @ matrix @ expected)) ** 0.5 < 1e-3
    plain = columns(matrix, vs, replace(solver, preconditioner=None, iterations=15), dtype)
    assert not any(one.converged for _, one in plain)


def test_an_exact_preconditioner_takes_one_product_for_each_column() -> None:
    inverse, vs, operator = torch.linalg.inv(SPREAD), randn(5, SIZE, seed=20), Matrix(SPREAD)
    solver = hvp.ConjugateGradient(50, tol=1e-9, preconditioner=lambda v: [inverse @ v[0]])
    solution = hvp.solve(operator, vs, solver, batched=True)
    assert solution.converged and operator.calls == 5


def test_a_preconditioner_that_is_not_positive_definite_is_refused() -> None:
    solver = hvp.ConjugateGradient(20, preconditioner=lambda v: [-part for part in v])
    with pytest.raises(ValueError, match="preconditioner: expected a symmetric positive definite M"):
        hvp.solve(Matrix(SPREAD), randn(4, SIZE, seed=21), solver, batched=True)


# --- what blocks leave to single solves ------------------------------------------------------------------------------


@DTYPES
@pytest.mark.parametrize("iterations", [5, 200])
def test_indefinite_is_as_one_by_one(iterations: int, dtype: torch.dtype, alone: list[int]) -> None:
    values = torch.linspace(-0.5, 4.0, SIZE, dtype=DTYPE)
    matrix, vs = matrix_with(values, seed=22), randn(6, SIZE, seed=23)
    results = columns(matrix, vs, hvp.ConjugateGradient(iterations), dtype)
    assert alone == [6]
    for v, (value, solution) in zip(vs, results, strict=True):
        single = hvp.solve(Matrix(matrix), v.to(dtype), hvp.ConjugateGradient(iterations))
        assert solution.status is single.status and solution.hvps > single.hvps
        assert relative_error(value, single.value) < (1e-3 if dtype == torch.float32 else 1e-9)
    if iterations == 200:
        assert {one.status for _, one in results} == {hvp.Status.NEGATIVE_CURVATURE}
    damped = columns(matrix, vs, hvp.ConjugateGradient(200, damping=0.6), dtype)
    assert all(one.converged for _, one in damped)


def test_columns_that_do_not_see_the_negative_curvature_converge() -> None:
    matrix = torch.diag(torch.tensor([1.0, 2.0, 3.0, -1.0], dtype=DTYPE))
    vs = torch.tensor([[1.0, 1.0, 1.0, 0.0], [1.0, 1.0, 1.0, 1.0]], dtype=DTYPE)
    (_, first), (_, second) = columns(matrix, vs, hvp.ConjugateGradient(50))
    assert first.converged and second.status is hvp.Status.NEGATIVE_CURVATURE


@DTYPES
def test_singular_and_consistent(dtype: torch.dtype) -> None:
    values = torch.cat([torch.zeros(10, dtype=DTYPE), torch.linspace(1.0, 5.0, SIZE - 10, dtype=DTYPE)])
    matrix = matrix_with(values, seed=24)
    vs = randn(8, SIZE, seed=25) @ matrix
    truth = vs @ torch.linalg.pinv(matrix, hermitian=True)
    for expected, (value, solution) in zip(truth, columns(matrix, vs, hvp.ConjugateGradient(300), dtype), strict=True):
        assert solution.converged
        assert relative_error(value.double(), expected) < (1e-3 if dtype == torch.float32 else 1e-8)


def test_singular_and_inconsistent_is_reported() -> None:
    matrix = matrix_with(torch.cat([torch.zeros(1), torch.linspace(1.0, 9.0, SIZE - 1)]).double(), seed=26)
    solution = hvp.solve(Matrix(matrix), randn(5, SIZE, seed=27), hvp.ConjugateGradient(300), batched=True)
    assert not solution.converged and bool(torch.isfinite(solution.value).all())


def test_zeros_and_negative_definite_operators() -> None:
    vs = randn(4, SIZE, seed=28)
    for matrix in (-SPREAD, torch.zeros(SIZE, SIZE, dtype=DTYPE)):
        solution = hvp.solve(Matrix(matrix), vs, hvp.ConjugateGradient(50), batched=True)
        assert solution.status is hvp.Status.NEGATIVE_CURVATURE and not solution.value.any()


def test_what_is_not_finite_is_named() -> None:
    vs, solver = randn(4, SIZE, seed=29), hvp.ConjugateGradient(50)
    vs[2, 7] = math.nan
    with pytest.raises(hvp.NonFiniteError, match=r"^v\[2\]: expected finite values"):
        hvp.solve(Matrix(SPREAD), vs, solver, batched=True)
    with pytest.raises(hvp.NonFiniteError, match="product A v of a finite v is NaN"):
        hvp.solve(lambda v: v * math.nan, randn(4, SIZE, seed=30), solver, batched=True)


# --- where blocks are used -------------------------------------------------------------------------------------------


def test_memory_bounds_the_block(blocks: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    vs, solver = randn(7, SIZE, seed=31), hvp.ConjugateGradient(400, tol=1e-9)
    whole = hvp.solve(Matrix(SPREAD), vs, solver, batched=True)
    monkeypatch.setattr(block_conjugate_gradient, "_MOST_ELEMENTS", 3 * 64)  # 60 weights take 64 elements
    parts = hvp.solve(Matrix(SPREAD), vs, solver, batched=True)
    monkeypatch.setattr(block_conjugate_gradient, "_MOST_ELEMENTS", 127)
    singles = hvp.solve(Matrix(SPREAD), vs, solver, batched=True)
    assert blocks == [7, 2, 2, 3]
    for solution in (whole, parts, singles):
        assert float(residuals(SPREAD, vs, solution.value).max()) <= 1.01e-9
    assert whole.hvps < parts.hvps < singles.hvps


def test_many_columns_are_blocks_of_nearly_the_same_size(blocks: list[int]) -> None:
    vs = randn(260, SIZE, seed=32)
    solution = hvp.solve(Matrix(SPREAD), vs, hvp.ConjugateGradient(50, tol=1e-9), batched=True)
    assert blocks == [86, 87, 87] and solution.converged
    assert float(residuals(SPREAD, vs, solution.value).max()) <= 1.01e-9


def test_one_right_hand_side_and_16_bit_weights_go_one_by_one(blocks: list[int]) -> None:
    vs, solver = randn(3, SIZE, seed=33), hvp.ConjugateGradient(20, damping=1.0)
    together = hvp.solve(Matrix(SPREAD), vs[:1], solver, batched=True)
    assert torch.equal(together.value[0], hvp.solve(Matrix(SPREAD), vs[0], solver).value)
    low = hvp.solve(Matrix(SPREAD), vs.bfloat16(), solver, batched=True)
    assert torch.equal(low.value[1], hvp.solve(Matrix(SPREAD), vs[1].bfloat16(), solver).value)
    assert not blocks


@DTYPES
@pytest.mark.usefixtures("no_native_programs")
@pytest.mark.parametrize("name", ["mlp", "channels_last conv", "lstm", "tied"])
def test_networks_with_batched_products(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against the dense Hessian in float64; products are made side by side, and all are counted."""
    network = NETWORKS[name]()
    net, made = hvp.functional(network.module), []
    weights = {key: w.detach().to(dtype) for key, w in network.module.named_parameters()}
    x = network.x.to(dtype) if network.x.is_floating_point() else network.x

    def loss(w: Any) -> Tensor:
        return network.loss_of(net(w, x)) + 5 * sum(p.square().sum() for p in w.values())

    original = TracedLinearization._at_once

    def counting(self: TracedLinearization, stacked: Sequence[Tensor]) -> Sequence[Tensor]:
        made.append(len(stacked[0]))
        return original(self, stacked)

    monkeypatch.setattr(TracedLinearization, "_at_once", counting)
    vs = {key: randn(11, *w.shape, seed=seed).to(dtype) for seed, (key, w) in enumerate(weights.items())}
    operator = hvp.HessianOperator(loss, weights, engine="linearized")
    solution = operator.solve(vs, hvp.ConjugateGradient(60), batched=True)
    assert solution.converged and made and sum(made) <= solution.hvps and max(made) <= 11
    matrix = operator.dense().double()
    rows = torch.cat([part.flatten(1).double() for part in vs.values()], 1)
    found = torch.cat([part.flatten(1).double() for part in solution.value.values()], 1)
    assert relative_error(found, torch.linalg.solve(matrix, rows.T).T) < (1e-3 if dtype == torch.float32 else 1e-8)
    assert [part.stride() for part in solution.value.values()] == [
        torch.stack([w] * 11).stride() for w in weights.values()
    ]
