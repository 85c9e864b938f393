"""Several right-hand sides: the same values as one by one, by fewer calls; one dense matrix for all of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from problems_with_known_answers import DTYPE, NETWORKS, dense_hessian, flat, matrix_with, randn, relative_error
from torch import Tensor

import hvp_engine as hvp
from hvp_engine.differentiation.linear_map import LinearMap
from hvp_engine.engines import EagerEngine
from hvp_engine.engines.functions import TracedLinearization
from hvp_engine.operators.base import LinearOperator

COUNT = 11


def operator_of(name: str) -> tuple[hvp.HessianOperator, dict[str, Tensor]]:
    network = NETWORKS[name]()
    net = hvp.functional(network.module)
    weights = dict(network.module.named_parameters())

    def loss(w: Any) -> Tensor:
        return network.loss_of(net(w, network.x)) + sum(p.square().sum() for p in w.values())

    return hvp.HessianOperator(loss, weights, engine="linearized"), weights


def right_hand_sides(weights: dict[str, Tensor], count: int) -> dict[str, Tensor]:
    return {name: randn(count, *w.shape, seed=seed) for seed, (name, w) in enumerate(weights.items())}


@pytest.fixture
def batched_calls(monkeypatch: pytest.MonkeyPatch, no_native_programs: None) -> list[int]:
    """How many vectors each batched product took."""
    calls: list[int] = []
    original = TracedLinearization._at_once

    def counting(self: TracedLinearization, tangents: Sequence[Tensor]) -> Sequence[Tensor]:
        calls.append(len(tangents[0]))
        return original(self, tangents)

    monkeypatch.setattr(TracedLinearization, "_at_once", counting)
    return calls


SOLVERS = [
    hvp.Neumann(6, alpha=0.02),
    hvp.Neumann(6, form="accumulate", damping=0.5),
    hvp.MINRES(9, damping=3.0),
]


@pytest.mark.parametrize(
    "name",
    ["mlp", "channels_last conv", "batchnorm, training", "lstm", "multihead attention", "tied", "embedding"],
)
def test_networks_agree_with_one_by_one(name: str, batched_calls: list[int]) -> None:
    operator, weights = operator_of(name)
    v = right_hand_sides(weights, COUNT)
    for solver in SOLVERS:
        batched_calls.clear()
        found = operator.solve(v, solver, batched=True)
        assert batched_calls and set(batched_calls) == {COUNT}
        alpha = {"alpha": found.alpha} if found.alpha is not None else {}  # the one that all of them shared
        alone = type(solver)(**(vars(solver) | alpha))
        singles = [operator.solve({key: t[k] for key, t in v.items()}, alone) for k in range(COUNT)]
        for k, single in enumerate(singles):
            value = flat([found.value[key][k] for key in v])
            assert relative_error(value, flat(list(single.value.values()))) < 1e-10
        assert found.residual_norm == pytest.approx(max(single.residual_norm for single in singles), rel=1e-6)
        assert found.iterations == max(single.iterations for single in singles)


def test_right_hand_sides_stop_on_their_own_and_leave_the_batch(batched_calls: list[int]) -> None:
    """An eigenvector is done after a step, a random vector is not."""
    operator, weights = operator_of("mlp")
    values, vectors = torch.linalg.eigh(operator.dense())
    rows = torch.cat([vectors.T[:6], randn(6, len(values), seed=1)])
    v = operator._structure.rebuild(
        [
            part.view(12, *w.shape)
            for part, w in zip(rows.split([w.numel() for w in weights.values()], 1), weights.values(), strict=True)
        ]
    )
    batched_calls.clear()
    solution = operator.solve(v, hvp.ConjugateGradient(60, tol=1e-9, damping=9.0), batched=True)
    assert solution.converged
    assert batched_calls[0] == 12 and len(batched_calls) == 1, "the six that go on are too few for a batch"
    truth = torch.linalg.solve(operator.dense() + 9 * torch.eye(len(values), dtype=DTYPE), rows.T).T
    found = torch.cat([t.reshape(12, -1) for t in solution.value.values()], 1)
    torch.testing.assert_close(found, truth, rtol=1e-7, atol=1e-9)


def test_more_than_fit_into_one_product(batched_calls: list[int]) -> None:
    operator, weights = operator_of("mlp")
    v = right_hand_sides(weights, 32 + 9 + 1)
    value = operator.solve(v, hvp.Neumann(3, alpha=0.05), batched=True).value
    assert batched_calls == [32] * 3 + [10] * 3
    for k in (0, 31, 32, 41):
        single = operator.solve({name: t[k] for name, t in v.items()}, hvp.Neumann(3, alpha=0.05)).value
        torch.testing.assert_close({name: t[k] for name, t in value.items()}, single, rtol=1e-12, atol=1e-14)


def test_few_right_hand_sides_and_large_problems_go_one_by_one(batched_calls: list[int]) -> None:
    operator, weights = operator_of("mlp")
    operator.solve(right_hand_sides(weights, 7), hvp.Neumann(2, alpha=0.05), batched=True)
    large = hvp.HessianOperator(lambda w: w.square().sum(), torch.zeros(20_000), engine="linearized")
    torch.testing.assert_close(
        large.solve(torch.ones(9, 20_000), hvp.Neumann(40), batched=True).value, torch.full((9, 20_000), 0.5)
    )
    assert not batched_calls


def test_where_a_native_program_runs_they_go_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """It launches nothing that several vectors could share."""
    monkeypatch.setattr(TracedLinearization, "_at_once", lambda *_: pytest.fail("by vmap"))
    operator, weights = operator_of("mlp")
    v = right_hand_sides(weights, COUNT)
    for solver in (SOLVERS[0], SOLVERS[2], hvp.Exact(damping=3.0)):
        found = operator.solve(v, solver, batched=True)
        alone = operator.solve({name: t[4] for name, t in v.items()}, solver)
        value = flat([t[4] for t in found.value.values()])
        assert relative_error(value, flat(list(alone.value.values()))) < 1e-10
    assert operator.linear_map.functions.native.program is not None  # type: ignore[attr-defined]


@pytest.mark.usefixtures("no_native_programs")
def test_where_vmap_fails_a_loop_takes_over_and_the_report_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def failing(self: TracedLinearization, tangents: Sequence[Tensor]) -> Sequence[Tensor]:
        calls.append(len(tangents))
        raise RuntimeError("vmap: no batching rule for aten::something")

    monkeypatch.setattr(TracedLinearization, "_at_once", failing)
    operator, weights = operator_of("mlp")
    v = right_hand_sides(weights, COUNT)
    for _ in range(2):
        value = operator.solve(v, hvp.Neumann(3, alpha=0.05), batched=True).value
        single = operator.solve({name: t[4] for name, t in v.items()}, hvp.Neumann(3, alpha=0.05)).value
        torch.testing.assert_close({name: t[4] for name, t in value.items()}, single, rtol=1e-12, atol=1e-14)
    assert len(calls) == 1, "it is not tried again"
    assert "one by one, since vmap failed: RuntimeError: vmap: no batching rule" in operator.engine.report()


def test_a_divergence_names_its_right_hand_side() -> None:
    operator, weights = operator_of("mlp")
    v = right_hand_sides(weights, COUNT)
    with pytest.raises(hvp.DivergenceError, match="alpha=50"):
        operator.solve(v, hvp.Neumann(50, alpha=50.0), batched=True)
    next(iter(v.values()))[5] = math.nan
    with pytest.raises(hvp.NonFiniteError, match=r"^v\[5\]: expected finite values"):
        operator.solve(v, hvp.Neumann(2, alpha=0.01), batched=True)


# Dense matrices


@pytest.mark.parametrize("name", ["mlp", "channels_last conv", "gru", "sparse embedding"])
def test_dense_hessian_by_batched_products(name: str, batched_calls: list[int]) -> None:
    network = NETWORKS[name]()
    net = hvp.functional(network.module)
    weights = dict(network.module.named_parameters())
    operator = hvp.HessianOperator(lambda w: network.loss_of(net(w, network.x)), weights, engine="linearized")
    truth = dense_hessian(network)
    torch.testing.assert_close(operator.dense(), truth, rtol=1e-9, atol=1e-11)
    assert sum(batched_calls) >= len(truth) - 7


@pytest.mark.parametrize("matrix", [matrix_with([1.0, 2.0, 5.0], seed=1), matrix_with([0.0, -2.0, 5.0], seed=2)])
def test_exact_makes_one_matrix_for_all(matrix: Tensor) -> None:
    calls = []

    def product(v: Tensor) -> Tensor:
        calls.append(v)
        return matrix @ v

    v = randn(9, 3, seed=3)
    solution = hvp.solve(product, v, hvp.Exact(), batched=True)
    assert (len(calls), solution.hvps, solution.iterations) == (3, 3, 3)
    torch.testing.assert_close(solution.value, v @ torch.linalg.pinv(matrix), rtol=1e-10, atol=1e-12)
    v[7, 1] = math.nan
    with pytest.raises(hvp.NonFiniteError, match=r"^v\[7\]"):
        hvp.solve(product, v, hvp.Exact(), batched=True)


def test_exact_on_a_network_and_on_a_linear_model(batched_calls: list[int]) -> None:
    operator, weights = operator_of("mlp")
    v = right_hand_sides(weights, 3)
    solution = operator.solve(v, hvp.Exact(damping=3.0), batched=True)
    assert solution.converged and batched_calls
    matrix = operator.dense() + 3 * torch.eye(operator.shape[0], dtype=DTYPE)
    rows = torch.cat([t.flatten(1) for t in v.values()], 1)
    found = torch.cat([t.flatten(1) for t in solution.value.values()], 1)
    torch.testing.assert_close(found @ matrix, rows, rtol=1e-9, atol=1e-10)
    linear = hvp.LinearModelOperator(randn(8, 5, seed=5), torch.zeros(5, dtype=DTYPE), loss="squared", decay=0.1)
    both = linear.solve(randn(4, 5, seed=6), hvp.Exact(), batched=True)
    assert both.hvps == 5
    torch.testing.assert_close(both.value @ linear.dense(), randn(4, 5, seed=6), rtol=1e-10, atol=1e-12)


# --- Nystrom ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sketch", ["gaussian", "columns"])
@pytest.mark.parametrize("name", ["mlp", "channels_last conv", "tied"])
def test_a_sketch_is_made_in_blocks(name: str, sketch: Any, batched_calls: list[int]) -> None:
    """At most 32 vectors at a time, and what is left over one by one; the values are those of single products."""
    operator, weights = operator_of(name)
    plain = LinearOperator(Single(operator), operator._structure, EagerEngine())
    plain.spectrum = operator.spectrum
    v = {key: t[0] for key, t in right_hand_sides(weights, 1).items()}
    rank = min(70, operator.shape[0])
    solver = hvp.Nystrom(rank, rho=0.5, damping=0.1, sketch=sketch)
    together, alone = operator.solve(v, solver), plain.solve(v, solver)
    assert batched_calls and max(batched_calls) == min(32, rank)
    assert sum(batched_calls) > rank - 8
    assert relative_error(flat(list(together.value.values())), flat(list(alone.value.values()))) < 1e-9
    assert together.hvps == alone.hvps == together.iterations == rank + 1
    assert together.residual_norm == pytest.approx(alone.residual_norm, rel=1e-6)
    batched_calls.clear()
    preconditioner = hvp.NystromPreconditioner(operator, rank=rank, rho=0.5, sketch=sketch)
    assert preconditioner.hvps == rank and sum(batched_calls) > rank - 8
    single = hvp.NystromPreconditioner(plain, rank=rank, rho=0.5, sketch=sketch)
    leaves = list(v.values())
    assert relative_error(flat(list(preconditioner(leaves))), flat(list(single(leaves)))) < 1e-9


class Single(LinearMap):
    """An operator that takes one vector at a time."""

    def __init__(self, operator: hvp.HessianOperator):
        self.layout, self.product = operator.layout, operator.product
        self.loss, self.gradient = operator.loss, operator.linear_map.gradient


def test_several_right_hand_sides_share_a_sketch() -> None:
    matrix, calls = matrix_with(torch.linspace(0.5, 9.0, 12, dtype=DTYPE), seed=3), 0

    def product(v: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return matrix @ v

    v, solver = randn(5, 12, seed=4), hvp.Nystrom(12, rho=1e-9, damping=0.5)
    solution = hvp.solve(product, v, solver, batched=True)
    assert calls == solution.hvps == 12 + 5
    truth = torch.linalg.solve(matrix + (0.5 + 1e-9) * torch.eye(12, dtype=DTYPE), v.T).T
    assert relative_error(solution.value, truth) < 1e-9
    assert solution.residual_norm < 1e-7 and solution.converged
    calls = 0
    fitted = hvp.solve(product, v, hvp.Nystrom(5), batched=True)
    assert calls == fitted.hvps == 5 + 2 * 5, "a product for rho and one for the residual of each"
    alone = torch.stack([hvp.solve(product, row, hvp.Nystrom(5)).value for row in v])
    assert relative_error(fitted.value, alone) < 1e-12
