"""The Gauss-Newton operator against J^T (d2 loss / d outputs2) J with Jacobians that torch builds column by column."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from problems_with_known_answers import DTYPE, NETWORKS, Network, flat, generator, randn, relative_error, unflat
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, scaled_dot_product_attention

import hvp_engine as hvp


def squared(output: Tensor, target: Tensor) -> Tensor:
    return (output - target).square().mean()


def operator_of(network: Network, loss: Callable[[Any, Any], Tensor] = cross_entropy) -> hvp.GaussNewtonOperator:
    return hvp.GaussNewtonOperator(hvp.functional(network.module), loss, network.module, network.x, network.y)


def dense_gauss_newton(network: Network, loss: Callable[[Any, Any], Tensor] = cross_entropy) -> Tensor:
    """By torch's Jacobian of the outputs and its double loop over the outputs."""
    names = [name for name, _ in network.module.named_parameters()]
    parameters = [parameter.detach() for parameter in network.module.parameters()]

    def outputs(vector: Tensor) -> Tensor:
        state: dict[str, Tensor] = dict(zip(names, unflat(vector, parameters), strict=True))
        state |= {name: buffer.clone() for name, buffer in network.module.named_buffers()}
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            return torch.func.functional_call(network.module, state, (network.x,))

    point = flat(parameters)
    output = outputs(point)
    jacobian = torch.autograd.functional.jacobian(outputs, point).reshape(output.numel(), -1)
    curvature = torch.autograd.functional.hessian(lambda z: loss(z.view_as(output), network.y), output.reshape(-1))
    return jacobian.T @ curvature @ jacobian


@pytest.mark.filterwarnings("ignore:.*plain kernels")
@pytest.mark.parametrize("name", [name for name in NETWORKS if "sparse" not in name])
def test_network_against_dense_jacobians(name: str) -> None:
    network = NETWORKS[name]()
    operator, truth = operator_of(network), dense_gauss_newton(network)
    dense = operator.dense()
    assert relative_error(dense, truth) < 1e-12
    assert relative_error(dense.T, dense) < 1e-12
    assert float(torch.linalg.eigvalsh(dense)[0]) > -1e-13, "cross entropy is convex in the outputs"
    v = randn(len(truth), seed=60)
    tree = dict(zip(operator.gradient, unflat(v, list(network.module.parameters())), strict=True))
    assert relative_error(flat(list((operator @ tree).values())), truth @ v) < 1e-12


def test_differs_from_the_hessian_which_is_indefinite() -> None:
    network = NETWORKS["mlp"]()
    net = hvp.functional(network.module)
    hessian = hvp.HessianOperator(lambda w: network.loss_of(net(w, network.x)), network.module).dense()
    dense = operator_of(network).dense()
    assert relative_error(dense, hessian) > 0.05
    assert float(torch.linalg.eigvalsh(hessian)[0]) < -1e-3


def test_linear_model_gives_the_hessian() -> None:
    x, w, b = randn(20, 3, seed=61), randn(3, 4, seed=62), randn(4, seed=63)
    labels = torch.randint(4, (20,), generator=generator(64))

    def model(weights: dict[str, Tensor], x: Tensor) -> Tensor:
        return x @ weights["w"] + weights["b"]

    weights = {"w": w, "b": b}
    operator = hvp.GaussNewtonOperator(model, cross_entropy, weights, x, labels)
    hessian = hvp.HessianOperator(lambda weights: cross_entropy(model(weights, x), labels), weights)
    torch.testing.assert_close(operator.dense(), hessian.dense(), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(operator.loss, hessian.loss)
    torch.testing.assert_close(operator.gradient, hessian.gradient, rtol=1e-12, atol=1e-14)
    assert operator.shape == hessian.shape == (16, 16)


def test_closed_form_with_outputs_in_a_tree() -> None:
    """Outputs w0^2 and w0 w1, loss a(o0)^2 / 2 + 3 o0 o1: a Hessian that is not diagonal, a constant output beside."""
    weights = (torch.tensor(2.0, dtype=DTYPE), torch.tensor([5.0, 7.0], dtype=DTYPE))

    def model(w: tuple[Tensor, Tensor], inputs: None) -> dict[str, Any]:
        return {"square": w[0] ** 2, "products": [w[0] * w[1]], "constant": torch.ones(2, dtype=DTYPE)}

    def loss(outputs: dict[str, Any], target: float) -> Tensor:
        return outputs["square"] ** 2 / 2 + target * (outputs["square"] * outputs["products"][0]).sum()

    jacobian = torch.tensor([[4.0, 0.0, 0.0], [5.0, 2.0, 0.0], [7.0, 0.0, 2.0]], dtype=DTYPE)
    curvature = torch.tensor([[1.0, 3.0, 3.0], [3.0, 0.0, 0.0], [3.0, 0.0, 0.0]], dtype=DTYPE)
    operator = hvp.GaussNewtonOperator(model, loss, weights, None, 3.0)
    torch.testing.assert_close(operator.dense(), jacobian.T @ curvature @ jacobian)
    product = operator @ weights
    assert isinstance(product, tuple) and [part.shape for part in product] == [(), (2,)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_solve(dtype: torch.dtype) -> None:
    network = NETWORKS["mlp"]()
    truth = dense_gauss_newton(network) + 0.05 * torch.eye(26, dtype=DTYPE)
    module, x = network.module.to(dtype), network.x.to(dtype)
    operator = operator_of(Network(module, x, network.y))
    v = randn(26, seed=65)
    tree = dict(zip(operator.gradient, unflat(v, list(module.parameters())), strict=True))
    for solver in (
        hvp.ConjugateGradient(60, damping=0.05),
        hvp.Exact(damping=0.05),
        hvp.Neumann(600, damping=0.05),
    ):
        solution = operator.solve(tree, solver)
        assert solution.converged
        error = relative_error(flat(list(solution.value.values())), torch.linalg.solve(truth, v))
        assert error < (2e-3 if dtype == torch.float32 else 1e-5), solver
    assert operator.spectrum.estimate is not None


def test_unused_weights_get_zeros() -> None:
    weights = [randn(3, seed=66), randn(2, seed=67)]
    operator = hvp.GaussNewtonOperator(
        lambda w, x: x * w[0], squared, weights, torch.ones(3, dtype=DTYPE), torch.zeros(3, dtype=DTYPE)
    )
    expected = torch.diag(torch.tensor([2 / 3] * 3 + [0.0] * 2, dtype=DTYPE))
    torch.testing.assert_close(operator.dense(), expected)


def test_a_loss_linear_in_the_outputs_has_no_curvature() -> None:
    operator = hvp.GaussNewtonOperator(lambda w, x: w**3, lambda o, y: o.sum(), randn(3, seed=68), None, None)
    assert torch.equal(operator.dense(), torch.zeros(3, 3, dtype=DTYPE))


@pytest.mark.filterwarnings("ignore:.*plain kernels")
def test_one_mask_for_the_operator_and_nothing_of_the_caller_moves() -> None:
    module = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 2)).double()
    x, y = randn(6, 4, seed=69), torch.arange(6) % 2
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    state = torch.get_rng_state()
    operator = operator_of(Network(module, x, y))
    v = {name: torch.ones_like(parameter) for name, parameter in module.named_parameters()}
    first, second = operator @ v, operator @ v
    assert all(torch.equal(first[name], second[name]) for name in v)
    assert torch.equal(torch.get_rng_state(), state)
    for name, tensor in module.state_dict().items():
        assert torch.equal(tensor, before[name])
    assert all(parameter.grad is None and parameter.requires_grad for parameter in module.parameters())


def test_no_grad_around_it_makes_no_difference() -> None:
    w = randn(3, seed=70)
    with torch.no_grad():
        operator = hvp.GaussNewtonOperator(lambda w, x: w**2, lambda o, y: o.square().sum() / 2, w, None, None)
        torch.testing.assert_close(operator @ torch.ones_like(w), 4 * w**2)


def test_an_attention_kernel_without_a_second_derivative_is_replaced() -> None:
    def model(w: Tensor, x: Tensor) -> Tensor:
        return scaled_dot_product_attention(x @ w, x, x).mean(2)[:, 0]  # one head; only 4-d takes the fast kernel

    w, x, y = randn(4, 4, seed=71), randn(2, 1, 5, 4, seed=72), randn(2, 4, seed=73)
    dense = hvp.GaussNewtonOperator(model, squared, w, x, y).dense()
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        jacobian = torch.autograd.functional.jacobian(lambda w: model(w, x), w).reshape(8, 16)
    torch.testing.assert_close(dense, 2 / 8 * jacobian.T @ jacobian, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize(
    "error, message, model, loss",
    [
        (hvp.GraphError, "model: expected.*got", lambda w, x: x, squared),
        (hvp.GraphError, "model: expected.*got", lambda w, x: (w * x).detach(), squared),
        (hvp.GraphError, "loss: expected.*got", lambda w, x: w * x, lambda o, y: y.sum()),
        (ValueError, "loss: expected a scalar.*got", lambda w, x: w * x, lambda o, y: o - y),
        (TypeError, "loss: expected a scalar.*got", lambda w, x: w * x, lambda o, y: 1.0),
        (TypeError, r"model: expected a function of \(weights, inputs\); got NoneType", None, squared),
        (TypeError, r"model: .*got the module Sequential.*functional", torch.nn.Sequential(torch.nn.Tanh()), squared),
        (TypeError, r"loss: expected a function of \(outputs, targets\); got 'mse'", lambda w, x: w * x, "mse"),
        (TypeError, r"model\(weights, inputs\).*expected a tensor.*got", lambda w, x: [w * x, "text"], squared),
        (TypeError, r"model\(weights, inputs\).*floating.*got", lambda w, x: (w * x).long(), squared),
    ],
)
def test_what_does_not_fit(error: type[Exception], message: str, model: Callable, loss: Callable) -> None:
    x = torch.ones(3, dtype=DTYPE)
    with pytest.raises(error, match=message):
        hvp.GaussNewtonOperator(model, loss, randn(3, seed=74), x, x)


def test_vectors_that_do_not_fit() -> None:
    operator = hvp.GaussNewtonOperator(lambda w, x: w[0], squared, [randn(3, seed=75)], None, torch.zeros(3))
    with pytest.raises(ValueError, match="v.*expected shape.*got"):
        operator @ [torch.ones(4, dtype=DTYPE)]
    with pytest.raises(ValueError, match="v: expected 1 tensors.*got 2"):
        operator.solve([torch.ones(3, dtype=DTYPE)] * 2, hvp.ConjugateGradient(3))
