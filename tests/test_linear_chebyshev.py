"""The linear model's Chebyshev iteration in one call, against the ordinary solve with autograd's Hessian."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from linear_models_and_losses import DECAYS, LOSSES, Model, joined, likewise, model_of
from problems_with_known_answers import DTYPE, flat, randn, relative_error, unflat

import hvp_engine as hvp
from hvp_engine.ops.backend import why_not

FORMS = pytest.mark.parametrize("form", ["chebyshev", "heavy_ball"])


def v_of(model: Model, seed: int = 15) -> Any:
    return likewise(model, randn(sum(w.numel() for w in model.weights), seed=seed))


def compare(model: Model, solver: hvp.Chebyshev) -> hvp.Solution:
    ours = model.operator.solve(v_of(model), solver)
    ordinary = hvp.HessianOperator(model.value, model.weights, engine="eager").solve(
        unflat(joined(v_of(model)), model.weights), solver
    )
    torch.testing.assert_close(joined(ours.value), flat(ordinary.value), rtol=1e-9, atol=1e-12)
    assert ours.residual_norm == pytest.approx(ordinary.residual_norm, rel=1e-7, abs=1e-12)
    pairs = [(s.status, s.iterations, s.hvps, s.residual_of, s.alpha) for s in (ours, ordinary)]
    assert pairs[0] == pairs[1]
    return ours


@FORMS
@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("loss", LOSSES)
def test_terms_are_those_of_the_ordinary_solve(loss: str, decay: str, form: Any, backend: str) -> None:
    model = model_of(loss, decay=decay, bias=decay != "leaves")
    for iterations, damping in ((0, 0.0), (1, 0.3), (25, 0.3)):
        compare(model, hvp.Chebyshev(iterations, form=form, damping=damping))
    compare(model, hvp.Chebyshev(12, bounds=(0.2, 40.0), form=form))


# Below, at and above the widths of vectors, tiles, tasks and blocks.
@pytest.mark.parametrize("samples, features", [(1, 1), (7, 16), (13, 97), (97, 25), (200, 33), (5, 1400), (700, 60)])
@pytest.mark.parametrize("outputs", ["vector", 3, 10])
def test_sizes(samples: int, features: int, outputs: int | str) -> None:
    loss = "logistic" if outputs == "vector" else "softmax"
    model = model_of(loss, outputs, "per weight", samples=samples, features=features)
    compare(model, hvp.Chebyshev(3, bounds=(0.1, 30.0), damping=0.1))


def test_it_is_one_call_in_cpp() -> None:
    if reason := why_not("cpp", "cpu"):
        pytest.skip(reason)
    operator = model_of("softmax").operator
    operator.solve(v_of(model_of("softmax")), hvp.Chebyshev(5))
    assert operator.engine.report() == "direct form in C++"


@FORMS
def test_batched_equals_one_by_one(form: Any, backend: str) -> None:
    model = model_of("softmax", 5, "per weight", samples=30, features=40)
    solver = hvp.Chebyshev(15, bounds=(0.05, 20.0), form=form)
    vs = [v_of(model, seed) for seed in (1, 2, 3)]
    batch = tuple(torch.stack(parts) for parts in zip(*vs, strict=True))
    together = model.operator.solve(batch, solver, batched=True)
    for index, v in enumerate(vs):
        alone = model.operator.solve(v, solver)
        assert relative_error(flat([leaf[index] for leaf in together.value]), joined(alone.value)) < 1e-13
    assert together.hvps == 3 * 15


@pytest.mark.parametrize("threads", [1, 3])
def test_float32_and_threads(threads: int) -> None:
    model = model_of("softmax", 10, "per weight", samples=300, features=400)
    solver = hvp.Chebyshev(30, damping=0.1)
    truth = joined(model.operator.solve(v_of(model), solver).value)
    narrow, before = model.to(torch.float32), torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        value = narrow.operator.solve(likewise(narrow, joined(v_of(model)).float()), solver).value
    finally:
        torch.set_num_threads(before)
    assert value[0].dtype == torch.float32
    assert relative_error(joined(value).to(DTYPE), truth) < 2e-5


def test_it_converges_to_the_dense_solve(backend: str) -> None:
    model = model_of("logistic", 4, "per weight", samples=40, features=9)
    solution = model.operator.solve(v_of(model), hvp.Chebyshev(150))
    truth = torch.linalg.solve(model.hessian(), joined(v_of(model)))
    assert solution.converged and relative_error(joined(solution.value), truth) < 1e-8


def test_failures_are_explained(backend: str) -> None:
    model = model_of("squared", decay="scalar")
    v = v_of(model)
    with pytest.raises(hvp.DivergenceError, match=r"Chebyshev diverged after 60 products with bounds=\(0.01, 0.02\)"):
        model.operator.solve(v, hvp.Chebyshev(60, bounds=(0.01, 0.02)))
    broken = likewise(model, torch.full_like(joined(v), math.nan))
    with pytest.raises(hvp.NonFiniteError, match="^v: expected finite"):
        model.operator.solve(broken, hvp.Chebyshev(5, bounds=(0.1, 2.0)))
    negative = model_of("squared", decay="none", samples=3)
    operator = hvp.LinearModelOperator(
        negative.inputs, negative.container, loss="squared", targets=negative.targets, decay=-0.3
    )
    solution = operator.solve(v, hvp.Chebyshev(30))
    assert solution.status is hvp.Status.NEGATIVE_CURVATURE and solution.residual_norm < 11
