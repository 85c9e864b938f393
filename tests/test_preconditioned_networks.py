"""KFAC and the other preconditioners on networks: every solver that takes one, against dense solves in float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
from cases import DTYPE, flat, randn, relative_error, unflat
from torch import Tensor, nn

import hvp_engine as hvp

SHIFT = 3e-3


@dataclass(frozen=True)
class Network:
    """A network at random weights on badly scaled inputs, with its Gauss-Newton operator and a right-hand side."""

    module: nn.Module
    x: Tensor
    y: Tensor

    @property
    def weights(self) -> dict[str, Tensor]:
        return {name: parameter.detach() for name, parameter in self.module.named_parameters()}

    @property
    def operator(self) -> hvp.GaussNewtonOperator:
        net = hvp.functional(self.module)
        return hvp.GaussNewtonOperator(net, nn.functional.cross_entropy, self.weights, self.x, self.y)

    @property
    def kfac(self) -> hvp.KFACPreconditioner:
        return hvp.KFACPreconditioner(
            self.module, nn.functional.cross_entropy, self.weights, self.x, self.y, shift=SHIFT
        )

    @property
    def v(self) -> dict[str, Tensor]:
        return {name: randn(*w.shape, seed=60 + place) for place, (name, w) in enumerate(self.weights.items())}


def linear() -> Network:
    """Fully connected layers."""
    module = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    x = randn(40, 6, seed=50) * torch.logspace(-1, 1, 6, dtype=DTYPE)
    return Network(initialized(module), x, torch.arange(40) % 3)


def convolutional() -> Network:
    """Two convolutions and a linear layer."""
    module = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1),
        nn.Tanh(),
        nn.Conv2d(4, 3, 2, stride=2),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(12, 3),
    )
    x = randn(30, 2, 4, 4, seed=51) * torch.tensor([0.2, 4.0], dtype=DTYPE).view(2, 1, 1)
    return Network(initialized(module), x, torch.arange(30) % 3)


def initialized(module: nn.Module) -> nn.Module:
    module = module.double()
    with torch.no_grad():
        for number, parameter in enumerate(module.parameters()):
            parameter.copy_(randn(*parameter.shape, seed=52 + number) * 0.5)
    return module


NETWORKS = {"linear": linear, "convolutional": convolutional}
network_of: Callable[[str], Network] = cache(lambda name: NETWORKS[name]())


@cache
def truth_of(name: str) -> tuple[Tensor, Tensor]:
    """The damped operator as a matrix, and the solution by LU."""
    network = network_of(name)
    matrix = network.operator.dense()
    damped = matrix + SHIFT * torch.eye(len(matrix), dtype=DTYPE)
    return damped, torch.linalg.solve(damped, flat(list(network.v.values())))


SOLVERS: dict[str, Callable[[int, Any], Any]] = {
    "neumann": lambda k, m: hvp.Neumann(k, damping=SHIFT, preconditioner=m),
    "neumann, accumulated": lambda k, m: hvp.Neumann(k, form="accumulate", damping=SHIFT, preconditioner=m),
    "conjugate gradient": lambda k, m: hvp.ConjugateGradient(k, tol=0.0, damping=SHIFT, preconditioner=m),
    "chebyshev": lambda k, m: hvp.Chebyshev(k, damping=SHIFT, preconditioner=m),
    "heavy ball": lambda k, m: hvp.Chebyshev(k, form="heavy_ball", damping=SHIFT, preconditioner=m),
    "minres": lambda k, m: hvp.MINRES(k, tol=0.0, damping=SHIFT, preconditioner=m),
}


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("name", NETWORKS)
def test_kfac_brings_every_solver_closer_to_the_dense_solve(name: str, solver: str) -> None:
    network = network_of(name)
    _, truth = truth_of(name)
    errors = {}
    for which, preconditioner in (("plain", None), ("kfac", network.kfac)):
        solution = network.operator.solve(network.v, SOLVERS[solver](12, preconditioner))
        errors[which] = relative_error(flat(list(solution.value.values())), truth)
        assert solution.status is not hvp.Status.DIVERGED
    assert errors["kfac"] < 0.6 * errors["plain"]


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("name", NETWORKS)
def test_with_terms_enough_it_is_the_dense_solve(name: str, solver: str) -> None:
    network = network_of(name)
    _, truth = truth_of(name)
    terms = {"neumann": 1500, "neumann, accumulated": 1500, "chebyshev": 200, "heavy ball": 1000}.get(solver, 120)
    solution = network.operator.solve(network.v, SOLVERS[solver](terms, network.kfac))
    tolerance = {"conjugate gradient": 1e-9, "minres": 1e-9, "chebyshev": 1e-6}.get(solver, 1e-3)
    assert relative_error(flat(list(solution.value.values())), truth) < tolerance


@pytest.mark.parametrize("name", NETWORKS)
def test_condition_falls_and_products_are_reported(name: str) -> None:
    network = network_of(name)
    damped, _ = truth_of(name)
    like = list(network.weights.values())
    kfac = network.kfac
    inverse = torch.stack([flat(list(kfac(unflat(unit, like)))) for unit in torch.eye(len(damped), dtype=DTYPE)])
    torch.testing.assert_close(inverse, inverse.T, rtol=1e-8, atol=1e-8)
    root = torch.linalg.cholesky((inverse + inverse.T) / 2)
    plain, better = (torch.linalg.eigvalsh(matrix) for matrix in (damped, root.T @ damped @ root))
    assert float(better[-1] / better[0]) < float(plain[-1] / plain[0]) / 4
    assert (kfac.hvps, kfac.gradients) == (0, 3)  # one backward pass for each of three outputs
    assert (hvp.JacobiPreconditioner(network.operator, probes=7).hvps) == 7
    assert (hvp.NystromPreconditioner(network.operator, rank=9, rho=SHIFT).hvps) == 9
