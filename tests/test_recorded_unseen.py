"""What no walk through a gradient's graph sees: hooks, code outside torch, memory that has changed."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from recorded_checks import PYTHON, assert_same, calls, checked, gradient_of, level, plain, reason
from recorded_functions import Cube
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import hvp_engine as hvp
from hvp_engine.differentiation.recorded.library import Library
from hvp_engine.differentiation.recorded.linearization import RecordedLinearization
from hvp_engine.differentiation.recorded.owned import OwnedLinearization

pytestmark = [
    pytest.mark.usefixtures("float64_by_default", "programs_are_taken"),
    pytest.mark.filterwarnings("error:.*a recorded product"),
]

HOOK = "Python code that takes part in products"


def leaf(*shape: int) -> Tensor:
    return torch.randn(shape, requires_grad=True)


# --- Hooks ------------------------------------------------------------------------------------------------------------

HOOKS: dict[str, Callable[[float], Any]] = {
    "scales": lambda s: lambda g: g * s,
    "scales what it cuts off": lambda s: lambda g: g.detach() * s,
    "no Python function": lambda s: functools.partial(torch.mul, other=s),
}


@pytest.mark.parametrize("late", [False, True], ids=["before the gradient", "after the gradient"])
@pytest.mark.parametrize("hook", HOOKS)
def test_hooks_on_inner_tensors(hook: str, late: bool) -> None:
    """Also where there is a program for the graph without the hook, and where it was registered afterwards."""
    library, w = Library(), leaf(4)
    for scale in (None, None, 2.0, 2.0, 3.0, None, 4.0, None):
        h = w.exp()
        register = functools.partial(h.register_hook, HOOKS[hook](scale)) if scale else lambda: None
        if not late:
            register()
        gradient = gradient_of(h.square().sum(), [w])
        if late:
            register()
        made = checked(library, gradient, [w])
        assert level(made) == (2 if scale else 1)
        assert (HOOK in reason(made)) == bool(scale)


def test_hooks_of_two_graphs_at_once() -> None:
    library, w = Library(), leaf(4)
    for scale in (None, 2.0, 3.0, None):
        gradients = []
        for _ in range(2):
            h = w.exp()
            gradients.append(gradient_of(h.square().sum(), [w]))
            if scale:
                h.register_hook(HOOKS["scales"](scale))
        for gradient in gradients:
            assert level(checked(library, gradient, [w])) == (2 if scale else 1)


def test_hooks_on_weights() -> None:
    library, w, other = Library(), leaf(4), leaf(4)
    for scale in (None, 2.0, 2.0, 3.0, None, 4.0):
        for hooked in (w, other):
            handle = hooked.register_hook(HOOKS["scales"](scale)) if scale else None
            made = checked(library, gradient_of(((w * other) ** 3).sum(), [w]), [w], [other])
            assert level(made) == (2 if scale else 1), reason(made)
            if handle:
                handle.remove()


def test_hooks_on_nodes_and_retained_gradients() -> None:
    library, w = Library(), leaf(4)
    for scale in (2.0, 3.0):
        h = w.exp()
        h.grad_fn.register_hook(lambda into, out, s=scale: (into[0] * s,))
        assert level(checked(library, gradient_of(h.square().sum(), [w]), [w])) == 2
        h = w.exp()
        h.retain_grad()
        assert level(checked(library, gradient_of(h.square().sum(), [w]), [w])) == 2


# --- Functions of one's own -------------------------------------------------------------------------------------------

SCALE = [1.0]


class Global(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return 3 * SCALE[0] * ctx.saved_tensors[0] ** 2 * g


def test_attributes_and_globals_that_change() -> None:
    library, w = Library(), leaf(4)
    for scale in (2.0, 2.0, 3.0, 4.0, 5.0, 2.0):
        assert level(checked(library, gradient_of(Cube.apply(w.tanh(), scale).sum() ** 2, [w]), [w])) == 2
        SCALE[0] = scale
        gradient = gradient_of(Global.apply(w.tanh()).sum() ** 2, [w])
        SCALE[0] = scale + 1  # products see this one
        made = checked(library, gradient, [w])
        assert level(made) == 2 and PYTHON in reason(made)


class Masked(torch.autograd.Function):
    """g on a mask, by numpy, written into memory of `made`; the mask is empty in the first calls."""

    mask: np.ndarray
    made: Callable[[Tensor], Tensor]

    @staticmethod
    def forward(ctx: Any, g: Tensor) -> Tensor:
        out = Masked.made(g)
        out.numpy()[...] = g.detach().numpy() * Masked.mask
        return out

    @staticmethod
    def backward(ctx: Any, u: Tensor) -> Tensor:
        return Masked.apply(u)


class Known_(torch.autograd.Function):
    """g on a mask: the mask alone is numpy's, in memory that torch has filled with zeros."""

    @staticmethod
    def forward(ctx: Any, g: Tensor) -> Tensor:
        return g * torch.from_numpy(Masked.mask)

    @staticmethod
    def backward(ctx: Any, u: Tensor) -> Tensor:
        mask = torch.zeros_like(Masked.made(torch.ones(6)))
        mask.numpy()[...] = Masked.mask
        return u * mask


MEMORY: dict[str, Callable[[Tensor], Tensor]] = {
    "zeros": torch.zeros_like,
    "nothing": torch.empty_like,
    "numpy's": lambda g: torch.from_numpy(np.zeros(g.shape)),
}


@pytest.mark.parametrize("function", [Masked, Known_])
@pytest.mark.parametrize("memory", MEMORY)
def test_tangents_and_memory_that_numpy_sees(memory: str, function: Any) -> None:
    """Without the mask's entries the product is right without the path, and no check would find it missing."""
    library, w = Library(), leaf(6)
    Masked.made = MEMORY[memory]
    for entry in (0.0, 0.0, 1.0, 1.0):
        Masked.mask = np.full(6, entry)
        loss = function.apply(w.tanh()).pow(2).sum() + (w**4).sum()
        made = checked(library, gradient_of(loss, [w]), [w])
        assert level(made) == 3 or (function is Known_ and entry == 0.0)
    assert "numpy of a tangent" in reason(made) or "filled by code" in reason(made)


# --- Memory that changes or is gone -----------------------------------------------------------------------------------


def test_parts_off_the_path_may_be_gone() -> None:
    """What the products do not need may be freed, or changed."""
    library, w, encoder = Library(), leaf(4), leaf(4)
    for _ in range(3):
        freed, changed = encoder.exp(), encoder * encoder
        freed.sum().backward()
        gradient = gradient_of((w**3 * freed * changed).sum(), [w])
        with torch.no_grad():
            encoder.add_(0.1)
        made = checked(library, gradient, [w])
        assert level(made) == 2 and "cannot be read" in reason(made)


@pytest.mark.parametrize("hidden", [False, True], ids=["level 1", "level 2"])
@pytest.mark.parametrize("engine", ["eager", "recorded"])
def test_weights_that_change_between_backward_passes_are_refused(engine: Any, hidden: bool) -> None:
    for _ in range(3):
        decay, w = torch.tensor(0.3, requires_grad=True), leaf(6)
        h = checkpoint(torch.exp, w, use_reentrant=False) if hidden else torch.exp(w)
        train = (h**2).sum() + decay * (w**2).sum()
        (ws,) = hvp.best_response(train, w, decay, hvp.Neumann(3, 0.01), engine=engine)
        loss = (ws**2).sum()
        loss.backward(retain_graph=True)
        with torch.no_grad():
            w.add_(1.0)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


def test_a_solve_after_a_change_is_refused_at_level_2() -> None:
    library, w = Library(), leaf(6)
    for _ in range(3):
        gradient = gradient_of((checkpoint(torch.exp, w, use_reentrant=False) ** 2).sum(), [w])
        made = RecordedLinearization(gradient, [w], name="loss", library=library)
        made.product([torch.ones(6)])
        with torch.no_grad():
            w.add_(0.1)
        assert not made.learning
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            made.product([torch.ones(6)])
    assert library.built == 1


def test_a_freed_graph_is_refused() -> None:
    library, w = Library(), leaf(6)
    calls(lambda: (w**3).sum(), [w], library=library)
    gradient = gradient_of((w**3).sum(), [w])
    torch.autograd.grad(gradient, [w], [torch.ones(6)])
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        OwnedLinearization(gradient, [w], name="loss", library=library).product([torch.ones(6)])


class Scaled(Tensor):
    """A subclass: what it does in products is its own."""


def test_subclasses_are_left_to_autograd() -> None:
    library = Library()
    for _ in range(3):
        w = torch.randn(6).as_subclass(Scaled).requires_grad_()
        gradient = gradient_of((w**3).sum().as_subclass(Tensor), [w])
        made = OwnedLinearization(gradient, [w], name="loss", library=library)
        for _ in range(2):
            t = [torch.randn(6)]
            assert_same(made.product(t), plain(gradient, [w], t), 1e-10)
        assert level(made) != 1
