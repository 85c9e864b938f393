"""The linear model's whole series in one call, in both algorithms and backends, against the ordinary solve."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from linear_models_and_losses import BACKENDS, DECAYS, FORMS, LOSSES, Model, joined, likewise, model_of
from problems_with_known_answers import DTYPE, flat, randn, relative_error, truncated_sum, unflat
from torch import Tensor

import hvp_engine as hvp
from hvp_engine.linear_model import engine
from hvp_engine.linear_model import reference as linear_model_reference
from hvp_engine.linear_model.operator import LinearModelProducts
from hvp_engine.ops.backend import why_not

# The series


# Every pair of loss, decay and iterations occurs.
SETTINGS = [
    (loss, decay, (0, 1, 50)[(i + j) % 3], (0.0, 0.4)[(i * j) % 2])
    for i, loss in enumerate(LOSSES)
    for j, decay in enumerate(["none", "scalar", "leaves"])
]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("loss", "decay", "iterations", "damping"), SETTINGS)
def test_truncated_sum(
    loss: str, decay: str, iterations: int, form: str, damping: float, backend: str, algorithm: str
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


@pytest.mark.parametrize(("outputs", "form"), list(zip(["vector", 2, 3, 4, 5, 11], FORMS * 3, strict=True)))
@pytest.mark.parametrize("samples, features", SIZES)
def test_sizes(samples: int, features: int, outputs: int | str, form: str, backend: str, algorithm: str) -> None:
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
    where = {"cpp": "C++", "triton": "Triton"}.get(backend, "plain torch")
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


def test_a_solve_leaves_v_and_the_operator_as_they_were(backend: str, algorithm: str) -> None:
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
def test_batched_equals_one_by_one(outputs: int | str, form: str, backend: str, algorithm: str) -> None:
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


def test_memory_does_not_grow_with_iterations() -> None:
    from hvp_engine.diagnostics.memory import peak_memory

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
    from hvp_engine.linear_model import native

    model = model_of("softmax", 5, "leaves", samples=20, features=33)
    products = model.operator.linear_map
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
    table = torch.tensor([[0.2, 0.0], [0.3, 0.4], [0.1, 0.7], [0.4, 0.2]], dtype=DTYPE)
    for terms in (1, 2, 4):
        results = []
        for module in (linear_model_reference, native):
            r, d, x = start.clone(), torch.full_like(start, math.nan), torch.full_like(start, math.nan)
            figures = module.linear_model_chebyshev(r, d, x, products.factors, table[:terms], 0.2)
            results.append((r, d, x, figures))
        for ours, theirs in zip(*results, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)
    for steps in (1, 5):
        both = [m.linear_model_lanczos(start[0], products.factors, steps) for m in (linear_model_reference, native)]
        for ours, theirs in zip(*((t.basis, t.diagonal, t.off_diagonal) for t in both), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-12)
