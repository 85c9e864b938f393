"""hvp.check names the derivative that is wrong, and a fit that does not minimize."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from checked_hypergradient import ENOUGH, NOTHING, check_case
from problems_with_known_answers import DTYPE, Bilevel, randn, ridge_bilevel
from torch import Tensor

import hvp_engine as hvp
from hvp_engine import Verdict


class Flipped(torch.autograd.Function):
    """The identity, with the sign of its backward wrong."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return -gradient


class Square(torch.autograd.Function):
    """x^2, with a backward that is right and a second derivative that is not."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 2 * x.detach() * gradient


def wrong(case: Bilevel, where: str) -> dict[str, Any]:
    train, val = case.train_loss, case.val_loss
    return {
        "val_loss with respect to the hyperparameters": {"val_loss": lambda w, h, b: val(w, h.detach(), b)},
        "val_loss with respect to the weights": {"val_loss": lambda w, h, b: val(Flipped.apply(w), h, b)},
        "(mixed second derivative)": {
            "train_loss": lambda w, h, b: train(w, h, b) + (h.detach() * w).sum() + 0.1 * (h * w).sum()
        },
        "sign of (mixed second derivative)": {"train_loss": lambda w, h, b: train(w, Flipped.apply(h), b)},
        "(Hessian)": {"train_loss": lambda w, h, b: train(w, h, b) + Square.apply(w).sum()},
    }[where]


@pytest.mark.parametrize(
    "where",
    [
        "val_loss with respect to the hyperparameters",
        "val_loss with respect to the weights",
        "(mixed second derivative)",
        "sign of (mixed second derivative)",
        "(Hessian)",
    ],
)
def test_a_derivative_that_autograd_has_wrong_is_named(where):
    case = ridge_bilevel()
    options = wrong(case, where)
    if "train_loss" in options and where != "sign of (mixed second derivative)":
        options["weights"] = descended(options["train_loss"], case)
    result = check_case(case, **options)
    assert result.verdict is Verdict.WRONG_DERIVATIVE, result
    expected = where.removeprefix("sign of ")
    assert len(result.advice) == 1 and expected in result.advice[0], result
    assert ".detach()" in result.advice[0]


def descended(train_loss: Any, case: Bilevel) -> Tensor:
    """The minimum of a training loss by many gradient steps."""
    w = case.weights.clone()
    for _ in range(3000):
        w.requires_grad_()
        (gradient,) = torch.autograd.grad(train_loss(w, case.hyper, None), w)
        w = (w - 0.1 * gradient).detach()
    return w


def test_a_wrong_gradient_of_the_training_loss_is_named():
    """The fit then ends where that gradient, not the true one, is zero, and only the local test can tell."""
    target = randn(4, seed=50)

    def train(w: Tensor, h: Tensor, batch: Any) -> Tensor:
        return (Flipped.apply(Flipped.apply(w)) - target).square().sum() / 2 + Halved.apply(h * w.square()).sum()

    result = hvp.check(
        train,
        lambda w, h, batch: w.square().sum(),
        target.clone(),
        torch.ones(4, dtype=DTYPE),
        NOTHING,
        fit=lambda w, h: target / (1 + 2 * h),  # the true minimum
        solver=ENOUGH,
        engine="eager",
    )
    assert result.verdict is Verdict.WRONG_DERIVATIVE, result
    assert result.advice[0].startswith("train_loss with respect to the weights")


class Halved(torch.autograd.Function):
    """The identity, with half of its backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient / 2


@pytest.mark.parametrize("fit", [lambda w, h: w, lambda w, h: w + h.mean()], ids=["does nothing", "goes elsewhere"])
def test_a_fit_that_does_not_minimize_the_training_loss(fit):
    result = check_case(ridge_bilevel(), fit=fit)
    assert result.verdict is Verdict.FIT_NOT_STATIONARY, result
    assert result.advice[0].startswith("let fit run to a minimum of train_loss")
