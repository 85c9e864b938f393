"""Unrolled differentiation: what stays as it was, what is random, checkpoints, `Tuner`, and bad input."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from problems_with_known_answers import DTYPE, quadratic_bilevel, randn, relative_error, ridge_bilevel
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import hvp_engine as hvp
from hvp_engine.hypergradients import SGD, Adam, Unrolled

WAYS: dict[str, dict[str, Any]] = {
    "reverse": {},
    "checkpointing": {"checkpointing": True},
    "forward": {"mode": "forward"},
}


class Noisy:
    """A network with dropout and BatchNorm, one decay for all weights."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        layers = [nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.5), nn.Linear(8, 2)]
        self.module = nn.Sequential(*layers).to(DTYPE)
        self.net, self.weights = hvp.functional(self.module), dict(self.module.named_parameters())
        self.hyper = {"decay": torch.tensor(-2.0, dtype=DTYPE), "unused": torch.ones(2, dtype=DTYPE)}
        self.batch = randn(12, 6, seed=1), torch.arange(12) % 2

    def val_loss(self, weights: Any, hyper: Any, batch: Any) -> Tensor:
        return cross_entropy(self.net(weights, batch[0]), batch[1])

    def train_loss(self, weights: Any, hyper: Any, batch: Any) -> Tensor:
        decay = sum(w.square().sum() for w in weights.values())
        return self.val_loss(weights, hyper, batch) + hyper["decay"].exp() * decay

    def estimator(self, **options: Any) -> Unrolled:
        return Unrolled(self.train_loss, self.val_loss, 4, SGD(0.3, momentum=0.5), **options)

    def grad(self, estimator: Unrolled) -> Tensor:
        return estimator(self.weights, self.hyper, self.batch, self.batch).grads["decay"]


def test_all_passes_of_a_call_draw_the_same_masks_and_the_next_call_others() -> None:
    problem = Noisy()
    estimators = [problem.estimator(**options) for options in WAYS.values()]
    first, second = ([problem.grad(estimator) for estimator in estimators] for _ in range(2))
    for found in (first, second):
        for other in found[1:]:
            torch.testing.assert_close(other, found[0], rtol=1e-11, atol=1e-14)
    assert relative_error(first[0], second[0]) > 1e-3


@pytest.mark.parametrize("way", WAYS)
def test_everything_of_the_callers_stays(way: str) -> None:
    problem = Noisy()
    for weight in problem.weights.values():
        weight.grad = torch.ones_like(weight)
    problem.hyper["decay"].requires_grad_()
    before = {name: value.clone() for name, value in problem.module.state_dict().items()}
    state = torch.get_rng_state()
    estimate = problem.estimator(**WAYS[way])(problem.weights, problem.hyper, problem.batch, problem.batch)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in problem.module.state_dict().items())
    assert all(torch.equal(w.grad, torch.ones_like(w)) for w in problem.weights.values())  # type: ignore[arg-type]
    assert problem.hyper["decay"].grad is None and problem.hyper["decay"].requires_grad
    assert list(estimate.grads) == ["decay", "unused"] and torch.equal(
        estimate.grads["unused"], torch.zeros(2).double()
    )


def test_state_continues_the_draws() -> None:
    problem = Noisy()
    one, other = problem.estimator(), problem.estimator()
    problem.grad(one)
    other.load_state_dict(one.state_dict())
    assert torch.equal(problem.grad(one), problem.grad(other))


def tuner_of(problem: Noisy, estimator: Unrolled) -> hvp.Tuner:
    return hvp.Tuner(
        problem.module, problem.hyper, problem.train_loss, problem.val_loss,
        weight_optimizer=lambda tensors: torch.optim.SGD(tensors, lr=0.1),
        hyper_optimizer=lambda tensors: torch.optim.Adam(tensors, lr=0.05),
        inner_steps=2, estimator=estimator, train_batches=4,
    )  # fmt: skip


def test_tuner_runs_and_resumes_with_one_batch_for_each_step(tmp_path: Path) -> None:
    def run(steps: list[int], path: Path) -> tuple[hvp.Tuner, dict[str, Tensor]]:
        for count in steps:  # each time a new process, as it were
            problem = Noisy()
            tuner = tuner_of(problem, problem.estimator(batch_per_step=True))
            batches = [(randn(12, 6, seed=s), torch.arange(12) % 2) for s in range(5)]
            tuner.fit(batches, batches[:2], count, progress=False, checkpoint=path)
        return tuner, problem.hyper

    whole, hyper = run([5], tmp_path / "whole.pt")
    parts, resumed = run([2, 5], tmp_path / "parts.pt")
    assert torch.equal(hyper["decay"], resumed["decay"]) and float(hyper["decay"]) != -2.0
    assert [r.val_loss for r in whole.history] == [r.val_loss for r in parts.history]


def test_tuner_with_unrolling_reaches_the_optimum() -> None:
    """w* = data / (1 + e^d), the best decay puts it at the target."""
    data, target = torch.tensor([1.0, 3.0]), torch.tensor([0.8, 1.5])
    weights, decay = torch.zeros(2), torch.zeros(2)

    def train(w: Tensor, d: Tensor, batch: Tensor) -> Tensor:
        return ((w - batch) ** 2).sum() / 2 + (d.exp() * w**2).sum() / 2

    def val(w: Tensor, d: Tensor, batch: Tensor) -> Tensor:
        return ((w - batch) ** 2).sum() / 2

    tuner = hvp.Tuner(
        weights, decay, train, val,
        weight_optimizer=lambda tensors: torch.optim.SGD(tensors, lr=0.3),
        hyper_optimizer=lambda tensors: torch.optim.Adam(tensors, lr=0.1),
        warmup_steps=20, estimator=Unrolled(train, val, 10, SGD(0.3)),
    )  # fmt: skip
    tuner.fit([data], [target], hyper_steps=200, progress=False)
    torch.testing.assert_close(weights, target, rtol=1e-3, atol=1e-3)


# Bad input


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"steps": 0}, ValueError, "steps: expected an int >= 1.*got 0"),
        ({"steps": 1.5}, TypeError, "steps: expected an int.*got float"),
        ({"steps": True}, TypeError, "steps: expected an int.*got bool"),
        ({"truncation": 4}, ValueError, "truncation: expected at most steps=3; got 4"),
        ({"truncation": 0}, ValueError, "truncation: expected an int >= 1"),
        ({"rule": 0.1}, TypeError, "rule: expected an update rule such as SGD"),
        ({"rule": SGD}, TypeError, "rule: expected an update rule such as SGD"),
        ({"mode": "sideways"}, ValueError, "mode: expected 'reverse' or 'forward'; got 'sideways'"),
        ({"mode": "forward", "checkpointing": True}, ValueError, "checkpointing: expected False in forward mode"),
        ({"train_loss": torch.tensor(1.0)}, TypeError, "train_loss: expected a function.*got Tensor"),
        ({"val_loss": None}, TypeError, "val_loss: expected a function.*got NoneType"),
    ],
)
def test_bad_options(options: dict[str, Any], error: type[Exception], message: str) -> None:
    problem = quadratic_bilevel()
    given = {"train_loss": problem.train_loss, "val_loss": problem.val_loss, "steps": 3, "rule": SGD(0.1)} | options
    with pytest.raises(error, match=message):
        Unrolled(**given)


@pytest.mark.parametrize(
    "make, error, message",
    [
        (lambda: SGD(0.0), ValueError, "learning_rate: expected a number > 0; got 0.0"),
        (lambda: SGD("fast"), TypeError, "learning_rate: expected a number or a function"),
        (lambda: SGD(float("nan")), TypeError, "learning_rate"),
        (lambda: SGD(0.1, momentum=1.0), ValueError, r"momentum: expected a number in \[0, 1\); got 1.0"),
        (lambda: Adam(0.1, betas=(0.9, 1.0)), ValueError, r"betas: expected a number in \[0, 1\); got 1.0"),
        (lambda: Adam(0.1, betas=0.9), TypeError, "betas: expected a pair"),  # type: ignore[arg-type]
        (lambda: Adam(0.1, eps=0.0), ValueError, "eps: expected a finite number > 0; got 0.0"),
    ],
)
def test_bad_rules(make: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize("way", WAYS)
def test_losses_that_reach_nothing(way: str) -> None:
    problem, weights = ridge_bilevel(), torch.zeros(6, dtype=DTYPE)

    def call(train: Any, val: Any) -> None:
        Unrolled(train, val, 2, SGD(0.1), **WAYS[way])(weights, problem.hyper, None, None)

    with pytest.raises(hvp.GraphError, match="train_loss: expected a loss"):
        call(lambda w, h, b: w.detach().sum(), problem.val_loss)
    with pytest.raises(hvp.GraphError, match="train_loss: expected a loss that depends on the weights"):
        call(lambda w, h, b: torch.ones((), requires_grad=True) * 2, problem.val_loss)
    with pytest.raises(hvp.GraphError, match="val_loss: expected|hyperparameters: expected at least one"):
        call(lambda w, h, b: w.square().sum(), lambda w, h, b: w.square().sum())
    with pytest.raises(ValueError, match="train_loss: expected a scalar tensor"):
        call(lambda w, h, b: w, problem.val_loss)


@pytest.mark.parametrize("batches", [[None] * 3, None])
def test_wrong_number_of_batches(batches: Any) -> None:
    problem = quadratic_bilevel()
    estimator = Unrolled(problem.train_loss, problem.val_loss, 2, SGD(0.1), batch_per_step=True)
    with pytest.raises(ValueError, match="train_batch: expected a sequence of 2 batches, one for each step; got"):
        estimator(problem.weights, problem.hyper, batches, None)


class Once(torch.autograd.Function):
    """A square whose backward cannot be differentiated."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 2 * ctx.saved_tensors[0] * grad


@pytest.mark.parametrize("options", [{}, {"truncation": 1}, {"checkpointing": True}, {"mode": "forward"}])
def test_missing_derivatives_are_named(options: dict[str, Any]) -> None:
    def train(w: Tensor, h: Tensor, batch: Any) -> Tensor:
        return (h * Once.apply(w)).sum()

    estimator = Unrolled(train, lambda w, h, b: w.square().sum(), 2, SGD(0.1), **options)
    with pytest.raises(
        hvp.SecondDerivativeError, match="forward mode: .*jvp.*mode='reverse'" if "mode" in options else "Once"
    ):
        estimator(torch.ones(3), torch.ones(3), None, None)


def test_forward_mode_names_what_torch_cannot_do() -> None:
    def train(w: Tensor, h: Tensor, batch: Any) -> Tensor:
        return torch.nn.functional.mse_loss(w, torch.ones(3)) + (h.exp() * w.square()).sum()

    estimator = Unrolled(train, lambda w, h, b: w.square().sum(), 2, SGD(0.1), mode="forward")
    with pytest.raises(hvp.SecondDerivativeError, match="forward mode: .*use mode='reverse'"):
        estimator(torch.ones(3), torch.zeros(3), None, None)
