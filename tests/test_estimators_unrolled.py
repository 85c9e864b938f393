"""Unrolled differentiation: its two modes, by hand, by finite differences, against the series and torch.optim."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from problems_with_known_answers import BILEVEL, DTYPE, Bilevel, randn, relative_error
from torch import Tensor, nn
from torch.autograd.functional import hessian, jacobian
from torch.nn.functional import cross_entropy

import hvp_engine as hvp
from hvp_engine.diagnostics.memory import peak_memory
from hvp_engine.hypergradients import SGD, Adam, Unrolled, UpdateRule

RULES: dict[str, UpdateRule] = {
    "sgd": SGD(0.2),
    "momentum": SGD(0.1, momentum=0.8),
    "adam": Adam(0.05, betas=(0.8, 0.95), eps=1e-6),
}
WAYS: dict[str, dict[str, Any]] = {
    "reverse": {},
    "checkpointing": {"checkpointing": True},
    "forward": {"mode": "forward"},
}


@pytest.fixture(params=BILEVEL)
def problem(request: pytest.FixtureRequest) -> Bilevel:
    return BILEVEL[request.param]()


def start_of(problem: Bilevel) -> Tensor:
    """Weights far from the minimum."""
    return problem.weights + randn(*problem.weights.shape, seed=70)


def grads_of(problem: Bilevel, weights: Tensor, steps: int, rule: UpdateRule, **options: Any) -> Tensor:
    estimator = Unrolled(problem.train_loss, problem.val_loss, steps, rule, **options)
    return estimator(weights, problem.hyper, None, None).grads


# Numbers


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("rule", RULES)
def test_finite_differences(rule: str, way: str, problem: Bilevel) -> None:
    def val_loss(hyper: Tensor) -> float:
        estimator = Unrolled(problem.train_loss, problem.val_loss, 7, RULES[rule])
        return float(estimator(start_of(problem), hyper, None, None).val_loss)

    found = grads_of(problem, start_of(problem), 7, RULES[rule], **WAYS[way])
    step = 1e-5
    for unit, slope in zip(torch.eye(len(problem.hyper), dtype=DTYPE), found, strict=True):
        difference = val_loss(problem.hyper + step * unit) - val_loss(problem.hyper - step * unit)
        assert difference / (2 * step) == pytest.approx(float(slope), rel=1e-6, abs=1e-8)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("truncation", [1, 3, 7])
def test_modes_agree(truncation: int, rule: str, problem: Bilevel) -> None:
    reverse, *others = (
        grads_of(problem, start_of(problem), 7, RULES[rule], truncation=truncation, **options)
        for options in WAYS.values()
    )
    for other in others:
        torch.testing.assert_close(other, reverse, rtol=1e-11, atol=1e-13)


def by_lemma_2(problem: Bilevel, start: Tensor, steps: int, rate: float, truncation: int) -> Tensor:
    """With dense Hessians, away from w*: sum over j of [prod over k > j of (I - rate H(w_k))] rate d2L_T/dw dlambda."""
    w, h = start, problem.hyper
    slope = torch.zeros(len(w), len(h), dtype=DTYPE)  # dw/dlambda
    for index in range(steps):
        gradient = jacobian(lambda w: problem.train_loss(w, h, None), w)
        if index >= steps - truncation:
            curvature = hessian(lambda w: problem.train_loss(w, h, None), w)
            mixed = hessian(lambda w, h: problem.train_loss(w, h, None), (w, h))[0][1]
            slope = slope - rate * (curvature @ slope + mixed)
        w = w - rate * gradient
    in_weights, direct = jacobian(lambda w, h: problem.val_loss(w, h, None), (w, h))
    return direct + slope.T @ in_weights


@pytest.mark.parametrize("steps, truncation", [(1, 1), (6, 6), (6, 2)])
@pytest.mark.parametrize("way", WAYS)
def test_lemma_2_away_from_the_minimum(way: str, steps: int, truncation: int, problem: Bilevel) -> None:
    start = start_of(problem)
    found = grads_of(problem, start, steps, SGD(0.2), truncation=truncation, **WAYS[way])
    torch.testing.assert_close(found, by_lemma_2(problem, start, steps, 0.2, truncation), rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("steps", [1, 2, 3, 20])
@pytest.mark.parametrize("way", WAYS)
def test_steps_from_the_minimum_are_one_product_less(way: str, steps: int, problem: Bilevel) -> None:
    alpha = 0.7 * problem.alpha
    found = grads_of(problem, problem.weights, steps, SGD(alpha), **WAYS[way])
    implicit = hvp.Hypergradient(problem.train_loss, problem.val_loss, solver=hvp.Neumann(steps - 1, alpha=alpha))
    torch.testing.assert_close(
        found, implicit(problem.weights, problem.hyper, None, None).grads, rtol=1e-11, atol=1e-13
    )
    if steps < 20:  # one product more or less is another number
        other = hvp.Hypergradient(problem.train_loss, problem.val_loss, solver=hvp.Neumann(steps, alpha=alpha))
        assert relative_error(found, other(problem.weights, problem.hyper, None, None).grads) > 1e-3


def test_truncation_leaves_out_the_first_steps(problem: Bilevel) -> None:
    whole = Unrolled(problem.train_loss, problem.val_loss, 6, SGD(0.2))
    before = Unrolled(problem.train_loss, problem.val_loss, 4, SGD(0.2))
    after = before(start_of(problem), problem.hyper, None, None).weights
    truncated = grads_of(problem, start_of(problem), 6, SGD(0.2), truncation=2)
    torch.testing.assert_close(truncated, grads_of(problem, after, 2, SGD(0.2)), rtol=0, atol=0)
    full = whole(start_of(problem), problem.hyper, None, None).grads
    assert torch.equal(full, grads_of(problem, start_of(problem), 6, SGD(0.2), truncation=6))
    assert relative_error(truncated, full) > 1e-3


@pytest.mark.parametrize("way", WAYS)
def test_learning_rate_as_a_hyperparameter(way: str, problem: Bilevel) -> None:
    def estimate(log_rate: Tensor, **options: Any) -> Any:
        estimator = Unrolled(
            lambda w, h, b: problem.train_loss(w, problem.hyper, b),
            lambda w, h, b: problem.val_loss(w, problem.hyper, b),
            5, Adam(lambda hyper: hyper["log_rate"].exp()), **options,
        )  # fmt: skip
        return estimator(start_of(problem), {"log_rate": log_rate}, None, None)

    center, step = torch.tensor(-2.0, dtype=DTYPE), 1e-5
    difference = estimate(center + step).val_loss - estimate(center - step).val_loss
    found = estimate(center, **WAYS[way]).grads["log_rate"]
    torch.testing.assert_close(found, difference / (2 * step), rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize("name", RULES)
def test_steps_are_those_of_torch_optim(name: str) -> None:
    made = {
        "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.2),
        "momentum": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.8),
        "adam": lambda parameters: torch.optim.Adam(parameters, lr=0.05, betas=(0.8, 0.95), eps=1e-6),
    }
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).to(DTYPE)
    with torch.no_grad():
        module[0].bias[0] = -100.0  # a unit that is never on: gradients of exactly zero
    net, batches = hvp.functional(module), [(randn(5, 3, seed=s), torch.arange(5) % 2) for s in range(4)]

    def loss(weights: Any, hyper: Tensor, batch: Any) -> Tensor:
        decay = sum(w.square().sum() for n, w in weights.items() if n != "0.bias" and n != "0.weight")
        return cross_entropy(net(weights, batch[0]), batch[1]) + hyper.exp() * decay

    hyper = torch.tensor(-2.0, dtype=DTYPE)
    estimator = Unrolled(loss, loss, 4, RULES[name], batch_per_step=True)
    estimate = estimator(dict(module.named_parameters()), hyper, batches, batches[0])
    assert torch.isfinite(estimate.grads)
    optimizer = made[name](module.parameters())
    for batch in batches:
        optimizer.zero_grad()
        loss(dict(module.named_parameters()), hyper, batch).backward()
        optimizer.step()
    for parameter, weight in zip(module.parameters(), estimate.weights.values(), strict=True):
        torch.testing.assert_close(weight, parameter.detach(), rtol=1e-13, atol=1e-14)


def test_what_an_estimate_reports(problem: Bilevel) -> None:
    start = start_of(problem)
    for options in WAYS.values():
        found = Unrolled(problem.train_loss, problem.val_loss, 3, SGD(0.2), **options)(start, problem.hyper, None, None)
        gradient = jacobian(lambda w: problem.train_loss(w, problem.hyper, None), start)
        torch.testing.assert_close(found.train_loss, problem.train_loss(start, problem.hyper, None))
        torch.testing.assert_close(found.gradient_norm, gradient.norm())
        torch.testing.assert_close(found.val_loss, problem.val_loss(found.weights, problem.hyper, None))
        tensors = (found.grads, found.weights, found.train_loss, found.val_loss)
        assert not any(t.requires_grad or torch.autograd.forward_ad.unpack_dual(t).tangent is not None for t in tensors)


# Memory


def test_memory_grows_with_steps_only_where_steps_are_kept() -> None:
    module = nn.Sequential(nn.Linear(20, 30), nn.Tanh(), nn.Linear(30, 30), nn.Tanh(), nn.Linear(30, 2))
    net, weights = hvp.functional(module), dict(module.named_parameters())
    batch = torch.randn(100, 20), torch.randint(2, (100,))

    def val_loss(w: Any, h: Any, b: Any) -> Tensor:
        return cross_entropy(net(w, b[0]), b[1])

    def train_loss(w: Any, h: Any, b: Any) -> Tensor:
        return val_loss(w, h, b) + sum((h.get(n, h.get("all")).exp() * w[n].square()).sum() for n in w)

    def peak(estimator: Any, hyper: Any) -> int:
        estimator(weights, hyper, batch, batch)
        with peak_memory() as meter:
            estimator(weights, hyper, batch, batch)
        return meter.peak_bytes

    many = {name: torch.full_like(w, -5.0) for name, w in weights.items()}
    one = {"all": torch.tensor(-5.0)}
    size = sum(w.nbytes for w in weights.values())

    def slope(hyper: Any = many, **options: Any) -> float:
        """Bytes for each further step, in copies of the weights."""
        a, b = (peak(Unrolled(train_loss, val_loss, i, SGD(0.1), **options), hyper) for i in (4, 12))
        return (b - a) / 8 / size

    assert slope(one, mode="forward") == 0
    assert slope(truncation=3) == 0
    assert 0.99 < slope(one, checkpointing=True) < 1.01
    assert slope(checkpointing=True) < 2.01
    assert slope() > 5
    series = [peak(hvp.Hypergradient(train_loss, val_loss, hvp.Neumann(i, 0.1), "eager"), many) for i in (2, 20)]
    assert series[1] <= 1.01 * series[0]
    assert peak(Unrolled(train_loss, val_loss, 20, SGD(0.1)), many) > 5 * series[1]
