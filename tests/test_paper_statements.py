"""What the paper proves and says about hypergradients, beside its theorems: Lemma 1, sections 4.1 and 4.3."""

from __future__ import annotations

import pytest
import torch
from hypergradient_calling_styles import STYLES
from problems_with_known_answers import BILEVEL, DTYPE, Bilevel, randn, relative_error
from torch import Tensor
from torch.autograd.functional import hessian, jacobian

import hvp_engine as hvp


def gradient(problem: Bilevel, w: Tensor, h: Tensor) -> Tensor:
    return torch.autograd.grad(problem.train_loss(w, h, None), w, create_graph=True)[0]


def descend(problem: Bilevel, w: Tensor, h: Tensor, steps: int) -> Tensor:
    for _ in range(steps):
        w = w - problem.alpha * gradient(problem, w, h)
    return w


def test_lemma_1_the_recurrence_of_sgd_settles_where_the_gradient_is_zero(problem: Bilevel) -> None:
    start = problem.weights + 0.3 * randn(*problem.weights.shape, seed=71)
    settled = start
    for _ in range(3000):
        settled = descend(problem, settled.detach().requires_grad_(), problem.hyper, 1).detach()
    torch.testing.assert_close(settled, problem.weights, rtol=1e-9, atol=1e-10)
    assert relative_error(start, problem.weights) > 0.05


@pytest.mark.parametrize("steps", [1, 4, 9])
def test_lemma_1_at_the_fixed_point_the_response_is_the_truncated_series(steps: int, problem: Bilevel) -> None:
    """dw_i/dlambda = -alpha sum over j < i of (I - alpha H)^j d2L_T/dw dlambda, for i steps from the fixed point."""

    def response(h: Tensor) -> Tensor:
        return descend(problem, problem.weights.clone().requires_grad_(), h, steps)

    (curvature, mixed), _ = hessian(lambda w, h: problem.train_loss(w, h, None), (problem.weights, problem.hyper))
    contraction = torch.eye(len(curvature), dtype=DTYPE) - problem.alpha * curvature
    series = sum(torch.linalg.matrix_power(contraction, j) for j in range(steps))
    expected = -problem.alpha * series @ mixed
    torch.testing.assert_close(jacobian(response, problem.hyper), expected, rtol=1e-10, atol=1e-12)
    assert relative_error(expected, -torch.linalg.solve(curvature, mixed)) > 1e-3, "so few steps do not suffice"


@pytest.mark.parametrize("style", ["tape", "functional", "best_response"])
def test_section_4_1_without_the_response_a_pure_response_problem_has_no_gradient(style: str) -> None:
    """Where lambda is in the training loss alone, the direct gradient is exactly zero: all of it is indirect."""
    ridge = BILEVEL["ridge"]()

    def val_loss(w: Tensor, h: Tensor, batch: object) -> Tensor:
        return ridge.val_loss(w, torch.zeros_like(h), batch)

    def zero_weights(h: Tensor) -> Tensor:
        return val_loss(ridge.weights, h, None)

    assert torch.equal(jacobian(zero_weights, ridge.hyper), torch.zeros_like(ridge.hyper))
    pure = Bilevel(**{**vars(ridge), "val_loss": val_loss})
    w = ridge.weights.clone().requires_grad_()
    (v,) = torch.autograd.grad(val_loss(w, ridge.hyper, None), w)
    (curvature, mixed), _ = hessian(lambda w, h: ridge.train_loss(w, h, None), (ridge.weights, ridge.hyper))
    found = STYLES[style](pure, hvp.Neumann(600, alpha=ridge.alpha))
    torch.testing.assert_close(found, -mixed.T @ torch.linalg.solve(curvature, v), rtol=1e-9, atol=1e-11)
    assert found.norm() > 1e-3


def test_section_4_3_a_learning_rate_does_not_change_the_loss_surface() -> None:
    """It moves the weights on the surface only: refused, with the reason, unless the losses have it."""
    learning_rate = torch.tensor(0.1, requires_grad=True)
    weights = randn(3, seed=72).requires_grad_()

    def train_loss(w: Tensor, h: Tensor, batch: object) -> Tensor:
        return (w - 1).square().sum()

    with pytest.raises(hvp.GraphError, match="learning rate, does not change the loss surface"):
        hvp.Hypergradient(train_loss, train_loss, hvp.Neumann(2))(weights, learning_rate, None, None)
    tuner = hvp.Tuner(
        weights,
        learning_rate,
        train_loss,
        train_loss,
        weight_optimizer=lambda tensors: torch.optim.SGD(tensors, lr=learning_rate.item()),
        hyper_optimizer=lambda tensors: torch.optim.SGD(tensors, lr=0.1),
    )
    with pytest.raises(hvp.GraphError, match="learning rate, does not change the loss surface"):
        tuner.fit([None], [None], 1, progress=False)
