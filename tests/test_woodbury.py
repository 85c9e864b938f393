"""The Woodbury preconditioner against dense inverses of the Gauss-Newton matrix, and what it saves."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from problems_with_known_answers import DTYPE, flat, randn, relative_error, unflat
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss

import hvp_engine as hvp

Weights = dict[str, Tensor]


class OverPositions(nn.Module):
    """Linear layers on sequences, then the mean over positions."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x))).mean(1)


MODULES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(4, 3), (6, 4)),
    "mlp": (lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3, bias=False)), (6, 4)),
    "conv": (
        lambda: nn.Sequential(
            nn.Conv2d(2, 3, 3, padding=1, stride=2), nn.Tanh(), nn.Conv2d(3, 2, 2), nn.Flatten(), nn.Linear(2, 3)
        ),
        (5, 2, 4, 4),
    ),
    "positions": (OverPositions, (5, 7, 3)),
}
LOSSES = {"softmax": cross_entropy, "squared": mse_loss}


def problem(name: str, loss: str) -> tuple[nn.Module, Weights, Tensor, Tensor]:
    make, shape = MODULES[name]
    torch.manual_seed(0)
    module = make().double()
    weights = {key: weight.detach() for key, weight in module.named_parameters()}
    x = randn(*shape, seed=1)
    outputs = module(x)
    targets = randn(*outputs.shape, seed=2) if loss == "squared" else torch.arange(len(x)) % outputs.shape[1]
    return module, weights, x, targets


def gauss_newton(module: nn.Module, loss: Any, weights: Weights, x: Tensor, y: Tensor) -> Tensor:
    return hvp.GaussNewtonOperator(hvp.functional(module), loss, weights, x, y).dense()


def as_matrix(preconditioner: Callable, weights: Weights) -> Tensor:
    like = list(weights.values())
    identity = torch.eye(sum(w.numel() for w in like), dtype=DTYPE)
    return torch.stack([flat(preconditioner(unflat(unit, like))) for unit in identity], 1)


@pytest.mark.parametrize("kind", ["number", "a number for each tensor", "for each output", "for each weight"])
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("name", MODULES)
def test_it_is_the_inverse_of_the_gauss_newton_matrix(name: str, loss: str, kind: str) -> None:
    module, weights, x, y = problem(name, loss)
    diagonals: dict[str, Any] = {
        "number": 0.3,
        "a number for each tensor": {key: torch.tensor(0.1 + index, dtype=DTYPE) for index, key in enumerate(weights)},
        "for each output": {
            key: randn(len(w), *[1] * (w.dim() - 1), seed=index).abs() + 0.1
            for index, (key, w) in enumerate(weights.items())
        },
        "for each weight": {key: randn(*w.shape, seed=index).exp() for index, (key, w) in enumerate(weights.items())},
    }
    diagonal = diagonals[kind]
    made = hvp.WoodburyPreconditioner(module, LOSSES[loss], weights, x, y, diagonal)
    entries = [torch.as_tensor(diagonal if kind == "number" else diagonal[key], dtype=DTYPE) for key in weights]
    spread = flat([entry.expand(w.shape) for entry, w in zip(entries, weights.values(), strict=True)])
    matrix = gauss_newton(module, LOSSES[loss], weights, x, y) + torch.diag(spread)
    found = as_matrix(made, weights)
    assert relative_error(found, torch.linalg.inv(matrix)) < 1e-10
    assert relative_error(found, found.T) < 1e-12 and float(torch.linalg.eigvalsh((found + found.T) / 2)[0]) > 0
    assert (made.hvps, made.gradients) == (0, module(x).shape[1])


def test_some_of_the_weights_and_layers_that_it_does_not_know() -> None:
    """Weights outside of `weights` do not count; those of layers that it does not know get 1 / diagonal."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5), nn.Linear(5, 3)).double()
    x, y = randn(6, 4, seed=1), torch.arange(6) % 3
    weights = {key: w.detach() for key, w in module.named_parameters() if key != "2.bias"}
    made = hvp.WoodburyPreconditioner(module, cross_entropy, weights, x, y, 0.5)
    known = [key for key in weights if not key.startswith("1.")]
    part = gauss_newton(module, cross_entropy, {key: weights[key] for key in known}, x, y)
    inverse = torch.linalg.inv(part + 0.5 * torch.eye(len(part), dtype=DTYPE))
    vs = {key: randn(*w.shape, seed=3) for key, w in weights.items()}
    found = dict(zip(weights, made(list(vs.values())), strict=True))
    truth = unflat(inverse @ flat([vs[key] for key in known]), [vs[key] for key in known])
    torch.testing.assert_close([found[key] for key in known], truth, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(found["1.weight"], vs["1.weight"] / 0.5)


def test_single_precision_and_16_bit_vectors() -> None:
    module, weights, x, y = problem("mlp", "softmax")
    exact = hvp.WoodburyPreconditioner(module, cross_entropy, weights, x, y, 1e-3)
    low = {key: w.float() for key, w in weights.items()}
    made = hvp.WoodburyPreconditioner(module.float(), cross_entropy, low, x.float(), y, 1e-3)
    v = [randn(*w.shape, seed=5) for w in weights.values()]
    assert relative_error(flat(made([part.float() for part in v])).double(), flat(exact(v))) < 1e-3
    with pytest.raises(ValueError, match="expected shape"):
        made([part[:1].float() for part in v])


# --- what it saves, and what it is not -------------------------------------------------------------------------------


def trained(act: type[nn.Module]) -> tuple[nn.Module, Weights, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(60, 12, generator=generator, dtype=DTYPE)
    y = (x[:, :3] + 0.3 * torch.randn(60, 3, generator=generator, dtype=DTYPE)).argmax(1)
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(12, 16), act(), nn.Linear(16, 3)).double()
    optimizer = torch.optim.Adam(module.parameters(), lr=1e-2)
    for _ in range(300):
        optimizer.zero_grad()
        loss = cross_entropy(module(x), y) + 1e-3 * sum(w.square().sum() for w in module.parameters()) / 2
        loss.backward()
        optimizer.step()
    return module, {key: w.detach() for key, w in module.named_parameters()}, x, y


@pytest.mark.parametrize("act", [nn.ReLU, nn.Tanh])
def test_conjugate_gradients_need_far_fewer_products_with_it(act: type[nn.Module]) -> None:
    module, weights, x, y = trained(act)
    net = hvp.functional(module)

    def loss(w: Weights) -> Tensor:
        return cross_entropy(net(w, x), y) + 1e-3 * sum(part.square().sum() for part in w.values()) / 2

    operator = hvp.HessianOperator(loss, weights, engine="linearized")
    v, damping = {key: randn(*w.shape, seed=6) for key, w in weights.items()}, 0.05
    made = hvp.WoodburyPreconditioner(module, cross_entropy, weights, x, y, 1e-3 + damping)
    counts = []
    for preconditioner in (made, None):
        tries = (
            operator.solve(v, hvp.ConjugateGradient(n, tol=1e-4, damping=damping, preconditioner=preconditioner))
            for n in range(1, 200)
        )
        counts.append(next(one.iterations for one in tries if one.converged))
    assert 2 * counts[0] <= counts[1]


def test_it_is_no_inverse_of_a_network_that_is_not_linear() -> None:
    module, weights, x, y = trained(nn.Tanh)
    net = hvp.functional(module)
    operator = hvp.HessianOperator(lambda w: cross_entropy(net(w, x), y), weights, engine="linearized")
    v, damping = [randn(*w.shape, seed=7) for w in weights.values()], 0.05
    matrix = operator.dense() + damping * torch.eye(operator.shape[0], dtype=DTYPE)
    truth = torch.linalg.solve(matrix, flat(v))
    alone = hvp.WoodburyPreconditioner(module, cross_entropy, weights, x, y, damping)(v)
    krylov = operator.solve(dict(zip(weights, v, strict=True)), hvp.ConjugateGradient(20, tol=0.0, damping=damping))
    assert relative_error(flat(alone), truth) > 10 * relative_error(flat(list(krylov.value.values())), truth)


# --- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error, match, changes",
    [
        (TypeError, "module: expected a torch.nn.Module", {"module": None}),
        (TypeError, "weights: expected a dict", {"weights": [torch.ones(3, 4)]}),
        (ValueError, "module: expected torch.nn.Linear or Conv2d", {"module": nn.LayerNorm(4).double()}),
        (ValueError, "inputs: expected at most max_size=5 .*got 18", {"max_size": 5}),
        (ValueError, "diagonal: expected finite values > 0; got 0 for 'weight'", {"diagonal": 0.0}),
        (ValueError, "diagonal: expected finite values > 0; got nan", {"diagonal": math.nan}),
        (ValueError, "diagonal: expected 2 leaves", {"diagonal": [torch.ones(())]}),
        (
            ValueError,
            r"diagonal: expected a shape that broadcasts to \(3, 4\)",
            {"diagonal": [torch.ones(2, 3, 4)] * 2},
        ),
        (hvp.NonFiniteError, "inputs: expected finite", {"inputs": torch.full((6, 4), math.nan, dtype=DTYPE)}),
    ],
)
def test_bad_arguments(error: type[Exception], match: str, changes: dict[str, Any]) -> None:
    module, weights, x, y = problem("linear", "softmax")
    if isinstance(changes.get("module"), nn.Module):
        weights = dict(changes["module"].named_parameters())
    arguments: dict[str, Any] = {
        "module": module, "loss": cross_entropy, "weights": weights, "inputs": x, "targets": y, "diagonal": 0.1,
    }  # fmt: skip
    with pytest.raises(error, match=match):
        hvp.WoodburyPreconditioner(**(arguments | changes))
