"""Hypergradients in all styles against closed forms, gradcheck with a re-solved inner problem, and unrolling."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypergradient_calling_styles import STYLES, functional_style, tape_style
from problems_with_known_answers import BILEVEL, Bilevel, randn, relative_error, truncated_sum
from torch import Tensor
from torch.autograd.gradcheck import GradcheckError

import hvp_engine as hvp


def test_both_terms_of_the_problems_matter(problem: Bilevel) -> None:
    """Else a wrong sign, or a term left out, could pass below."""
    truth = problem.hypergradient
    for wrong in (problem.direct, problem.indirect, problem.direct - problem.indirect):
        assert relative_error(wrong, truth) > 0.1


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("alpha", ["fixed", "auto"])
def test_hypergradient_is_the_closed_form(style: str, alpha: str, problem: Bilevel) -> None:
    solver = hvp.Neumann(600, alpha=problem.alpha if alpha == "fixed" else "auto")
    grad = STYLES[style](problem, solver)
    torch.testing.assert_close(grad, problem.hypergradient, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("iterations", [0, 1, 2, 5])
def test_truncated_hypergradient(style: str, iterations: int) -> None:
    """direct + B^T alpha sum_j (I - alpha A)^j v: the truncation is exactly the solver's."""
    problem = BILEVEL["quadratic"]()
    w, h = problem.weights.clone().requires_grad_(), problem.hyper.clone().requires_grad_()
    v, direct = torch.autograd.grad(problem.val_loss(w, h, None), [w, h])
    mixed = torch.autograd.functional.jacobian(
        lambda h: torch.autograd.grad(problem.train_loss(w, h, None), w, create_graph=True)[0], problem.hyper
    )
    expected = direct - mixed.T @ truncated_sum(problem.hessian, v, iterations, 0.3, 0.2)
    solver = hvp.Neumann(iterations, alpha=0.3, damping=0.2)
    torch.testing.assert_close(STYLES[style](problem, solver), expected, rtol=1e-12, atol=1e-13)
    if iterations == 0:
        assert relative_error(expected, problem.hypergradient) > 0.05, "too few terms do not suffice"


@pytest.mark.parametrize("style", ["tape", "functional", "best_response"])
def test_identity_leaves_the_inverse_out(style: str) -> None:
    """T1-T2: direct + B^T v, exact for A = I only."""
    problem = BILEVEL["quadratic"]()
    w, h = problem.weights.clone().requires_grad_(), problem.hyper.clone().requires_grad_()
    v, direct = torch.autograd.grad(problem.val_loss(w, h, None), [w, h])
    mixed = torch.autograd.functional.jacobian(
        lambda h: torch.autograd.grad(problem.train_loss(w, h, None), w, create_graph=True)[0], problem.hyper
    )
    grad = STYLES[style](problem, hvp.Identity())
    torch.testing.assert_close(grad, direct - mixed.T @ v, rtol=1e-12, atol=1e-13)


def test_gauss_newton_inverse_of_a_linear_model() -> None:
    """Larsen et al.: for a linear model J^T J / n + decay, the Gauss-Newton matrix, is the Hessian."""
    problem = BILEVEL["ridge"]()
    w, h = problem.weights.clone().requires_grad_(), problem.hyper.clone().requires_grad_()
    v, direct = torch.autograd.grad(problem.val_loss(w, h, None), [w, h])
    jacobian = randn(30, 6, seed=16)  # of the ridge problem's predictions, its data matrix

    def gauss_newton(t: Tensor) -> Tensor:
        return jacobian.T @ (jacobian @ t) / 30 + torch.exp(problem.hyper) * t

    p = hvp.solve(gauss_newton, v, hvp.Neumann(600)).value
    f = torch.autograd.grad(problem.train_loss(w, h, None), w, create_graph=True)
    (mixed,) = torch.autograd.grad(f, h, (p,))
    torch.testing.assert_close(direct - mixed, problem.hypergradient, rtol=1e-9, atol=1e-11)


# gradcheck: the inner problem is solved again for every perturbed input. It also makes a backward pass twice, of which
# the second may be the first to run a program: the two differ by rounding.
AGAIN = {"eps": 1e-5, "atol": 1e-7, "rtol": 1e-6, "nondet_tol": 1e-11}


def test_gradcheck_of_the_implicit_function(problem: Bilevel) -> None:
    """The whole Jacobian dw*/dh."""

    def minimum(h: Tensor) -> Tensor:
        w = problem.minimum(h.detach()).requires_grad_()
        (response,) = hvp.best_response(problem.train_loss(w, h, None), w, h, hvp.Neumann(300, alpha=problem.alpha))
        return response

    assert torch.autograd.gradcheck(minimum, problem.hyper.clone().requires_grad_(), **AGAIN)


def test_gradcheck_of_the_validation_loss(problem: Bilevel) -> None:
    """Both terms of the hypergradient."""

    def objective(h: Tensor) -> Tensor:
        w = problem.minimum(h.detach()).requires_grad_()
        (response,) = hvp.best_response(problem.train_loss(w, h, None), w, h, hvp.Neumann(300, alpha=problem.alpha))
        return problem.val_loss(response, h, None)

    assert torch.autograd.gradcheck(objective, problem.hyper.clone().requires_grad_(), **AGAIN)


def test_gradcheck_rejects_too_few_terms() -> None:
    problem = BILEVEL["quadratic"]()

    def minimum(h: Tensor) -> Tensor:
        w = problem.minimum(h.detach()).requires_grad_()
        return hvp.best_response(problem.train_loss(w, h, None), w, h, hvp.Neumann(3, alpha=problem.alpha))[0]

    with pytest.raises(GradcheckError):
        torch.autograd.gradcheck(minimum, problem.hyper.clone().requires_grad_(), **AGAIN)


# The theorem: unrolling


def unrolled(problem: Bilevel, steps: int, alpha: float) -> Tensor:
    """Gradient through `steps` steps of gradient descent that begin at w*."""
    h = problem.hyper.clone().requires_grad_()
    w = problem.weights.clone().requires_grad_()
    for _ in range(steps):
        (gradient,) = torch.autograd.grad(problem.train_loss(w, h, None), w, create_graph=True)
        w = w - alpha * gradient
    return torch.autograd.grad(problem.val_loss(w, h, None), h)[0]


@pytest.mark.parametrize("steps", [1, 2, 3, 6, 20])
def test_unrolling_from_the_minimum_is_one_product_less(steps: int, problem: Bilevel) -> None:
    alpha = 0.7 * problem.alpha
    grad = functional_style(problem, hvp.Neumann(steps - 1, alpha=alpha))
    torch.testing.assert_close(grad, unrolled(problem, steps, alpha), rtol=1e-11, atol=1e-13)
    if steps < 6:
        off_by_one = functional_style(problem, hvp.Neumann(steps, alpha=alpha))
        assert relative_error(off_by_one, grad) > 1e-5


# First derivatives only


def test_hypergradient_refuses_create_graph() -> None:
    problem = BILEVEL["ridge"]()
    w, h = problem.weights.requires_grad_(), problem.hyper.clone().requires_grad_()
    with pytest.raises(hvp.SecondDerivativeError, match="hypergradient gives first derivatives only; create_graph"):
        hvp.hypergradient(problem.train_loss(w, h, None), problem.val_loss(w, h, None), w, h, create_graph=True)


def test_best_response_refuses_create_graph() -> None:
    problem = BILEVEL["ridge"]()
    w, h = problem.weights.requires_grad_(), problem.hyper.clone().requires_grad_()
    (response,) = hvp.best_response(problem.train_loss(w, h, None), w, h)
    value = problem.val_loss(response, h, None)
    with pytest.raises(hvp.SecondDerivativeError, match="best_response gives first derivatives only; create_graph"):
        torch.autograd.grad(value, h, create_graph=True)
    assert h.grad is None


def test_results_carry_no_graph(problem: Bilevel) -> None:
    assert not tape_style(problem, hvp.Neumann(3)).requires_grad
    result = hvp.Hypergradient(problem.train_loss, problem.val_loss)(problem.weights, problem.hyper, None, None)
    tensors = (result.grads, result.train_loss, result.val_loss, result.gradient_norm, result.solution.value)
    assert not any(tensor.requires_grad for tensor in tensors)


# Losses without hyperparameters


def test_hyperparameter_in_the_validation_loss_alone_warns() -> None:
    w, h = randn(3, seed=30), randn(3, seed=31)
    hypergradient = hvp.Hypergradient(lambda w, h, b: w.square().sum(), lambda w, h, b: (w * h).sum(), hvp.Neumann(3))
    with pytest.warns(UserWarning, match="no hyperparameter reaches the training gradient"):
        grads = hypergradient(w, h, None, None).grads
    torch.testing.assert_close(grads, w)


@pytest.mark.parametrize("style", ["tape", "functional", "best_response"])
def test_hyperparameter_that_is_nowhere_is_refused(style: str) -> None:
    w, h = randn(3, seed=32).requires_grad_(), randn(3, seed=33).requires_grad_()
    other = randn(3, seed=34).requires_grad_()
    with pytest.raises(hvp.GraphError, match="hyperparameters: expected at least one"):
        if style == "functional":
            hvp.Hypergradient(lambda w, h, b: w.square().sum(), lambda w, h, b: w.sum())(w, h, None, None)
        elif style == "tape":
            hvp.hypergradient((w * other).square().sum(), w.sum(), w, h)
        else:
            hvp.best_response(w.square().sum(), w, h)[0].sum().backward()


def test_of_losses_that_depend_on_the_weights_alone_the_hypergradient_is_zero_and_a_warning_says_so() -> None:
    w, h = randn(3, seed=32).requires_grad_(), randn(2, 2, seed=33).requires_grad_()
    frozen = randn(3, seed=34)
    with pytest.warns(UserWarning, match="neither loss depends on any of them, or on anything but the weights"):
        (found,) = hvp.hypergradient((w * frozen).square().sum(), w.sum(), w, h)
    assert torch.equal(found, torch.zeros_like(h))


def test_without_products_engines_are_compared_for_no_terms():
    for solver, terms in ((hvp.Identity(), 0), (hvp.Neumann(0, alpha=0.1), 0), (None, 10)):
        assert hvp.Hypergradient(lambda w, h, b: w, lambda w, h, b: w, solver).engine.terms == terms


@pytest.mark.parametrize("engine", ["eager", "recorded", "linearized", "finite_difference"])
@pytest.mark.parametrize("shape", [(1,), (1, 1)])
@pytest.mark.filterwarnings("ignore:the weights are far from a minimum")
def test_a_loss_of_one_element_is_a_scalar(engine: str, shape: tuple[int, ...]) -> None:
    """As a squared error of a batch of one example is."""
    w, h = randn(3, seed=1), randn(3, seed=2)

    def train(w: Tensor, h: Tensor, batch: Tensor) -> Tensor:
        return ((w - batch).square() + h.exp() * w.square()).sum()

    def val(w: Tensor, h: Tensor, batch: Tensor) -> Tensor:
        return (w - batch - 1).square().sum()

    def result(*losses: Any) -> hvp.HypergradientResult:
        return hvp.Hypergradient(*losses, hvp.Neumann(4, alpha=0.1), engine)(w, h, torch.ones(3), torch.zeros(3))

    shaped = result(lambda *a: train(*a).reshape(shape), lambda *a: val(*a).reshape(shape))
    plain = result(train, val)
    assert shaped.train_loss.shape == shaped.val_loss.shape == ()
    assert torch.equal(shaped.val_loss, plain.val_loss) and relative_error(shaped.grads, plain.grads) < 1e-12
