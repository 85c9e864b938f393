"""Closed-form optima are found, also with custom optimizers and estimators."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from problems_with_known_answers import BILEVEL, DTYPE, Bilevel, matrix_with
from torch import Tensor
from tuning_problem_with_known_optimum import DATA, TARGET, adam, sgd, tuner_of, zeros

import hvp_engine as hvp
from hvp_engine.hypergradients.estimator import Estimate, Estimator

pytestmark = pytest.mark.filterwarnings("ignore:the weights are far from a minimum")


def test_one_decay_for_all_weights() -> None:
    """w* = s x with s = 1 / (1 + e^h); ||s x - t||^2 is smallest at s = x.t / x.x."""
    w, h = zeros(3), zeros()
    tuner_of(w, h, warmup_steps=30).fit([DATA], [TARGET], hyper_steps=200, progress=False)
    share = float(DATA @ TARGET / (DATA @ DATA))
    assert float(h) == pytest.approx(math.log(1 / share - 1), abs=1e-3)
    torch.testing.assert_close(w, share * DATA, rtol=1e-3, atol=0)


def test_one_decay_for_each_weight_of_a_coupled_problem() -> None:
    """L_T = w A w / 2 - b w + sum(e^h w^2) / 2 has w* = t where e^h = (b - A t) / t, chosen positive."""
    a = matrix_with([0.5, 1.0, 2.0, 3.0], seed=41)
    target, h_best = torch.tensor([1.0, -0.5, 0.8, 1.5], dtype=DTYPE), torch.tensor([0.3, -1.0, 0.0, -0.5], dtype=DTYPE)
    b = a @ target + h_best.exp() * target
    w, h = zeros(4), zeros(4)
    tuner = tuner_of(
        w,
        h,
        train=lambda w, h, batch: w @ a @ w / 2 - b @ w + (h.exp() * w.square()).sum() / 2,
        val=lambda w, h, batch: (w - target).square().sum() / 2,
        weight_optimizer=sgd(0.25),
        inner_steps=10,
        solver=hvp.Neumann(20),
    )
    tuner.fit([None], [None], hyper_steps=200, progress=False)
    torch.testing.assert_close(h, h_best, rtol=0, atol=1e-3)
    torch.testing.assert_close(w, target, rtol=1e-3, atol=0)


class Jump(torch.optim.Optimizer):
    """A custom optimizer that jumps to the minimum of the training loss."""

    def __init__(self, tensors: Any, minimum: Callable[[], Tensor]):
        super().__init__(tensors, {})
        self.minimum = minimum

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        self.param_groups[0]["params"][0].copy_(self.minimum())


class Unrolled:
    """The hypergradient through `steps` steps of SGD from the current weights."""

    def __init__(self, case: Bilevel, steps: int, lr: float):
        self.case, self.steps, self.lr = case, steps, lr

    def __call__(self, weights: Tensor, hyper: Tensor, train_batch: Any, val_batch: Any) -> Estimate:
        w, h = weights.detach().requires_grad_(), hyper.detach().requires_grad_()
        norm = zeros()
        for step in range(self.steps):
            loss = self.case.train_loss(w, h, train_batch)
            (gradient,) = torch.autograd.grad(loss, w, create_graph=True)
            norm = torch.linalg.vector_norm(gradient.detach()) if step == 0 else norm
            w = w - self.lr * gradient
        val_loss = self.case.val_loss(w, h, val_batch)
        (grads,) = torch.autograd.grad(val_loss, h)
        return Estimate(grads, loss.detach(), val_loss.detach(), norm)


@pytest.mark.parametrize("name", ["quadratic", "ridge"])
@pytest.mark.parametrize("steps", [1, 2, 5])
def test_unrolled_training_equals_the_truncated_series(steps: int, name: str) -> None:
    """Unrolling i steps of SGD from w* equals i - 1 products: the same records and results in ten hyper steps."""
    case = BILEVEL[name]()
    found = []
    for options in (
        {"estimator": Unrolled(case, steps, case.alpha)},
        {"solver": hvp.Neumann(steps - 1, alpha=case.alpha)},
    ):
        h = case.hyper.clone()
        tuner = tuner_of(
            case.weights.clone(),
            h,
            train=case.train_loss,
            val=case.val_loss,
            weight_optimizer=lambda tensors, h=h: Jump(tensors, lambda: case.minimum(h)),
            hyper_optimizer=adam(0.05),
            inner_steps=1,
            **options,
        )
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            history = tuner.fit([None], [None], hyper_steps=10, progress=False)
        figures = [[r.val_loss, r.train_loss, r.hypergradient_norm] for r in history]
        found.append((h, torch.tensor(figures, dtype=DTYPE)))
    (one, figures), (other, other_figures) = found
    torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(figures, other_figures, rtol=1e-10, atol=1e-12)
    assert not torch.allclose(one, case.hyper, atol=1e-2)


def test_an_estimator_of_ones_own() -> None:
    """It gets the trees, and lists of batches where there are several; its record has no figures of a solve."""
    seen: list[Any] = []

    def estimator(weights: Any, hyper: Any, train_batch: Any, val_batch: Any) -> Estimate:
        seen.append((weights["w"], hyper[0], train_batch, val_batch))
        one = torch.ones(())
        return Estimate([torch.ones(2)], one, 2 * one, 3 * one.double())

    w, h = torch.zeros(2), torch.zeros(2)
    tuner = tuner_of(
        {"w": w},
        [h],
        train=lambda w, h, b: w["w"].square().sum(),
        estimator=estimator,
        hyper_optimizer=sgd(0.5),
        val_batches=2,
        inner_steps=1,
    )
    (record,) = tuner.fit([10, 20], [30, 40], 1, progress=False)
    assert seen[0][0] is w and seen[0][1] is h and seen[0][2:] == (20, [30, 40])
    assert (record.train_loss, record.val_loss, record.gradient_norm) == (1.0, 2.0, 3.0)
    assert record.hypergradient_norm == pytest.approx(math.sqrt(2))
    assert math.isnan(record.residual_norm) and math.isnan(record.unfinished)
    assert record.status == "" and record.alpha is None
    assert torch.equal(h, torch.full((2,), -0.5))


def test_an_estimator_that_returns_another_container() -> None:
    one = torch.ones(())
    tuner = tuner_of(torch.zeros(2), [torch.zeros(2)], estimator=lambda *_: Estimate(torch.ones(2), one, one, one))
    with pytest.raises(ValueError, match="^estimator: expected grads in the container of hyper"):
        tuner.hyper_step(None, None)


class Counting(Estimator):
    """Its hypergradient is the number of its calls; it returns all the optional figures."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, weights: Any, hyper: Tensor, train_batch: Any, val_batch: Any) -> Estimate:
        self.calls += 1
        one = torch.ones(())
        solution = hvp.solve(lambda v: 2 * v, torch.ones(2, dtype=DTYPE), hvp.Neumann(30, alpha=0.4))
        return Estimate(torch.full_like(hyper, self.calls), one, one, one, unfinished=-3 * one, solution=solution)


class Saved(Counting):
    def state_dict(self) -> dict[str, Any]:
        return {"calls": self.calls}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.calls = state["calls"]


class Duck:
    """The same without the base class."""

    def __init__(self) -> None:
        self.inner = Saved()
        self.state_dict, self.load_state_dict = self.inner.state_dict, self.inner.load_state_dict

    def __call__(self, *arguments: Any) -> Estimate:
        return self.inner(*arguments)


def counting_tuner(estimator: Any) -> hvp.Tuner:
    return tuner_of(zeros(2), zeros(2), train=lambda w, h, b: w.square().sum(), estimator=estimator)


def test_the_optional_figures_of_an_estimate_are_in_the_record() -> None:
    (record,) = counting_tuner(Counting()).fit([None], [None], 1, progress=False)
    assert record.unfinished == -3.0 and record.status == "CONVERGED" and record.alpha == 0.4
    assert 0 <= record.residual_norm < 1e-6


@pytest.mark.parametrize(("make", "calls"), [(Counting, 1), (Saved, 4), (Duck, 4)])
def test_the_state_of_an_estimator_is_part_of_the_tuners(make: Callable[[], Any], calls: int) -> None:
    one, other = counting_tuner(make()), counting_tuner(make())
    one.fit([None], [None], 3, progress=False)
    other.load_state_dict(one.state_dict())
    found = other.hyper_step(None, None)
    assert found is not None and torch.equal(found.grads, torch.full((2,), calls, dtype=DTYPE))


def test_the_base_class_says_what_is_missing() -> None:
    with pytest.raises(NotImplementedError, match="Estimator: expected a __call__"):
        counting_tuner(Estimator()).hyper_step(None, None)
