"""hvp.check: right hypergradients pass, and each way to be wrong gets its own verdict."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from checked_hypergradient import ENOUGH, NOTHING, check_case
from problems_with_known_answers import BILEVEL, DTYPE, generator, quadratic_bilevel, randn, ridge_bilevel
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, dropout

import hvp_engine as hvp
from hvp_engine import Verdict

# What is right passes


@pytest.mark.parametrize("name", BILEVEL)
@pytest.mark.parametrize("fitted_by", ["check", "caller"])
def test_a_right_hypergradient_passes(name, fitted_by):
    case = BILEVEL[name]()
    fit = None if fitted_by == "check" else lambda weights, hyper: case.minimum(hyper)
    result = check_case(case, fit=fit, directions=4)
    assert result.verdict is Verdict.CORRECT and result.passed, result
    assert len(result.errors) == 4 and max(result.errors) < 1e-6
    assert result.advice == ()
    assert result.given.gradient_norm < 1e-10
    eigenvalues = torch.linalg.eigvalsh(case.hessian)
    assert result.given.smallest == pytest.approx(float(eigenvalues[0]), rel=1e-6)
    assert result.given.largest == pytest.approx(float(eigenvalues[-1]), rel=1e-6)
    assert result.refitted.residual < 1e-6


@pytest.mark.parametrize("engine", ["auto", "linearized"])
def test_the_given_engine_is_the_one_tested(engine):
    assert check_case(ridge_bilevel(), engine=engine, directions=1).passed


def small_network(dtype: torch.dtype = DTYPE) -> tuple[Any, ...]:
    """Losses, weights, hyperparameters (a module) and batches of a classifier with a BatchNorm and a learned decay."""
    module = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).to(dtype)
    with torch.no_grad():
        for number, parameter in enumerate(module.parameters()):
            parameter.copy_(randn(*parameter.shape, seed=number))
    net = hvp.functional(module)
    decay = nn.ParameterDict({"log": torch.tensor(-4.0, dtype=dtype)})

    def train(weights: dict[str, Tensor], hyper: Any, batch: Any) -> Tensor:
        penalty = sum(w.square().sum() for w in weights.values())
        return cross_entropy(net(weights, batch[0]), batch[1]) + hyper["log"].exp() * penalty / 2

    def val(weights: dict[str, Tensor], hyper: Any, batch: Any) -> Tensor:
        return cross_entropy(net(weights, batch[0]), batch[1])

    labels = torch.randint(2, (40,), generator=generator(40))
    x = randn(40, 3, seed=41).to(dtype) + labels[:, None]
    return module, decay, train, val, ((x[:25], labels[:25]), (x[25:], labels[25:]))


def test_weights_of_a_network_are_followed_from_anywhere_to_a_minimum():
    module, decay, train, val, batches = small_network()
    result = hvp.check(
        train, val, module, decay, batches, solver=hvp.ConjugateGradient(60), directions=1, engine="eager"
    )
    assert result.verdict is Verdict.NOT_STATIONARY, result
    assert result.refitted.gradient_norm < 1e-9 < 1e-2 < result.given.gradient_norm


def test_float32_problems_are_compared_in_float64_where_their_losses_allow_it():
    module, decay, train, val, batches = small_network(torch.float32)
    weights = minimum_of(train, module, decay, batches[0])
    result = hvp.check(
        train, val, weights, decay, batches, solver=hvp.ConjugateGradient(40), directions=2, engine="eager"
    )
    assert result.passed, result
    assert result.step < 1e-5  # the step for float64
    assert result.refitted.gradient_norm < 1e-12


def minimum_of(train: Any, module: nn.Module, decay: Any, batch: Any) -> dict[str, Tensor]:
    weights = {name: p.detach().clone().requires_grad_() for name, p in module.named_parameters()}
    hyper = {name: p.detach() for name, p in decay.named_parameters()}
    options = {"max_iter": 500, "tolerance_grad": 1e-7, "tolerance_change": 0, "line_search_fn": "strong_wolfe"}
    optimizer = torch.optim.LBFGS(list(weights.values()), **options)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = train(weights, hyper, batch)
        loss.backward()
        return loss

    optimizer.step(closure)
    return {name: w.detach() for name, w in weights.items()}


def test_a_hypergradient_of_zero_passes():
    result = hvp.check(
        lambda w, h, batch: (w - h).square().sum() / 2,
        lambda w, h, batch: (w - 1).square().sum(),
        torch.ones(3, dtype=DTYPE),
        torch.ones(3, dtype=DTYPE),
        NOTHING,
        engine="eager",
    )
    assert result.passed, result


def test_the_callers_state_stays_as_it_was():
    module, decay, train, val, batches = small_network()
    for parameter in module.parameters():
        parameter.grad = torch.ones_like(parameter)
    before, random_state = copy.deepcopy(module.state_dict()), torch.get_rng_state()

    def fit(weights: Any, hyper: Any) -> Any:
        torch.rand(3)
        return {name: w.mul_(0.9) for name, w in weights.items()}  # in place, on copies

    hvp.check(train, val, module, decay, batches, fit=fit, directions=1)
    hvp.check(train, val, module, decay, batches, directions=1)
    for name, tensor in module.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert all(torch.equal(p.grad, torch.ones_like(p)) and p.requires_grad for p in module.parameters())
    assert torch.equal(torch.get_rng_state(), random_state)


def test_the_same_seed_gives_the_same_figures_and_another_seed_other_directions():
    first, again, other = (check_case(ridge_bilevel(), directions=2, seed=seed) for seed in (3, 3, 4))
    assert first == again
    assert first.hypergradients != other.hypergradients


# Each way to be wrong


def test_weights_away_from_the_minimum():
    case = ridge_bilevel()
    result = check_case(case, weights=case.weights + 0.3)
    assert result.verdict is Verdict.NOT_STATIONARY, result
    assert result.advice[0].startswith("train longer") and f"{result.given.gradient_norm:.2g}" in result.advice[0]
    assert dict(result.causes)["iterations too few"] < 1e-6


@pytest.mark.parametrize("solver", [hvp.Neumann(2), hvp.Identity()], ids=["Neumann", "Identity"])
def test_too_few_iterations(solver):
    case = quadratic_bilevel()
    result = check_case(case, solver=solver)
    assert result.verdict is Verdict.TOO_FEW_ITERATIONS, result
    assert result.refitted.residual > 0.1
    assert f"residual is {result.refitted.residual:.2g}" in result.advice[0]
    assert "hvp.ConjugateGradient(" in result.advice[0]


def test_the_iterations_that_the_advice_names_suffice():
    case = quadratic_bilevel()
    advice = check_case(case, solver=hvp.Neumann(1)).advice[0]
    count = int(advice.split("hvp.Neumann(")[1].split(")")[0])
    assert 5 < count < 30  # condition 4: 17 by the contraction of the slowest component
    assert check_case(case, solver=hvp.Neumann(count), tolerance=0.02).passed


def test_a_step_far_too_small_is_told_from_a_short_series():
    result = check_case(quadratic_bilevel(), solver=hvp.Neumann(300, alpha=1e-4))
    assert result.verdict is Verdict.TOO_FEW_ITERATIONS
    assert "a larger step (alpha=0.0001, while alpha=0.5 would converge)" in result.advice[0]


def test_damping_that_moves_the_solution():
    result = check_case(quadratic_bilevel(), solver=hvp.Neumann(300, damping=0.5))
    assert result.verdict is Verdict.DAMPED, result
    assert "damping=0.5" in result.advice[0]


def test_a_solve_that_diverges():
    result = check_case(quadratic_bilevel(), solver=hvp.Neumann(300, alpha=3.0))
    assert result.verdict is Verdict.DIVERGED, result
    assert "alpha" in result.advice[0]


def saddle() -> tuple[Any, Any, Tensor, Tensor]:
    """A stationary point of the training loss with curvatures 1 and -0.5."""
    curvature = torch.tensor([1.0, -0.5], dtype=DTYPE)
    hyper = torch.tensor([0.3, 0.7], dtype=DTYPE)
    return (
        lambda w, h, batch: (curvature * w.square()).sum() / 2 - w @ h,
        lambda w, h, batch: (w - 1).square().sum() / 2,
        hyper / curvature,
        hyper,
    )


@pytest.mark.parametrize("fitted_by", ["check", "caller"])
@pytest.mark.parametrize("iterations", [5, 400], ids=["short", "divergent"])
def test_an_indefinite_hessian(fitted_by, iterations):
    train, val, weights, hyper = saddle()
    fit = None if fitted_by == "check" else lambda w, h: h / torch.tensor([1.0, -0.5], dtype=DTYPE)
    result = hvp.check(train, val, weights, hyper, NOTHING, fit=fit, solver=hvp.Neumann(iterations), engine="eager")
    assert result.verdict is Verdict.INDEFINITE, result
    assert result.given.smallest == pytest.approx(-0.5)
    assert "damping=" in result.advice[0]


def test_curvature_that_is_negative_only_before_training():
    result = hvp.check(
        lambda w, h, batch: (w.square() - h).square().sum() / 4,  # curvature (3 w^2 - h): minima at +-sqrt(h)
        lambda w, h, batch: (w - 2).square().sum() / 2,
        torch.full((2,), 0.1, dtype=DTYPE),
        torch.tensor([1.0, 1.5], dtype=DTYPE),
        NOTHING,
        solver=hvp.Neumann(3),
        engine="eager",
    )
    assert result.verdict is Verdict.NOT_STATIONARY, result
    assert result.given.indefinite and not result.refitted.indefinite
    assert "until then the Hessian has negative curvature" in " ".join(result.advice)


def test_a_loss_with_dropout():
    result = check_case(ridge_bilevel(), train_loss=lambda w, h, batch: dropout(w, 0.5).square().sum() + (w * h).sum())
    assert result.verdict is Verdict.NOT_DETERMINISTIC, result
    assert result.advice[0].startswith("train_loss is") and "module.eval()" in result.advice[0]


def test_a_loss_with_a_random_state_of_its_own():
    source = generator(0)
    noisy = lambda w, h, batch: (w + torch.randn(6, generator=source, dtype=DTYPE)).square().sum()  # noqa: E731
    result = check_case(ridge_bilevel(), val_loss=noisy)
    assert result.verdict is Verdict.NOT_DETERMINISTIC
    assert result.advice[0].startswith("val_loss is")


def test_noise_of_finite_differences_in_float32():
    """A loss that brings along its own float32 data stays in float32; a tight tolerance is then out of reach."""
    case = ridge_bilevel()
    x, y = randn(30, 6, seed=16).float(), randn(30, seed=17).float()

    def train(w: Tensor, h: Tensor, batch: Any) -> Tensor:
        return (x @ w - y).square().sum() / 60 + (torch.exp(h) * w.square()).sum() / 2

    def val(w: Tensor, h: Tensor, batch: Any) -> Tensor:
        return 1000 + (x[:9] @ w - y[:9]).square().sum() / 18

    arguments = train, val, case.weights.float(), case.hyper.float(), NOTHING
    result = hvp.check(*arguments, solver=ENOUGH, engine="eager", step=1e-2, tolerance=1e-6)
    assert result.verdict is Verdict.NOISY, result
    assert "use float64 instead of float32" in result.advice[0]


def test_low_precision_weights():
    """Weights at the minimum exactly, but products and the validation gradient are rounded to 8 bits."""
    h = randn(40, seed=60).bfloat16()
    scale = randn(40, seed=61).abs() + 0.5
    result = hvp.check(
        lambda w, h, batch: (batch * (w - h).square()).sum() / 2,
        lambda w, h, batch: (batch * w).square().sum() / 2,
        h.clone(),
        h,
        (scale.bfloat16(), scale.bfloat16()),
        solver=ENOUGH,
        tolerance=3e-4,
        engine="eager",
    )
    assert result.verdict is Verdict.LOW_PRECISION, result
    assert dict(result.causes)["not stationary"] < 1e-6
    assert "float32 or float64" in result.advice[0]


# The report and the arguments


def test_the_report_shows_what_it_judged_by():
    result = check_case(quadratic_bilevel(), solver=hvp.Neumann(1), directions=2)
    text = str(result)
    assert text.startswith(f"hypergradient check: {result.verdict.value}\n")
    for figure in ("relative error", "||dL_T/dw||", "largest curvature", "smallest curvature seen", "residual"):
        assert figure in text
    for value in (*result.hypergradients, *result.finite_differences):
        assert f"{value:.5g}" in text
    assert text.endswith(f"- {result.advice[-1]}")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tolerance": 0.0}, "tolerance: expected a finite number > 0; got 0.0"),
        ({"step": -1.0}, "step: expected a finite number > 0; got -1.0"),
        ({"directions": 0}, "directions: expected an int >= 1; got 0"),
        ({"fit": 3}, "fit: expected a function of"),
        ({"solver": 3}, "solver: expected a solver"),
        ({"fit": lambda w, h: [w]}, "fit.weights, hyper.: expected the container of weights"),
        ({"fit": lambda w, h: w[:3]}, r"fit.weights, hyper.\[0\]: expected shape \(6,\)"),
        ({"fit": lambda w, h: None}, "fit.weights, hyper."),
        ({"engine": "warp"}, "engine: expected one of"),
    ],
)
def test_bad_arguments_are_named(options, message):
    with pytest.raises((TypeError, ValueError), match=message):
        check_case(ridge_bilevel(), **options)


def test_batches_are_a_pair():
    case = ridge_bilevel()
    with pytest.raises(ValueError, match="batches: expected the pair"):
        hvp.check(case.train_loss, case.val_loss, case.weights, case.hyper, torch.ones(3))
