"""A rewrite that fails, breaks the graph or changes the numbers: undone, named, or found."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, fx

import hvp_engine as hvp
from hvp_engine.differentiation.trace import partial_evaluation, regions, rewriting, tracing
from hvp_engine.differentiation.trace.rewriting import WrongRewriteError
from hvp_engine.engines import compiled
from hvp_engine.engines.auto import AutoEngine
from hvp_engine.engines.compiled import CompiledEngine
from hvp_engine.engines.functions import TracedLinearization
from hvp_engine.engines.traced import LinearizedEngine

aten = torch.ops.aten
DTYPE = torch.float64
W, X = torch.linspace(-1, 1, 9, dtype=DTYPE).view(3, 3), torch.linspace(0, 2, 12, dtype=DTYPE).view(4, 3)


def loss(w: Tensor) -> Tensor:
    return (torch.tanh(X @ w) @ w).square().mean() + 0.1 * (w * w).sum()


def crash(graph: fx.Graph, linear: set[fx.Node]) -> None:
    """Half done when it fails."""
    node = next(node for node in reversed(graph.nodes) if node.op == "call_function")
    node.replace_all_uses_with(next(iter(graph.nodes)))
    raise KeyError("halfway")


def disorder(graph: fx.Graph, linear: set[fx.Node]) -> None:
    """A node that is read before it is there."""
    calls = [node for node in graph.nodes if node.op == "call_function"]
    calls[0].prepend(calls[-1])


def double(graph: fx.Graph, linear: set[fx.Node]) -> None:
    """Twice the last product."""
    node = next(node for node in reversed(graph.nodes) if node.op == "call_function" and node in linear)
    with graph.inserting_after(node):
        twice = graph.call_function(aten.mul.Scalar, (node, 2.0))
    twice.meta = dict(node.meta)
    node.replace_all_uses_with(twice)
    twice.args = (node, 2.0)


@contextlib.contextmanager
def unverified() -> Iterator[None]:
    """As for users: a failing rewrite is undone."""
    token = rewriting._VERIFIED.set(False)
    try:
        yield
    finally:
        rewriting._VERIFIED.reset(token)


def everywhere(monkeypatch: pytest.MonkeyPatch, rewrite: rewriting.Rewrite, place: int) -> None:
    rewrites = list(partial_evaluation.REWRITES)
    monkeypatch.setattr(partial_evaluation, "REWRITES", (*rewrites[:place], rewrite, *rewrites[place:]))


@pytest.mark.parametrize("place", range(len(partial_evaluation.REWRITES) + 1))
@pytest.mark.parametrize("rewrite", [crash, disorder])
def test_a_rewrite_that_fails_is_undone(
    monkeypatch: pytest.MonkeyPatch, rewrite: rewriting.Rewrite, place: int
) -> None:
    everywhere(monkeypatch, rewrite, place)
    engine = LinearizedEngine()
    v = W.exp()
    with unverified():
        operator = hvp.HessianOperator(loss, W, engine=engine)
        assert isinstance(operator.linear_map, TracedLinearization)
        product = operator @ v
    torch.testing.assert_close(product, torch.autograd.functional.hvp(loss, W, v)[1], rtol=1e-12, atol=1e-12)
    (undone,) = operator.linear_map.functions.partition.undone
    assert undone.startswith(f"{rewrite.__name__}: ")
    assert f"rewrite undone: {undone}" in engine.report()
    assert "disorder" not in undone or "RuntimeError" in undone
    assert "crash" not in undone or "KeyError: 'halfway'" in undone


@pytest.mark.parametrize("step", ["recomputable", "decompose", "written_over", "functionalized"])
def test_a_step_that_fails_is_left_out(monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    def fails(*arguments: object) -> None:
        raise IndexError("step")

    fails.__name__ = step
    monkeypatch.setattr(tracing if step == "functionalized" else partial_evaluation, step, fails)
    with unverified():
        operator = hvp.HessianOperator(loss, W, engine=LinearizedEngine())
        assert isinstance(operator.linear_map, TracedLinearization)
        product = operator @ W
    torch.testing.assert_close(product, torch.autograd.functional.hvp(loss, W, W)[1], rtol=1e-12, atol=1e-12)
    assert all("IndexError: step" in undone for undone in operator.linear_map.functions.partition.undone)
    assert operator.linear_map.functions.partition.undone


@pytest.mark.parametrize("step", ["outline", "written_over"])
def test_a_step_of_compiling_that_fails_is_left_out(monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    def fails(*arguments: object) -> None:
        raise IndexError("step")

    fails.__name__ = step
    monkeypatch.setattr(compiled, "_LARGEST_WHOLE", 0)
    monkeypatch.setattr(regions.Regions if step == "outline" else compiled, step, fails)
    engine = CompiledEngine()
    with unverified():
        operator = hvp.HessianOperator(loss, W, engine=engine)
        assert isinstance(operator.linear_map, compiled.CompiledLinearization)
        product = operator @ W
    torch.testing.assert_close(product, torch.autograd.functional.hvp(loss, W, W)[1], rtol=1e-12, atol=1e-12)
    assert f"rewrite undone: {step}: IndexError: step" in engine.report()


@pytest.mark.parametrize("place", range(len(partial_evaluation.REWRITES) + 1))
def test_a_rewrite_that_changes_the_numbers_is_found(monkeypatch: pytest.MonkeyPatch, place: int) -> None:
    everywhere(monkeypatch, double, place)
    with pytest.raises(WrongRewriteError, match="double: output"):
        hvp.HessianOperator(loss, W, engine=LinearizedEngine()) @ W


@pytest.mark.parametrize("rewrite", [crash, disorder])
def test_a_rewrite_that_fails_is_an_error_of_tests(monkeypatch: pytest.MonkeyPatch, rewrite: rewriting.Rewrite) -> None:
    everywhere(monkeypatch, rewrite, 2)
    with pytest.raises(hvp.BackendError, match="a fault of hvp_engine"):
        hvp.HessianOperator(loss, W, engine=LinearizedEngine()) @ W


def test_a_fault_of_ours_is_not_blamed_on_the_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*arguments: object) -> None:
        raise KeyError("ours")

    monkeypatch.setattr(partial_evaluation, "_subgraph", fails)
    engine = AutoEngine()
    operator = hvp.HessianOperator(loss, W, engine=engine)
    torch.testing.assert_close(operator @ W, torch.autograd.functional.hvp(loss, W, W)[1])
    assert "cannot be traced" not in engine.report()
    assert "a fault of hvp_engine" in engine.report()


SQUARES: dict[str, Callable[[Tensor], Tensor]] = {
    "alone": lambda w: (w * w).sum(),
    "weighted": lambda w: (X @ w).square().mean() + (w.detach().exp() * (w * w)).sum(),
    "dot": lambda w: (X @ w).square().mean() + torch.dot(w.flatten(), w.flatten()),
    "of a product": lambda w: ((p := w @ w) * p).sum(),
    "of a batched product": lambda w: ((p := torch.bmm(w[None], w[None])) * p).sum(),
    "cube": lambda w: (w * w * w).sum(),
    "by hand normalized": lambda w: ((h := X @ w) * torch.rsqrt((h * h).mean(-1, keepdim=True) + 1e-5)).tanh().sum(),
    "gate": lambda w: ((h := X @ w) * torch.sigmoid(h) * h).sum(),
    "twice the same": lambda w: ((q := (w * w)) + q).square().sum(),
}


@pytest.mark.parametrize("name", SQUARES)
def test_a_tensor_times_itself(name: str) -> None:
    v = W.exp()
    operator = hvp.HessianOperator(SQUARES[name], W, engine=LinearizedEngine())
    assert isinstance(operator.linear_map, TracedLinearization)
    expected = torch.autograd.functional.hvp(SQUARES[name], W, v)[1]
    torch.testing.assert_close(operator @ v, expected, rtol=1e-11, atol=1e-12)
    assert not operator.linear_map.functions.partition.undone


def test_the_recorded_inputs_are_left_alone() -> None:
    """Tests evaluate graphs on copies, with random numbers that nobody misses."""
    w, state = W.clone(), torch.get_rng_state()
    hvp.HessianOperator(lambda w: torch.dropout(w * w, 0.5, True).sum() + (w**4).sum(), w, engine=LinearizedEngine())
    assert torch.equal(w, W)
    assert torch.equal(torch.get_rng_state(), state)
