"""Hypergradients through fixed points: closed forms, truncation, an equilibrium layer, a momentum map, the Tuner."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from problems_with_known_answers import DTYPE, randn, relative_error
from torch import Tensor

import hvp_engine as hvp

SIZE = 6


def contraction(seed: int, radius: float = 0.5) -> Tensor:
    """A matrix far from symmetric with this spectral radius."""
    matrix = randn(SIZE, SIZE, seed=seed)
    return radius * matrix / torch.linalg.eigvals(matrix).abs().max()


def linear(w: Tensor, h: Any, batch: Tensor) -> Tensor:
    return batch @ w + h["a"] * h["b"]


def quadratic(w: Tensor, h: Any, batch: Tensor) -> Tensor:
    return (w * batch).sum() + (w.square().sum() + h["a"].square().sum()) / 2


def linear_problem() -> tuple[Any, Any, Tensor, Tensor, dict[str, Tensor]]:
    """Weights, hyperparameters, both batches, and the hypergradient written out by hand."""
    matrix, hyper = contraction(seed=1), {"a": randn(SIZE, seed=2), "b": randn(SIZE, seed=3)}
    resolvent = torch.linalg.inv(torch.eye(SIZE, dtype=DTYPE) - matrix)
    w, slope = resolvent @ (hyper["a"] * hyper["b"]), randn(SIZE, seed=4)
    x = resolvent.T @ (slope + w)
    truth = {"a": hyper["a"] + hyper["b"] * x, "b": hyper["a"] * x}
    return w, hyper, matrix, slope, truth


# Closed forms


def test_linear_map_against_its_closed_form() -> None:
    w, hyper, matrix, slope, truth = linear_problem()
    result = hvp.FixedPointHypergradient(linear, quadratic, hvp.Neumann(200))(w, hyper, matrix, slope)
    assert result.solution.converged and result.solution.alpha == 1.0
    torch.testing.assert_close(result.grads, truth, rtol=1e-11, atol=1e-12)
    assert float(result.gradient_norm) < 1e-13 and float(result.train_loss) < 1e-26
    transposed = torch.linalg.solve(torch.eye(SIZE, dtype=DTYPE) - matrix, slope + w)
    assert relative_error(hyper["a"] * transposed, truth["b"]) > 0.1, "which side the transpose is on has to matter"


@pytest.mark.parametrize("form", ["accumulate", "horner"])
@pytest.mark.parametrize(("iterations", "alpha", "damping"), [(0, 1.0, 0.0), (3, 1.0, 0.0), (7, 0.6, 0.2)])
def test_truncated_series_term_by_term(form: Any, iterations: int, alpha: float, damping: float) -> None:
    w, hyper, matrix, slope, truth = linear_problem()
    solver = hvp.Neumann(iterations, alpha=alpha, damping=damping, form=form)
    grads = hvp.FixedPointHypergradient(linear, quadratic, solver)(w, hyper, matrix, slope).grads
    step = (1 - alpha - alpha * damping) * torch.eye(SIZE, dtype=DTYPE) + alpha * matrix.T
    v = slope + w
    x = alpha * sum(torch.linalg.matrix_power(step, j) @ v for j in range(iterations + 1))
    torch.testing.assert_close(grads["b"], hyper["a"] * x, rtol=1e-12, atol=1e-13)
    assert relative_error(grads["b"], truth["b"]) > 1e-3, "so few terms must not be enough"


def test_truncation_equals_reverse_mode_through_applications_of_the_map() -> None:
    w, hyper, matrix, slope, _ = linear_problem()
    solver = hvp.Neumann(4, alpha=1.0)
    grads = hvp.FixedPointHypergradient(linear, quadratic, solver)(w, hyper, matrix, slope).grads
    leaves = {name: t.clone().requires_grad_() for name, t in hyper.items()}
    unrolled = w
    for _ in range(5):
        unrolled = linear(unrolled, leaves, matrix)
    quadratic(unrolled, leaves, slope).backward()
    torch.testing.assert_close(grads, {name: t.grad for name, t in leaves.items()}, rtol=1e-12, atol=1e-13)


def test_the_solver_without_products_takes_x_for_v() -> None:
    w, hyper, matrix, slope, _ = linear_problem()
    grads = hvp.FixedPointHypergradient(linear, quadratic, hvp.Identity())(w, hyper, matrix, slope).grads
    torch.testing.assert_close(grads["b"], hyper["a"] * (slope + w), rtol=1e-13, atol=0)


def test_automatic_alpha_accounts_for_damping() -> None:
    """No contraction, but with damping: I - alpha (A + damping I) = J^T / (1 + damping)."""
    w, hyper, matrix, slope, _ = linear_problem()
    wide = 3 * matrix  # spectral radius 1.5
    hg = hvp.FixedPointHypergradient(linear, quadratic, hvp.Neumann(300, damping=1.0))
    with pytest.warns(UserWarning, match=r"far from a fixed point of phi: \|\|w - phi\(w\)\|\| is"):
        result = hg(w, hyper, wide, slope)  # these are no weights that it leaves as they are
    assert result.solution.alpha == 0.5 and result.solution.converged
    x = torch.linalg.solve(2 * torch.eye(SIZE, dtype=DTYPE) - wide.T, slope + w)
    torch.testing.assert_close(result.grads["b"], hyper["a"] * x, rtol=1e-10, atol=1e-12)


# Against Hypergradient


def train_loss(w: Any, h: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
    x, y = batch
    output = torch.tanh(x @ w["first"]) @ w["second"]
    return (output - y).square().mean() + (h.exp() * w["first"].square()).sum() + 0.1 * w["second"].square().sum()


def val_loss(w: Any, h: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
    x, y = batch
    return (torch.tanh(x @ w["first"]) @ w["second"] - y).square().mean() + 0.01 * h.sum()


def gradient_of(w: Any, h: Tensor, batch: Any) -> list[Tensor]:
    return list(torch.autograd.grad(train_loss(w, h, batch), list(w.values()), create_graph=True))


def network() -> tuple[Any, Tensor, Any, Any]:
    weights = {"first": randn(3, 4, seed=11), "second": randn(4, 1, seed=12)}
    batches = [(randn(8, 3, seed=s), randn(8, 1, seed=s + 1)) for s in (13, 15)]
    return weights, randn(3, 4, seed=17) / 4 - 1, *batches


def test_a_gradient_step_gives_what_hypergradient_gives() -> None:
    """Not only in the limit: term by term, with alpha the length of the step."""
    weights, hyper, train, val = network()

    def step(w: Any, h: Tensor, batch: Any) -> Any:
        return {name: t - 0.05 * g for (name, t), g in zip(w.items(), gradient_of(w, h, batch), strict=True)}

    for iterations in (0, 1, 10):
        ours = hvp.FixedPointHypergradient(step, val_loss, hvp.Neumann(iterations, alpha=1.0))
        theirs = hvp.Hypergradient(train_loss, val_loss, hvp.Neumann(iterations, alpha=0.05), engine="eager")
        found, expected = (hg(weights, hyper, train, val) for hg in (ours, theirs))
        torch.testing.assert_close(found.grads, expected.grads, rtol=1e-11, atol=1e-13)
        torch.testing.assert_close(found.gradient_norm, 0.05 * expected.gradient_norm, rtol=1e-12, atol=0)
        torch.testing.assert_close(found.unfinished, expected.unfinished, rtol=1e-10, atol=1e-13)


def test_a_momentum_map_has_the_hypergradient_of_its_loss() -> None:
    """The state is (weights, velocities), and its Jacobian is not symmetric: the limit is that of the loss."""
    hessian = randn(5, 5, seed=21)
    hessian = hessian @ hessian.T / 5 + torch.eye(5, dtype=DTYPE)

    def loss(w: Tensor, h: Tensor, batch: Any) -> Tensor:
        return w @ hessian @ w / 2 - (h * w).sum()

    def phi(state: Any, h: Tensor, batch: Any) -> Any:
        velocity = 0.8 * state["velocity"] - 0.1 * (hessian @ state["w"] - h)
        return {"w": state["w"] + velocity, "velocity": velocity}

    h, slope = randn(5, seed=22), randn(5, seed=23)
    w = torch.linalg.solve(hessian, h)
    state = {"w": w, "velocity": torch.zeros(5, dtype=DTYPE)}
    hg = hvp.FixedPointHypergradient(phi, lambda s, h, batch: s["w"] @ slope, hvp.Neumann(400))
    grads = hg(state, h, None, None).grads
    torch.testing.assert_close(grads, torch.linalg.solve(hessian, slope), rtol=1e-9, atol=1e-11)
    expected = hvp.Hypergradient(loss, lambda w, h, batch: w @ slope, hvp.Neumann(400), engine="eager")
    torch.testing.assert_close(grads, expected(w, h, None, None).grads, rtol=1e-9, atol=1e-11)


# A deep equilibrium layer


def layer(z: Tensor, h: Any, x: Tensor) -> Tensor:
    return torch.tanh(z @ h["W"].T + x @ h["U"].T + h["b"])


def equilibrium(h: Any, x: Tensor) -> Tensor:
    z = torch.zeros(len(x), len(h["b"]), dtype=DTYPE)
    for _ in range(200):
        z = layer(z, h, x)
    return z


def test_an_equilibrium_layer_against_finite_differences() -> None:
    """One hidden state for each sample; the parameters are the hyperparameters, re-solved at every difference."""
    x, target = randn(4, 3, seed=31), randn(4, SIZE, seed=32)
    h = {"W": contraction(33, 0.7), "U": randn(SIZE, 3, seed=34), "b": randn(SIZE, seed=35)}

    def val(z: Tensor, h: Any, y: Tensor) -> Tensor:
        return (z - y).square().mean()

    before = {name: t.clone() for name, t in h.items()}
    result = hvp.FixedPointHypergradient(layer, val, hvp.Neumann(150))(equilibrium(h, x), h, x, target)
    assert all(torch.equal(before[name], h[name]) and not h[name].requires_grad for name in h)
    for name, grad in result.grads.items():
        direction = randn(*grad.shape, seed=36)
        sides = [val(equilibrium(h | {name: h[name] + sign * 1e-5 * direction}, x), h, target) for sign in (1.0, -1.0)]
        assert float((grad * direction).sum()) == pytest.approx(float(sides[0] - sides[1]) / 2e-5, rel=1e-7)


def test_a_tuner_learns_an_equilibrium_layer() -> None:
    """Inner steps of SGD on f = z - Phi(z) are the fixed-point iteration; the hypergradient trains the layer."""
    x = randn(5, 3, seed=41)
    teacher = {"W": contraction(42, 0.5), "U": randn(SIZE, 3, seed=43), "b": randn(SIZE, seed=44)}
    target = equilibrium(teacher, x)
    h = {name: torch.zeros_like(t) for name, t in teacher.items()}
    z = torch.zeros(5, SIZE, dtype=DTYPE)

    def val(z: Tensor, h: Any, y: Tensor) -> Tensor:
        return (z - y).square().mean()

    tuner = hvp.Tuner(
        z,
        h,
        lambda z, h, x: (z * (z - layer(z, h, x)).detach()).sum(),
        val,
        weight_optimizer=lambda tensors: torch.optim.SGD(tensors, lr=1.0),
        hyper_optimizer=lambda tensors: torch.optim.Adam(tensors, lr=0.05),
        estimator=hvp.FixedPointHypergradient(layer, val, hvp.Neumann(20)),
        inner_steps=10,
    )
    tuner.fit([x], [target], hyper_steps=100, progress=False)
    start = equilibrium({name: torch.zeros_like(t) for name, t in h.items()}, x)
    assert float(val(equilibrium(h, x), h, target)) < 0.05 * float(val(start, h, target))


# Bad input


@pytest.mark.parametrize("solver", [hvp.ConjugateGradient(5), hvp.Exact()], ids=repr)
def test_solvers_that_need_symmetry_are_refused(solver: Any) -> None:
    with pytest.raises(ValueError, match=rf"^solver: .*symmetric.*hvp\.Neumann.*got {type(solver).__name__}"):
        hvp.FixedPointHypergradient(linear, quadratic, solver)


def test_a_map_that_does_not_contract_is_named() -> None:
    w, hyper, matrix, slope, _ = linear_problem()
    hg = hvp.FixedPointHypergradient(linear, quadratic, hvp.Neumann(200))
    with pytest.raises(hvp.DivergenceError, match=r"^phi: expected a map that contracts.*smaller alpha"):
        hg(w, hyper, 4 * matrix, slope)
    with pytest.raises(hvp.NonFiniteError, match=r"dL_V/dw"):
        hg(w, hyper, matrix, slope * torch.nan)


@pytest.mark.parametrize(
    ("phi", "message"),
    [
        (lambda w, h, batch: (w, w), r"^phi\(weights\): expected the container of weights"),
        (lambda w, h, batch: w[1:], r"^phi\(weights\)\[0\]: expected shape \(6,\)"),
        (lambda w, h, batch: w.float(), r"^phi\(weights\)\[0\]: .*float64.*got .*float32"),
    ],
)
def test_a_map_to_something_else_is_named(phi: Any, message: str) -> None:
    w, hyper, matrix, slope, _ = linear_problem()
    with pytest.raises(ValueError, match=message):
        hvp.FixedPointHypergradient(phi, quadratic)(w, hyper, matrix, slope)
    with pytest.raises(TypeError, match=r"^phi: expected a function of \(weights, hyper, batch\)"):
        hvp.FixedPointHypergradient(w, quadratic)  # type: ignore[arg-type]
