"""Hard models: on each engine a hypergradient is plain double backward's in float64, or the documented error."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import cross_entropy

import hvp_engine as hvp
from bench.hard_models import ENGINES, MODELS, HardModel
from hvp_engine._support.isolation import Draws
from hvp_engine.differentiation.linear_map import Linearization
from hvp_engine.differentiation.problem import Problem
from hvp_engine.differentiation.recorded.owned import OwnedLinearization
from hvp_engine.engines import RecordedEngine

pytestmark = [
    pytest.mark.filterwarnings("ignore:the weights are far from a minimum"),
    pytest.mark.filterwarnings("ignore:.*a kernel in it has no second derivative"),
    pytest.mark.filterwarnings("error:the traced gradient"),
]

ITERATIONS, ALPHA, SEED = 3, 0.05, 7

CHOSEN = ("`nn.Dropout`", "`checkpoint(use_reentrant=False)`", "complex weights", "a compiled part of a module")
"""Where the automatic engine is tried by default; `make soak` tries it, and compiling, everywhere."""

INSTALLED = tuple(int(part) for part in torch.__version__.split(".")[:2])
UPSTREAM = {
    ("`grid_sample`", (2, 12)): (
        (*ENGINES, "recorded"),
        "torch 2.11 has no double backward of grid_sample (pytorch issue 34704)",
    ),
    ("`scan`", (2, 13)): (
        ("finite_difference",),
        "torch 2.11 and 2.12 have a wrong first gradient of scan where the initial state needs none, "
        "as in a recurrent net (pytorch issue 184528)",
    ),
}
"""The torch version from which on models whose names begin so work on these engines, and what is wrong before."""


BY_AUTOGRAD: dict[str, str] = {}
"""Models of which the recorded engine makes no program, and why."""


class Watched(RecordedEngine):
    """Keeps the linearizations that it makes."""

    def __init__(self) -> None:
        super().__init__()
        self.tapes: list[OwnedLinearization] = []

    def linearize(self, problem: Problem) -> Linearization:
        tape = super().linearize(problem)
        assert isinstance(tape, OwnedLinearization)
        self.tapes.append(tape)
        return tape


def cells() -> list[Any]:
    found = []
    for name in MODELS:
        for engine in (*ENGINES, "recorded", "cudagraph"):
            refused = MODELS[name].outcome(engine).kind == "refused"
            slow = (engine == "compiled" and not refused) or (engine == "auto" and name not in CHOSEN)
            marks = [pytest.mark.soak] if slow else []
            if engine == "cudagraph":
                marks.append(pytest.mark.gpu)
            for (start, since), (engines, reason) in UPSTREAM.items():
                if name.startswith(start) and engine in engines:
                    marks.append(pytest.mark.skipif(since > INSTALLED, reason=reason))
            found.append(pytest.param(name, engine, marks=marks, id=f"{name.strip('`')}, {engine}"))
    return found


def real(tree: Any, device: torch.device, dtype: torch.dtype) -> Any:
    """A module or a tensor there; what is complex or whole numbers keeps its dtype."""
    if isinstance(tree, Tensor):
        return tree.to(device, dtype if tree.is_floating_point() else tree.dtype)
    return tree._apply(lambda t: real(t, device, dtype))


def losses(call: Callable[[dict[str, Tensor], Tensor], Tensor], scale: float) -> tuple[Any, Any]:
    """A training loss with one decay for each weight, and a validation loss."""

    def entropy(weights: dict[str, Tensor], x: Tensor, shift: int) -> Tensor:
        outputs = call(weights, x)
        labels = (torch.arange(len(x), device=x.device) + shift) % 2
        return cross_entropy(outputs.to(next(iter(weights.values())).dtype), labels)

    def train(weights: dict[str, Tensor], decays: dict[str, Tensor], x: Tensor) -> Tensor:
        penalty = sum((decays[name].exp() * weight.square()).sum() for name, weight in weights.items())
        return scale * (entropy(weights, x, 0) + penalty)

    return train, lambda weights, decays, x: entropy(weights, x, 1)


def built(model: HardModel, make: Callable[[], nn.Module], device: torch.device, dtype: torch.dtype) -> Any:
    """The module, its weights, their decays, and a batch."""
    torch.manual_seed(0)
    module = real(make(), device, dtype)
    weights = {name: p.detach() for name, p in module.named_parameters() if p.requires_grad}
    torch.manual_seed(1)
    decays = {name: torch.full_like(weight, -2.0) for name, weight in weights.items()}
    return module, weights, decays, real(model.inputs(), device, dtype)


def oracle(model: HardModel, device: torch.device) -> Tensor:
    """The hypergradient by plain double backward in float64."""
    module, weights, decays, x = built(model, model.plain or model.make, device, torch.float64)
    plain = module["module"] if isinstance(module, nn.ModuleDict) else module
    prefix = "module." if plain is not module else ""
    buffers = dict(plain.named_buffers())

    def call(weights: dict[str, Tensor], x: Tensor) -> Tensor:
        state = {name.removeprefix(prefix): weight for name, weight in weights.items()}
        state |= {name: buffer.clone() for name, buffer in buffers.items()}
        return torch.func.functional_call(plain, state, (x,))

    train, val = losses(call, 1.0)
    w = {name: weight.clone().requires_grad_() for name, weight in weights.items()}
    h = {name: decay.clone().requires_grad_() for name, decay in decays.items()}
    torch.manual_seed(SEED)
    torch.manual_seed(Draws().next_seed())
    with sdpa_kernel(SDPBackend.MATH), torch.backends.cudnn.flags(enabled=False):
        v = list(torch.autograd.grad(val(w, h, x), list(w.values())))
        f = torch.autograd.grad(train(w, h, x), list(w.values()), create_graph=True)
    total = [ALPHA * t for t in v]
    for _ in range(ITERATIONS):
        product = torch.autograd.grad(f, list(w.values()), v, retain_graph=True)
        v = [t - ALPHA * p for t, p in zip(v, product, strict=True)]
        total = [t + ALPHA * s for t, s in zip(total, v, strict=True)]
    return -flat(torch.autograd.grad(f, list(h.values()), total))


def flat(tensors: Any) -> Tensor:
    return torch.cat([tensor.detach().double().flatten() for tensor in tensors])


def settings(module: nn.Module) -> list[Any]:
    """What must be the same before and after: all that is not tensors' values."""
    return [
        [(name, id(p), id(p.grad), p.requires_grad, p._version) for name, p in module.named_parameters()],
        [(name, id(b), b._version) for name, b in module.named_buffers()],
        [part.training for part in module.modules()],
        torch.is_grad_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch.backends.cudnn.enabled,
        torch._C._get_mkldnn_enabled(),
        torch.backends.cuda.flash_sdp_enabled(),
        torch.backends.cuda.mem_efficient_sdp_enabled(),
        torch._C._autograd._saved_tensors_hooks_is_enabled(),
        torch.get_rng_state().tolist(),
    ]


@pytest.mark.parametrize(("name", "engine"), cells())
def test_hypergradient(name: str, engine: str, device: torch.device) -> None:
    model = MODELS[name]
    expected = model.outcome(engine)
    module, weights, decays, x = built(model, model.make, device, model.dtype)
    net = hvp.functional(module)
    train, val = losses(net, model.loss_scale)
    torch.manual_seed(SEED)
    recorded = Watched()
    chosen = recorded if engine == "recorded" else engine
    hypergradient = hvp.Hypergradient(train, val, hvp.Neumann(ITERATIONS, ALPHA / model.loss_scale), chosen)
    values = {key: t.clone() for key, t in module.state_dict().items()}
    before = settings(module)
    if expected.kind == "refused":
        error = getattr(hvp, expected.error, None) or __builtins__[expected.error]
        with pytest.raises(error, match=f"(?s){expected.message}"):
            hypergradient(weights, decays, x, x)
    else:
        found = flat(hypergradient(weights, decays, x, x).grads.values())
    assert settings(module) == before
    assert all(torch.equal(t, values[key]) for key, t in module.state_dict().items())
    if expected.kind == "refused":
        return
    if engine == "recorded":
        *given_up, tape = recorded.tapes
        assert len(given_up) < 2, "a call that has to build a program may begin again, alone"
        assert (tape.program is None) == (name in BY_AUTOGRAD), tape.fallback
        assert BY_AUTOGRAD.get(name, "") in (tape.fallback or "")
        recorded.tapes.clear()
        hypergradient(weights, decays, x, x)
        assert len(recorded.tapes) == 1, "with its program built, a call records once"
    truth = oracle(model, device)
    difference = float((found - truth).norm() / truth.norm())
    tolerance = max(model.tolerance, 1e-6) if engine == "finite_difference" else model.tolerance
    if expected.kind == "differs":
        assert 100 * tolerance < difference < 0.2
    else:
        assert difference < tolerance
