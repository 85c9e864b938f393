"""Whole hypergradients in one recording, on a CPU by recorded calls: with the same results as in parts."""

from __future__ import annotations

from contextvars import ContextVar
from typing import Any

import pytest
import torch
from recorder_on_cpu import CallRecording, FailingRecorder
from test_engines_cudagraph import Make, assert_same, both, make, point, train, val
from torch import Tensor

import hvp_engine as hvp
from hvp_engine.engines.cudagraph import CudaGraphEngine

pytestmark = pytest.mark.filterwarnings("ignore:the weights are far from a minimum")
__all__ = ["make"]  # a fixture

SOLVERS = {
    "neumann": (hvp.Neumann(3, 0.1), 1),
    "chebyshev": (hvp.Chebyshev(3, bounds=(0.5, 4.0)), 1),
    "identity": (hvp.Identity(), 1),
    "conjugate gradient": (hvp.ConjugateGradient(7, tol=1e-12), 4),
    "automatic": (hvp.Neumann(3), 5),  # both gradients, the estimate, the solve, the mixed product
}
"""Solvers, and how many replays a hypergradient takes."""


@pytest.fixture
def replays(monkeypatch: pytest.MonkeyPatch) -> list[CallRecording]:
    """What is replayed."""
    found: list[CallRecording] = []
    replay = CallRecording.replay

    def counted(self: CallRecording) -> None:
        found.append(self)
        replay(self)

    monkeypatch.setattr(CallRecording, "replay", counted)
    return found


@pytest.mark.parametrize("name", SOLVERS)
def test_a_hypergradient_is_one_launch(name: str, make: Make, device: torch.device, replays: list[Any]) -> None:
    solver, launches = SOLVERS[name]
    engine = make()
    ours, theirs = both(engine, solver)
    for call in range(5):
        arguments = point(device, call)
        before = [part.clone() for part in arguments[0].values()]
        expected = theirs(*arguments)
        replays.clear()
        result = ours(*arguments)
        assert_same(result, expected)
        torch.testing.assert_close(result.val_loss, expected.val_loss)
        torch.testing.assert_close(result.unfinished, expected.unfinished)
        torch.testing.assert_close(list(arguments[0].values()), before, rtol=0, atol=0)
        if call == 1:
            kept = result.grads, result.solution.value, result.unfinished
            copies = torch.utils._pytree.tree_map(torch.clone, kept)
    if device.type == "cpu":
        assert len(replays) == launches  # the fifth call checks nothing
    torch.testing.assert_close(kept, copies, rtol=0, atol=0)  # later calls did not change them
    assert "by CUDA graphs" in engine.report() and "instead" not in engine.report()


def test_random_layers_draw_the_masks_of_eager(make: Make, device: torch.device) -> None:
    def dropped(loss: Any) -> Any:
        return lambda weights, hyper, batch: loss(weights, hyper, torch.nn.functional.dropout(batch, 0.5))

    ours, theirs = both(make(), hvp.Neumann(2, 0.1), (dropped(train), dropped(val)))
    arguments = point(device, 0)
    for _ in range(4):
        assert_same(ours(*arguments), theirs(*arguments))


def test_what_asks_for_more_than_the_whole_gets_it(make: Make, device: torch.device) -> None:
    """Products after a whole hypergradient are at its point."""
    engine = make()
    ours, _ = both(engine, hvp.Neumann(3, 0.1))
    for call in range(4):  # the fourth is not compared with anything
        ours(*point(device, call))
    assert "term by term" not in engine.report()
    graphs = engine._kept[0]
    weights, hyper, batch, _ = point(device, 3)
    eager = hvp.HessianOperator(train, weights, hyper, batch, engine="eager")
    tangents = [part.cos() for part in weights.values()]
    torch.testing.assert_close(list(graphs.product(tangents)), list(eager.product(tangents)))


def test_a_recording_that_fails_costs_no_result(monkeypatch: pytest.MonkeyPatch) -> None:
    device, solver = torch.device("cpu"), hvp.Neumann(2, 0.1)
    expected = [both(CudaGraphEngine(), solver)[1](*point(device, call)) for call in range(3)]
    with hvp.use_backend("reference"):
        for fails in range(1, 100):
            monkeypatch.setattr(FailingRecorder, "fails", fails)
            monkeypatch.setattr(FailingRecorder, "made", 0)
            engine = CudaGraphEngine(recorder=FailingRecorder)
            ours, _ = both(engine, solver)
            for call in range(3):
                assert_same(ours(*point(device, call)), expected[call])
            if FailingRecorder.made < fails:
                break
            assert f"recording {fails} failed" in engine.report()
    assert fails > 6  # the validation gradient, the primal part, two products, a solve, the whole


def test_a_validation_loss_that_changes_is_found_out(make: Make, device: torch.device) -> None:
    scale = ContextVar("scale", default=1.0)

    def bound(weights: Any, hyper: Any, batch: Tensor) -> Tensor:
        return scale.get() * val(weights, hyper, batch)

    engine = make()
    ours, theirs = both(engine, hvp.Neumann(2, 0.1), (train, bound))
    with pytest.warns(UserWarning, match="the traced gradient of val_loss is replaced by autograd's"):
        for call in range(10):  # the tenth is compared
            scale.set(1.0 if call < 9 else 2.0)
            result = ours(*point(device, call))
    assert_same(result, theirs(*point(device, 9)))
