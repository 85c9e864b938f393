"""Everyday losses and modules: on every engine each has plain double backward's numbers, and none falls back. The
compiled engine is tried on a few of them, in soak."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import everyday_inner  # noqa: F401  its losses join the list
import everyday_modules
import pytest
import torch
from everyday_losses import LOSSES, Tensors, batch, weights
from everyday_modules import MODULES
from everyday_operators import TWINS
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import hvp_engine as hvp
from hvp_engine._support.isolation import Draws
from hvp_engine.differentiation.recorded.owned import OwnedLinearization
from hvp_engine.engines.functions import TracedLinearization

pytestmark = [
    pytest.mark.filterwarnings("error:.*is replaced by"),
    pytest.mark.filterwarnings("ignore:.*a kernel in it has no second derivative"),
]

SEED = 7

ENGINES, NOT_TRACED = ("eager", "linearized", "recorded"), ("linearized",)
UNMENDED: dict[str, tuple[str, ...]] = {
    # Python asks a tensor
    "one_hot without a number": NOT_TRACED,
    "gaussian_nll_loss": NOT_TRACED,
    "correlation": NOT_TRACED,
    "loss.item() logged": NOT_TRACED,
    "if any NaN": NOT_TRACED,
    "assert finite": NOT_TRACED,
    "policy gradient, distributions with their checks": NOT_TRACED,
    "Normal with its checks": NOT_TRACED,
    "rsample and kl_divergence": NOT_TRACED,
    "MultivariateNormal": NOT_TRACED,
    "Beta": NOT_TRACED,
    "fixed point of a loop until it settles": NOT_TRACED,
    "BatchNorm without momentum": NOT_TRACED,
    "packed GRU": NOT_TRACED,
    # a value decides a size, or Python reads it
    "prototypes": NOT_TRACED,
    "boolean indexing of rows": NOT_TRACED,
    "nonzero": NOT_TRACED,
    "masked_select": NOT_TRACED,
    "loop over classes": NOT_TRACED,
    "len(unique)": NOT_TRACED,
    "labels as list": NOT_TRACED,
    "mixture of experts": NOT_TRACED,
    # what is made or changed inside
    "a module made inside": NOT_TRACED,
    "Embedding, max_norm": NOT_TRACED,
    "checkpoint": NOT_TRACED,
}
"""Engines that do not have the right numbers yet, by loss or module."""

COMPILED = ("one_hot", "max pooling", "Dropout", "BatchNorm2d", "EmbeddingBag", "spectral_norm")
"""Losses and modules that the compiled engine has to get right too; the others would take minutes."""

BY_AUTOGRAD: dict[str, str] = {}
"""Losses and modules of which the recorded engine makes no program, and why."""


def cells(names: Iterable[str]) -> list[Any]:
    """Each name with each engine."""
    found = [(name, engine) for name in names for engine in ENGINES if engine not in UNMENDED.get(name, ())]
    compiled = [pytest.param(name, "compiled", marks=pytest.mark.soak) for name in names if name in COMPILED]
    return [pytest.param(*cell) for cell in found] + compiled


@pytest.fixture(autouse=True)
def double() -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


def flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([t.detach().flatten() for t in tensors])


def tangents(w: Tensors) -> Tensors:
    generator = torch.Generator().manual_seed(2)
    return {name: torch.randn(t.shape, generator=generator, dtype=t.dtype) for name, t in w.items()}


def plain(loss: Callable[[Tensors], Tensor], w: Tensors) -> tuple[Tensor, Tensor]:
    """The gradient and a product with the Hessian, by torch alone, with the random numbers of an operator's."""
    torch.manual_seed(SEED)
    torch.manual_seed(Draws().next_seed())
    leaves = {name: t.clone().requires_grad_() for name, t in w.items()}
    values = list(leaves.values())
    settings = {"create_graph": True, "allow_unused": True, "materialize_grads": True}
    with sdpa_kernel(SDPBackend.MATH):
        f = torch.autograd.grad(loss(leaves), values, **settings)
        path = [(g, t) for g, t in zip(f, tangents(w).values(), strict=True) if g.requires_grad]
        products = torch.autograd.grad([g for g, _ in path], values, [t for _, t in path], **settings)
    found = flat(f), flat(products)
    assert all(torch.isfinite(vector).all() for vector in found), "a poor example"
    assert found[1].norm() > 0, "a poor example"
    return found


def compare(
    name: str, engine: str, loss: Callable[..., Tensor], truth: tuple[Tensor, Tensor], w: Tensors, *args: Any
) -> None:
    torch.manual_seed(SEED)
    operator = hvp.HessianOperator(loss, w, *args, engine=engine)
    gradient = flat(list(operator.gradient.values()))
    for _ in range(2):  # the recorded engine's second product is by a program
        product = flat(list((operator @ tangents(w)).values()))
        for ours, true in zip((gradient, product), truth, strict=True):
            assert (ours - true).norm() <= 1e-9 * true.norm()
    made = operator.linear_map
    assert isinstance(made, TracedLinearization) == (engine in ("linearized", "compiled")), f"{engine} fell back"
    if engine == "recorded":
        assert isinstance(made, OwnedLinearization)
        assert (made.program is None) == (name in BY_AUTOGRAD), made.fallback
        assert BY_AUTOGRAD.get(name, "") in (made.fallback or "")


@pytest.mark.parametrize(("name", "engine"), cells(LOSSES))
def test_loss(name: str, engine: str) -> None:
    w, x = weights(), batch()
    twin = TWINS.get(name, LOSSES[name])
    compare(name, engine, LOSSES[name], plain(lambda leaves: twin(leaves, x), w), w, x)


@pytest.mark.parametrize(("name", "engine"), cells(MODULES))
def test_module(name: str, engine: str) -> None:
    make, inputs = MODULES[name]
    torch.manual_seed(0)
    module, x = make(), inputs()
    w = {key: p.detach() for key, p in module.named_parameters()}
    own, twin = copy.deepcopy(module), everyday_modules.TWINS.get(name, everyday_modules.call)
    net = hvp.functional(module)
    truth = plain(lambda leaves: twin(own, leaves, x).square().mean(), w)
    compare(name, engine, lambda w, x: net(w, x).square().mean(), truth, w, x)
