"""The compiled engine against eager, its budget, and auto's way to it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import hvp_engine as hvp
from hvp_engine import engines
from hvp_engine.engines.compiled import CompiledFunctions

pytestmark = pytest.mark.filterwarnings("ignore:the weights are far from a minimum")
DTYPE = torch.float64


def train(weights: list[Tensor], hyper: Tensor, batch: Tensor) -> Tensor:
    hidden = torch.tanh(batch @ weights[0].t() + weights[1])
    return (hidden @ weights[2]).square().mean() + (hyper.exp() * weights[0].square()).sum()


def val(weights: list[Tensor], hyper: Tensor, batch: Tensor) -> Tensor:
    return (torch.tanh(batch @ weights[0].t() + weights[1]) @ weights[2] - 1).square().mean()


def point() -> tuple[list[Tensor], Tensor, Tensor]:
    torch.manual_seed(0)
    weights = [torch.randn(6, 9, dtype=DTYPE), torch.randn(6, dtype=DTYPE), torch.randn(6, dtype=DTYPE)]
    return weights, torch.randn(6, 9, dtype=DTYPE) - 2, torch.randn(12, 9, dtype=DTYPE)


@pytest.fixture(scope="module")
def engine() -> engines.CompiledEngine:
    """One engine, so that the graph is compiled once for the file."""
    return engines.CompiledEngine()


@pytest.mark.parametrize("form", ["accumulate", "horner"])
@pytest.mark.parametrize("iterations", [1, 5])
def test_hypergradient_equals_eagers(engine: Any, form: Any, iterations: int) -> None:
    weights, hyper, batch = point()
    solver = hvp.Neumann(iterations, alpha=0.05, form=form, damping=0.1)
    compiled = hvp.Hypergradient(train, val, solver, engine=engine)
    eager = hvp.Hypergradient(train, val, solver, engine="eager")
    for scale in (1.0, 0.7):
        arguments = ([scale * w for w in weights], scale * hyper, batch * scale, batch)
        ours, theirs = compiled(*arguments), eager(*arguments)
        torch.testing.assert_close(ours.grads, theirs.grads, rtol=1e-10, atol=1e-13)
        torch.testing.assert_close(ours.solution.value, theirs.solution.value, rtol=1e-10, atol=1e-13)
        assert ours.solution.residual_norm == pytest.approx(theirs.solution.residual_norm, rel=1e-9)
    functions = list(engine._cache.values())
    assert len(functions) == 1 and isinstance(functions[0], CompiledFunctions) and functions[0].distrust is None
    assert "compiled in" in compiled.report()


def test_log_probabilities_that_are_transposed() -> None:
    """As speech networks hand them to a CTC loss: time first."""
    _, _, batch = point()
    weights, factors = torch.randn(9, 5, dtype=DTYPE), torch.randn(4, 3, 5, dtype=DTYPE)

    def loss(w: Tensor) -> Tensor:
        scores = (batch.view(3, 4, 9) @ w).log_softmax(-1)
        return (scores.transpose(0, 1).contiguous() * factors).sin().mean()

    compiled, eager = (hvp.HessianOperator(loss, weights, engine=name) for name in ("compiled", "eager"))
    torch.testing.assert_close(compiled @ weights, eager @ weights, rtol=1e-10, atol=1e-13)
    assert "compiled in" in compiled.engine.report()


def test_a_graph_that_inductor_fails_on_is_named_by_its_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*_: Any, **__: Any) -> None:
        raise ValueError("no such layout\n\nSet TORCHDYNAMO_VERBOSE=1 for the internal stack trace")

    monkeypatch.setattr("hvp_engine.engines.compiled.compile_graph", failing)
    weights, hyper, batch = point()
    with pytest.raises(hvp.BackendError, match="ValueError: no such layout; use engine='linearized'"):
        hvp.Hypergradient(train, val, hvp.Neumann(2, 0.05), engine="compiled")(weights, hyper, batch, batch)


def test_a_graph_beyond_the_budget_is_refused() -> None:
    weights, hyper, batch = point()
    hypergradient = hvp.Hypergradient(train, val, hvp.Neumann(2, 0.05), engine=engines.CompiledEngine(0.5))
    with pytest.raises(hvp.BackendError, match="compile_budget_s: compiling would take about .* s, more than"):
        hypergradient(weights, hyper, batch, batch)


def test_automatic_choice_tries_compiling_when_it_would_have_paid() -> None:
    weights, hyper, batch = point()
    automatic, by_extension = engines.AutoEngine(), engines.AutoEngine()

    def lacking(weights: list[Tensor], hyper: Tensor, batch: Tensor) -> Tensor:
        """With a convolution of groups, which the extension lacks."""
        smooth = torch.nn.functional.conv1d(weights[0][:, None].expand(-1, 2, -1), batch.new_ones(2, 1, 3), groups=2)
        return train(weights, hyper, batch) + smooth.square().mean()

    hypergradient = hvp.Hypergradient(lacking, val, hvp.Neumann(4, 0.05), engine=automatic)
    eager = hvp.Hypergradient(lacking, val, hvp.Neumann(4, 0.05), engine="eager")
    hypergradient(weights, hyper, batch, batch)
    (choice,) = automatic.choices.values()
    assert "compiled" not in choice.seconds and choice.terms == 4 and choice.compile_seconds is not None
    choice.compile_seconds = 0.0
    ours, theirs = hypergradient(weights, hyper, batch, batch), eager(weights, hyper, batch, batch)
    assert "compiled" in choice.seconds
    torch.testing.assert_close(ours.grads, theirs.grads, rtol=1e-10, atol=1e-13)
    never = engines.AutoEngine(compile_budget_s=0.0)
    hvp.Hypergradient(lacking, val, hvp.Neumann(4, 0.05), engine=never)(weights, hyper, batch, batch)
    hvp.Hypergradient(train, val, hvp.Neumann(4, 0.05), engine=by_extension)(weights, hyper, batch, batch)
    for choice in (*never.choices.values(), *by_extension.choices.values()):
        assert choice.compile_seconds is None and choice.engine.name != "compiled"


def test_automatic_choice_is_kept_with_the_state() -> None:
    weights, hyper, batch = point()
    first = hvp.Hypergradient(train, val, hvp.Neumann(4, 0.05))
    expected = first(weights, hyper, batch, batch)
    for name in ("eager", "linearized"):
        state = first.state_dict()
        state["engine"] = {"engines": dict.fromkeys(state["engine"]["engines"], name)}
        second = hvp.Hypergradient(train, val, hvp.Neumann(4, 0.05))
        second.load_state_dict(state)
        torch.testing.assert_close(second(weights, hyper, batch, batch).grads, expected.grads, rtol=1e-10, atol=1e-13)
        assert second.report().splitlines()[1].startswith(f"{name}: as before the checkpoint")
