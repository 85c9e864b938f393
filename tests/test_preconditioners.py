"""Estimated preconditioners: Jacobi, Nystrom and KFAC against exact blocks, and with every solver that takes one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from problems_with_known_answers import DTYPE, flat, matrix_with, randn, relative_error, unflat
from torch import Tensor, nn

import hvp_engine as hvp
from hvp_engine.differentiation.linear_map import LinearMap
from hvp_engine.solvers.preconditioners.diagonal import hutchinson_diagonal

DECAY = torch.logspace(-1, 4, 40, dtype=DTYPE)
SCALED = matrix_with(torch.linspace(0.5, 2.0, 40, dtype=DTYPE), seed=1) + torch.diag(DECAY)
FEW_LARGE = matrix_with([1.0 + 0.05 * k for k in range(34)] + [1e2, 3e2, 1e3, 2e3, 5e3, 1e4], seed=2)
B = randn(40, seed=3)


def operator_of(matrix: Tensor) -> hvp.HessianOperator:
    return hvp.HessianOperator(lambda w: w @ matrix @ w / 2, torch.zeros(len(matrix), dtype=DTYPE), engine="eager")


# --- Jacobi ----------------------------------------------------------------------------------------------------------


def test_hutchinson_is_exact_for_a_diagonal_and_unbiased_otherwise() -> None:
    exact, squares = hutchinson_diagonal(operator_of(torch.diag(DECAY)), 1)
    torch.testing.assert_close(exact.views[0], DECAY, rtol=1e-13, atol=0)
    torch.testing.assert_close(squares.views[0], DECAY.square(), rtol=1e-13, atol=0)
    matrix = matrix_with(torch.linspace(-1.0, 3.0, 40, dtype=DTYPE), seed=4)
    diagonal, squares = hutchinson_diagonal(operator_of(matrix), 4000, seed=5)
    estimate = diagonal.views[0]
    torch.testing.assert_close(squares.views[0], matrix.square().sum(1), rtol=0.15, atol=0)
    deviation = (matrix.square().sum(1) - matrix.diagonal().square()).sqrt() / 4000**0.5
    assert float(((estimate - matrix.diagonal()) / deviation).abs().max()) < 4
    few, again, other = (hutchinson_diagonal(operator_of(matrix), 3, seed=seed)[0].data for seed in (6, 6, 7))
    assert torch.equal(few, again) and not torch.equal(few, other)


def test_jacobi_counts_its_products_and_stays_positive() -> None:
    matrix = matrix_with(torch.linspace(-1.0, 3.0, 40, dtype=DTYPE), seed=4)
    calls = 0
    operator = operator_of(matrix)

    class Counting(LinearMap):
        layout = operator.layout

        def product(self, tangents: list[Tensor]) -> Any:
            nonlocal calls
            calls += 1
            return operator.product(tangents)

    preconditioner = hvp.JacobiPreconditioner(Counting(), probes=3)
    assert preconditioner.hvps == calls == 3
    image = preconditioner([torch.ones(40, dtype=DTYPE)])[0]
    assert bool((image > 0).all()) and float(image.max() / image.min()) < 100


# --- Nystrom ---------------------------------------------------------------------------------------------------------


def test_nystrom_flattens_the_large_eigenvalues() -> None:
    operator = operator_of(FEW_LARGE)
    preconditioner = hvp.NystromPreconditioner(operator, rank=10, rho=1.0)
    assert preconditioner.hvps == 10
    inverse = torch.stack([preconditioner([unit])[0] for unit in torch.eye(40, dtype=DTYPE)])
    torch.testing.assert_close(inverse, inverse.T, rtol=1e-10, atol=1e-14)
    assert float(torch.linalg.eigvalsh(inverse)[0]) > 0
    root = torch.linalg.cholesky(inverse)
    values = torch.linalg.eigvalsh(root.T @ (FEW_LARGE + torch.eye(40, dtype=DTYPE)) @ root)
    assert float(values[-1] / values[0]) < 20 < 1e3 < 1e4 / 2


def test_nystrom_is_its_formula_for_an_operator_of_low_rank() -> None:
    """With the sketch exact, M (A + rho I) is 1 on the range of A, and rho / (l_k + rho) beside it."""
    values, rho = torch.cat([torch.tensor([2.0, 3.0, 5.0, 9.0], dtype=DTYPE), torch.zeros(36, dtype=DTYPE)]), 0.5
    matrix = matrix_with(values, seed=6)
    preconditioner = hvp.NystromPreconditioner(operator_of(matrix), rank=4, rho=rho)
    damped = matrix + rho * torch.eye(40, dtype=DTYPE)
    product = torch.stack([preconditioner([column])[0] for column in damped])
    found = torch.linalg.eigvalsh((product + product.T) / 2)
    expected = torch.cat([torch.full((36,), rho / (2.0 + rho), dtype=DTYPE), torch.ones(4, dtype=DTYPE)])
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=0)


# --- KFAC ------------------------------------------------------------------------------------------------------------


def half_square(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs - targets).square().sum(1).mean() / 2


def cross_entropy(outputs: Tensor, targets: Tensor) -> Tensor:
    return nn.functional.cross_entropy(outputs, targets)


def set_up(module: nn.Module) -> tuple[nn.Module, dict[str, Tensor]]:
    module = module.double()
    with torch.no_grad():
        for number, parameter in enumerate(module.parameters()):
            parameter.copy_(randn(*parameter.shape, seed=20 + number) * 0.5)
    return module, {name: parameter.detach() for name, parameter in module.named_parameters()}


def dense(preconditioner: hvp.KFACPreconditioner, weights: dict[str, Tensor]) -> Tensor:
    like = list(weights.values())
    size = sum(tensor.numel() for tensor in like)
    return torch.stack([flat(preconditioner(unflat(unit, like))) for unit in torch.eye(size, dtype=DTYPE)])


def blocks_of(matrix: Tensor, weights: dict[str, Tensor]) -> Tensor:
    """The matrix without what couples different layers."""
    layers = [name.rsplit(".", 1)[0] for name, tensor in weights.items() for _ in range(tensor.numel())]
    same = torch.tensor([[a == b for b in layers] for a in layers])
    return matrix * same


CASES: dict[str, Callable[[], tuple[nn.Module, Callable, Tensor, Tensor]]] = {
    "one sample, cross entropy": lambda: (
        nn.Sequential(nn.Linear(3, 4)), cross_entropy, randn(1, 3, seed=10), torch.tensor([2]),
    ),
    "one sample, two layers": lambda: (
        nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), half_square, randn(1, 3, seed=11),
        randn(1, 2, seed=12),
    ),
    "deep linear net": lambda: (
        nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 3, bias=False), nn.Linear(3, 2)), half_square,
        randn(7, 3, seed=13), randn(7, 2, seed=14),
    ),
    "convolution of one position": lambda: (
        nn.Sequential(nn.Conv2d(2, 3, 2), nn.Flatten(), nn.Linear(3, 2)), half_square, randn(5, 2, 2, 2, seed=15),
        randn(5, 2, seed=16),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_kfac_is_exact_where_the_theory_says_so(name: str) -> None:
    module, loss, x, y = CASES[name]()
    module, weights = set_up(module)
    exact = hvp.GaussNewtonOperator(hvp.functional(module), loss, weights, x, y).dense()
    inverse = dense(hvp.KFACPreconditioner(module, loss, weights, x, y, shift=0.3), weights)
    truth = torch.linalg.inv(blocks_of(exact, weights) + 0.3 * torch.eye(len(exact), dtype=DTYPE))
    torch.testing.assert_close(inverse, truth, rtol=1e-9, atol=1e-11)


def test_kfac_of_a_convolution_has_the_exact_trace_of_one_input_channel_of_ones() -> None:
    """With constant inputs a a^T is the same everywhere, and the sum over positions factorizes."""
    module, weights = set_up(nn.Sequential(nn.Conv2d(1, 2, 2), nn.AvgPool2d(2), nn.Flatten()))
    x, y = torch.ones(3, 1, 3, 3, dtype=DTYPE), randn(3, 2, seed=17)
    exact = hvp.GaussNewtonOperator(hvp.functional(module), half_square, weights, x, y).dense()
    inverse = dense(hvp.KFACPreconditioner(module, half_square, weights, x, y, shift=0.3), weights)
    approximate = torch.linalg.inv(inverse) - 0.3 * torch.eye(len(exact), dtype=DTYPE)
    # 4 equal positions: exactly (sum g)(sum g)^T (x) a a^T; KFAC takes positions as independent, 1/4 of it
    torch.testing.assert_close(4 * approximate, exact, rtol=1e-8, atol=1e-10)


def test_kfac_lowers_the_condition_of_a_network() -> None:
    module, weights = set_up(nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)))
    x, y = randn(40, 6, seed=18) * torch.logspace(-1.5, 1.5, 6, dtype=DTYPE), torch.arange(40) % 3
    operator = hvp.GaussNewtonOperator(hvp.functional(module), cross_entropy, weights, x, y)
    inverse = dense(hvp.KFACPreconditioner(module, cross_entropy, weights, x, y, shift=1e-3), weights)
    torch.testing.assert_close(inverse, inverse.T, rtol=1e-9, atol=1e-9)
    damped, root = operator.dense() + 1e-3 * torch.eye(len(inverse), dtype=DTYPE), torch.linalg.cholesky(inverse)
    plain, better = (torch.linalg.eigvalsh(matrix) for matrix in (damped, root.T @ damped @ root))
    assert float(better[-1] / better[0]) < float(plain[-1] / plain[0]) / 5


def test_kfac_gives_other_parameters_the_mean_of_their_diagonal() -> None:
    """A normalization's scale and shift; with one output and one sample the estimate is exact."""
    module, weights = set_up(nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 1)))
    x, y = randn(1, 3, seed=18), randn(1, 1, seed=19)
    exact = hvp.GaussNewtonOperator(hvp.functional(module), half_square, weights, x, y).dense().diagonal()
    means = [part.mean() for part in unflat(exact, list(weights.values()))]
    applied = hvp.KFACPreconditioner(module, half_square, weights, x, y, shift=0.5)(
        [torch.ones_like(weight) for weight in weights.values()]
    )
    for place in (2, 3):
        torch.testing.assert_close(applied[place], torch.full_like(applied[place], 1 / (0.5 + float(means[place]))))


def test_kfac_estimates_a_diagonal_with_signs_of_its_own_for_each_sample_and_output() -> None:
    """Of two equal samples: without signs the estimate would be twice the truth, with the same signs for every output
    twice the truth or nothing."""
    samples, outputs = 2, 400
    module, weights = set_up(nn.Sequential(nn.Linear(1, outputs), nn.PReLU()))
    x, y = randn(1, 1, seed=18).expand(samples, 1), torch.zeros(samples, outputs, dtype=DTYPE)
    z = module[0](x[:1]).detach()
    exact = float(z.clamp_max(0).square().sum())  # the derivative by PReLU's slope is min(z, 0)
    applied = hvp.KFACPreconditioner(module, half_square, weights, x, y, shift=0.5)(
        [torch.ones_like(weight) for weight in weights.values()]
    )
    assert 1 / float(applied[2]) - 0.5 == pytest.approx(exact, rel=0.2)


def test_kfac_leaves_the_module_alone_and_needs_a_layer() -> None:
    module, weights = set_up(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)))
    before = {name: value.clone() for name, value in module.state_dict().items()}
    hvp.KFACPreconditioner(module, half_square, weights, randn(5, 3, seed=1), randn(5, 2, seed=2), shift=1.0)
    assert all(torch.equal(before[name], value) for name, value in module.state_dict().items())
    assert not any(layer._forward_hooks for layer in module.modules())
    module, weights = set_up(nn.Sequential(nn.LayerNorm(3)))
    with pytest.raises(ValueError, match=r"module: expected torch.nn.Linear or Conv2d.*got none"):
        hvp.KFACPreconditioner(module, half_square, weights, randn(5, 3, seed=1), randn(5, 3, seed=2), shift=1.0)


# --- with every solver -----------------------------------------------------------------------------------------------

SOLVERS: dict[str, Callable[[Any], Any]] = {
    "neumann": lambda m: hvp.Neumann(60, preconditioner=m),
    "neumann, accumulated": lambda m: hvp.Neumann(60, form="accumulate", preconditioner=m),
    "conjugate gradient": lambda m: hvp.ConjugateGradient(25, preconditioner=m),
    "chebyshev": lambda m: hvp.Chebyshev(25, preconditioner=m),
    "minres": lambda m: hvp.MINRES(25, preconditioner=m),
}
PROBLEMS: dict[str, tuple[Tensor, Callable[[Any], Any]]] = {
    "decay": (SCALED, lambda operator: hvp.DiagonalPreconditioner(DECAY, shift=1.25)),
    "jacobi": (SCALED, lambda operator: hvp.JacobiPreconditioner(operator, probes=20)),
    "nystrom": (FEW_LARGE, lambda operator: hvp.NystromPreconditioner(operator, rank=12, rho=0.1)),
}


@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.parametrize("solver", SOLVERS)
def test_every_solver_gains_from_every_preconditioner(solver: str, problem: str) -> None:
    matrix, preconditioner = PROBLEMS[problem]
    operator = operator_of(matrix)
    truth = torch.linalg.solve(matrix, B)
    better = relative_error(operator.solve(B, SOLVERS[solver](preconditioner(operator))).value, truth)
    plain = relative_error(operator.solve(B, SOLVERS[solver](None)).value, truth)
    assert better < (0.05 if "neumann" in solver else 5e-3)
    assert better < plain / 10


@pytest.mark.parametrize(
    "error, argument, make",
    [
        (TypeError, "operator", lambda: hvp.JacobiPreconditioner(SCALED)),
        (ValueError, "probes", lambda: hvp.JacobiPreconditioner(operator_of(SCALED), probes=0)),
        (TypeError, "rank", lambda: hvp.NystromPreconditioner(operator_of(SCALED), 1.5, 0.1)),
        (ValueError, "rho", lambda: hvp.NystromPreconditioner(operator_of(SCALED), 2, 0.0)),
        (ValueError, "sketch", lambda: hvp.NystromPreconditioner(operator_of(SCALED), 2, 0.1, "rows")),
        (TypeError, "module", lambda: hvp.KFACPreconditioner(None, half_square, {}, B, B, 1.0)),
        (ValueError, "shift", lambda: hvp.KFACPreconditioner(nn.Linear(1, 1), half_square, {}, B, B, 0.0)),
        (TypeError, "weights", lambda: hvp.KFACPreconditioner(nn.Linear(1, 1), half_square, [B], B, B, 1.0)),
    ],
)
def test_bad_arguments(error: type[Exception], argument: str, make: Callable[[], Any]) -> None:
    with pytest.raises(error, match=f"{argument}: expected.*got"):
        make()
