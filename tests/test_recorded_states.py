"""Recorded products when the state of a training script changes from call to call: modes, freezing, shapes, dtypes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from recorded_checks import UNPACKED, assert_same, calls, checked, gradient_of, level, plain, reason
from threads_at_once import at_once
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import hvp_engine as hvp
from hvp_engine._support.torch_compat import DispatchMode
from hvp_engine.differentiation.recorded.library import Library
from hvp_engine.differentiation.recorded.linearization import RecordedLinearization
from hvp_engine.differentiation.recorded.owned import OwnedLinearization
from hvp_engine.hypergradients.short_series import TapeSystem
from hvp_engine.solvers import Neumann

pytestmark = [pytest.mark.usefixtures("float64_by_default"), pytest.mark.filterwarnings("error:.*a recorded product")]


class Script:
    """A classifier with dropout, on one library."""

    def __init__(self) -> None:
        self.library = Library()
        self.drop = nn.Dropout(0.3)
        self.net = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.BatchNorm1d(16), self.drop, nn.Linear(16, 3))

    def loss(self, rows: int = 5) -> Tensor:
        dtype = next(self.net.parameters()).dtype
        return F.cross_entropy(self.net(torch.randn(rows, 8, dtype=dtype)), torch.randint(3, (rows,)))

    def step(self, expected: int = 1, **settings: Any) -> RecordedLinearization:
        weights = [p for p in self.net.parameters() if p.requires_grad]
        made = calls(lambda: self.loss(**settings), weights, count=1, library=self.library)[0]
        assert level(made) == expected, reason(made)
        return made


def test_layers_frozen_and_unfrozen() -> None:
    script = Script()
    for frozen in ((), (0,), (4,), (0,), (), (4,), (2,), ()):
        for index, layer in enumerate(script.net):
            layer.requires_grad_(index not in frozen)
        script.step()
    assert script.library.built == 4


def test_training_and_evaluation() -> None:
    script = Script()
    for training in (True, False, True, False, False, True):
        script.net.train(training)
        script.step()
    assert script.library.built == 2


def test_dropout_changes() -> None:
    script = Script()
    for p in (0.3, 0.5, 0.3, 0.0, 0.5, 0.9):
        script.drop.p = p
        script.step()


def test_lengths_alternate() -> None:
    script = Script()
    for rows in (5, 6, 5, 6, 7, 5):
        script.step(rows=rows)
    assert script.library.built == 3


def test_dtypes_change() -> None:
    library = Library()
    for dtype, tolerance in [(torch.float64, 1e-10), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)] * 2:
        w = torch.randn(4, 3).to(dtype).requires_grad_()
        x = torch.randn(5, 4).to(dtype)
        loss = (x @ w).tanh().square().sum() * 1.5
        assert level(checked(library, gradient_of(loss, [w]), [w], tolerance=tolerance)) == 1


def test_weights_of_two_dtypes() -> None:
    library = Library()
    a, b = torch.randn(6, requires_grad=True), torch.randn(6, dtype=torch.float32, requires_grad=True)
    for _ in range(3):
        made = checked(library, gradient_of(((a * b.double()) ** 3).sum(), [a, b]), [a, b], tolerance=1e-6)
        assert level(made) == 1


STRIDES: dict[str, Callable[[], Tensor]] = {
    "contiguous": lambda: torch.randn(4, 6),
    "transposed": lambda: torch.randn(6, 4).t(),
    "every second": lambda: torch.randn(8, 12)[::2, ::2],
    "expanded": lambda: torch.randn(6).expand(4, 6),
}


def test_strides_of_weights_and_batches_change() -> None:
    library = Library()
    for first in (*STRIDES, *STRIDES):
        for second in STRIDES:
            w, x = STRIDES[first]().detach().requires_grad_(), STRIDES[second]()
            loss = (w.reshape(-1).tanh() * x.reshape(-1)).square().sum() + (w * x).exp().sum() ** 2 * 1e-6
            gradient = gradient_of(loss, [w])
            made = OwnedLinearization(gradient, [w], name="loss", library=library)
            for _ in range(2):  # solvers' vectors have the layout's strides
                t = torch.empty_strided(w.shape, made.layout.strides[0]).copy_(torch.randn(4, 6))
                assert_same(made.product([t]), plain(gradient, [w], [t]), 1e-10)
            assert level(made) < 3, reason(made)


@pytest.mark.parametrize("engine", ["linearized", "recorded"])
def test_checks_are_laid_out_like_the_weights(engine: str) -> None:
    """A view of the transposed weights is one of the transposed tangents too, and of no contiguous ones."""
    w = torch.randn(6, 4).t()

    def loss(w: Tensor) -> Tensor:
        return (w.t().view(-1).tanh() ** 2).sum() + (w.t().view(2, 12).exp() @ torch.ones(12, 3)).pow(2).sum()

    operator, eager = (hvp.HessianOperator(loss, w, engine=name) for name in (engine, "eager"))
    for v in (torch.randn(4, 6), torch.randn(6, 4).t()):
        for _ in range(2):
            torch.testing.assert_close(operator @ v, eager @ v)
    assert not isinstance(operator.linear_map, OwnedLinearization) or operator.linear_map.program is not None


def test_tied_and_untied() -> None:
    library = Library()
    table, head = nn.Embedding(7, 4), nn.Linear(4, 7, bias=False)
    for tied in (True, False, True, False):
        head.weight = table.weight if tied else nn.Parameter(torch.randn(7, 4))
        words = torch.randint(7, (5, 3))
        loss = F.cross_entropy(head(table(words).tanh()).flatten(0, 1), words.flatten())
        weights = [table.weight] if tied else [table.weight, head.weight]
        assert level(checked(library, gradient_of(loss, weights), weights)) == 1
    assert library.built == 2


def test_checkpointing_on_and_off() -> None:
    script = Script()
    inner = script.net[0]
    w = list(inner.parameters())
    for on in (True, False, True, False):
        x = torch.randn(5, 8)
        h = checkpoint(inner, x, use_reentrant=False) if on else inner(x)
        made = checked(script.library, gradient_of(h.tanh().square().sum(), w), w)
        assert level(made) == (2 if on else 1)
        assert (UNPACKED in reason(made)) == on


def test_tensors_saved_elsewhere() -> None:
    script = Script()
    w = list(script.net.parameters())
    for _ in range(3):
        with torch.autograd.graph.save_on_cpu():
            loss = script.loss()
        made = checked(script.library, gradient_of(loss, w), w)
        assert level(made) == 2 and UNPACKED in reason(made)


def test_forward_under_autocast() -> None:
    """And products of gradients with and without it, by turns."""
    library, net = Library(), nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 3)).float()
    w = list(net.parameters())
    for on in (True, False, True, False):
        with torch.autocast("cpu", torch.bfloat16, enabled=on):
            loss = F.cross_entropy(net(torch.randn(5, 8, dtype=torch.float32)), torch.randint(3, (5,)))
        assert level(checked(library, gradient_of(loss, w), w, tolerance=2e-2 if on else 1e-5)) == 1
    assert library.built == 2


@pytest.mark.parametrize("order", ["0011", "1100", "0101"])
def test_autocast_around_products(order: str) -> None:
    """A program is what the graph says, in the dtypes of the forward, wherever it is written down and runs."""
    library, net = Library(), nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 3)).float()
    w = list(net.parameters())
    for on in order:
        loss = F.cross_entropy(net(torch.randn(5, 8, dtype=torch.float32)), torch.randint(3, (5,)))
        gradient = gradient_of(loss, w)
        t = [torch.randn_like(p) for p in w]
        true = plain(gradient, w, t)
        with torch.autocast("cpu", torch.bfloat16, enabled=on == "1"):
            made = OwnedLinearization(gradient, w, name="loss", library=library)
            products = [made.product(t) for _ in range(2)]
        for product in products:
            assert_same(product, true, 1e-5)
        assert level(made) == 1


class Counting(DispatchMode):
    operations = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operations += 1
        return func(*args, **(kwargs or {}))


def test_a_mode_of_the_caller_around_calls() -> None:
    script = Script()
    for around in (False, True, False, True):
        if around:
            with Counting() as mode:
                script.step()
            assert mode.operations > 100
        else:
            script.step()
    assert script.library.built == 1


def test_a_mode_of_the_caller_inside_the_loss() -> None:
    script = Script()
    w = list(script.net.parameters())
    for around in (False, True, False, True):
        if around:
            with Counting():
                gradient = gradient_of(script.loss(), w)
        else:
            gradient = gradient_of(script.loss(), w)
        assert level(checked(script.library, gradient, w)) == 1


def test_threads_share_a_library() -> None:
    script = Script()
    script.net.eval()

    def work(seed: int) -> set[int]:
        net = copy.deepcopy(script.net)
        w, generator = list(net.parameters()), torch.Generator().manual_seed(seed)
        found = set()
        for _ in range(8):
            x = torch.randn(5, 8, generator=generator)
            loss = F.cross_entropy(net(x), torch.randint(3, (5,), generator=generator))
            found.add(level(checked(script.library, gradient_of(loss, w), w, products=2)))
        return found

    assert at_once(*(partial(work, seed) for seed in range(6))) == [{1}] * 6
    assert script.library.built == 1


def test_several_losses_share_a_library() -> None:
    """Two scripts' losses of one kind, which differ in a number, and one of another kind between them."""
    library = Library()
    w = torch.randn(6, requires_grad=True)
    losses = [lambda: (2.5 * w).exp().sum() ** 2, lambda: (w.sin() ** 3).sum(), lambda: (3.5 * w).exp().sum() ** 2]
    for loss in losses * 3:
        assert level(checked(library, gradient_of(loss(), [w]), [w])) == 1


def test_a_second_solve_after_a_tensor_has_changed_is_refused() -> None:
    library, x = Library(), torch.randn(30, 20, dtype=torch.float64)
    w, v = torch.randn(20, dtype=torch.float64, requires_grad=True), [torch.ones(20, dtype=torch.float64)]
    for _ in range(4):
        made = checked(library, gradient_of((x @ w).tanh().square().sum(), [w]), [w], kind=RecordedLinearization)
    assert level(made) == 1
    TapeSystem(made).general(v, Neumann(2, 0.1))
    x.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        TapeSystem(made).general(v, Neumann(2, 0.1))
