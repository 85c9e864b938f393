"""The linear model's operator against Hessians written out by hand, and against autograd on exactly the stated loss."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from cases import DTYPE, flat, generator, randn, relative_error, truncated_sum, unflat
from torch import Tensor, nn
from torch.nn import functional

import hvp_engine as hvp
from hvp_engine import linear_model_reference
from hvp_engine.backend import why_not
from hvp_engine.engines import linear_model as engine
from hvp_engine.linear_model import LinearModelProducts

LOSSES = ["squared", "logistic", "softmax"]
DECAYS = ["none", "scalar", "leaves", "per weight"]
BACKENDS = ["reference", "cpp"]
FORMS = ["accumulate", "horner"]
OUTPUTS = ["vector", 1, 3, 10]


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Any:
    if reason := why_not(request.param, "cpu"):
        pytest.skip(reason)
    with hvp.use_backend(request.param):
        yield request.param


@pytest.fixture(params=["direct", "dual"])
def shape(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The algorithm to take; the cost decides in test_form_is_chosen_by_cost."""
    monkeypatch.setattr(engine, "prefers_dual", lambda *_: request.param == "dual")
    return request.param


@dataclass(frozen=True)
class Model:
    """A problem: everything LinearModelOperator takes, and the loss it stands for."""

    inputs: Tensor
    weights: list[Tensor]
    targets: Tensor
    loss: str
    decay: list[Tensor]
    reduction: str = "mean"

    @property
    def container(self) -> Any:
        return self.weights[0] if len(self.weights) == 1 else tuple(self.weights)

    @property
    def operator(self) -> hvp.LinearModelOperator:
        decay = self.decay[0] if len(self.decay) == 1 else tuple(self.decay)
        return hvp.LinearModelOperator(
            self.inputs,
            self.container,
            loss=self.loss,  # type: ignore[arg-type]
            targets=self.targets,
            decay=decay,
            reduction=self.reduction,  # type: ignore[arg-type]
        )

    def value(self, weights: Sequence[Tensor]) -> Tensor:
        """The loss that the documentation states, word by word."""
        weight, *bias = weights
        if weight.dim() == 2:
            outputs = functional.linear(self.inputs, weight, *bias)
        else:
            outputs = self.inputs @ weight + (bias[0] if bias else 0.0)
        if self.loss == "squared":
            data = functional.mse_loss(outputs, self.targets, reduction=self.reduction)
        elif self.loss == "logistic":
            data = functional.binary_cross_entropy_with_logits(outputs, self.targets, reduction=self.reduction)
        else:
            data = functional.cross_entropy(outputs, self.targets, reduction=self.reduction)
        return data + sum((d * w**2).sum() / 2 for d, w in zip(self.decay, weights, strict=True))

    def hessian(self) -> Tensor:
        """By torch's own double backward."""
        point = flat(self.weights)
        return torch.autograd.functional.hessian(lambda x: self.value(unflat(x, self.weights)), point)

    def to(self, dtype: torch.dtype) -> Model:
        targets = self.targets if self.targets.dtype == torch.int64 else self.targets.to(dtype)
        weights, decay = [w.to(dtype) for w in self.weights], [d.to(dtype) for d in self.decay]
        return replace(self, inputs=self.inputs.to(dtype), weights=weights, targets=targets, decay=decay)


def model_of(
    loss: str, outputs: int | str = 3, decay: str = "scalar", bias: bool = True, samples: int = 12, features: int = 7
) -> Model:
    k = 1 if outputs == "vector" else int(outputs)
    weight = randn(k, features, seed=1) / 2
    weights = [weight, randn(k, seed=2)] if bias else [weight]
    targets = randn(samples, k, seed=3)
    if loss == "logistic":
        targets = (targets > 0).to(DTYPE)
    elif loss == "softmax":
        targets = torch.randint(k, (samples,), generator=generator(3))
    if outputs == "vector":
        weights = [w[0] for w in weights]
        targets = targets[:, 0]
    decays = {
        "none": [torch.zeros((), dtype=DTYPE) for _ in weights],
        "scalar": [torch.tensor(0.3, dtype=DTYPE) for _ in weights],
        "leaves": [torch.tensor(0.3 / (i + 1), dtype=DTYPE) for i in range(len(weights))],
        "per weight": [randn(w.numel(), seed=4).exp().view_as(w) / 5 for w in weights],
    }[decay]
    return Model(randn(samples, features, seed=5), weights, targets, loss, decays)


def models() -> list[Any]:
    return [
        pytest.param(model_of(loss, outputs, decay, bias), id=f"{loss}-{outputs}-{decay}-{'bias' if bias else 'plain'}")
        for loss in LOSSES
        for outputs in OUTPUTS
        for decay in DECAYS
        for bias in (True, False)
        if not (loss == "softmax" and outputs == "vector")
    ]


def likewise(model: Model, vector: Tensor) -> Any:
    parts = unflat(vector, model.weights)
    return parts[0] if len(parts) == 1 else tuple(parts)


def joined(tree: Any) -> Tensor:
    return flat([tree] if isinstance(tree, Tensor) else list(tree))


def safe_alpha(hessian: Tensor, damping: float = 0.0) -> float:
    return 1.0 / (float(torch.linalg.eigvalsh(hessian)[-1]) + damping)


# The operator


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("model", models())
def test_operator_is_the_hessian_of_the_stated_loss(model: Model, reduction: str) -> None:
    model = replace(model, reduction=reduction)
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


@pytest.mark.parametrize("layout", ["transposed inputs", "sliced inputs", "transposed weights"])
def test_strides(layout: str, backend: str, shape: str) -> None:
    model = model_of("softmax")
    v, solver = likewise(model, randn(24, seed=14)), hvp.Neumann(4, alpha=0.05)
    truth = joined(model.operator.solve(v, solver).value)
    if layout == "transposed inputs":
        model = replace(model, inputs=model.inputs.T.contiguous().T)
    elif layout == "sliced inputs":
        model = replace(model, inputs=torch.cat([model.inputs, model.inputs], 1)[:, :7])
    else:
        model = replace(model, weights=[model.weights[0].T.contiguous().T, model.weights[1]])
        v = (v[0].T.contiguous().T, v[1])
    torch.testing.assert_close(joined(model.operator.solve(v, solver).value), truth, rtol=1e-13, atol=1e-14)


# The series


@pytest.mark.parametrize("damping", [0.0, 0.4])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("iterations", [0, 1, 50])
@pytest.mark.parametrize("decay", ["none", "scalar", "leaves"])
@pytest.mark.parametrize("loss", LOSSES)
def test_truncated_sum(
    loss: str, decay: str, iterations: int, form: str, damping: float, backend: str, shape: str
) -> None:
    check_series(model_of(loss, decay=decay), iterations, form, damping)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("iterations", [0, 1, 50])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("loss", LOSSES)
def test_truncated_sum_with_a_decay_for_each_weight(
    loss: str, bias: bool, iterations: int, form: str, backend: str
) -> None:
    check_series(model_of(loss, decay="per weight", bias=bias), iterations, form, 0.2)


# Below, at and above the widths of vectors, tiles, tasks and blocks.
SIZES = [(1, 1), (2, 3), (7, 16), (13, 97), (25, 96), (97, 25), (200, 33), (5, 400)]


@pytest.mark.parametrize("outputs", ["vector", 2, 3, 4, 5, 11])
@pytest.mark.parametrize("samples, features", SIZES)
@pytest.mark.parametrize("form", FORMS)
def test_sizes(samples: int, features: int, outputs: int | str, form: str, backend: str, shape: str) -> None:
    loss = "logistic" if outputs == "vector" else "softmax"
    check_series(model_of(loss, outputs, samples=samples, features=features), 3, form, 0.1)


def check_series(model: Model, iterations: int, form: str, damping: float) -> None:
    """The operator's solve against the ordinary one with autograd, and for small problems dense powers."""
    size = sum(w.numel() for w in model.weights)
    v = randn(size, seed=15)
    autograd = hvp.HessianOperator(model.value, model.weights, engine="eager")
    alpha = autograd.solve(unflat(v, model.weights), hvp.Neumann(1, damping=damping)).alpha
    assert alpha is not None
    solver = hvp.Neumann(iterations, alpha=alpha, form=form, damping=damping)  # type: ignore[arg-type]
    solution = model.operator.solve(likewise(model, v), solver)
    ordinary = autograd.solve(unflat(v, model.weights), solver)
    torch.testing.assert_close(joined(solution.value), flat(ordinary.value), rtol=1e-11, atol=1e-13)
    if size < 100:
        truth = truncated_sum(model.hessian(), v, iterations, alpha, damping)
        torch.testing.assert_close(joined(solution.value), truth, rtol=1e-11, atol=1e-12)
    assert solution.residual_norm == pytest.approx(ordinary.residual_norm, rel=1e-9, abs=1e-13)
    others = [(s.status, s.iterations, s.hvps, s.residual_of, s.alpha) for s in (solution, ordinary)]
    assert others[0] == others[1]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("loss", LOSSES)
def test_float32(loss: str, decay: str, form: str, backend: str) -> None:
    """No further from float64 than the ordinary solve in float32, or only by a factor of two."""
    model = model_of(loss, 10, decay, samples=50, features=300)
    v = randn(sum(w.numel() for w in model.weights), seed=16)
    narrow = model.to(torch.float32)
    alpha = model.operator.solve(likewise(model, v), hvp.Neumann(0, damping=0.1)).alpha
    assert alpha is not None
    solver = hvp.Neumann(50, alpha=alpha, form=form, damping=0.1)  # type: ignore[arg-type]
    truth = joined(model.operator.solve(likewise(model, v), solver).value)
    ours = narrow.operator.solve(likewise(narrow, v), solver)
    ordinary = hvp.HessianOperator(narrow.value, narrow.weights, engine="eager").solve(
        unflat(v, narrow.weights), solver
    )
    floor = 2e-7
    assert relative_error(joined(ours.value), truth) < 2 * max(floor, relative_error(flat(ordinary.value), truth))
    assert ours.residual_norm == pytest.approx(ordinary.residual_norm, rel=1e-4, abs=2e-7)
    assert ours.status is ordinary.status
    assert joined(ours.value).dtype == DTYPE and ours.value[0].dtype == torch.float32


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("loss", LOSSES)
def test_both_forms_agree(loss: str, form: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, values = model_of(loss, 10, "leaves", samples=40, features=90), []
    v = likewise(model, randn(910, seed=17))
    operator, reports = model.operator, []
    for dual in (False, True):
        monkeypatch.setattr(engine, "prefers_dual", lambda *_, dual=dual: dual)
        values.append(joined(operator.solve(v, hvp.Neumann(20, alpha=0.02, form=form)).value))  # type: ignore[arg-type]
        reports.append(operator.engine.report())
    assert relative_error(values[1], values[0]) < 1e-13
    assert not torch.equal(*values), "two algorithms round differently"
    where = "C++" if backend == "cpp" else "plain torch"
    assert reports == [f"direct form in {where}", f"dual form in {where}"]


@pytest.mark.parametrize(
    "samples, features, decay, dual",
    [(50, 784, "scalar", True), (50, 784, "leaves", True), (50, 784, "per weight", False), (900, 20, "scalar", False)],
)
def test_form_is_chosen_by_cost(samples: int, features: int, decay: str, dual: bool) -> None:
    model = model_of("softmax", 10, decay, samples=samples, features=features)
    operator = model.operator
    operator.solve(likewise(model, randn(10 * features + 10, seed=18)), hvp.Neumann(20, alpha=0.01))
    assert operator.engine.report().startswith("dual" if dual else "direct")


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("decay", ["scalar", "per weight"])
def test_converges_to_the_dense_solve(loss: str, decay: str, backend: str) -> None:
    model = model_of(loss, decay=decay, samples=5)
    v = randn(24, seed=19)
    truth = torch.linalg.solve(model.hessian(), v)
    solution = model.operator.solve(likewise(model, v), hvp.Neumann(2000))
    assert relative_error(joined(solution.value), truth) < 1e-6
    assert solution.converged and solution.lambda_max is not None
    assert solution.hvps == 2008
    few = model.operator.solve(likewise(model, v), hvp.Neumann(2))
    assert relative_error(joined(few.value), truth) > 1e-2, "two terms are not enough"


@pytest.mark.parametrize(
    "solver",
    [hvp.ConjugateGradient(40), hvp.Exact(), hvp.Neumann(2000, preconditioner=lambda v: [2 * t for t in v])],
    ids=lambda solver: type(solver).__name__,
)
def test_every_solver_works_on_it(solver: Any) -> None:
    model = model_of("softmax", decay="per weight")
    v = randn(24, seed=20)
    value = joined(model.operator.solve(likewise(model, v), solver).value)
    assert relative_error(value, torch.linalg.solve(model.hessian(), v)) < 1e-7


def test_a_solve_leaves_v_and_the_operator_as_they_were(backend: str, shape: str) -> None:
    model = model_of("softmax")
    operator, v = model.operator, likewise(model, randn(24, seed=21))
    before = joined(v).clone()
    first = operator.solve(v, hvp.Neumann(7, alpha=0.1))
    second = operator.solve(v, hvp.Neumann(7, alpha=0.1))
    assert torch.equal(joined(v), before)
    assert torch.equal(joined(first.value), joined(second.value))
    third = operator.solve(v, hvp.Neumann(3, alpha=0.1, form="horner"))
    assert not torch.equal(joined(third.value), joined(first.value))
    assert torch.equal(joined(v), before)


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("decay", ["scalar", "per weight"])
def test_threads_do_not_change_the_value(threads: int, decay: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if reason := why_not("cpp", "cpu"):
        pytest.skip(reason)
    monkeypatch.setattr(engine, "prefers_dual", lambda factors, *_: factors.uniform)
    model = model_of("softmax", 10, decay, samples=403, features=601)
    v = likewise(model, randn(6020, seed=22))
    before = torch.get_num_threads()
    try:
        values = []
        for count in (1, threads):
            torch.set_num_threads(count)
            values.append(joined(model.operator.solve(v, hvp.Neumann(4, alpha=0.01)).value))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*values)


# Several right-hand sides


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("outputs", ["vector", 3])
def test_batched_equals_one_by_one(outputs: int | str, form: str, backend: str, shape: str) -> None:
    model = model_of("logistic", outputs)
    vs = [likewise(model, randn(sum(w.numel() for w in model.weights), seed=23 + i)) for i in range(5)]
    solver = hvp.Neumann(9, alpha=0.1, form=form, damping=0.1)  # type: ignore[arg-type]
    batch = model.operator.solve(tuple(torch.stack(parts) for parts in zip(*vs, strict=True)), solver, batched=True)
    alone = [model.operator.solve(v, solver) for v in vs]
    for index, solution in enumerate(alone):
        part = joined([leaf[index] for leaf in batch.value])
        torch.testing.assert_close(part, joined(solution.value), rtol=1e-14, atol=1e-15)
    assert batch.hvps == 45 and batch.iterations == 9
    assert batch.residual_norm == pytest.approx(max(solution.residual_norm for solution in alone), rel=1e-12)


def test_batch_shares_one_estimate() -> None:
    model = model_of("softmax")
    v = (randn(4, 3, 7, seed=28), randn(4, 3, seed=29))
    solution = model.operator.solve(v, hvp.Neumann(5), batched=True)
    assert solution.hvps == 8 + 4 * 5


@pytest.mark.parametrize("make", ["autograd", "callable", "conjugate gradients"])
def test_any_operator_takes_a_batch(make: str) -> None:
    model = model_of("softmax")
    hessian = model.hessian()
    v = randn(3, 24, seed=30)
    solver: Any = hvp.ConjugateGradient(24) if make == "conjugate gradients" else hvp.Neumann(500, alpha=0.1)
    operator: Any = (lambda x: hessian @ x) if make == "callable" else model.operator
    tree: Any = v if make == "callable" else (v[:, :21].reshape(3, 3, 7), v[:, 21:])
    if make == "autograd":
        operator, tree = hvp.HessianOperator(model.value, model.weights), list(tree)
    value = hvp.solve(operator, tree, solver, batched=True).value
    leaves = [value] if isinstance(value, Tensor) else list(value)
    result = torch.cat([leaf.reshape(3, -1) for leaf in leaves], 1)
    assert relative_error(result, torch.linalg.solve(hessian, v.T).T) < 1e-6


def test_batch_errors() -> None:
    model = model_of("softmax")
    operator = model.operator
    good = randn(2, 3, 7, seed=31), randn(2, 3, seed=32)
    solver = hvp.Neumann(2, alpha=0.1)
    with pytest.raises(ValueError, match=r"^v: expected leaves with a first dimension of one length"):
        operator.solve((good[0], good[1][:1]), solver, batched=True)
    with pytest.raises(ValueError, match=r"^v: expected leaves .* got shapes \(\)"):
        hvp.solve(lambda x: x, torch.tensor(1.0), solver, batched=True)
    with pytest.raises(ValueError, match="first dimension"):
        operator.solve((good[0][:0], good[1][:0]), solver, batched=True)
    with pytest.raises(ValueError, match=r"^v\[0\]\[0\]: expected shape \(3, 7\) as weights"):
        operator.solve((good[0][:, :2], good[1]), solver, batched=True)
    good[1][1, 2] = math.nan
    with pytest.raises(hvp.NonFiniteError, match=r"^v\[1\]: expected finite values"):
        operator.solve(good, solver, batched=True)
    with pytest.raises(hvp.NonFiniteError, match=r"^v: expected finite values"):
        operator.solve((good[0][1], good[1][1]), hvp.Neumann(2), batched=False)


# Failure


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("iterations", [0, 1, 5])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("leaf", [0, 1])
def test_bad_v_is_named(bad: float, iterations: int, form: str, leaf: int, backend: str, shape: str) -> None:
    model = model_of("softmax")
    v = randn(3, 7, seed=33), randn(3, seed=34)
    v[leaf].view(-1)[1] = bad
    with pytest.raises(hvp.NonFiniteError, match=r"^v: expected finite values"):
        model.operator.solve(v, hvp.Neumann(iterations, alpha=0.1, form=form))  # type: ignore[arg-type]


@pytest.mark.parametrize("iterations", [30, 3000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("form", FORMS)
def test_divergence(iterations: int, form: str, dtype: torch.dtype, backend: str, shape: str) -> None:
    model = model_of("squared").to(dtype)
    v = likewise(model, randn(24, seed=35))
    match = r"^Neumann diverged after \d+ products with alpha=50: .*; lambda_max is estimated as .*would converge"
    with pytest.raises(hvp.DivergenceError, match=match):
        model.operator.solve(v, hvp.Neumann(iterations, alpha=50.0, form=form))  # type: ignore[arg-type]


def test_growth_below_the_limit_is_a_status(backend: str, shape: str) -> None:
    model = model_of("squared")
    v, matrix = randn(24, seed=36), model.hessian()
    solution = model.operator.solve(likewise(model, v), hvp.Neumann(2, alpha=4 * safe_alpha(matrix)))
    assert solution.status is hvp.Status.DIVERGED
    assert 1 < solution.residual_norm < 1e4


def test_negative_decay_is_negative_curvature(backend: str) -> None:
    model = replace(model_of("softmax"), decay=[torch.tensor(-0.5, dtype=DTYPE)] * 2)
    solution = model.operator.solve(likewise(model, randn(24, seed=37)), hvp.Neumann(5))
    assert solution.status is hvp.Status.NEGATIVE_CURVATURE


X, W = torch.randn(6, 4), torch.randn(3, 4)

WRONG: dict[str, tuple[Callable[[], object], type[Exception], str]] = {
    "loss": (lambda: linear(loss="hinge"), ValueError, "^loss: expected one of 'squared', 'logistic', 'softmax'; got"),
    "reduction": (
        lambda: linear(reduction="none"),
        ValueError,
        "^reduction: expected one of 'mean', 'sum'; got 'none'",
    ),
    "inputs kind": (lambda: linear(inputs=[1.0]), TypeError, "^inputs: expected a tensor; got list"),
    "inputs 3-d": (lambda: linear(inputs=torch.ones(2, 2, 4)), ValueError, r"^inputs: .*\(samples, features\); got"),
    "no samples": (lambda: linear(inputs=torch.ones(0, 4)), ValueError, r"^inputs: expected a non-empty tensor"),
    "inputs dtype": (lambda: linear(inputs=X.double()), TypeError, "^inputs: expected torch.float32 as the weights"),
    "weights shape": (lambda: linear(weights=torch.ones(4, 3)), ValueError, r"^weights: expected shape \(outputs, 4\)"),
    "weights 3-d": (
        lambda: linear(weights=torch.ones(1, 3, 4)),
        ValueError,
        r"^weights: expected shape \(outputs, 4\)",
    ),
    "weights dtype": (lambda: linear(weights=W.bfloat16()), TypeError, "^weights: expected float32 or float64; got"),
    "weights count": (lambda: linear(weights=[W, W, W]), ValueError, "^weights: expected one tensor, or two with a b"),
    "vector softmax": (lambda: linear(weights=W[0]), ValueError, "^weights: .*for the softmax loss; .*'logistic'"),
    "bias shape": (lambda: linear(weights=(W, X[0])), ValueError, r"^weights: expected a bias of shape \(3,\) after"),
    "bias of a vector": (
        lambda: linear(weights=(W[0], X[0]), loss="squared"),
        ValueError,
        r"bias of shape \(\) or \(1,\)",
    ),
    "bias dtype": (lambda: linear(weights=(W, W[:, 0].double())), TypeError, "^weights: bias: expected torch.float32"),
    "device": (
        lambda: linear(inputs=X.to("meta")),
        ValueError,
        "^inputs: expected device cpu as the weights; got meta",
    ),
    "decay kind": (lambda: linear(decay="much"), TypeError, "^decay: expected a number or a tensor; got str"),
    "decay bool": (lambda: linear(decay=True), TypeError, "^decay: expected a number or a tensor; got bool"),
    "decay shape": (lambda: linear(decay=torch.ones(4)), ValueError, r"^decay: expected a number, or .*\(3, 4\)"),
    "decay dtype": (lambda: linear(decay=W.double()), TypeError, "^decay: expected torch.float32 as the weights"),
    "decay container": (lambda: linear(decay=[0.1, 0.2]), ValueError, "^decay: expected a number, or the container"),
    "target shape": (
        lambda: linear(targets=torch.ones(6, 2)),
        ValueError,
        r"^targets: expected shape \(6,\) or \(6, 3\)",
    ),
    "class dtype": (
        lambda: linear(targets=torch.ones(6)),
        TypeError,
        "^targets: expected class indices in torch.int64",
    ),
    "classes": (lambda: linear(targets=torch.full((6,), 3)), ValueError, "^targets: .*indices from 0 to 2; got 3 to 3"),
    "ignored": (lambda: linear(targets=torch.full((6,), -100)), ValueError, "^targets: .*leave out the samples"),
    "float targets": (lambda: linear(targets=X[:, :3].double()), TypeError, "^targets: expected torch.float32"),
    "squared targets": (lambda: linear(loss="squared", targets=X), ValueError, r"^targets: expected shape \(6, 3\)"),
    "no targets": (lambda: linear().gradient, ValueError, "^targets: expected those of the loss, .* got None"),
    "v": (lambda: linear() @ torch.ones(4), ValueError, r"^v\[0\]: expected shape \(3, 4\) as weights\[0\]"),
    "v dtype": (lambda: linear().solve(W.double(), hvp.Neumann(1)), TypeError, r"^v\[0\]: expected a dtype no wider"),
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


def test_hypergradient_by_hand(backend: str) -> None:
    """Ridge regression with a decay for each weight: dL_V/dlambda = -w * H^-1 dL_V/dw, in closed form."""
    x, y, x_val, y_val = randn(30, 6, seed=40), randn(30, seed=41), randn(20, 6, seed=42), randn(20, seed=43)
    decay = randn(6, seed=44).exp().requires_grad_()

    def train_loss(w: Tensor) -> Tensor:
        return functional.mse_loss(x @ w, y) + (decay * w**2).sum() / 2

    hessian = 2 * x.T @ x / 30 + torch.diag(decay.detach())
    w = torch.linalg.solve(hessian, 2 * x.T @ y / 30).requires_grad_()
    [v] = torch.autograd.grad(functional.mse_loss(x_val @ w, y_val), w)
    operator = hvp.LinearModelOperator(x, w, loss="squared", targets=y, decay=decay)
    assert float(operator.gradient.abs().max()) < 1e-12, "w is the minimum of exactly this loss"
    q = operator.solve(v, hvp.Neumann(400)).value
    [gradient] = torch.autograd.grad(train_loss(w), w, create_graph=True)
    [mixed] = torch.autograd.grad(gradient, decay, q)
    truth = -w.detach() * torch.linalg.solve(hessian, 2 * x_val.T @ (x_val @ w.detach() - y_val) / 20)
    torch.testing.assert_close(-mixed, truth, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("decay", ["scalar", "per weight"])
@pytest.mark.parametrize("loss", LOSSES)
def test_any_device(loss: str, decay: str, device: torch.device) -> None:
    """Both forms, a product and a gradient, against the CPU's in plain torch."""
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
    assert there.engine.report().startswith("dual" if decay == "scalar" else "direct")


def test_memory_does_not_grow_with_iterations() -> None:
    from hvp_engine.memory import peak_memory

    model = model_of("softmax", 10, samples=30, features=400)
    v = likewise(model, randn(4010, seed=45))
    for name in BACKENDS:
        if why_not(name, "cpu"):
            continue
        peaks = []
        for iterations in (3, 100):
            operator = model.operator
            operator.solve(v, hvp.Neumann(100, alpha=0.01))  # the Gram matrix is kept
            with hvp.use_backend(name), peak_memory("cpu") as meter:
                operator.solve(v, hvp.Neumann(iterations, alpha=0.01))
            peaks.append(meter.peak_bytes)
        assert peaks[1] <= 1.01 * peaks[0]


def test_reference_and_kernels_have_one_meaning() -> None:
    """v, p and figures after a call, not only what a solve makes of them."""
    if reason := why_not("cpp", "cpu"):
        pytest.skip(reason)
    from hvp_engine import native

    model = model_of("softmax", 5, "leaves", samples=20, features=33)
    products = model.operator.linearization
    assert isinstance(products, LinearModelProducts)
    start = torch.zeros(2, products.layout.size, dtype=DTYPE)
    for row in start:
        for view in products.layout.views(row):
            view.copy_(randn(*view.shape, seed=46))
    for name in ("linear_model_direct", "linear_model_dual"):
        for horner in (False, True):
            for iterations in (0, 1, 6):
                results = []
                for module in (linear_model_reference, native):
                    v, p = start.clone(), torch.full_like(start, math.nan)
                    figures = getattr(module, name)(v, p, products.factors, 0.1, 0.2, iterations, horner)
                    results.append((v, p, figures))
                for ours, theirs in zip(*results, strict=True):
                    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)
                assert torch.equal(results[1][0], start) == (horner or iterations == 0)
