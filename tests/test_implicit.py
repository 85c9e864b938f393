"""Hypergradients in three styles against closed forms, gradcheck with a re-solved inner problem, and unrolling."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import BILEVEL, DTYPE, NETWORKS, Bilevel, dense_hessian, flat, randn, relative_error, truncated_sum
from torch import Tensor, nn
from torch.autograd.gradcheck import GradcheckError
from torch.nn.functional import cross_entropy, dropout

import hvp_engine as hvp
from hvp_engine.memory import peak_memory


@pytest.fixture(params=BILEVEL)
def problem(request: pytest.FixtureRequest) -> Bilevel:
    return BILEVEL[request.param]()


def tape_style(problem: Bilevel, solver: Any, w: Tensor | None = None) -> Tensor:
    w = (problem.weights if w is None else w).clone().requires_grad_()
    h = problem.hyper.clone().requires_grad_()
    (grad,) = hvp.hypergradient(problem.train_loss(w, h, None), problem.val_loss(w, h, None), w, h, solver)
    return grad


def functional_style(problem: Bilevel, solver: Any, w: Tensor | None = None) -> Tensor:
    hypergradient = hvp.Hypergradient(problem.train_loss, problem.val_loss, solver=solver)
    return hypergradient(problem.weights if w is None else w, problem.hyper, None, None).grads


def best_response_style(problem: Bilevel, solver: Any, w: Tensor | None = None) -> Tensor:
    w = (problem.weights if w is None else w).clone().requires_grad_()
    h = problem.hyper.clone().requires_grad_()
    (response,) = hvp.best_response(problem.train_loss(w, h, None), w, h, solver)
    problem.val_loss(response, h, None).backward()
    assert w.grad is None
    assert h.grad is not None
    return h.grad


def by_hand(problem: Bilevel, solver: Any, w: Tensor | None = None) -> Tensor:
    """Put together from approx_inverse_hvp, as public training scripts do."""
    w = (problem.weights if w is None else w).clone().requires_grad_()
    h = problem.hyper.clone().requires_grad_()
    f = torch.autograd.grad(problem.train_loss(w, h, None), w, create_graph=True)
    v, direct = torch.autograd.grad(problem.val_loss(w, h, None), [w, h])
    p = hvp.approx_inverse_hvp(v, f, w, solver.iterations, solver.alpha, damping=solver.damping)
    (mixed,) = torch.autograd.grad(f, h, p)
    return direct - mixed


STYLES: dict[str, Callable[..., Tensor]] = {
    "tape": tape_style,
    "functional": functional_style,
    "best_response": best_response_style,
    "by hand": by_hand,
}


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


# gradcheck: the inner problem is solved again for every perturbed input.


def test_gradcheck_of_the_implicit_function(problem: Bilevel) -> None:
    """The whole Jacobian dw*/dh."""

    def minimum(h: Tensor) -> Tensor:
        w = problem.minimum(h.detach()).requires_grad_()
        (response,) = hvp.best_response(problem.train_loss(w, h, None), w, h, hvp.Neumann(300, alpha=problem.alpha))
        return response

    assert torch.autograd.gradcheck(minimum, problem.hyper.clone().requires_grad_(), eps=1e-5, atol=1e-7, rtol=1e-6)


def test_gradcheck_of_the_validation_loss(problem: Bilevel) -> None:
    """Both terms of the hypergradient."""

    def objective(h: Tensor) -> Tensor:
        w = problem.minimum(h.detach()).requires_grad_()
        (response,) = hvp.best_response(problem.train_loss(w, h, None), w, h, hvp.Neumann(300, alpha=problem.alpha))
        return problem.val_loss(response, h, None)

    assert torch.autograd.gradcheck(objective, problem.hyper.clone().requires_grad_(), eps=1e-5, atol=1e-7, rtol=1e-6)


def test_gradcheck_rejects_too_few_terms() -> None:
    problem = BILEVEL["quadratic"]()

    def minimum(h: Tensor) -> Tensor:
        w = problem.minimum(h.detach()).requires_grad_()
        return hvp.best_response(problem.train_loss(w, h, None), w, h, hvp.Neumann(3, alpha=problem.alpha))[0]

    with pytest.raises(GradcheckError):
        torch.autograd.gradcheck(minimum, problem.hyper.clone().requires_grad_(), eps=1e-5, atol=1e-7, rtol=1e-6)


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


# What comes back


def test_result_of_a_call(problem: Bilevel) -> None:
    w = problem.weights + 0.1
    solver = hvp.Neumann(600)
    result = hvp.Hypergradient(problem.train_loss, problem.val_loss, solver)(w, problem.hyper, None, None)
    leaf = w.clone().requires_grad_()
    train, val = problem.train_loss(leaf, problem.hyper, None), problem.val_loss(leaf, problem.hyper, None)
    (gradient,) = torch.autograd.grad(train, leaf, retain_graph=True)
    torch.testing.assert_close(result.train_loss, train.detach())
    torch.testing.assert_close(result.val_loss, val.detach())
    torch.testing.assert_close(result.gradient_norm, gradient.norm())
    (v,) = torch.autograd.grad(val, leaf)
    hessian = torch.autograd.functional.hessian(lambda w: problem.train_loss(w, problem.hyper, None), w)
    torch.testing.assert_close(result.solution.value, torch.linalg.solve(hessian, v), rtol=1e-8, atol=1e-10)
    assert result.solution.converged and result.solution.hvps >= 600


def test_gradient_norm_is_zero_at_the_minimum(problem: Bilevel) -> None:
    result = hvp.Hypergradient(problem.train_loss, problem.val_loss)(problem.weights, problem.hyper, None, None)
    assert float(result.gradient_norm) < 1e-12


@pytest.mark.parametrize(
    "container", [list, tuple, lambda x: dict(zip("ab", x, strict=True)), lambda x: {"n": list(x)}]
)
def test_trees_come_back_as_they_were_given(container: Callable[[Any], Any]) -> None:
    def parts(tree: Any) -> list[Tensor]:
        return torch.utils._pytree.tree_leaves(tree)

    def train(w: Any, h: Any, batch: Tensor) -> Tensor:
        return sum(((a - batch * b) ** 2).sum() for a, b in zip(parts(w), parts(h), strict=True)) / 2

    def val(w: Any, h: Any, batch: Tensor) -> Tensor:
        return sum((a**2).sum() for a in parts(w)) / 2

    hyper = [randn(3, seed=1), randn(1, seed=2)[0]]
    result = hvp.Hypergradient(train, val, hvp.Neumann(60))(
        container([2 * h for h in hyper]), container(hyper), torch.tensor(2.0, dtype=DTYPE), None
    )
    structure = torch.utils._pytree.tree_structure(container(hyper))
    assert torch.utils._pytree.tree_structure(result.grads) == structure
    assert torch.utils._pytree.tree_structure(result.solution.value) == structure
    torch.testing.assert_close(parts(result.grads), [4 * h for h in hyper])  # w* = 2 h, L_V = (2 h)^2 / 2


def test_modules_stand_for_their_parameters() -> None:
    model, decays = nn.Linear(3, 2, dtype=DTYPE), nn.Linear(3, 2, dtype=DTYPE)
    net = hvp.functional(model)
    x = randn(8, 3, seed=3)

    def train(w: dict[str, Tensor], h: dict[str, Tensor], batch: Any) -> Tensor:
        return net(w, x).square().mean() + sum((h[name].exp() * w[name].square()).sum() for name in w)

    result = hvp.Hypergradient(train, lambda w, h, b: net(w, x).mean(), hvp.Neumann(5))(model, decays, None, None)
    assert list(result.grads) == ["weight", "bias"] and result.grads["weight"].shape == (2, 3)
    assert list(result.solution.value) == ["weight", "bias"]


def test_tape_style_takes_single_tensors_sequences_and_generators() -> None:
    w = [randn(2, seed=4).requires_grad_(), randn(3, seed=5).requires_grad_()]
    h = [torch.tensor(0.5, dtype=DTYPE, requires_grad=True)]
    train = h[0] * (w[0].square().sum() + w[1].square().sum()) / 2 + w[0].sum()
    val = w[0].sum() + w[1].square().sum()
    results = [
        hvp.hypergradient(train, val, weights(w), hyper(h), hvp.Neumann(50, alpha=1.0))
        for weights in (list, tuple, iter)
        for hyper in (list, iter, lambda h: h[0])
    ]
    assert all(isinstance(result, tuple) and len(result) == 1 for result in results)
    assert all(torch.equal(result[0], results[0][0]) for result in results)
    expected = -((w[0].detach() / 0.5).sum() + 2 * w[1].detach().square().sum() / 0.5)
    torch.testing.assert_close(results[0][0], expected)


# Tensors of every kind


def test_unused_weights_and_hyperparameters_get_zeros() -> None:
    weights = {"used": randn(3, seed=6), "unused": randn(2, seed=7)}
    hyper = {"used": torch.tensor(0.3, dtype=DTYPE), "unused": randn(4, seed=8)}
    train = lambda w, h, b: (h["used"].exp() + 1) * w["used"].square().sum()  # noqa: E731
    val = lambda w, h, b: w["used"].sum() + w["unused"].sum()  # noqa: E731
    result = hvp.Hypergradient(train, val, hvp.Neumann(20, alpha=0.2))(weights, hyper, None, None)
    assert torch.equal(result.grads["unused"], torch.zeros(4, dtype=DTYPE))
    assert float(result.grads["used"].abs()) > 0
    only_val = lambda w, h, b: w["unused"].sum() + h["used"]  # noqa: E731
    result = hvp.Hypergradient(train, only_val, hvp.Neumann(20, alpha=0.2))(weights, hyper, None, None)
    assert float(result.grads["used"]) == 1.0
    assert torch.equal(result.solution.value["used"], torch.zeros(3, dtype=DTYPE))


def test_frozen_tensors_tape_style() -> None:
    w = randn(3, seed=9).requires_grad_()
    frozen_weight, h, frozen_hyper = randn(2, seed=10), randn(3, seed=11).requires_grad_(), randn(3, seed=12)
    train = ((w - h * frozen_hyper) ** 2).sum() / 2 + frozen_weight.sum()
    val = w.square().sum() / 2
    solver = hvp.Neumann(40, alpha=0.5)
    grads = hvp.hypergradient(train, val, [w, frozen_weight], [h, frozen_hyper], solver)
    torch.testing.assert_close(grads[0], w.detach() * frozen_hyper)
    assert torch.equal(grads[1], torch.zeros(3, dtype=DTYPE))
    response, frozen_response = hvp.best_response(train, [w, frozen_weight], [h, frozen_hyper], solver)
    assert torch.equal(frozen_response, frozen_weight)
    (response.square().sum() / 2).backward()
    torch.testing.assert_close(h.grad, w.detach() * frozen_hyper)
    assert frozen_hyper.grad is None and w.grad is None


def test_zero_dim_weights_and_hyperparameters() -> None:
    """L_T = (w - h)^2, L_V = w^3: dL_V/dh = 3 h^2."""
    h = torch.tensor(1.5, dtype=DTYPE)
    result = hvp.Hypergradient(lambda w, h, b: (w - h) ** 2, lambda w, h, b: w**3, hvp.Neumann(60))(h, h, None, None)
    assert result.grads.shape == ()
    torch.testing.assert_close(result.grads, 3 * h**2)


@pytest.mark.parametrize("style", ["tape", "functional"])
def test_non_contiguous_and_channels_last(style: str) -> None:
    """w* = h elementwise, with the weight, the hyperparameter and v all in other storage orders."""
    h = randn(2, 3, 4, 5, seed=13)
    w = h.to(memory_format=torch.channels_last).clone()
    c = randn(5, 4, 3, 2, seed=14).permute(3, 2, 1, 0)
    train = lambda w, h, b: ((w - h) ** 2).sum() / 2 + ((w - h) ** 4).sum()  # noqa: E731
    val = lambda w, h, b: (w * c).sum()  # noqa: E731
    if style == "functional":
        grads = hvp.Hypergradient(train, val, hvp.Neumann(40, alpha=0.5))(w, h, None, None).grads
    else:
        w.requires_grad_(), h.requires_grad_()
        (grads,) = hvp.hypergradient(train(w, h, 0), val(w, h, 0), w, h, hvp.Neumann(40, alpha=0.5))
    torch.testing.assert_close(grads, c, rtol=1e-9, atol=0, check_stride=False)


@pytest.mark.parametrize(
    ("first", "second", "tolerance"),
    [(torch.float32, torch.float64, 1e-6), (torch.bfloat16, torch.float32, 2e-2)],
    ids=["fp32+fp64", "bf16+fp32"],
)
def test_mixed_dtypes(first: torch.dtype, second: torch.dtype, tolerance: float) -> None:
    hyper = [randn(3, seed=15).to(first), randn(2, seed=16).to(second)]
    weights = [2 * hyper[0], 2 * hyper[1]]

    def train(w: list[Tensor], h: list[Tensor], batch: Any) -> Tensor:
        return sum(((a - 2 * b) ** 2).sum().to(second) for a, b in zip(w, h, strict=True))

    result = hvp.Hypergradient(
        train, lambda w, h, b: sum(a.square().sum().to(second) for a in w), hvp.Neumann(40, alpha=0.3)
    )(weights, hyper, None, None)
    assert [g.dtype for g in result.grads] == [first, second] == [x.dtype for x in result.solution.value]
    assert relative_error(flat(result.grads), 8 * flat(hyper)) < tolerance


@pytest.mark.parametrize("style", ["tape", "functional"])
def test_sparse_embedding_gradients(style: str) -> None:
    table, words = randn(6, 3, seed=17), torch.tensor([0, 2, 2, 5])
    decay = randn(6, 3, seed=18)

    def rows(w: Tensor) -> Tensor:
        return torch.nn.functional.embedding(words, w, sparse=True)

    train = lambda w, h, b: rows(w).square().sum() / 2 + (h.exp() * w.square()).sum() / 2  # noqa: E731
    val = lambda w, h, b: rows(w).sum()  # noqa: E731
    counts = torch.bincount(words, minlength=6).to(DTYPE)[:, None]
    expected = -decay.exp() * table * counts / (counts + decay.exp())
    if style == "functional":
        grad = hvp.Hypergradient(train, val, hvp.Neumann(2000))(table, decay, None, None).grads
    else:
        w, h = table.clone().requires_grad_(), decay.clone().requires_grad_()
        (grad,) = hvp.hypergradient(train(w, h, 0), val(w, h, 0), w, h, hvp.Neumann(2000))
    torch.testing.assert_close(grad, expected, rtol=1e-8, atol=1e-12)


@pytest.mark.filterwarnings("ignore:.*plain kernels")
@pytest.mark.parametrize("name", NETWORKS)
def test_network_with_a_decay_for_each_weight(name: str) -> None:
    """-e^h w . (sum of powers of I - alpha (H + diag e^h)) v, with H from a double loop, through every layer."""
    network = NETWORKS[name]()
    net = hvp.functional(network.module)
    weights = dict(network.module.named_parameters())
    hyper = {name: torch.full_like(w, -1.0).detach() for name, w in weights.items()}

    def train(w: dict[str, Tensor], h: dict[str, Tensor], batch: Tensor) -> Tensor:
        data = cross_entropy(
            net(w, batch), network.y
        )  # first: torch adds sparse gradients to dense ones, not vice versa
        return data + torch.stack([(h[name].exp() * w[name].square()).sum() for name in w]).sum() / 2

    def val(w: dict[str, Tensor], h: dict[str, Tensor], batch: Tensor) -> Tensor:
        return torch.stack([part.sin().sum() for part in w.values()]).sum()

    hypergradient = hvp.Hypergradient(train, val, hvp.Neumann(6, alpha=0.2))
    grads = hypergradient(network.module, hyper, network.x, None).grads
    point = flat(list(weights.values()))
    decay = torch.full_like(point, torch.e**-1.0)
    expected = -decay * point * truncated_sum(dense_hessian(network) + torch.diag(decay), point.cos(), 6, 0.2)
    assert relative_error(flat(list(grads.values())), expected) < 1e-11
    assert all(grads[name].stride() == weights[name].stride() for name in grads)


# The caller's state


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


@pytest.mark.parametrize("failure", ["none", "in train_loss", "in val_loss", "divergence", "bad hyper"])
def test_functional_style_leaves_the_callers_state(failure: str) -> None:
    module = busy_module()
    net, x, y = hvp.functional(module), randn(7, 3, seed=19), torch.arange(7) % 2
    hyper = torch.zeros(3, dtype=DTYPE, requires_grad=True)
    hyper.grad = torch.ones_like(hyper)

    def loss(name: str) -> Callable[..., Tensor]:
        def function(w: dict[str, Tensor], h: Tensor, batch: Tensor) -> Tensor:
            value = cross_entropy(net(w, batch * h.exp()), y) + torch.rand((), dtype=DTYPE)
            if failure == f"in {name}":
                raise KeyError("from the loss")
            return value

        return function

    alpha = 1e6 if failure == "divergence" else 0.1
    hypergradient = hvp.Hypergradient(loss("train_loss"), loss("val_loss"), hvp.Neumann(4, alpha=alpha))
    before = snapshot(module)
    arguments: tuple[Any, ...] = (module, "nothing" if failure == "bad hyper" else hyper, x, x)
    if failure == "none":
        hypergradient(*arguments)
    else:
        with pytest.raises((KeyError, hvp.DivergenceError, TypeError)):
            hypergradient(*arguments)
    assert same(before, snapshot(module))
    assert torch.equal(hyper.detach(), torch.zeros(3, dtype=DTYPE)) and hyper.requires_grad
    assert torch.equal(hyper.grad, torch.ones_like(hyper))
    assert torch.is_grad_enabled()


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
    for style in STYLES.values():
        assert torch.equal(style(problem, solver), style(problem, solver))
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
    torch.manual_seed(8)
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
    with pytest.raises(hvp.GraphError, match="hyperparameters: expected at least one"):
        if style == "functional":
            hvp.Hypergradient(lambda w, h, b: w.square().sum(), lambda w, h, b: w.sum())(w, h, None, None)
        elif style == "tape":
            hvp.hypergradient(w.square().sum(), w.sum(), w, h)
        else:
            hvp.best_response(w.square().sum(), w, h)[0].sum().backward()


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
