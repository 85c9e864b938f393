"""What a call leaves behind: the caller's state as it was, constant memory, estimates and masks with one life."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypergradient_calling_styles import STYLES, functional_style
from problems_with_known_answers import BILEVEL, DTYPE, Bilevel, randn, truncated_sum
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, dropout

import hvp_engine as hvp
from hvp_engine.diagnostics.memory import peak_memory


def snapshot(module: nn.Module) -> list[Any]:
    tensors = [*module.parameters(), *module.buffers()]
    return [
        *(tensor.detach().clone() for tensor in tensors),
        *(None if tensor.grad is None else tensor.grad.clone() for tensor in tensors),
        *(tensor.requires_grad for tensor in tensors),
        torch.get_rng_state(),
    ]


def same(before: list[Any], after: list[Any]) -> bool:
    return all(torch.equal(a, b) if isinstance(a, Tensor) else a == b for a, b in zip(before, after, strict=True))


def busy_module() -> nn.Module:
    """BatchNorm, dropout, a frozen parameter, and gradients that were there before."""
    torch.manual_seed(5)
    layers = [nn.Linear(3, 6), nn.BatchNorm1d(6), nn.Dropout(0.5), nn.Tanh(), nn.Linear(6, 2)]
    module = nn.Sequential(*layers).to(DTYPE)
    module[0].bias.requires_grad_(False)
    for parameter in module.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.ones_like(parameter)
    return module


@pytest.mark.parametrize("alpha", [0.1, "auto", 1e6])
def test_tape_style_leaves_the_callers_state(alpha: float | str) -> None:
    module = busy_module()
    x, y = randn(7, 3, seed=20), torch.arange(7) % 2
    hyper = torch.zeros(3, dtype=DTYPE, requires_grad=True)
    weights = list(module.parameters())
    train, val = cross_entropy(module(x * hyper.exp()), y), cross_entropy(module(x), y)
    before = snapshot(module)
    solver = hvp.Neumann(6, alpha=alpha, damping=2.0)
    try:
        hvp.hypergradient(train, val, weights, hyper, solver)
        assert alpha != 1e6
    except hvp.DivergenceError:
        assert alpha == 1e6
    assert same(before, snapshot(module))
    assert hyper.grad is None
    train.backward()  # the graph of the caller is still there
    val.backward()


def test_v_and_f_stay() -> None:
    w = randn(4, seed=21).requires_grad_()
    f = torch.autograd.grad(w.pow(4).sum(), w, create_graph=True)
    v = [randn(4, seed=22)]
    kept = v[0].clone(), f[0].detach().clone(), w.detach().clone()
    first = hvp.approx_inverse_hvp(v, f, [w], 5, 0.01)
    second = hvp.approx_inverse_hvp(v, f, [w], 5, 0.01)
    assert torch.equal(first[0], second[0])
    assert torch.equal(v[0], kept[0]) and torch.equal(f[0], kept[1]) and torch.equal(w, kept[2])
    assert w.grad is None
    f[0].sum().backward()


def test_calling_twice_gives_the_same(problem: Bilevel) -> None:
    solver = hvp.Neumann(5, alpha=problem.alpha)
    for style in STYLES.values():  # to rounding: the second time a program may make the products
        torch.testing.assert_close(style(problem, solver), style(problem, solver), rtol=1e-10, atol=1e-14)
    hypergradient = hvp.Hypergradient(problem.train_loss, problem.val_loss, solver)
    calls = [hypergradient(problem.weights, problem.hyper, None, None).grads for _ in range(2)]
    assert torch.equal(*calls)


def test_works_without_grad_mode(problem: Bilevel) -> None:
    expected = functional_style(problem, hvp.Neumann(600))
    with torch.no_grad():
        assert torch.equal(functional_style(problem, hvp.Neumann(600)), expected)
        assert not torch.is_grad_enabled()


def test_response_shares_memory_with_the_weights() -> None:
    w, h = randn(3, seed=23).requires_grad_(), randn(3, seed=24).requires_grad_()
    (response,) = hvp.best_response(((w - h) ** 2).sum(), w, h)
    assert response.data_ptr() == w.data_ptr() and response.requires_grad


def test_backward_twice_through_a_response() -> None:
    w, h = randn(3, seed=25).requires_grad_(), randn(3, seed=26).requires_grad_()
    (response,) = hvp.best_response(((w - h) ** 2).sum() / 2, w, h, hvp.Neumann(40, alpha=0.5))
    value = response.sum()
    value.backward(retain_graph=True)
    value.backward()
    torch.testing.assert_close(h.grad, 2 * torch.ones(3, dtype=DTYPE))


# Randomness


def noisy_losses() -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    x = randn(6, 20, seed=27)

    def train(w: Tensor, h: Tensor, batch: Any) -> Tensor:
        return (dropout(x * h, 0.5) @ w).square().mean() + w.square().sum()

    return train, lambda w, h, b: w.sum()


def test_a_fresh_mask_for_every_call_and_none_from_the_caller() -> None:
    train, val = noisy_losses()
    w, h = randn(20, seed=28), torch.ones(20, dtype=DTYPE)
    torch.manual_seed(7)
    state = torch.get_rng_state()
    hypergradient = hvp.Hypergradient(train, val, hvp.Neumann(3, alpha=0.1))
    calls = [hypergradient(w, h, None, None).grads for _ in range(3)]
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(calls[0], calls[1]) and not torch.equal(calls[1], calls[2])
    again = hvp.Hypergradient(train, val, hvp.Neumann(3, alpha=0.1))
    torch.rand(5)
    assert all(torch.equal(again(w, h, None, None).grads, call) for call in calls), "reproducible from the seed"
    saved = again.state_dict()
    torch.manual_seed(8)
    after = [again(w, h, None, None).grads]
    again.load_state_dict(saved)
    torch.manual_seed(9)
    assert torch.equal(again(w, h, None, None).grads, after[0]), "not from the seed at a call"
    other = hvp.Hypergradient(train, val, hvp.Neumann(3, alpha=0.1))
    assert not torch.equal(other(w, h, None, None).grads, calls[0])


def test_one_mask_for_all_terms_of_a_call() -> None:
    """The training loss is drawn once in a call: the residual of a long solve goes to zero, as of one fixed matrix."""
    train, val = noisy_losses()
    drawn = []

    def counting(w: Tensor, h: Tensor, batch: Any) -> Tensor:
        drawn.append(1)
        return train(w, h, batch)

    result = hvp.Hypergradient(counting, val, hvp.Neumann(500), engine="eager")(
        randn(20, seed=29), torch.ones(20, dtype=DTYPE), None, None
    )
    assert len(drawn) == 1 and result.solution.converged


# The estimate of alpha lives as long as the Hypergradient


@pytest.mark.parametrize("grown", [0, 11], ids=["same direction", "new direction"])
@pytest.mark.parametrize("iterations", [20, 300])
def test_survives_growth_between_calls(grown: int, iterations: int) -> None:
    """Curvature rises 13-fold between two calls of one Hypergradient."""
    before = torch.linspace(1.0, 0.1, 12, dtype=DTYPE)
    after = before.clone()
    after[grown] = 13.0
    hypergradient = hvp.Hypergradient(
        lambda w, h, curvature: (curvature * (w - h) ** 2).sum() / 2,
        lambda w, h, b: w.square().sum() / 2,
        hvp.Neumann(iterations),
    )
    w = randn(12, seed=34)
    hypergradient(w, w, before, None)
    result = hypergradient(w, w, after, None)
    alpha = result.solution.alpha
    assert alpha is not None and alpha * 13 < 2
    torch.testing.assert_close(
        result.grads, after * truncated_sum(torch.diag(after), w, iterations, alpha), rtol=1e-8, atol=1e-10
    )


def test_estimate_is_refreshed_and_not_shared() -> None:
    problem = BILEVEL["ridge"]()
    first, second = (hvp.Hypergradient(problem.train_loss, problem.val_loss, hvp.Neumann(4)) for _ in range(2))
    size = len(problem.hyper)
    hvps = [first(problem.weights, problem.hyper, None, None).solution.hvps for _ in range(3)]
    assert hvps == [4 + min(8, size), 4 + 3, 4 + 3]
    assert second(problem.weights, problem.hyper, None, None).solution.hvps == hvps[0]


@pytest.mark.parametrize("where", ["train_loss", "val_loss"])
@pytest.mark.parametrize("alpha", [0.1, "auto"])
def test_non_finite_loss_is_named(where: str, alpha: float | str) -> None:
    w = randn(3, seed=35)
    losses = {
        "train_loss": lambda w, h, b: ((w - h) ** 2).sum(),
        "val_loss": lambda w, h, b: w.square().sum(),
    }
    good = losses[where]
    losses[where] = lambda w, h, b: good(w, h, b) * float("nan")
    with pytest.raises(hvp.NonFiniteError, match=where):
        hvp.Hypergradient(**losses, solver=hvp.Neumann(3, alpha=alpha))(w, w, None, None)


# Memory


def test_memory_does_not_grow_with_iterations_but_does_by_unrolling() -> None:
    x, y = randn(64, 40, seed=36), randn(64, 10, seed=37)

    def train(w: list[Tensor], h: Tensor, batch: Any) -> Tensor:
        return (torch.tanh(x @ w[0]) @ w[1] - y).square().mean() + h.exp() * (w[0].square().sum() + w[1].square().sum())

    def val(w: list[Tensor], h: Tensor, batch: Any) -> Tensor:
        return (torch.tanh(x @ w[0]) @ w[1] + y).square().mean()

    weights = [randn(40, 50, seed=38) / 6, randn(50, 10, seed=39) / 7]
    hyper = torch.tensor(0.0, dtype=DTYPE)

    def implicit(iterations: int) -> int:
        hypergradient = hvp.Hypergradient(train, val, hvp.Neumann(iterations, alpha=0.05))
        with peak_memory("cpu") as meter:
            hypergradient(weights, hyper, None, None)
        return meter.peak_bytes

    def unrolling(steps: int) -> int:
        with peak_memory("cpu") as meter:
            h = hyper.clone().requires_grad_()
            w = [part.clone().requires_grad_() for part in weights]
            for _ in range(steps):
                gradients = torch.autograd.grad(train(w, h, None), w, create_graph=True)
                w = [a - 0.05 * g for a, g in zip(w, gradients, strict=True)]
            torch.autograd.grad(val(w, h, None), h)
        return meter.peak_bytes

    few, many = implicit(2), implicit(100)
    assert many <= 1.01 * few
    assert unrolling(20) > 4 * unrolling(2), "the meter has to see what unrolling keeps"
    assert unrolling(20) > 4 * many
