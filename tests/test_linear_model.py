"""The linear model's operator against Hessians written out by hand, and against autograd on exactly the stated loss."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from linear_models_and_losses import DECAYS, ENGINES, FORMS, LOSSES, Model, joined, likewise, model_of, safe_alpha
from problems_with_known_answers import DTYPE, flat, randn, unflat
from torch import Tensor, nn
from torch.nn import functional

import hvp_engine as hvp

BY_ENGINE = pytest.mark.parametrize("engine", ENGINES)


def models() -> list[Any]:
    """Every loss with every number of outputs, reduction and decay; with and without a bias by turns."""
    settings = [
        (loss, outputs, reduction, decay)
        for loss in LOSSES
        for outputs in ("vector", 1, 3, 10)
        for reduction in ("mean", "sum")
        for decay in DECAYS
        if not (loss == "softmax" and outputs == "vector")
    ]
    return [
        pytest.param(
            replace(model_of(loss, outputs, decay, bias), reduction=reduction),
            id=f"{loss}-{outputs}-{reduction}-{decay}-{'bias' if bias else 'plain'}",
        )
        for number, (loss, outputs, reduction, decay) in enumerate(settings)
        for bias in [(number + number // 4) % 2 == 0]
    ]


# The operator


@pytest.mark.parametrize("model", models())
def test_operator_is_the_hessian_of_the_stated_loss(model: Model) -> None:
    operator, hessian = model.operator, model.hessian()
    scale = float(hessian.abs().max()) + 1e-300
    assert float((operator.dense() - hessian).abs().max()) <= 1e-13 * scale
    weights = [w.clone().requires_grad_() for w in model.weights]
    value = model.value(weights)
    gradient = flat(torch.autograd.grad(value, weights))
    torch.testing.assert_close(operator.loss, value.detach(), rtol=1e-13, atol=0)
    torch.testing.assert_close(joined(operator.gradient), gradient, rtol=1e-12, atol=1e-14)
    v = randn(len(gradient), seed=6)
    autograd = hvp.HessianOperator(model.value, model.weights, engine="eager")
    torch.testing.assert_close(
        joined(operator @ likewise(model, v)), flat(autograd @ unflat(v, model.weights)), rtol=1e-12, atol=1e-13
    )
    assert operator.shape == hessian.shape


def test_closed_forms() -> None:
    x, w = randn(9, 4, seed=7), randn(4, seed=8)
    decay = randn(4, seed=9).exp()
    p = 1 / (1 + torch.exp(-x @ w))
    logistic = hvp.LinearModelOperator(x, w, loss="logistic", decay=decay).dense()
    torch.testing.assert_close(logistic, x.T @ torch.diag(p * (1 - p)) @ x / 9 + torch.diag(decay), rtol=1e-13, atol=0)
    squared = hvp.LinearModelOperator(x, w, loss="squared", reduction="sum").dense()
    torch.testing.assert_close(squared, 2 * x.T @ x, rtol=1e-13, atol=1e-14)
    matrix = randn(3, 4, seed=10)
    scores = torch.exp(x @ matrix.T)
    q = scores / scores.sum(1, keepdim=True)
    softmax = torch.zeros(12, 12, dtype=DTYPE)
    for sample, chances in zip(x, q, strict=True):
        softmax += torch.kron(torch.diag(chances) - torch.outer(chances, chances), torch.outer(sample, sample)) / 9
    operator = hvp.LinearModelOperator(x, matrix, loss="softmax")
    torch.testing.assert_close(operator.dense(), softmax, rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_probabilities_need_not_add_up_to_one(reduction: str) -> None:
    model = replace(model_of("softmax"), targets=randn(12, 3, seed=11).exp(), reduction=reduction)
    hessian = model.hessian()
    torch.testing.assert_close(model.operator.dense(), hessian, rtol=1e-12, atol=1e-14)
    weights = [w.clone().requires_grad_() for w in model.weights]
    gradient = torch.autograd.grad(model.value(weights), weights)
    torch.testing.assert_close(joined(model.operator.gradient), flat(gradient), rtol=1e-12, atol=1e-14)
    assert float((replace(model, targets=model.targets * 2).operator.dense() - hessian).abs().max()) > 1e-3


def test_containers() -> None:
    module = nn.Linear(7, 3, dtype=DTYPE)
    x, v = randn(12, 7, seed=5), {"weight": randn(3, 7, seed=12), "bias": randn(3, seed=13)}
    operator = hvp.LinearModelOperator(x, module, loss="softmax", decay={"weight": 0.1, "bias": 0.0})
    solver = hvp.Neumann(3, alpha=0.1)
    value = operator.solve(v, solver).value
    assert list(value) == ["weight", "bias"]
    listed = hvp.LinearModelOperator(x, list(module.parameters()), loss="softmax", decay=[0.1, 0.0])
    for a, b in zip(value.values(), listed.solve(list(v.values()), solver).value, strict=True):
        assert torch.equal(a, b)
    assert module.weight.grad is None and module.weight.requires_grad


def test_later_changes_do_not_reach_it() -> None:
    model = model_of("softmax", decay="per weight")
    operator = model.operator
    before, gradient = operator.dense(), joined(operator.gradient)
    for tensor in (*model.weights, *model.decay):
        tensor.mul_(3.0)
    model.targets.fill_(0)
    assert torch.equal(operator.dense(), before)
    assert torch.equal(joined(operator.gradient), gradient)


@BY_ENGINE
@pytest.mark.parametrize("layout", ["transposed inputs", "sliced inputs", "transposed weights"])
def test_strides(layout: str, engine: str) -> None:
    model = model_of("softmax")
    v, solver = likewise(model, randn(24, seed=14)), hvp.Neumann(4, alpha=0.05)
    truth = joined(model.operator_by(engine).solve(v, solver).value)
    if layout == "transposed inputs":
        model = replace(model, inputs=model.inputs.T.contiguous().T)
    elif layout == "sliced inputs":
        model = replace(model, inputs=torch.cat([model.inputs, model.inputs], 1)[:, :7])
    else:
        model = replace(model, weights=[model.weights[0].T.contiguous().T, model.weights[1]])
        v = (v[0].T.contiguous().T, v[1])
    torch.testing.assert_close(joined(model.operator_by(engine).solve(v, solver).value), truth, rtol=1e-13, atol=1e-14)


# Failure


@BY_ENGINE
@pytest.mark.parametrize(("bad", "iterations"), [(math.nan, 0), (math.inf, 1), (math.nan, 5), (-math.inf, 5)])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("leaf", [0, 1])
def test_bad_v_is_named(bad: float, iterations: int, form: str, leaf: int, engine: str) -> None:
    model = model_of("softmax")
    v = randn(3, 7, seed=33), randn(3, seed=34)
    v[leaf].view(-1)[1] = bad
    with pytest.raises(hvp.NonFiniteError, match=r"^v: expected finite values"):
        model.operator_by(engine).solve(v, hvp.Neumann(iterations, alpha=0.1, form=form))  # type: ignore[arg-type]


@BY_ENGINE
@pytest.mark.parametrize("iterations", [30, 3000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("form", FORMS)
def test_divergence(iterations: int, form: str, dtype: torch.dtype, engine: str) -> None:
    model = model_of("squared").to(dtype)
    v = likewise(model, randn(24, seed=35))
    match = r"^Neumann diverged after \d+ products with alpha=50: .*; lambda_max is estimated as .*would converge"
    with pytest.raises(hvp.DivergenceError, match=match):
        model.operator_by(engine).solve(v, hvp.Neumann(iterations, alpha=50.0, form=form))  # type: ignore[arg-type]


@BY_ENGINE
def test_growth_below_the_limit_is_a_status(engine: str) -> None:
    model = model_of("squared")
    v, matrix = randn(24, seed=36), model.hessian()
    solution = model.operator_by(engine).solve(likewise(model, v), hvp.Neumann(2, alpha=4 * safe_alpha(matrix)))
    assert solution.status is hvp.Status.DIVERGED
    assert 1 < solution.residual_norm < 1e4


@BY_ENGINE
def test_negative_decay_is_negative_curvature(engine: str) -> None:
    model = replace(model_of("softmax"), decay=[torch.tensor(-0.5, dtype=DTYPE)] * 2)
    solution = model.operator_by(engine).solve(likewise(model, randn(24, seed=37)), hvp.Neumann(5))
    assert solution.status is hvp.Status.NEGATIVE_CURVATURE


X, W = torch.randn(6, 4), torch.randn(3, 4)

WRONG: dict[str, tuple[Callable[[], object], type[Exception], str]] = {
    "loss": (lambda: linear(loss="hinge"), ValueError, "^loss: expected one of 'squared', 'logistic', 'softmax'; got"),
    "reduction": (
        lambda: linear(reduction="none"),
        ValueError,
        "^reduction: expected one of 'mean', 'sum'; got 'none'",
    ),
    "inputs kind": (lambda: linear(inputs=[1.0]), TypeError, "^inputs: expected a dense tensor .*; got list"),
    "inputs 3-d": (lambda: linear(inputs=torch.ones(2, 2, 4)), ValueError, r"^inputs: .*\(samples, features\); got"),
    "no samples": (lambda: linear(inputs=torch.ones(0, 4)), ValueError, r"^inputs: expected a non-empty tensor"),
    "inputs dtype": (
        lambda: linear(inputs=X.double()),
        TypeError,
        r"^inputs: expected .* in torch.float32 on cpu; got .*torch.float64 on cpu: cast it with .to\(torch.float32\)",
    ),
    "weights shape": (lambda: linear(weights=torch.ones(4, 3)), ValueError, r"^weights: expected shape \(outputs, 4\)"),
    "weights 3-d": (
        lambda: linear(weights=torch.ones(1, 3, 4)),
        ValueError,
        r"^weights: expected shape \(outputs, 4\)",
    ),
    "weights dtype": (lambda: linear(weights=W.bfloat16()), TypeError, "^weights: expected float32 or float64; got"),
    "weights count": (lambda: linear(weights=[W, W, W]), ValueError, "^weights: expected one tensor, or two with a b"),
    "vector softmax": (
        lambda: linear(weights=W[0]),
        ValueError,
        "^weights: .* one output of another loss than 'softmax'",
    ),
    "bias shape": (
        lambda: linear(weights=(W, X[0])),
        ValueError,
        r"^weights: expected a bias of shape \(3,\) .*; got shape \(4,\)",
    ),
    "bias of a vector": (
        lambda: linear(weights=(W[0], X[0]), loss="squared"),
        ValueError,
        r"bias of shape \(\) or \(1,\)",
    ),
    "bias dtype": (
        lambda: linear(weights=(W, W[:, 0].double())),
        TypeError,
        "^weights: expected a bias .*torch.float32",
    ),
    "device": (
        lambda: linear(inputs=X.to("meta")),
        ValueError,
        "^inputs: .* on cpu; got .* on meta: move it with .to..cpu..",
    ),
    "decay kind": (lambda: linear(decay="much"), TypeError, "^decay: expected a number, or a tensor .*; got str"),
    "decay bool": (lambda: linear(decay=True), TypeError, "^decay: expected a number, or a tensor .*; got bool"),
    "decay shape": (lambda: linear(decay=torch.ones(4)), ValueError, r"^decay: expected a number, or .*\(3, 4\)"),
    "decay dtype": (
        lambda: linear(decay=W.double()),
        TypeError,
        "^decay: expected .* in torch.float32 .*; got .*float64",
    ),
    "decay container": (lambda: linear(decay=[0.1, 0.2]), ValueError, "^decay: expected a number, or the container"),
    "target shape": (
        lambda: linear(targets=torch.ones(6, 2)),
        ValueError,
        r"^targets: expected a tensor or None of shape \(6, 3\) .*; got shape \(6, 2\)",
    ),
    "class dtype": (
        lambda: linear(targets=torch.ones(6)),
        TypeError,
        "^targets: expected class indices .* in torch.int64",
    ),
    "classes": (lambda: linear(targets=torch.full((6,), 3)), ValueError, "^targets: .*indices from 0 to 2; got 3 to 3"),
    "ignored": (lambda: linear(targets=torch.full((6,), -100)), ValueError, "^targets: .*leave out samples"),
    "float targets": (lambda: linear(targets=X[:, :3].double()), TypeError, "^targets: expected .* in torch.float32"),
    "squared targets": (
        lambda: linear(loss="squared", targets=X),
        ValueError,
        r"^targets: expected a tensor or None of shape \(6, 3\)",
    ),
    "no targets": (lambda: linear().gradient, ValueError, "^targets: expected those of the loss, .* got None"),
    "v": (lambda: linear() @ torch.ones(4), ValueError, r"^v\[0\]: expected shape \(3, 4\) as weights\[0\]"),
    "v dtype": (
        lambda: linear().solve(W.double(), hvp.Neumann(1)),
        TypeError,
        r"^v\[0\]: expected a float",
    ),
}


def linear(inputs: Any = X, weights: Any = W, loss: Any = "softmax", **rest: Any) -> hvp.LinearModelOperator:
    return hvp.LinearModelOperator(inputs, weights, loss=loss, **rest)


@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments_are_named(name: str) -> None:
    make, error, message = WRONG[name]
    with pytest.raises(error, match=message):
        make()


def test_loss_is_none_without_targets() -> None:
    assert linear().loss is None


# Use


@BY_ENGINE
def test_hypergradient_by_hand(engine: str) -> None:
    """Ridge regression with a decay for each weight: dL_V/dlambda = -w * H^-1 dL_V/dw, in closed form."""
    x, y, x_val, y_val = randn(30, 6, seed=40), randn(30, seed=41), randn(20, 6, seed=42), randn(20, seed=43)
    decay = randn(6, seed=44).exp().requires_grad_()

    def train_loss(w: Tensor) -> Tensor:
        return functional.mse_loss(x @ w, y) + (decay * w**2).sum() / 2

    hessian = 2 * x.T @ x / 30 + torch.diag(decay.detach())
    w = torch.linalg.solve(hessian, 2 * x.T @ y / 30).requires_grad_()
    [v] = torch.autograd.grad(functional.mse_loss(x_val @ w, y_val), w)
    operator = hvp.LinearModelOperator(x, w, loss="squared", targets=y, decay=decay, engine=engine)
    assert float(operator.gradient.abs().max()) < 1e-12, "w is the minimum of exactly this loss"
    q = operator.solve(v, hvp.Neumann(400)).value
    [gradient] = torch.autograd.grad(train_loss(w), w, create_graph=True)
    [mixed] = torch.autograd.grad(gradient, decay, q)
    truth = -w.detach() * torch.linalg.solve(hessian, 2 * x_val.T @ (x_val @ w.detach() - y_val) / 20)
    torch.testing.assert_close(-mixed, truth, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("decay", ["scalar", "per weight"])
@pytest.mark.parametrize("loss", LOSSES)
def test_any_device(loss: str, decay: str, device: torch.device) -> None:
    """A solve, a product and a gradient, against the CPU's in plain torch."""
    model = model_of(loss, 10, decay, samples=20, features=300)
    v = likewise(model, randn(3010, seed=47))
    solver = hvp.Neumann(20, alpha=0.01)
    with hvp.use_backend("reference"):
        truth = [joined(model.operator.solve(v, solver).value), joined(model.operator @ v)]
    truth.append(joined(model.operator.gradient))
    there = replace(
        model,
        inputs=model.inputs.to(device),
        weights=[w.to(device) for w in model.weights],
        targets=model.targets.to(device),
        decay=[d.to(device) for d in model.decay],
    ).operator
    v = tuple(part.to(device) for part in v)
    results = [there.solve(v, solver).value, there @ v, there.gradient]
    for result, expected in zip(results, truth, strict=True):
        assert all(part.device == device for part in result)
        torch.testing.assert_close(joined(result).cpu(), expected, rtol=1e-11, atol=1e-13)
