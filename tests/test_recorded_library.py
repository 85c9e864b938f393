"""The library of recorded products: memory, limits, faults, and what is refused."""

from __future__ import annotations

import copy
import gc
import math
import pickle
import threading
import warnings
import weakref
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from recorded_checks import assert_same, calls, checked, gradient_of, level, plain, reason
from threads_at_once import at_once
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import hvp_engine as hvp
from hvp_engine._support.torch_compat_nodes import NodeFields
from hvp_engine.differentiation import graph_structure
from hvp_engine.differentiation.recorded import graph_contents, library, linearization, programs
from hvp_engine.differentiation.recorded.known_graphs import Known, Solve
from hvp_engine.differentiation.recorded.library import Library
from hvp_engine.differentiation.recorded.linearization import RecordedLinearization
from hvp_engine.differentiation.recorded.owned import OwnedLinearization
from hvp_engine.differentiation.trace.evaluated import PartitionedLinearization
from hvp_engine.engines import RecordedEngine

pytestmark = pytest.mark.usefixtures("float64_by_default", "programs_are_taken")


class Net:
    def __init__(self, hidden: bool = False) -> None:
        self.net = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 3))
        self.weights = list(self.net.parameters())
        self.hidden = hidden

    def loss(self) -> Tensor:
        x = torch.randn(5, 8)
        h = checkpoint(self.net, x, use_reentrant=False) if self.hidden else self.net(x)
        return F.cross_entropy(h, torch.randint(3, (5,)))

    def gradient(self) -> list[Tensor]:
        return gradient_of(self.loss(), self.weights)


# --- Memory -----------------------------------------------------------------------------------------------------------


class Token:
    """What a node's metadata hold as long as it lives."""


@pytest.mark.parametrize("hidden", [False, True], ids=["level 1", "level 2"])
@pytest.mark.parametrize("kind", [RecordedLinearization, OwnedLinearization])
def test_a_library_keeps_no_tensor_of_a_call(kind: type[RecordedLinearization], hidden: bool) -> None:
    net, kept = Net(hidden), Library()
    for _ in range(3):
        checked(kept, net.gradient(), net.weights, kind=kind)

    def live() -> int:
        return sum(isinstance(item, Tensor) for item in gc.get_objects())

    gc.collect()
    gc.disable()
    try:
        before = live()
        for _ in range(5):
            made = checked(kept, net.gradient(), net.weights, kind=kind)
            assert level(made) == 1 + hidden
            alive = weakref.ref(made)
            del made
            assert alive() is None, "a cycle keeps the linearization"
        assert live() <= before
    finally:
        gc.enable()


@pytest.mark.parametrize("hidden", [False, True], ids=["level 1", "level 2"])
def test_the_graph_is_let_go_when_a_program_has_taken_over(hidden: bool) -> None:
    net, kept = Net(hidden), Library()
    for owned in (True, True, False):
        gradient = net.gradient()
        gradient[0].grad_fn.metadata["token"] = token = Token()
        alive = weakref.ref(token)
        del token
        kind = OwnedLinearization if owned else RecordedLinearization
        made = kind(gradient, net.weights, name="loss", library=kept)
        tangents = [torch.randn_like(w) for w in net.weights]
        true = plain(gradient, net.weights, tangents)
        del gradient
        for _ in range(2):
            assert_same(made.product(tangents), true, 1e-10)
        assert level(made) == 1 + hidden
        assert (alive() is None) == owned


def test_the_callers_graph_is_kept() -> None:
    net = Net()
    for _ in range(3):
        gradient = net.gradient()
        hvp.approx_inverse_hvp([torch.ones_like(w) for w in net.weights], gradient, net.weights, 5, 0.1)
        torch.autograd.grad(gradient, net.weights, [torch.ones_like(w) for w in net.weights])


# --- Limits -----------------------------------------------------------------------------------------------------------


def test_the_oldest_programs_are_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "_MOST_NODES", 120)
    kept, w = Library(), torch.randn(6, requires_grad=True)
    functions: list[Callable[[Tensor], Tensor]] = [torch.exp, torch.sin, torch.tanh, torch.sigmoid, F.softplus]
    for _ in range(2):
        for first in functions:
            for second in functions:
                loss = (first(w) * second(w)).sum() ** 2
                assert level(checked(kept, gradient_of(loss, [w]), [w])) == 1
    assert kept._nodes <= 120 and len(kept._programs) < 25
    held = [shortcut.program for known in kept._graphs.values() for shortcut in known.shortcuts]
    assert all(any(program is one for one in kept._programs.values()) for program in held)
    assert kept.built > 25, "some were built twice"


def test_the_oldest_graphs_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "_MOST_GRAPHS", 3)
    kept = Library()
    for length in (4, 5, 6, 7, 8, 4, 8):
        w = torch.randn(length, requires_grad=True)
        assert level(checked(kept, gradient_of((w**3).sum(), [w]), [w])) == 1
    assert len(kept._graphs) == 3


def test_numbers_of_texts_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    """Texts that are numbered anew match no old ones, and no others."""
    monkeypatch.setattr(graph_contents, "_MOST_NUMBERS", 5)
    kept = Library()
    for length in (4, 5, 6, 7) * 3:
        w = torch.randn(length, requires_grad=True)
        assert level(checked(kept, gradient_of((w**3 * w.exp()).sum(), [w]), [w])) == 1


def test_numbers_of_node_classes_are_no_two_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both threads come to a class that neither has seen before, at once: each gets another number."""
    readers: dict[type, Any] = {}
    monkeypatch.setattr(graph_structure, "_READERS", readers)
    meeting, fields_of = threading.Barrier(2), graph_structure.fields_of

    def slow(node: Any) -> Any:
        if type(node).__name__.startswith(("Sin", "Exp")):
            meeting.wait(10)
        return fields_of(node)

    monkeypatch.setattr(graph_structure, "fields_of", slow)
    w = torch.randn(3, requires_grad=True)
    at_once(*(partial(graph_structure.walk, [function(w)], [w]) for function in (torch.sin, torch.exp)))
    assert len({reader.number for reader in readers.values()}) == len(readers) == 3


# --- Faults -----------------------------------------------------------------------------------------------------------


def test_a_builder_that_raises_leaves_products_to_autograd(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> Any:
        raise KeyError("nothing here")

    monkeypatch.setattr(programs, "partition", broken)
    net, kept = Net(), Library()
    for made in calls(net.loss, net.weights, library=kept):
        assert level(made) == 3
        assert "could not be built: KeyError" in reason(made)
    assert "could not be built: KeyError" in (made.fallback or "")
    assert "could not be built" in kept.report(kept._graphs.values()) and kept.built == 0


@pytest.mark.parametrize("hidden", [False, True], ids=["level 1", "level 2"])
def test_a_wrong_program_is_found_and_told_once(hidden: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    class Wrong(PartitionedLinearization):
        def product(self, tangents: Sequence[Tensor]) -> Sequence[Tensor]:
            return [1.001 * t for t in super().product(tangents)]

    monkeypatch.setattr(linearization, "PartitionedLinearization", Wrong)
    net, kept = Net(hidden), Library()
    with pytest.warns(
        UserWarning, match="a recorded product does not agree with autograd's: it differs by 0.001"
    ) as told:
        made = calls(net.loss, net.weights, library=kept)
    assert len([warning for warning in told if "recorded product" in str(warning.message)]) == 1
    assert {level(tape) for tape in made} == {3}
    assert "does not agree" in (made[-1].fallback or "") and "does not agree" in kept.report(kept._graphs.values())


def test_a_program_that_goes_wrong_later_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the check of the tenth call, as of an input that the text misses."""
    kept, w = Library(), torch.randn(6, requires_grad=True)
    fields_of = graph_structure.fields_of

    def tensors_alone(node: Any) -> Any:  # no number of any node is seen
        fields = fields_of(node)
        return fields if isinstance(fields, str) else NodeFields(fields.tensors, ())

    monkeypatch.setattr(graph_structure, "_READERS", {})
    monkeypatch.setattr(graph_structure, "fields_of", tensors_alone)
    with pytest.warns(UserWarning, match="a recorded product does not agree"):
        for call in range(12):
            gradient = gradient_of((w.abs() + 1).pow(2.5 + (call > 3)).sum(), [w])
            made = OwnedLinearization(gradient, [w], name="loss", library=kept)
            made.product([torch.ones(6)])
    checked(kept, gradient_of((w.abs() + 1).pow(3.5).sum(), [w]), [w])
    assert level(made) == 3


def test_a_report_is_of_the_engines_own_losses() -> None:
    """Programs belong to the process; what went wrong with somebody else's loss does not."""

    def plain(w: Tensor) -> Tensor:
        return w.tanh().square().sum()

    def hiding(w: Tensor) -> Tensor:
        return checkpoint(plain, w, use_reentrant=False).exp()

    reports = []
    for loss in (hiding, plain):
        operator = hvp.HessianOperator(loss, torch.randn(6), engine="recorded")
        operator @ torch.ones(6)
        reports.append(operator.engine.report())
    assert "1 of 1 kinds" in reports[0] and "written down" in reports[0]
    assert "1 of 1 kinds" in reports[1] and "written down" not in reports[1]
    for copied in (copy.deepcopy(operator.engine), pickle.loads(pickle.dumps(RecordedEngine()))):
        assert copied.report().startswith("0 of 0 kinds")


# --- Refused ----------------------------------------------------------------------------------------------------------


def test_compiled_parts_are_refused() -> None:
    net = Net()
    net.net = torch.compile(net.net, backend="aot_eager")  # type: ignore[assignment]
    for _ in range(2):
        with torch._functorch.config.patch(donated_buffer=False):  # or torch refuses to build a graph of the gradient
            gradient = net.gradient()
        with pytest.raises(hvp.SecondDerivativeError, match="compiled by torch.compile"):
            OwnedLinearization(gradient, net.weights, name="loss", library=Library()).product(net.weights)


def test_random_numbers_on_tangents_are_left_to_autograd() -> None:
    class Noisy(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.save_for_backward(x)
            return x**3

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> Tensor:
            return 3 * ctx.saved_tensors[0] ** 2 * g * (1 + 0 * torch.rand_like(g))

    kept, w = Library(), torch.randn(6, requires_grad=True)
    for _ in range(3):
        made = checked(kept, gradient_of(Noisy.apply(w.tanh()).sum() ** 2, [w]), [w])
        assert level(made) == 3 and "random" in reason(made)


def test_engines_by_name() -> None:
    w = torch.ones(3, requires_grad=True)
    with pytest.raises(ValueError, match="engine: expected 'recorded' or 'eager'"):
        hvp.approx_inverse_hvp([w], (w**3).sum(), w, 3, 0.1, engine="linearized")  # type: ignore[arg-type]
    assert RecordedLinearization([w], [w])._library is library.LIBRARY
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert "programs built" in library.LIBRARY.report([])


@pytest.mark.parametrize("hidden", [False, True], ids=["level 1", "level 2"])
def test_a_program_that_has_to_wait_is_written_down_once(hidden: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its graph has fewer nodes than it has operations: what the nodes could afford, the program cannot."""
    net, kept, written = Net(hidden), Library(), []
    record = linearization.record
    monkeypatch.setattr(linearization, "record", lambda *a, **k: written.append(1) or record(*a, **k))
    nodes = RecordedLinearization(net.gradient(), net.weights, library=Library()).nodes
    monkeypatch.setattr(library, "_SHARE", 0.0)
    monkeypatch.setattr(library, "_SECONDS_PER_NODE", 10.0)
    kept.build_seconds = library._CREDIT - library._SECONDS_PER_NODE * nodes
    kind = RecordedLinearization
    for _ in range(6):
        assert level(checked(kept, net.gradient(), net.weights, kind=kind)) == 3
    assert len(written) == 1 and kept.built == 0
    assert kept.plain_seconds > 0
    kept.build_seconds = -math.inf
    made = [checked(kept, net.gradient(), net.weights, kind=kind) for _ in range(3)]
    assert kept.built == 1 and level(made[-1]) == 1 + hidden


def test_a_kind_of_graphs_earns_its_own_program(monkeypatch: pytest.MonkeyPatch) -> None:
    """What other programs have taken does not stop it; where several kinds wait, each has to earn what all take."""
    kept, net = Library(), Net()
    monkeypatch.setattr(library, "_SECONDS_PER_NODE", 1.0)
    kept.build_seconds = 1000.0
    made = checked(kept, net.gradient(), net.weights, kind=RecordedLinearization)
    known = made._known
    assert level(made) == 3 and not kept.affords(known, 5)
    known.awaited, known.plain_seconds = 5, 4.9
    assert not kept.affords(known, 5)
    known.plain_seconds = 5.0
    assert kept.affords(known, 5)
    others = [kept.known(number) for number in range(3)]
    for other in others:
        other.awaited, other.plain_seconds = 5, 4.0
    assert not kept.affords(known, 5)
    known.plain_seconds = 20.0
    assert kept.affords(known, 5) and not kept.affords(others[0], 5)


def test_a_solve_by_both_tells_nothing() -> None:
    """Whether autograd or a program is faster."""
    for mixed in (True, False):
        known = Known(solve=Solve(products=4, began=1.0, ended=3.0, mixed=mixed))
        known.begin(Solve())
        assert known.plain == ([] if mixed else [0.5]) and not known.program
