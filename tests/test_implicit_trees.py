"""What goes in and comes back: containers, modules, and tensors of every kind, through every kind of layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from problems_with_known_answers import (
    DTYPE,
    NETWORKS,
    Bilevel,
    dense_hessian,
    flat,
    randn,
    relative_error,
    truncated_sum,
)
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import hvp_engine as hvp

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


def test_frozen_parameters_of_a_module_are_no_weights() -> None:
    module = torch.nn.Linear(3, 2, dtype=DTYPE)
    module.bias.requires_grad_(False)
    net, x = hvp.functional(module), randn(5, 3, seed=1)
    hypergradient = hvp.Hypergradient(
        lambda w, h, batch: net(w, batch).square().mean() + h.exp() * sum(t.square().sum() for t in w.values()),
        lambda w, h, batch: (net(w, batch) - 1).square().mean(),
        hvp.Exact(),
        "eager",
    )
    hyper = torch.zeros((), dtype=DTYPE)
    found = hypergradient(module, hyper, x, x)
    expected = hypergradient({"weight": module.weight}, hyper, x, x)
    assert found.solution.value.keys() == {"weight"}
    assert torch.equal(found.grads, expected.grads)


class Holder:
    """A container that torch does not know, and no mapping; not hashable, so that only its address tells."""

    __hash__ = None  # type: ignore[assignment]

    def __init__(self, x: Tensor | None = None):
        self.x = x


@pytest.mark.parametrize("kind", ["changed in place", "a new one each time", "an array"])
@pytest.mark.parametrize("engine", ["auto", "linearized"])
def test_batches_whose_content_a_trace_cannot_see(engine: str, kind: str) -> None:
    def pair(name: str) -> hvp.Hypergradient:
        def values(batch: Any) -> Tensor:
            return torch.from_numpy(batch) if kind == "an array" else batch.x

        return hvp.Hypergradient(
            lambda w, h, batch: (w - values(batch)).square().sum() + h * w.square().square().sum(),
            lambda w, h, batch: (w + values(batch)).square().sum(),
            hvp.Neumann(3, 0.1),
            name,
        )

    traced, eager, kept = pair(engine), pair("eager"), Holder()
    w, h = randn(3, seed=2), torch.ones((), dtype=DTYPE)
    for seed in range(6):
        kept.x = x = randn(3, seed=seed)
        batch = x.numpy() if kind == "an array" else kept if kind == "changed in place" else Holder(x)
        if engine == "linearized":
            with pytest.raises(
                hvp.TraceError, match="got one with a (Holder|ndarray), whose content a trace would keep"
            ):
                traced(w, h, batch, batch)
        else:
            found, expected = traced(w, h, batch, batch).grads, eager(w, h, batch, batch).grads
            torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)


def test_an_iterator_as_a_batch_is_read_once() -> None:
    hypergradient = hvp.Hypergradient(
        lambda w, h, batch: h * w.square().sum() + sum((w - x).square().sum() for x in batch),
        lambda w, h, batch: w.sum(),
        hvp.Neumann(60, 0.1),
    )
    w, h, x = randn(3, seed=2), torch.ones((), dtype=DTYPE), randn(3, seed=3)
    found = hypergradient(w, h, iter([x, x]), None).grads
    torch.testing.assert_close(found, -(2 * w).sum() / 6)


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


@pytest.mark.parametrize("solver", [hvp.ConjugateGradient(10), hvp.Chebyshev(60), hvp.Exact()], ids=str)
def test_frozen_weights_are_no_part_of_the_system(solver: Any) -> None:
    """Also where the validation loss depends on them: L_T = (w - h)^2 / 2 . curvature + f w, L_V = w^2 / 2 + f^2."""
    w, frozen = randn(3, seed=9).requires_grad_(), randn(2, seed=10)
    h, curvature = randn(3, seed=11).requires_grad_(), torch.tensor([1.0, 2.0, 3.0], dtype=DTYPE)

    def val(w: Tensor, frozen: Tensor) -> Tensor:
        return w.square().sum() / 2 + frozen.square().sum()

    def train() -> Tensor:
        return (curvature * (w - h) ** 2).sum() / 2 + (frozen.sum() * w).sum()

    (grad,) = hvp.hypergradient(train(), val(w, frozen), [w, frozen], h, solver)
    torch.testing.assert_close(grad, w.detach())
    val(*hvp.best_response(train(), [w, frozen], h, solver)).backward()
    torch.testing.assert_close(h.grad, w.detach())


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
