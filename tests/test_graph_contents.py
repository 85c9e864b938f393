"""Graphs read by the extension, and by Python: the same text, to the byte, the same tensors, the same refusals."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from recorded_checks import gradient_of
from recorded_models import MODELS
from torch import Tensor, nn

from hvp_engine.differentiation import graph_structure
from hvp_engine.differentiation.graph_structure import HiddenContentsError, walk
from hvp_engine.differentiation.recorded import graph_contents
from hvp_engine.differentiation.recorded.graph_contents import GraphContents, contents_of

pytestmark = [
    pytest.mark.usefixtures("float64_by_default"),
    pytest.mark.skipif(graph_structure._C is None, reason="the extension has not been built"),
]
READERS = {"extension": "the extension's", "Python": "Python's"}


def read(reader: str, outputs: list[Tensor], inputs: list[Tensor], patch: pytest.MonkeyPatch) -> GraphContents | str:
    """The contents, or why they are hidden."""
    assert graph_structure._C is not None
    chosen = graph_structure._C.walk_graph if reader == "extension" else graph_structure.walk_by_python
    patch.setattr(graph_structure, "_walk", chosen)
    try:
        return contents_of(walk(outputs, inputs), inputs)
    except HiddenContentsError as reason:
        return str(reason)


def assert_same_contents(outputs: list[Tensor], inputs: list[Tensor], patch: pytest.MonkeyPatch) -> GraphContents | str:
    """By both; returns what the extension has read."""
    theirs, ours = (read(reader, outputs, inputs, patch) for reader in ("Python", "extension"))
    if isinstance(ours, str) or isinstance(theirs, str):
        assert ours == theirs
        return ours
    assert ours.text == theirs.text and ours.numbers == theirs.numbers
    places = [[(t.data_ptr(), t.shape, t.stride()) for t in found.tensors] for found in (ours, theirs)]
    assert places[0] == places[1]
    return ours


def test_the_extension_reads_where_there_is_one() -> None:
    assert graph_structure._C is not None
    assert graph_structure._walk is graph_structure._C.walk_graph


@pytest.mark.parametrize("name", MODELS)
def test_models(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    weights, loss = MODELS[name]()
    gradient = [g for g in gradient_of(loss(), weights) if g.requires_grad]
    active = [w for w in weights if w.requires_grad]
    assert_same_contents(gradient, active, monkeypatch)
    assert_same_contents(gradient[:1], active[1:], monkeypatch)


LOOK_ALIKES: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "an exponent": (lambda w: w.pow(2.5), lambda w: w.pow(3.5)),
    "a dimension": (lambda w: w.softmax(0) ** 2, lambda w: w.softmax(1) ** 2),
    "a flag": (lambda w: w.std(unbiased=True) ** 2, lambda w: w.std(unbiased=False) ** 2),
    "an order": (lambda w: w.sin() * w.exp().sum(), lambda w: w.exp() * w.sin().sum()),
    "a shape": (lambda w: w.t().exp() ** 2, lambda w: w.reshape(-1).exp() ** 2),
    "an edge": (lambda w: w.exp() * w.sin() * w.sin(), lambda w: w.exp() * w.exp() * w.sin()),
    "a dtype": (lambda w: w.exp() ** 2, lambda w: w.float().exp().double() ** 2),
    "an alias": (lambda w: (y := w.exp()) * y, lambda w: w.exp() * w.exp().clone()),
    "strides": (lambda w: w.t().contiguous() ** 3, lambda w: w.t() ** 3),
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("name", LOOK_ALIKES)
def test_look_alikes_have_texts_of_their_own(name: str, reader: str, monkeypatch: pytest.MonkeyPatch) -> None:
    w = torch.rand(3, 3, requires_grad=True)

    def text(function: Callable[[Tensor], Tensor]) -> Any:
        found = read(reader, gradient_of(function(w).sum() * 2, [w]), [w], monkeypatch)
        assert isinstance(found, GraphContents)
        return found.text

    one, other = LOOK_ALIKES[name]
    assert text(one) == text(one) and text(other) == text(other)
    assert text(one) != text(other)


def test_weights_that_are_exchanged(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which leaf belongs to which weight is told by the tensor itself, and of what is no leaf by its node."""
    a, b, apart = (torch.rand(3, requires_grad=True) for _ in range(3))
    scaled = a * 2
    (gradient,) = torch.autograd.grad((scaled**3 * b.exp()).sum(), [scaled], create_graph=True)
    texts = []
    for inputs in ([a, b], [b, a], [scaled, b], [b, scaled], [apart, b], [b]):
        found = assert_same_contents([gradient], inputs, monkeypatch)
        assert isinstance(found, GraphContents)
        texts.append(found.text)
    assert len(set(texts)) == len(texts)


def test_a_gradient_that_is_a_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    w = torch.rand(3, requires_grad=True)
    assert isinstance(assert_same_contents([w], [w], monkeypatch), GraphContents)


def test_numbers_of_the_loss_are_saved_as_tensors_and_no_part_of_the_text(monkeypatch: pytest.MonkeyPatch) -> None:
    w = torch.rand(3, requires_grad=True)
    found = set()
    for slope in (3, 1 << 70, 1 << 71):
        contents = assert_same_contents(gradient_of((w**3 * float(slope)).sum(), [w]), [w], monkeypatch)
        assert isinstance(contents, GraphContents)
        found.add(contents.text)
    assert len(found) == 1


@pytest.mark.parametrize("reader", READERS)
def test_what_hides_a_graph_is_told(reader: str, monkeypatch: pytest.MonkeyPatch) -> None:
    w = torch.rand(4, 4, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
        hooked = gradient_of((w**3).sum(), [w])
    assert "saved-tensor hooks" in str(read(reader, hooked, [w], monkeypatch))
    freed = gradient_of((w**3).sum(), [w])
    torch.autograd.grad(freed, [w], [torch.ones_like(w)])
    assert "cannot be read any more" in str(read(reader, freed, [w], monkeypatch))
    changed = torch.rand(4, 4, requires_grad=True)
    gradient = gradient_of((changed**3).sum(), [changed])
    with torch.no_grad():
        changed.add_(1)
    assert "cannot be read any more" in str(read(reader, gradient, [changed], monkeypatch))
    strided = gradient_of((w.as_strided((2, 2), (4, 1)) ** 3).sum(), [w])
    assert "AsStrided" in str(read(reader, strided, [w], monkeypatch))


def test_reading_leaves_nothing_behind() -> None:
    """Neither a reference to a node or tensor, nor a count that is wrong, which would crash later."""
    import gc
    import sys

    net = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2))
    weights = list(net.parameters())
    gradient = gradient_of(net(torch.rand(3, 4)).pow(2).sum(), weights)
    gc.collect()
    counted = [graph_contents._NUMBERS, graph_structure._READERS, torch.float64, weights[0], gradient[0], None]
    before = [sys.getrefcount(thing) for thing in counted[:-1]]
    for _ in range(200):
        contents_of(walk(gradient, weights), weights)
    gc.collect()
    assert all(abs(sys.getrefcount(t) - b) < 50 for t, b in zip(counted[:-1], before, strict=True))


def test_a_class_of_nodes_keeps_its_reader():
    # a thread that also met the class as its first must not replace what the extension points into
    node = torch.ones(2, requires_grad=True).cosh().grad_fn
    assert graph_structure._reader_of(node) is graph_structure._reader_of(node)
