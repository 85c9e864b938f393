"""Hessian-vector products against Hessians that are known or computed another way."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from problems_with_known_answers import (
    CLOSED_FORMS,
    DTYPE,
    NETWORKS,
    Case,
    dense_hessian,
    flat,
    randn,
    relative_error,
    truncated_sum,
    unflat,
)
from torch import Tensor, nn

import hvp_engine as hvp


@pytest.fixture(params=CLOSED_FORMS)
def case(request: pytest.FixtureRequest) -> Case:
    return CLOSED_FORMS[request.param]()


def test_dense_is_the_closed_form(case: Case) -> None:
    operator = hvp.HessianOperator(case.loss, case.weights)
    torch.testing.assert_close(operator.dense(), case.hessian, rtol=1e-12, atol=1e-14)
    assert operator.shape == tuple(case.hessian.shape)


def test_product_is_the_closed_form(case: Case) -> None:
    v = randn(len(case.hessian), seed=50)
    product = hvp.HessianOperator(case.loss, case.weights) @ unflat(v, case.weights)
    torch.testing.assert_close(flat(product), case.hessian @ v, rtol=1e-12, atol=1e-14)


@pytest.mark.filterwarnings("ignore:.*plain kernels")
@pytest.mark.parametrize("name", NETWORKS)
def test_network_against_a_double_loop(name: str) -> None:
    network = NETWORKS[name]()
    net = hvp.functional(network.module)
    operator = hvp.HessianOperator(lambda w: network.loss_of(net(w, network.x)), network.module)
    truth = dense_hessian(network)
    dense = operator.dense()
    assert relative_error(dense, truth) < 1e-12
    assert relative_error(dense.T, dense) < 1e-12
    v = randn(len(truth), seed=51)
    parameters = list(network.module.parameters())
    tree = dict(zip(dict(network.module.named_parameters()), unflat(v, parameters), strict=True))
    assert relative_error(flat(list((operator @ tree).values())), truth @ v) < 1e-12


@pytest.mark.parametrize("name", ["conv", "channels_last conv", "lstm", "tied", "batchnorm, training"])
def test_network_truncated_sum(name: str) -> None:
    """The whole solve, not only one product, in the strides of the weights."""
    network = NETWORKS[name]()
    net = hvp.functional(network.module)
    operator = hvp.HessianOperator(lambda w: network.loss_of(net(w, network.x)), network.module)
    truth = dense_hessian(network)
    parameters = dict(network.module.named_parameters())
    v = randn(len(truth), seed=52)
    tree = dict(zip(parameters, unflat(v, list(parameters.values())), strict=True))
    value = operator.solve(tree, hvp.Neumann(7, alpha=0.3)).value
    assert relative_error(flat(list(value.values())), truncated_sum(truth, v, 7, 0.3)) < 1e-12


def test_single_precision_lstm() -> None:
    network = NETWORKS["lstm"]()
    truth = dense_hessian(network)
    module, x = network.module.float(), network.x.float()
    net = hvp.functional(module)
    operator = hvp.HessianOperator(lambda w: network.loss_of(net(w, x)), module)
    assert relative_error(operator.dense().double(), truth) < 1e-5


@pytest.mark.parametrize(("engine", "roundings"), [("eager", 0), ("auto", 4)])
def test_loss_and_gradient(case: Case, engine: str, roundings: int) -> None:
    """Autograd's own bit by bit, or, where a program of the extension adds in another order, up to a few roundings."""
    operator = hvp.HessianOperator(case.loss, case.weights, engine=engine)
    tolerance = {"rtol": roundings * torch.finfo(DTYPE).eps, "atol": roundings * torch.finfo(DTYPE).eps}
    leaves = [w.clone().requires_grad_() for w in case.weights]
    loss = case.loss(leaves)
    torch.testing.assert_close(operator.loss, loss.detach(), **tolerance)
    torch.testing.assert_close(operator.gradient, list(torch.autograd.grad(loss, leaves)), **tolerance)
    assert not operator.loss.requires_grad and not any(g.requires_grad for g in operator.gradient)


def test_solve_inverts(case: Case) -> None:
    v = randn(len(case.hessian), seed=53)
    solution = hvp.HessianOperator(case.loss, case.weights).solve(
        unflat(v, case.weights), hvp.Neumann(3000, damping=0.05)
    )
    truth = torch.linalg.solve(case.hessian + 0.05 * torch.eye(len(v), dtype=DTYPE), v)
    assert solution.converged
    torch.testing.assert_close(flat(solution.value), truth, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize(
    "weights",
    [
        randn(3, seed=1),
        [randn(3, seed=1)],
        (randn(2, seed=1), randn(3, seed=2)),
        {"a": randn(2, seed=1), "b": [randn(3, seed=2), randn(1, seed=3)[0]]},
    ],
    ids=["tensor", "list", "tuple", "nested dict"],
)
def test_container_comes_back(weights: object) -> None:
    leaves, structure = torch.utils._pytree.tree_flatten(weights)

    def loss(w: object) -> Tensor:
        return torch.stack([leaf.pow(4).sum() for leaf in torch.utils._pytree.tree_leaves(w)]).sum()

    operator = hvp.HessianOperator(loss, weights)
    expected = [12 * leaf**3 for leaf in leaves]
    for result in (operator @ weights, operator.solve(weights, hvp.Neumann(0, alpha=1.0)).value, operator.gradient):
        found, found_structure = torch.utils._pytree.tree_flatten(result)
        assert found_structure == structure
        assert [leaf.shape for leaf in found] == [leaf.shape for leaf in leaves]
    torch.testing.assert_close(torch.utils._pytree.tree_leaves(operator @ weights), expected)


# Products that share memory with the tangent they are taken at.

ALIASING = {
    "half of a squared norm": (
        lambda w: w[0].square().sum() / 2,
        [randn(3, seed=1)],
        torch.eye(3, dtype=DTYPE),
    ),
    "product of two weights": (
        lambda w: (w[0] * w[1]).sum(),
        [randn(3, seed=1), randn(3, seed=2)],
        torch.kron(torch.tensor([[0.0, 1.0], [1.0, 0.0]], dtype=DTYPE), torch.eye(3, dtype=DTYPE)),
    ),
    "trace of a square": (
        lambda w: torch.trace(w[0] @ w[0].T),
        [randn(2, 2, seed=1)],
        2 * torch.eye(4, dtype=DTYPE),
    ),
    "trace of w w": (
        lambda w: torch.trace(w[0] @ w[0]),
        [randn(2, 2, seed=1)],
        2 * torch.eye(4, dtype=DTYPE)[[0, 2, 1, 3]],
    ),
    "sum, expanded": (
        lambda w: w[0].sum().square() / 2,
        [randn(3, seed=1)],
        torch.ones(3, 3, dtype=DTYPE),
    ),
}


@pytest.mark.parametrize("name", ALIASING)
@pytest.mark.parametrize("form", ["accumulate", "horner"])
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_aliasing_products(name: str, form: str, backend: str) -> None:
    loss, weights, hessian = ALIASING[name]
    operator = hvp.HessianOperator(loss, weights)
    v = randn(len(hessian), seed=54)
    tree = unflat(v, weights)
    torch.testing.assert_close(flat(operator @ tree), hessian @ v, rtol=1e-13, atol=0)
    torch.testing.assert_close(flat(tree), v, rtol=0, atol=0)
    with hvp.use_backend(backend):
        value = operator.solve(tree, hvp.Neumann(5, alpha=0.2, form=form)).value
        automatic = operator.solve(tree, hvp.Neumann(5, form=form, damping=3.0))
    torch.testing.assert_close(flat(value), truncated_sum(hessian, v, 5, 0.2), rtol=1e-13, atol=0)
    torch.testing.assert_close(
        flat(automatic.value), truncated_sum(hessian, v, 5, automatic.alpha, 3.0), rtol=1e-13, atol=0
    )
    torch.testing.assert_close(flat(tree), v, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("kernel", "matrix"),
    [
        (lambda v: v, torch.eye(2, dtype=DTYPE)),
        (lambda v: (v[1], v[0]), torch.eye(2, dtype=DTYPE)[[1, 0]]),
    ],
    ids=["identity", "swap"],
)
def test_callable_that_returns_its_argument(kernel: object, matrix: Tensor) -> None:
    """A swap of views by an in-place copy of one onto the other would make another matrix of it."""
    v = (torch.tensor([1.0, 2.0], dtype=DTYPE), torch.tensor([3.0, -1.0], dtype=DTYPE))
    dense = torch.kron(matrix, torch.eye(2, dtype=DTYPE))
    solution = hvp.solve(kernel, v, hvp.Neumann(4, damping=2.0))
    assert solution.lambda_max == pytest.approx(1.0, rel=1e-12)
    torch.testing.assert_close(
        flat(solution.value), truncated_sum(dense, flat(v), 4, solution.alpha, 2.0), rtol=1e-13, atol=0
    )


# Tensors of every kind.


def test_zero_dim_and_non_contiguous_weights() -> None:
    base = randn(4, 6, seed=60)
    weights = [base.T[::2], randn(1, seed=61)[0], torch.zeros(0, dtype=DTYPE)]
    assert not weights[0].is_contiguous()
    before = base.clone()
    operator = hvp.HessianOperator(lambda w: w[0].pow(3).sum() * w[1] + w[2].sum(), weights)
    leaves = [w.clone() for w in weights]
    dense = torch.autograd.functional.hessian(
        lambda x: x[:12].pow(3).sum() * x[12],
        flat(leaves),
    )
    torch.testing.assert_close(operator.dense(), dense, rtol=1e-12, atol=1e-12)
    v = randn(13, seed=62)
    value = operator.solve(unflat(v, leaves), hvp.Neumann(3, alpha=0.01)).value
    torch.testing.assert_close(flat(value), truncated_sum(dense, v, 3, 0.01), rtol=1e-12, atol=0)
    assert torch.equal(base, before)


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("swapped", [False, True], ids=["weight channels_last", "v channels_last"])
def test_v_and_weight_of_different_strides(swapped: bool, backend: str) -> None:
    weight, v = randn(2, 3, 4, 5, seed=63), randn(2, 3, 4, 5, seed=64)
    if swapped:
        v = v.to(memory_format=torch.channels_last)
    else:
        weight = weight.to(memory_format=torch.channels_last)
    with hvp.use_backend(backend):
        operator = hvp.HessianOperator(lambda w: (w.pow(3) / 6).sum(), weight)
        value = operator.solve(v, hvp.Neumann(2, alpha=0.1)).value
    expected = 0.1 * v * (1 + (1 - 0.1 * weight) + (1 - 0.1 * weight) ** 2)
    torch.testing.assert_close(value, expected, rtol=1e-13, atol=0)
    assert value.stride() == weight.stride()


@pytest.mark.parametrize(
    ("first", "second", "tolerance"),
    [(torch.float32, torch.float64, 1e-6), (torch.bfloat16, torch.float32, 2e-2), (torch.float16, torch.float32, 2e-3)],
    ids=["fp32+fp64", "bf16+fp32", "fp16+fp32"],
)
def test_mixed_dtypes(first: torch.dtype, second: torch.dtype, tolerance: float) -> None:
    matrix = randn(4, 3, seed=65)
    weights = [randn(4, seed=66).to(first), randn(3, seed=67).to(second)]

    def loss(w: list[Tensor]) -> Tensor:
        a, b = w[0].to(second), w[1]
        return a.square().sum() + b.square().sum() + (a @ matrix.to(second) @ b) / 4

    coupling = matrix / 4
    hessian = torch.cat(
        [
            torch.cat([2 * torch.eye(4, dtype=DTYPE), coupling], 1),
            torch.cat([coupling.T, 2 * torch.eye(3, dtype=DTYPE)], 1),
        ]
    )
    v = [randn(4, seed=68).to(first), randn(3, seed=69).to(second)]
    operator = hvp.HessianOperator(loss, weights)
    for product, weight in zip(operator @ v, weights, strict=True):
        assert product.dtype == weight.dtype
    assert relative_error(flat(operator @ v), hessian @ flat(v)) < tolerance
    solution = operator.solve(v, hvp.Neumann(60))
    assert [x.dtype for x in solution.value] == [first, second]
    assert relative_error(flat(solution.value), torch.linalg.solve(hessian, flat(v))) < tolerance


def test_unused_and_frozen_weights_get_zeros() -> None:
    used, unused = randn(3, seed=70), randn(2, seed=71)
    operator = hvp.HessianOperator(lambda w: w["used"].pow(3).sum(), {"used": used, "unused": unused})
    product = operator @ {"used": torch.ones(3, dtype=DTYPE), "unused": torch.ones(2, dtype=DTYPE)}
    torch.testing.assert_close(product["used"], 6 * used)
    assert torch.equal(product["unused"], torch.zeros(2, dtype=DTYPE))
    assert not used.requires_grad and not unused.requires_grad


def test_linear_loss_has_a_zero_hessian() -> None:
    operator = hvp.HessianOperator(lambda w: 3 * w.sum(), randn(3, seed=72))
    assert torch.equal(operator @ torch.ones(3, dtype=DTYPE), torch.zeros(3, dtype=DTYPE))


def test_dropout_draws_one_mask_for_one_operator() -> None:
    module = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Tanh(), nn.Linear(8, 1)).to(DTYPE)
    net, x = hvp.functional(module), randn(5, 4, seed=73)
    operator = hvp.HessianOperator(lambda w: net(w, x).square().sum(), module)
    dense = operator.dense()
    assert relative_error(dense.T, dense) < 1e-12
    assert torch.equal(operator.dense(), dense)
    leaves = list(module.parameters())
    names = [name for name, _ in module.named_parameters()]
    a, b = randn(len(dense), seed=74), randn(len(dense), seed=75)

    def apply(v: Tensor) -> Tensor:
        return flat(list((operator @ dict(zip(names, unflat(v, leaves), strict=True))).values()))

    torch.testing.assert_close(apply(2 * a - 3 * b), 2 * apply(a) - 3 * apply(b), rtol=1e-10, atol=1e-12)
    module.eval()
    without = hvp.HessianOperator(lambda w: net(w, x).square().sum(), module).dense()
    assert relative_error(dense, without) > 0.1, "the mask has to matter, else this test shows nothing"


def test_result_does_not_share_memory() -> None:
    operator = hvp.HessianOperator(lambda w: w.square().sum() / 2, randn(3, seed=76))
    v = torch.ones(3, dtype=DTYPE)
    first = operator @ v
    first.zero_()
    assert torch.equal(v, torch.ones(3, dtype=DTYPE))
    torch.testing.assert_close(operator @ v, v)


def test_applying_twice_gives_the_same(case: Case) -> None:
    operator = hvp.HessianOperator(case.loss, case.weights)
    v = unflat(randn(len(case.hessian), seed=77), case.weights)
    assert torch.equal(flat(operator @ v), flat(operator @ v))
    solver = hvp.Neumann(9, alpha=0.1)
    assert torch.equal(flat(operator.solve(v, solver).value), flat(operator.solve(v, solver).value))


@pytest.mark.parametrize("engine", ["eager", "recorded", "linearized"])
def test_product_with_a_vector_in_other_memory(engine: str) -> None:
    weights, v = torch.ones(2, 3, dtype=torch.float64), torch.arange(6.0, dtype=torch.float64).view(3, 2).T
    operator = hvp.HessianOperator(lambda w: w.reshape(-1).pow(3).sum(), weights, engine=engine)
    assert torch.equal(operator @ v, 6 * v)


def test_a_copy_multiplies_alike() -> None:
    """Of a trace; torch copies no graph of autograd's."""
    w, v = randn(4, seed=80), randn(4, seed=82)
    w.mul_(2)
    operator = hvp.HessianOperator(lambda w: w.pow(4).sum(), w, engine="linearized")
    expected = operator @ v
    assert torch.equal(copy.deepcopy(operator) @ v, expected)


@pytest.mark.parametrize("changed", ["weights", "arguments"])
@pytest.mark.parametrize("engine", ["eager", "linearized", "finite_difference", "auto", "gauss-newton"])
def test_what_it_was_made_of_must_stay(engine: str, changed: str) -> None:
    """A trace would go on with some numbers from before and some from after."""
    w, x, v = randn(4, seed=80), randn(6, 4, seed=81), randn(4, seed=82)

    def made() -> hvp.HessianOperator | hvp.GaussNewtonOperator:
        if engine == "gauss-newton":
            return hvp.GaussNewtonOperator(lambda w, x: x @ w, lambda o, y: (o - y).pow(4).sum(), w, x, x[:, 0] + 1)
        return hvp.HessianOperator(lambda w, x: (x @ w).pow(4).sum(), w, x, engine=engine)

    operator = made()
    operator @ v
    (w if changed == "weights" else x).mul_(2)
    for call in (
        lambda: operator @ v,
        lambda: operator.solve(v, hvp.Identity()),
        lambda: hvp.extreme_eigenvalues(operator),
    ):
        with pytest.raises(ValueError, match="changed in place since: make a new operator"):
            call()
    assert bool(torch.isfinite(made() @ v).all())


def two_operators() -> tuple[hvp.HessianOperator, hvp.HessianOperator, dict[str, Tensor]]:
    weights = {"a": randn(2, 3, seed=1), "b": randn(4, seed=2)}
    first = hvp.HessianOperator(lambda w: (w["a"] ** 4).sum() + w["a"].sum() * (w["b"] ** 3).sum(), weights)
    second = hvp.HessianOperator(lambda w: w["a"].exp().sum() * w["b"].sin().sum(), weights)
    return first, second, weights


@pytest.mark.parametrize("engine", ["eager", "recorded", "linearized"])
def test_sums_and_multiples_are_those_of_the_matrices(engine: str) -> None:
    weights = {"a": randn(2, 3, seed=1), "b": randn(4, seed=2)}
    A = hvp.HessianOperator(lambda w: (w["a"] ** 4).sum() + w["a"].sum() * (w["b"] ** 3).sum(), weights, engine=engine)
    B = hvp.HessianOperator(lambda w: w["a"].exp().sum() * w["b"].sin().sum(), weights, engine=engine)
    eye = torch.eye(10, dtype=DTYPE)
    for operator, matrix in (
        (A + B, A.dense() + B.dense()),
        (A - B, A.dense() - B.dense()),
        (2 * A, 2 * A.dense()),
        (-A, -A.dense()),
        (A + 0.3 * hvp.I, A.dense() + 0.3 * eye),
        (hvp.I + A, A.dense() + eye),
        (A - hvp.I, A.dense() - eye),
        (0.5 * (A + B) * 3.0 + hvp.I * 2.0, 1.5 * (A.dense() + B.dense()) + 2 * eye),
    ):
        torch.testing.assert_close(operator.dense(), matrix, rtol=1e-12, atol=1e-13)
        v = randn(10, seed=3)
        torch.testing.assert_close(flat(list((operator @ _tree(v)).values())), matrix @ v, rtol=1e-12, atol=1e-13)


def _tree(v: Tensor) -> dict[str, Tensor]:
    return {"a": v[:6].view(2, 3), "b": v[6:]}


def test_an_added_multiple_of_the_identity_is_damping() -> None:
    operator = hvp.HessianOperator(lambda w: (w**4).sum() + w.prod(), randn(5, seed=4))
    v = randn(5, seed=5)
    damped = operator.solve(v, hvp.MINRES(30, tol=1e-12, damping=0.7)).value
    for solver in (hvp.Exact(), hvp.MINRES(30, tol=1e-12)):
        shifted = (operator + 0.7 * hvp.I).solve(v, solver).value
        torch.testing.assert_close(shifted, damped, rtol=1e-9, atol=1e-10)


def test_a_sum_takes_several_right_hand_sides() -> None:
    first, second, _ = two_operators()
    v = {"a": randn(9, 2, 3, seed=6), "b": randn(9, 4, seed=7)}
    both = first + second + 40.0 * hvp.I
    value = both.solve(v, hvp.ConjugateGradient(40, tol=1e-13), batched=True).value
    rows = torch.cat([value["a"].reshape(9, -1), value["b"]], 1)
    expected = torch.cat([v["a"].reshape(9, -1), v["b"]], 1)
    torch.testing.assert_close(rows @ both.dense(), expected, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("make", [hvp.HessianOperator, hvp.StochasticHessianOperator])
@pytest.mark.parametrize(
    "loss, got", [(None, "NoneType"), (torch.nn.Tanh(), r"the module Tanh, which is called with \(input.*functional")]
)
def test_losses_that_are_no_functions_of_weights(make: Callable[..., Any], loss: Any, got: str) -> None:
    with pytest.raises(TypeError, match=rf"loss: expected a function of \(weights, .*\); got {got}"):
        make(loss, torch.zeros(3), [torch.zeros(3)], engine="eager")


def test_operators_on_other_weights_do_not_add_up() -> None:
    first, _, _ = two_operators()
    other = hvp.HessianOperator(lambda w: (w**2).sum(), torch.zeros(3))
    with pytest.raises(ValueError, match=r"^operators: expected two on the same tree of weights"):
        first + other
    with pytest.raises(TypeError):
        first + 3.0
    with pytest.raises(TypeError):
        first * "3"


def test_a_changed_weight_is_noticed_through_a_sum() -> None:
    first, second, weights = two_operators()
    both = first + second
    weights["b"].add_(1.0)
    with pytest.raises(ValueError, match="changed in place"):
        both @ weights


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_scipy_solves_with_an_operator(dtype: torch.dtype) -> None:
    linalg = pytest.importorskip("scipy.sparse.linalg")
    weights = [randn(2, 3, seed=1).to(dtype).t(), randn(4, seed=2).to(dtype)]  # one of them in transposed memory
    H = hvp.HessianOperator(lambda w: (w[0] ** 4).sum() + (w[1] ** 2).sum() + w[0].sum() * w[1].sum() / 9, weights)
    theirs = H.to_scipy()
    matrix = H.dense().double().numpy()
    assert theirs.shape == matrix.shape and str(theirs.dtype) == str(dtype).removeprefix("torch.")
    v = randn(10, seed=3).numpy()
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    assert abs(theirs @ v - matrix @ v).max() <= tolerance * abs(matrix @ v).max()
    assert abs(theirs.rmatvec(v) - matrix.T @ v).max() <= tolerance * abs(matrix @ v).max()
    found, info = linalg.minres(theirs, v, rtol=1e-9)
    assert info == 0 and abs(matrix @ found - v).max() < 1e-4


def test_a_solver_for_symmetric_operators_refuses_another() -> None:
    from hvp_engine.differentiation.double_backward import Tape

    w = torch.ones(2, dtype=DTYPE, requires_grad=True)
    jacobian = Tape([w * torch.tensor([1.0, 2.0]) + w.flip(0) * torch.tensor([3.0, 0.0])], [w], symmetric=False)
    with pytest.raises(ValueError, match=r"^solver: expected one that does not need a symmetric operator"):
        hvp.solve(jacobian, torch.ones(2, dtype=DTYPE), hvp.ConjugateGradient(3))


def test_scipy_multiplies_complex_vectors() -> None:
    numpy = pytest.importorskip("numpy")
    pytest.importorskip("scipy")
    H = hvp.HessianOperator(lambda w: (w**3).sum(), torch.tensor([1.0, 2.0]))
    assert numpy.allclose(H.to_scipy() @ numpy.array([1 + 2j, 3j]), [6 + 12j, 36j])


def test_arithmetic_with_numbers_and_the_identity() -> None:
    H = hvp.HessianOperator(lambda w: (w**3).sum(), torch.tensor([1.0, 2.0]))
    v = torch.tensor([1.0, -1.0])
    torch.testing.assert_close(H / 2 @ v, H @ v / 2)
    torch.testing.assert_close((hvp.I / 2 - H) @ v, v / 2 - H @ v)
    torch.testing.assert_close(sum([H, H, hvp.I]) @ v, 2 * (H @ v) + v)
