"""The Neumann series against dense matrix powers, its diagnostics, and what it says when it fails."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
from problems_with_known_answers import DTYPE, matrix_with, randn, relative_error, truncated_sum
from torch import Tensor

import hvp_engine as hvp

FORMS = ["accumulate", "horner"]
SPD = matrix_with([0.1, 0.4, 1.0, 1.7, 3.0, 9.0], seed=1)
INDEFINITE = matrix_with([-0.5, 0.3, 1.0, 1.7, 3.0, 4.0], seed=2)
MATRICES = {"positive definite": SPD, "indefinite": INDEFINITE}
V = randn(6, seed=3)


class Counting:
    """v -> A v, counting its calls."""

    def __init__(self, matrix: Tensor):
        self.matrix, self.calls = matrix, 0

    def __call__(self, v: Tensor) -> Tensor:
        self.calls += 1
        return self.matrix.to(v.dtype) @ v


def inverse(matrix: Tensor, damping: float = 0.0) -> Tensor:
    return torch.linalg.solve(matrix + damping * torch.eye(len(matrix), dtype=DTYPE), V)


@pytest.mark.parametrize("damping", [0.0, 0.7])
@pytest.mark.parametrize("name", MATRICES)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("iterations", [0, 1, 2, 5])
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_truncated_sum(iterations: int, form: str, name: str, damping: float, backend: str) -> None:
    matrix = Counting(MATRICES[name])
    with hvp.use_backend(backend):
        solution = hvp.solve(matrix, V, hvp.Neumann(iterations, alpha=0.15, form=form, damping=damping))
    truth = truncated_sum(MATRICES[name], V, iterations, 0.15, damping)
    torch.testing.assert_close(solution.value, truth, rtol=1e-13, atol=1e-14)
    assert matrix.calls == solution.iterations == solution.hvps == iterations
    for other in (iterations - 1, iterations + 1):
        if other >= 0:
            wrong = truncated_sum(MATRICES[name], V, other, 0.15, damping)
            assert relative_error(wrong, truth) > 1e-3, "one product more or less has to show"


@pytest.mark.parametrize("iterations", [0, 1, 2, 5])
def test_truncated_sum_tape_style(iterations: int) -> None:
    w = randn(6, seed=4).requires_grad_()
    loss = w @ SPD @ w / 2
    (value,) = hvp.approx_inverse_hvp(V, loss, w, iterations, 0.15)
    torch.testing.assert_close(value, truncated_sum(SPD, V, iterations, 0.15), rtol=1e-13, atol=1e-14)
    gradient = torch.autograd.grad(w @ SPD @ w / 2, w, create_graph=True)
    (value,) = hvp.approx_inverse_hvp([V], gradient, [w], iterations, 0.15, damping=0.7)
    torch.testing.assert_close(value, truncated_sum(SPD, V, iterations, 0.15, 0.7), rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("form", FORMS)
def test_no_product_gives_alpha_v(form: str) -> None:
    def never(v: Tensor) -> Tensor:
        raise AssertionError("a product was made")

    solution = hvp.solve(never, V, hvp.Neumann(0, alpha=0.3, form=form))
    torch.testing.assert_close(solution.value, 0.3 * V, rtol=1e-15, atol=0)
    assert (solution.residual_of, solution.residual_norm) == ("none", 1.0)


@pytest.mark.parametrize("form", FORMS)
def test_enough_terms_suffice_and_too_few_do_not(form: str) -> None:
    truth = inverse(SPD)
    errors = {
        i: relative_error(hvp.solve(lambda v: SPD @ v, V, hvp.Neumann(i, alpha=0.2, form=form)).value, truth)
        for i in (5, 20, 100, 2000)
    }
    assert errors[2000] < 1e-12
    assert errors[5] > 0.5 and errors[20] > 0.2 and errors[100] > 0.05
    assert errors[5] > errors[20] > errors[100] > errors[2000]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("damping", [0.0, 0.4])
@pytest.mark.parametrize("iterations", [1, 2, 7])
def test_residual_is_that_of_the_iterate_before(form: str, damping: float, iterations: int) -> None:
    solution = hvp.solve(lambda v: SPD @ v, V, hvp.Neumann(iterations, alpha=0.1, form=form, damping=damping))
    before = truncated_sum(SPD, V, iterations - 1, 0.1, damping)
    residual = V - SPD @ before - damping * before
    assert solution.residual_of == "previous"
    assert solution.residual_norm == pytest.approx(float(residual.norm() / V.norm()), rel=1e-11)


def test_forms_agree_and_differ_only_in_rounding() -> None:
    one, other = (hvp.solve(lambda v: SPD @ v, V, hvp.Neumann(50, alpha=0.2, form=form)).value for form in FORMS)
    torch.testing.assert_close(one, other, rtol=1e-12, atol=0)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_low_precision_keeps_a_single_precision_state(dtype: torch.dtype, form: str) -> None:
    """300 increments would stall at the 8 bits of bfloat16 if the state were kept in it."""
    diagonal = torch.tensor([0.0625, 0.5, 1.0, 1.5], dtype=DTYPE)
    v = torch.tensor([1.0, -2.0, 0.5, 3.0], dtype=dtype)
    solution = hvp.solve(lambda t: diagonal.to(dtype) * t, v, hvp.Neumann(300, alpha=0.5, form=form))
    assert solution.value.dtype == dtype
    error = relative_error(solution.value.double(), v.double() / diagonal)
    assert error < {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 2e-3}[dtype]


def test_status_converged_and_iteration_limit() -> None:
    few = hvp.solve(lambda v: SPD @ v, V, hvp.Neumann(10, alpha=0.2))
    many = hvp.solve(lambda v: SPD @ v, V, hvp.Neumann(2000, alpha=0.2))
    assert few.status is hvp.Status.ITERATION_LIMIT and not few.converged
    assert many.status is hvp.Status.CONVERGED and many.converged
    assert (few.alpha, few.lambda_max) == (0.2, None)


def test_status_diverged_before_it_is_an_error() -> None:
    solution = hvp.solve(lambda v: SPD @ v, V, hvp.Neumann(3, alpha=0.3))  # 1 - 0.3 * 9 = -1.7
    assert solution.status is hvp.Status.DIVERGED
    torch.testing.assert_close(solution.value, truncated_sum(SPD, V, 3, 0.3), rtol=1e-13, atol=0)


def test_status_negative_curvature() -> None:
    automatic = hvp.solve(lambda v: INDEFINITE @ v, V, hvp.Neumann(10))
    assert automatic.status is hvp.Status.NEGATIVE_CURVATURE
    damped = hvp.solve(lambda v: INDEFINITE @ v, V, hvp.Neumann(10, damping=0.6))
    assert damped.status is hvp.Status.ITERATION_LIMIT


def test_zero_right_hand_side() -> None:
    solution = hvp.solve(lambda v: SPD @ v, torch.zeros(6, dtype=DTYPE), hvp.Neumann(5))
    assert torch.equal(solution.value, torch.zeros(6, dtype=DTYPE))
    assert solution.residual_norm == 0.0


def number_after(what: str, message: str) -> float:
    found = re.search(rf"{what}\s*(-?\d+(?:\.\d+)?(?:e[-+]\d+)?)", message)
    assert found, message
    return float(found[1])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("damping", [0.0, 2.0])
@pytest.mark.parametrize("iterations", [40, 5000], ids=["grown", "overflowed"])
def test_divergence_names_an_alpha_that_works(form: str, damping: float, iterations: int) -> None:
    with pytest.raises(hvp.DivergenceError) as caught:
        hvp.solve(lambda v: SPD @ v, V, hvp.Neumann(iterations, alpha=0.5, form=form, damping=damping))
    message = str(caught.value)
    assert number_after("with alpha=", message) == 0.5
    assert number_after("lambda_max is estimated as", message) == pytest.approx(9.0 + damping, rel=0.01)
    alpha = number_after("; alpha=", message)
    solution = hvp.solve(lambda v: SPD @ v, V, hvp.Neumann(5000, alpha=alpha, form=form, damping=damping))
    torch.testing.assert_close(solution.value, inverse(SPD, damping), rtol=1e-9, atol=0)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("alpha", [0.2, 5.0])
def test_divergence_on_negative_curvature_names_a_damping_that_works(form: str, alpha: float | str) -> None:
    with pytest.raises(hvp.DivergenceError) as caught:
        hvp.solve(lambda v: INDEFINITE @ v, V, hvp.Neumann(400, alpha=alpha, form=form))
    message = str(caught.value)
    assert number_after("smallest eigenvalue is about", message) == pytest.approx(-0.5, rel=0.01)
    damping, step = number_after("damping=", message), number_after("with alpha=", message[message.index("damping=") :])
    solution = hvp.solve(lambda v: INDEFINITE @ v, V, hvp.Neumann(4000, alpha=step, form=form, damping=damping))
    torch.testing.assert_close(solution.value, inverse(INDEFINITE, damping), rtol=1e-9, atol=0)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("iterations", [1, 5, 20, 400])
def test_automatic_alpha_bounds_the_growth_under_negative_curvature(form: str, iterations: int) -> None:
    solution = hvp.solve(lambda v: INDEFINITE @ v, V, hvp.Neumann(iterations, form=form))
    assert solution.status is hvp.Status.NEGATIVE_CURVATURE
    assert solution.residual_norm <= 10.0
    positive = hvp.solve(lambda v: SPD @ v, V, hvp.Neumann(iterations, form=form))
    assert positive.alpha == pytest.approx(1 / 9, rel=0.01)  # no caution where there is no need


@pytest.mark.parametrize("seed", range(20))
def test_advice_works_on_spectra_longer_than_the_estimate(seed: int) -> None:
    """60 eigenvalues, 8 Lanczos steps: the smallest one is only bounded, and the advice has to hold nevertheless."""
    eigenvalues = torch.linspace(1.0, 4.0, 60, dtype=DTYPE)
    eigenvalues[: 1 + seed % 3] = -(10.0 ** (-(seed % 4) / 2))
    matrix, v = matrix_with(eigenvalues, seed), randn(60, seed=seed)
    with pytest.raises(hvp.DivergenceError) as caught:
        hvp.solve(lambda x: matrix @ x, v, hvp.Neumann(3000, alpha=0.6))
    message = str(caught.value)
    if "damping=" in message:
        damping, alpha = number_after("damping=", message), number_after("with alpha=", message.split("damping=")[1])
    else:
        damping, alpha = 0.0, number_after("; alpha=", message)
    solution = hvp.solve(lambda x: matrix @ x, v, hvp.Neumann(5000, alpha=alpha, damping=damping))
    truth = torch.linalg.solve(matrix + damping * torch.eye(60, dtype=DTYPE), v)
    assert relative_error(solution.value, truth) < 1e-6


@pytest.mark.parametrize("damping", [0.0, 3.0])
def test_identity(damping: float) -> None:
    def never(v: Tensor) -> Tensor:
        raise AssertionError("a product was made")

    solution = hvp.solve(never, V, hvp.Identity(damping=damping))
    torch.testing.assert_close(solution.value, V / (1 + damping), rtol=1e-15, atol=0)
    assert solution.iterations == solution.hvps == 0


@pytest.mark.parametrize("solver", [hvp.Neumann(6, alpha=0.1), hvp.Neumann(6), hvp.Identity()], ids=repr)
def test_v_stays_and_twice_is_the_same(solver: hvp.Neumann | hvp.Identity) -> None:
    v = V.clone().requires_grad_()
    kernel: Callable[[Tensor], Tensor] = lambda x: SPD @ x  # noqa: E731
    first, second = hvp.solve(kernel, v, solver), hvp.solve(kernel, v, solver)
    assert torch.equal(first.value, second.value)
    assert torch.equal(v.detach(), V) and v.grad is None and v.requires_grad
    assert not first.value.requires_grad
    assert first.value.data_ptr() != v.data_ptr()


def test_solvers_are_values() -> None:
    assert hvp.Neumann(3, alpha=0.1) == hvp.Neumann(3, alpha=0.1) != hvp.Neumann(4, alpha=0.1)
    with pytest.raises(AttributeError):
        hvp.Neumann(3).iterations = 4  # type: ignore[misc]


# Preconditioned

DECAY = torch.logspace(-1, 3, 6, dtype=DTYPE)
SCALED = SPD / 9 + torch.diag(DECAY)
INVERSE = torch.diag(1 / (DECAY + 0.5))


@pytest.mark.parametrize("damping", [0.0, 0.7])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("iterations", [0, 1, 2, 5])
def test_preconditioned_sum(iterations: int, form: str, damping: float) -> None:
    """alpha sum_j (I - alpha M (A + damping I))^j M v, by dense matrix powers."""
    preconditioner = hvp.DiagonalPreconditioner(DECAY, shift=0.5)
    matrix = Counting(SCALED)
    solver = hvp.Neumann(iterations, alpha=0.3, form=form, damping=damping, preconditioner=preconditioner)
    solution = hvp.solve(matrix, V, solver)
    damped = SCALED + damping * torch.eye(6, dtype=DTYPE)
    truth = truncated_sum(INVERSE @ damped, INVERSE @ V, iterations, 0.3)
    torch.testing.assert_close(solution.value, truth, rtol=1e-12, atol=1e-14)
    assert matrix.calls == solution.hvps == iterations
    if iterations:
        before = truncated_sum(INVERSE @ damped, INVERSE @ V, iterations - 1, 0.3)
        residual = float((V - damped @ before).norm() / V.norm())
        assert solution.residual_norm == pytest.approx(residual, rel=1e-11) and solution.residual_of == "previous"


@pytest.mark.parametrize("damping", [0.0, 3.0])
@pytest.mark.parametrize("form", FORMS)
def test_preconditioned_with_automatic_alpha(form: str, damping: float) -> None:
    """The estimate is that of M (A + damping I): alpha is near 1, not near 1 / lambda_max(A) = 1e-3."""
    dense = torch.linalg.inv(SCALED + damping * torch.eye(6, dtype=DTYPE)) + 0.001 * torch.eye(6, dtype=DTYPE)
    for preconditioner, matrix in [
        (hvp.DiagonalPreconditioner(DECAY, shift=0.5), INVERSE),
        (lambda v: [dense @ v[0]], dense),  # not diagonal
    ]:
        solver = hvp.Neumann(200, form=form, damping=damping, preconditioner=preconditioner)
        solution = hvp.solve(lambda v: SCALED @ v, V, solver)
        product = matrix @ (SCALED + damping * torch.eye(6, dtype=DTYPE))
        largest = float(torch.linalg.eigvals(product).real.max())
        assert solution.lambda_max == pytest.approx(largest, rel=1e-6)
        assert solution.alpha == pytest.approx(1 / largest, rel=1e-3)
        truth = torch.linalg.solve(SCALED + damping * torch.eye(6, dtype=DTYPE), V)
        assert relative_error(solution.value, truth) < 1e-6
        plain = hvp.solve(lambda v: SCALED @ v, V, hvp.Neumann(200, form=form, damping=damping))
        assert relative_error(plain.value, truth) > 1e-2


def test_preconditioned_without_a_limit() -> None:
    preconditioner = hvp.DiagonalPreconditioner(torch.ones(6, dtype=DTYPE), shift=1.0)
    solution = hvp.solve(lambda v: INDEFINITE @ v, V, hvp.Neumann(5, preconditioner=preconditioner))
    assert solution.status is hvp.Status.NEGATIVE_CURVATURE
    damped = hvp.solve(lambda v: INDEFINITE @ v, V, hvp.Neumann(5, damping=0.6, preconditioner=preconditioner))
    assert damped.status is hvp.Status.ITERATION_LIMIT
    with pytest.raises(hvp.DivergenceError, match="M .A . damping I. has a negative eigenvalue.*more damping"):
        hvp.solve(lambda v: INDEFINITE @ v, V, hvp.Neumann(2000, alpha=0.3, preconditioner=preconditioner))
    with pytest.raises(hvp.DivergenceError) as caught:
        hvp.solve(lambda v: SPD @ v, V, hvp.Neumann(100, alpha=1.0, preconditioner=preconditioner))
    alpha = number_after("; alpha=", str(caught.value))
    solution = hvp.solve(lambda v: SPD @ v, V, hvp.Neumann(5000, alpha=alpha, preconditioner=preconditioner))
    torch.testing.assert_close(solution.value, inverse(SPD), rtol=1e-9, atol=0)


def test_a_solution_beyond_the_weights_dtype_is_refused() -> None:
    with pytest.raises(hvp.DivergenceError, match="float32 can hold"):
        hvp.solve(lambda v: 1e-20 * v, torch.full((3,), 1e19), hvp.Neumann(5, alpha=1e20))
