"""Which models work on which engine: what is expected of each, checked by tests/test_hard_models.py.

The documentation's table is made from this list, so that it says what the tests check.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

from bench import hard_modules as modules

ENGINES = ("eager", "linearized", "compiled", "finite_difference", "auto")


@dataclass(frozen=True)
class Outcome:
    """What a hypergradient is: "works", "refused" by the error `error` whose message has `message`, or "differs"."""

    kind: str
    error: str = ""
    message: str = ""

    def __str__(self) -> str:
        return f"`{self.error}`" if self.kind == "refused" else self.kind


WORKS, DIFFERS = Outcome("works"), Outcome("differs")


@dataclass(frozen=True)
class HardModel:
    """A model, and what a hypergradient through it is expected to be on each engine.

    Attributes:
        make: the module; its parameters that require grad are the weights.
        inputs: a batch.
        plain: a module with the same parameters in the same order that plain double backward differentiates rightly in
            float64; None if `make`'s is one.
        dtype: of the weights.
        tolerance: of the relative difference from the plain module's hypergradient.
        loss_scale: what the training loss is multiplied by.
        outcomes: by engine, where it does not work.
        note: how it works, or why not.
    """

    make: Callable[[], nn.Module]
    inputs: Callable[[], Tensor]
    plain: Callable[[], nn.Module] | None = None
    dtype: torch.dtype = torch.float64
    tolerance: float = 1e-9
    loss_scale: float = 1.0
    outcomes: Mapping[str, Outcome] = field(default_factory=dict)
    note: str = ""

    def outcome(self, engine: str) -> Outcome:
        """What is expected on `engine`: a recorded trace is a trace, a recorded product one of autograd's."""
        return self.outcomes.get({"cudagraph": "linearized", "recorded": "eager"}.get(engine, engine), WORKS)


def sequences() -> Tensor:
    return torch.randn(3, 5, 4)


def steps() -> Tensor:
    return torch.randn(3, 4, 2)


def vectors() -> Tensor:
    return torch.randn(5, 4)


def images() -> Tensor:
    return torch.randn(4, 2, 4, 4)


def words() -> Tensor:
    return torch.tensor([[0, 2, 2], [5, 1, 0], [2, 2, 3]])


def perceptron(first: nn.Module | None = None) -> nn.Module:
    return nn.Sequential(nn.Linear(4, 4) if first is None else first, nn.Tanh(), nn.Linear(4, 2))


def after_convolution(norm: nn.Module, training: bool = True) -> nn.Module:
    return nn.Sequential(nn.Conv2d(2, 4, 3), norm, nn.Tanh(), nn.Flatten(), nn.Linear(16, 2)).train(training)


def encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(4, 2, 6, dropout=0.2, batch_first=True)
    return nn.Sequential(layer, nn.Flatten(), nn.Linear(20, 2))


def frozen() -> nn.Module:
    first = nn.Linear(4, 4)
    return perceptron(first.requires_grad_(False))


def positive() -> nn.Module:
    first = nn.Linear(4, 4)
    parametrize.register_parametrization(first, "weight", modules.Positive())
    return perceptron(first)


def pooled() -> nn.Module:
    return nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.MaxPool2d(2), nn.Tanh(), nn.Flatten(), nn.Linear(16, 2))


def dropped() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 8), nn.Dropout(), nn.Tanh(), nn.Linear(8, 2))


def automatic(dtype: torch.dtype) -> nn.Module:
    return modules.Autocast(perceptron(), dtype)


def compiled(module: nn.Module) -> Any:
    """By a backend that generates no code: what matters here is how it is differentiated."""
    return torch.compile(module, backend="aot_eager")


def refused(error: str, message: str, *engines: str) -> dict[str, Outcome]:
    """The outcomes of `engines`, by default of all."""
    return dict.fromkeys(engines or ENGINES, Outcome("refused", error, message))


_CONSTANT = "finite differences see how {} depends on the weights, where autograd is told not to"
_DIFFERS = {"finite_difference": DIFFERS}

MODELS: dict[str, HardModel] = {
    "`scaled_dot_product_attention`": HardModel(
        modules.BareAttention, sequences, note="the math kernel, forced around our own calls alone"
    ),
    "`nn.MultiheadAttention`": HardModel(modules.Attention, sequences),
    "`nn.TransformerEncoderLayer`": HardModel(encoder, sequences, note="with dropout"),
    "a vision transformer": HardModel(modules.VisionTransformer, images),
    "a residual network": HardModel(modules.ResidualNetwork, images),
    "`nn.LSTM`": HardModel(lambda: modules.Recurrent(nn.LSTM), steps, note="without cuDNN; traced without mkldnn"),
    "`nn.GRU`": HardModel(lambda: modules.Recurrent(nn.GRU), steps, note="as `nn.LSTM`"),
    "`scan`": HardModel(
        modules.Scanned,
        steps,
        lambda: modules.Scanned(loop=True),
        outcomes=refused(
            "SecondDerivativeError",
            "scan, which has no second derivative; remedy: write it as a Python loop",
            *(engine for engine in ENGINES if engine != "finite_difference"),
        ),
        note="torch has a wrong second derivative of it, without a word; so of `map`, `while_loop` and `cond`; before "
        "torch 2.13 its gradient is wrong too (pytorch issue 184528)",
    ),
    "`nn.MaxPool2d`": HardModel(pooled, images),
    "`grid_sample`, weights in the image": HardModel(
        lambda: modules.SpatialTransformer(True), images, note="from torch 2.12 on"
    ),
    "`grid_sample`, weights in the grid": HardModel(
        lambda: modules.SpatialTransformer(False), images, note="from torch 2.12 on"
    ),
    "`nn.Embedding`": HardModel(modules.Words, words),
    "`nn.Embedding(sparse=True)`": HardModel(
        lambda: modules.Words(sparse=True), words, modules.Words, note="products come out dense"
    ),
    "`nn.BatchNorm2d`, training": HardModel(
        lambda: after_convolution(nn.BatchNorm2d(4)), images, note="copies of its statistics are updated"
    ),
    "`nn.BatchNorm2d`, evaluation": HardModel(lambda: after_convolution(nn.BatchNorm2d(4), False), images),
    "`nn.SyncBatchNorm`": HardModel(
        lambda: after_convolution(nn.SyncBatchNorm(4)), images, note="in one process: there it is `nn.BatchNorm2d`"
    ),
    "`nn.InstanceNorm2d`": HardModel(lambda: after_convolution(nn.InstanceNorm2d(4, affine=True)), images),
    "`nn.GroupNorm`": HardModel(lambda: after_convolution(nn.GroupNorm(2, 4)), images),
    "`nn.LayerNorm`": HardModel(lambda: after_convolution(nn.LayerNorm([4, 2, 2])), images),
    "`nn.Dropout`": HardModel(dropped, vectors, note="one mask for all terms of a solve, a fresh one for each call"),
    "`parametrizations.weight_norm`": HardModel(
        lambda: perceptron(parametrizations.weight_norm(nn.Linear(4, 4))),
        vectors,
        lambda: perceptron(modules.WeightNorm(4, 4)),
        note="by its formula: the second derivative of torch's fused kernel is wrong; in tape style "
        "`SecondDerivativeError`",
    ),
    "`parametrizations.spectral_norm`": HardModel(
        lambda: perceptron(parametrizations.spectral_norm(nn.Linear(4, 4))),
        vectors,
        outcomes=_DIFFERS,
        note=_CONSTANT.format("the power iteration"),
    ),
    "`parametrizations.orthogonal`": HardModel(
        lambda: perceptron(parametrizations.orthogonal(nn.Linear(4, 4))), vectors
    ),
    "a parametrization of one's own": HardModel(positive, vectors),
    "tied weights": HardModel(modules.Tied, vectors),
    "frozen weights": HardModel(frozen, vectors),
    "low-rank adapters": HardModel(
        lambda: perceptron(modules.LowRank(4, 4)), vectors, note="weights are any subset of the parameters"
    ),
    "a buffer that forward changes": HardModel(
        modules.RunningScale, vectors, outcomes=_DIFFERS, note="a copy of it; " + _CONSTANT.format("the buffer")
    ),
    "`checkpoint(use_reentrant=False)`": HardModel(
        lambda: modules.Checkpointed(False),
        vectors,
        lambda: modules.Checkpointed(None),
        outcomes=refused("TraceError", "switch checkpointing off", "linearized", "compiled")
        | refused("ValueError", "weights: expected the module's own", "finite_difference"),
        note="at the module's own weights: it computes with those again, whatever was passed",
    ),
    "`checkpoint(use_reentrant=True)`": HardModel(
        lambda: modules.Checkpointed(True),
        vectors,
        outcomes=refused("SecondDerivativeError", "use_reentrant=True.*remedy: pass use_reentrant=False"),
        note="it works with `.backward()` alone",
    ),
    "autocast to bfloat16": HardModel(
        lambda: automatic(torch.bfloat16), vectors, lambda: nn.ModuleDict({"module": perceptron()}), torch.float32, 5e-2
    ),
    "autocast to float16, a scaled loss": HardModel(
        lambda: automatic(torch.float16),
        vectors,
        lambda: nn.ModuleDict({"module": perceptron()}),
        torch.float32,
        1e-2,
        128.0,
        note="the scale cancels: see [Precision](precision.md)",
    ),
    "complex weights": HardModel(
        modules.Complex,
        vectors,
        outcomes=refused("TypeError", r"weights\['filter'\]: expected a real floating dtype.*view_as_real"),
        note="`torch.view_as_real` makes them real",
    ),
    "`torch.compile(module)`": HardModel(
        lambda: compiled(perceptron()), vectors, perceptron, note="`functional` calls the original"
    ),
    "a compiled part of a module": HardModel(
        lambda: perceptron(compiled(nn.Linear(4, 4))),
        vectors,
        perceptron,
        outcomes=refused(
            "SecondDerivativeError",
            "torch.compile.*remedy: hand the original",
            *(engine for engine in ENGINES if engine != "finite_difference"),
        ),
        note="compiled code can be differentiated once only",
    ),
}


def markdown() -> str:
    """The list as a Markdown table."""
    lines = [["model", *(f"`{engine}`" for engine in ENGINES), "how, or why not"]]
    lines.append(["---"] * len(lines[0]))
    lines += [[name, *(str(m.outcome(engine)) for engine in ENGINES), m.note] for name, m in MODELS.items()]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
