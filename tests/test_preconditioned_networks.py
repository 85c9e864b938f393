"""KFAC and the other preconditioners on networks: every solver that takes one, against dense solves in float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import pytest
import torch
from problems_with_known_answers import DTYPE, flat, randn, relative_error, unflat
from torch import Tensor, nn

import hvp_engine as hvp
from hvp_engine.solvers.spectrum import Spectrum

SCALED, MILD = (2.0, 1e-3), (1.0, 0.1)
"""Decades that the inputs' scales are spread over, and the damping."""


@dataclass(frozen=True)
class Network:
    """A network with badly scaled inputs, its Gauss-Newton operator, KFAC, a right-hand side and the dense solution."""

    module: nn.Module
    x: Tensor
    y: Tensor
    damping: float

    @cached_property
    def weights(self) -> dict[str, Tensor]:
        return {name: parameter.detach() for name, parameter in self.module.named_parameters()}

    @cached_property
    def operator(self) -> hvp.GaussNewtonOperator:
        net = hvp.functional(self.module)
        return hvp.GaussNewtonOperator(net, nn.functional.cross_entropy, self.weights, self.x, self.y)

    @cached_property
    def kfac(self) -> hvp.KFACPreconditioner:
        loss = nn.functional.cross_entropy
        return hvp.KFACPreconditioner(self.module, loss, self.weights, self.x, self.y, shift=self.damping)

    @cached_property
    def v(self) -> dict[str, Tensor]:
        return {name: randn(*w.shape, seed=60 + place) for place, (name, w) in enumerate(self.weights.items())}

    @cached_property
    def damped(self) -> Tensor:
        matrix = self.operator.dense()
        return matrix + self.damping * torch.eye(len(matrix), dtype=DTYPE)

    @cached_property
    def truth(self) -> Tensor:
        """By a dense solve in float64."""
        return torch.linalg.solve(self.damped, flat(list(self.v.values())))

    @cached_property
    def inverse(self) -> Tensor:
        """KFAC as a matrix."""
        like, units = list(self.weights.values()), torch.eye(len(self.damped), dtype=DTYPE)
        return torch.stack([flat(list(self.kfac(unflat(unit, like)))) for unit in units])

    @property
    def extremes(self) -> tuple[float, float]:
        """The smallest and the largest eigenvalue of M (A + damping I)."""
        root = torch.linalg.cholesky((self.inverse + self.inverse.T) / 2)
        values = torch.linalg.eigvalsh(root.T @ self.damped @ root)
        return float(values[0]), float(values[-1])

    def error(self, solver: Any) -> float:
        self.operator.spectrum = Spectrum()
        solution = self.operator.solve(self.v, solver)
        return relative_error(flat(list(solution.value.values())), self.truth)


def linear(spread: float, damping: float) -> Network:
    """Fully connected layers."""
    module = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    x = randn(40, 6, seed=50) * torch.logspace(-spread, spread, 6, dtype=DTYPE)
    return Network(initialized(module), x, torch.arange(40) % 3, damping)


def convolutional(spread: float, damping: float) -> Network:
    """Two convolutions and a linear layer."""
    module = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), nn.Tanh(), nn.Conv2d(4, 3, 2, stride=2), nn.Tanh(), nn.Flatten(),
        nn.Linear(12, 3),
    )  # fmt: skip
    x = randn(30, 2, 4, 4, seed=51) * torch.tensor([10**-spread, 10**spread], dtype=DTYPE).view(2, 1, 1)
    return Network(initialized(module), x, torch.arange(30) % 3, damping)


def initialized(module: nn.Module) -> nn.Module:
    module = module.double()
    with torch.no_grad():
        for number, parameter in enumerate(module.parameters()):
            inputs = parameter[0].numel() if parameter.dim() > 1 else 4
            parameter.copy_(randn(*parameter.shape, seed=52 + number) / (2 * inputs**0.5))
    return module


MAKE = {"linear": linear, "convolutional": convolutional}
NETWORKS = pytest.mark.parametrize("name", MAKE)


@cache
def network_of(name: str, setting: tuple[float, float]) -> Network:
    return MAKE[name](*setting)


SOLVERS: dict[str, Callable[[int, float, Any], Any]] = {
    "neumann": lambda k, d, m: hvp.Neumann(k, damping=d, preconditioner=m),
    "neumann, accumulated": lambda k, d, m: hvp.Neumann(k, form="accumulate", damping=d, preconditioner=m),
    "conjugate gradient": lambda k, d, m: hvp.ConjugateGradient(k, tol=0.0, damping=d, preconditioner=m),
    "chebyshev": lambda k, d, m: hvp.Chebyshev(k, damping=d, preconditioner=m),
    "heavy ball": lambda k, d, m: hvp.Chebyshev(k, form="heavy_ball", damping=d, preconditioner=m),
    "minres": lambda k, d, m: hvp.MINRES(k, tol=0.0, damping=d, preconditioner=m),
}


@pytest.mark.parametrize("solver", SOLVERS)
@NETWORKS
def test_kfac_brings_few_terms_closer_to_the_dense_solve(name: str, solver: str) -> None:
    network = network_of(name, SCALED)
    plain = network.error(SOLVERS[solver](12, network.damping, None))
    better = network.error(SOLVERS[solver](12, network.damping, network.kfac))
    assert better < 0.85 * plain


def converging(name: str, network: Network) -> tuple[Any, float]:
    """A solver with settings by the eigenvalues of M (A + damping I), and how close it has to come."""
    low, high = network.extremes
    m, d = network.kfac, network.damping
    return {
        "neumann": (hvp.Neumann(500, alpha=2 / (low + high), damping=d, preconditioner=m), 1e-5),
        "chebyshev": (hvp.Chebyshev(120, bounds=(low, high), damping=d, preconditioner=m), 1e-7),
        "heavy ball": (hvp.Chebyshev(1000, (low, high), form="heavy_ball", damping=d, preconditioner=m), 1e-2),
        "conjugate gradient": (hvp.ConjugateGradient(200, tol=0.0, damping=d, preconditioner=m), 1e-9),
        "minres": (hvp.MINRES(200, tol=0.0, damping=d, preconditioner=m), 1e-9),
    }[name]


@pytest.mark.parametrize("solver", ["neumann", "chebyshev", "heavy ball", "conjugate gradient", "minres"])
@NETWORKS
def test_with_terms_enough_it_is_the_dense_solve(name: str, solver: str) -> None:
    network = network_of(name, MILD)
    chosen, tolerance = converging(solver, network)
    assert network.error(chosen) < tolerance


@NETWORKS
def test_it_is_a_metric_and_says_what_it_was_made_from(name: str) -> None:
    network = network_of(name, SCALED)
    torch.testing.assert_close(network.inverse, network.inverse.T, rtol=1e-8, atol=1e-8)
    assert float(torch.linalg.eigvalsh(network.inverse)[0]) > 0
    assert (network.kfac.hvps, network.kfac.gradients) == (0, 3)  # a backward pass for each of three outputs
    assert hvp.JacobiPreconditioner(network.operator, probes=7).hvps == 7
    assert hvp.NystromPreconditioner(network.operator, rank=9, rho=0.1).hvps == 9
