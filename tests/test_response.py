"""Rows of the best response's Jacobian against closed forms, finite differences of w*, and hypergradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from problems_with_known_answers import BILEVEL, DTYPE, quadratic_bilevel, randn, relative_error, ridge_bilevel
from torch import Tensor

import hvp_engine as hvp

SOLVERS: dict[str, Any] = {
    "default": None,
    "exact": hvp.Exact(),
    "chebyshev": hvp.Chebyshev(120),
    "neumann": hvp.Neumann(300),
    "budget": hvp.Budget(error=1e-9),
}


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("engine", ["auto", "eager", "linearized"])
def test_ridge_with_a_decay_for_each_weight(engine: str, solver: str) -> None:
    """dw*/dh = -H^-1 diag(e^h w*), and its rows for a stack of predictions X."""
    case = ridge_bilevel()
    w, x = case.minimum(case.hyper), randn(9, 6, seed=1)
    found = hvp.response_jacobian(case.train_loss, w, case.hyper, None, x, SOLVERS[solver], engine=engine)
    truth = -x @ torch.linalg.solve(case.hessian, torch.diag(torch.exp(case.hyper) * w))
    assert relative_error(found.rows, truth) < 1e-6
    assert found.solution.value is None
    assert found.solution.hvps == 6 if solver == "exact" else found.solution.hvps >= 6


@pytest.mark.parametrize("name", BILEVEL)
def test_all_rows_are_the_derivative_of_training_anew(name: str) -> None:
    case = BILEVEL[name]()
    w, h, step = case.minimum(case.hyper), case.hyper, 1e-5
    found = hvp.response_jacobian(case.train_loss, w, h, None, torch.eye(len(w), dtype=DTYPE)).rows
    columns = [(case.minimum(h + step * e) - case.minimum(h - step * e)) / (2 * step) for e in torch.eye(len(h)).to(h)]
    assert relative_error(found, torch.stack(columns, 1)) < 1e-6


def test_hypergradients_of_several_validation_losses() -> None:
    case = ridge_bilevel()
    w, x, y = case.minimum(case.hyper), randn(3, 5, 6, seed=2), randn(3, 5, seed=3)

    def loss(w: Tensor, part: int) -> Tensor:
        return (x[part] @ w - y[part]).square().mean()

    gradients = torch.stack([torch.func.grad(loss)(w, part) for part in range(3)])
    rows = hvp.response_jacobian(case.train_loss, w, case.hyper, None, gradients).rows
    for part, row in enumerate(rows):
        one = hvp.Hypergradient(case.train_loss, lambda w, h, p: loss(w, p), hvp.ConjugateGradient(100))
        assert relative_error(row, one(w, case.hyper, None, part).grads) < 1e-8


def test_containers_and_what_does_not_reach_the_weights() -> None:
    """Trees of weights and of hyperparameters; one that the training loss ignores has rows of zeros."""

    def train(w: dict[str, Tensor], h: dict[str, Tensor], batch: Tensor) -> Tensor:
        a, b = w["a"], w["b"]
        return ((a - batch).square().sum() * h["scale"].exp() + (b - h["b"]).square().sum() + a.sum() * b) / 2

    h = {"scale": torch.tensor(0.3, dtype=DTYPE), "b": torch.tensor(0.5, dtype=DTYPE), "unused": randn(2, 3, seed=4)}
    w = {"a": randn(2, seed=5), "b": torch.tensor(1.5, dtype=DTYPE)}
    batch, before = randn(2, seed=6), {name: value.clone() for name, value in w.items()}
    cotangents = {"a": randn(4, 2, seed=7), "b": randn(4, seed=8)}
    rows = hvp.response_jacobian(train, w, h, batch, cotangents).rows
    assert {name: tuple(row.shape) for name, row in rows.items()} == {"scale": (4,), "b": (4,), "unused": (4, 2, 3)}
    assert not rows["unused"].any()
    e = float(h["scale"].exp())
    hessian = torch.tensor([[e, 0.0, 0.5], [0.0, e, 0.5], [0.5, 0.5, 1.0]], dtype=DTYPE)
    mixed = torch.zeros(3, 2, dtype=DTYPE)  # of (a, b) by (scale, b)
    mixed[:2, 0], mixed[2, 1] = e * (w["a"] - batch), -1.0
    truth = -torch.cat([cotangents["a"], cotangents["b"][:, None]], 1) @ torch.linalg.solve(hessian, mixed)
    torch.testing.assert_close(torch.stack([rows["scale"], rows["b"]], 1), truth)
    assert all(torch.equal(before[name], value) and not value.requires_grad for name, value in w.items())


@pytest.mark.parametrize(
    "error, match, changes",
    [
        (TypeError, "train_loss: expected a function", {"train_loss": torch.ones(())}),
        (ValueError, "cotangents: expected leaves with a first dimension", {"cotangents": torch.ones(())}),
        (ValueError, r"cotangents\[0\]\[0\]: expected shape \(5,\)", {"cotangents": torch.ones(2, 4, dtype=DTYPE)}),
        (TypeError, "solver: expected a solver", {"solver": hvp.Neumann}),
        (hvp.NonFiniteError, r"cotangents\[1\]", {"cotangents": torch.tensor([[1.0] * 5, [torch.nan] * 5])}),
        (hvp.GraphError, "hyper: expected at least one", {"train_loss": lambda w, h, batch: w.square().sum()}),
    ],
)
def test_bad_arguments(error: type[Exception], match: str, changes: dict[str, Any]) -> None:
    case = quadratic_bilevel()
    arguments: dict[str, Any] = {
        "train_loss": case.train_loss,
        "weights": case.minimum(case.hyper),
        "hyper": case.hyper,
        "train_batch": None,
        "cotangents": torch.ones(2, 5, dtype=DTYPE),
    }
    call: Callable = hvp.response_jacobian
    with pytest.raises(error, match=match):
        call(**(arguments | changes))
