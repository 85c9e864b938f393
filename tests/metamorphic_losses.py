"""A generator of losses: the same function, written in as many ways as there are.

A :class:`Skeleton` says what is computed: layers with or without a residual connection, the end of the loss, a penalty.
A :class:`Writing` says how each part is written. Two writings of one skeleton are equal but for rounding.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import metamorphic_elementwise as elementwise
import metamorphic_layers as layers
import metamorphic_scores as scores
import torch
from metamorphic_layers import Kind
from torch import Tensor

LAYERS: dict[str, Kind] = {
    "linear": layers.LINEAR,
    "gelu": layers.GELU,
    "gelu tanh": layers.GELU_TANH,
    "swiglu": layers.SWIGLU,
    "layer norm": layers.LAYER_NORM,
    "rms norm": layers.RMS_NORM,
    "attention": layers.ATTENTION,
    "relu": elementwise.RELU,
    "tanh": elementwise.TANH,
    "softplus": elementwise.SOFTPLUS,
    "gate": elementwise.GATE,
    "rearrange": elementwise.REARRANGE,
    "shift": elementwise.SHIFT,
    "running mean": elementwise.RUNNING_MEAN,
}
ENDS: dict[str, Kind] = {
    "squared error": scores.SQUARED_ERROR,
    "cross-entropy": scores.CROSS_ENTROPY,
    "binary": scores.BINARY,
    "huber": scores.HUBER,
    "cosine": scores.COSINE,
    "gaussian": scores.GAUSSIAN,
}
PENALTIES: dict[str, Kind] = {"decay": scores.DECAY, "smooth L1": scores.SMOOTH_L1}


def _residual_in_place(x: Tensor, f: Tensor) -> Tensor:
    out = x.clone()
    out += f
    return out


RESIDUALS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "none": lambda x, f: f,
    "x + f": lambda x, f: x + f,
    "+=": _residual_in_place,
    "stack": lambda x, f: torch.stack([x, f]).sum(0),
    "sum": lambda x, f: sum([x, f]),
    "add alpha": lambda x, f: torch.add(x, f, alpha=1),
    "f.add_": lambda x, f: (f * 1).add_(x),
}


@dataclass(frozen=True)
class Skeleton:
    """What is computed: names of layers, each with whether its input is added; of the end; of the penalty."""

    layers: tuple[tuple[str, bool], ...]
    end: str
    penalty: str

    @property
    def first_writing(self) -> Writing:
        """The plainest one."""
        parts = tuple((next(iter(LAYERS[kind].writings)), "x + f" if added else "none") for kind, added in self.layers)
        ends = next(iter(ENDS[self.end].writings)), next(iter(PENALTIES[self.penalty].writings))
        return Writing(parts, *ends)


@dataclass(frozen=True)
class Writing:
    """How each part of a skeleton is written, by names."""

    layers: tuple[tuple[str, str], ...]
    end: str
    penalty: str


@dataclass(frozen=True)
class Loss:
    """`loss(weights, hyper, batch)`: weights and hyper lists of tensors, as `draw` draws them.

    `sizes` are those of the batch, of time and features.
    """

    skeleton: Skeleton
    writing: Writing
    sizes: tuple[int, int, int] = (3, 4, 6)

    def __str__(self) -> str:
        parts = [
            f"{kind}: {how}" + (f" [{added}]" if residual else "")
            for (kind, residual), (how, added) in zip(self.skeleton.layers, self.writing.layers, strict=True)
        ]
        ends = [f"{self.skeleton.end}: {self.writing.end}", f"{self.skeleton.penalty}: {self.writing.penalty}"]
        return " | ".join([*parts, *ends])

    def __call__(self, weights: list[Tensor], hyper: list[Tensor], batch: tuple[Tensor, ...]) -> Tensor:
        inputs, targets, labels = batch
        first, rest = weights[0], iter(weights[1:])
        x = inputs @ first.T
        for (kind, _), (how, added) in zip(self.skeleton.layers, self.writing.layers, strict=True):
            own = [next(rest) for _ in LAYERS[kind].shapes]
            x = RESIDUALS[added](x, LAYERS[kind].writings[how](x, *own))
        score = ENDS[self.skeleton.end].writings[self.writing.end](x, targets, labels)
        return score + PENALTIES[self.skeleton.penalty].writings[self.writing.penalty](weights, hyper)

    def draw(self, seed: int = 0) -> tuple[list[Tensor], list[Tensor], tuple[Tensor, ...]]:
        """Weights, logarithms of decays and a batch, in float64; weights are away from zero, where |w| has a kink."""
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64)

        batch, time, features = self.sizes
        shapes = [(1, 1), *(shape for kind, _ in self.skeleton.layers for shape in LAYERS[kind].shapes)]
        weights = [0.3 * (raw := normal(*(features * n for n in shape))) + 0.1 * raw.sign() for shape in shapes]
        weights = [w * (6 / features) ** 0.5 if w.dim() > 1 else w for w in weights]
        hyper = [0.3 * normal() - 3 for _ in weights]
        labels = torch.randint(features, (batch, time), generator=generator)
        return weights, hyper, (normal(batch, time, features), normal(batch, time, features), labels)


def covering() -> Iterator[Loss]:
    """Losses of one layer, among which every writing of every part occurs."""
    of_layers = [(kind, how) for kind in LAYERS for how in LAYERS[kind].writings]
    of_ends = [(kind, how) for kind in ENDS for how in ENDS[kind].writings]
    of_penalties = [(kind, how) for kind in PENALTIES for how in PENALTIES[kind].writings]
    residuals = list(RESIDUALS)
    for index in range(max(200, len(of_layers))):
        layer, how = of_layers[index % len(of_layers)]
        end, penalty = of_ends[index % len(of_ends)], of_penalties[index % len(of_penalties)]
        added = residuals[index % len(residuals)]
        skeleton = Skeleton(((layer, added != "none"),), end[0], penalty[0])
        yield Loss(skeleton, Writing(((how, added),), end[1], penalty[1]))


def drawn(seed: int) -> Loss:
    """A loss of one to three layers."""
    choose = random.Random(seed)
    kinds = tuple((choose.choice(list(LAYERS)), choose.random() < 0.5) for _ in range(choose.randint(1, 3)))
    return rewritten(Skeleton(kinds, choose.choice(list(ENDS)), choose.choice(list(PENALTIES))), seed)


def rewritten(skeleton: Skeleton, seed: int) -> Loss:
    """The loss of this skeleton in a writing drawn by `seed`."""
    choose = random.Random(f"writing {seed}")
    parts = tuple(
        (choose.choice(list(LAYERS[kind].writings)), choose.choice(list(RESIDUALS)[1:]) if added else "none")
        for kind, added in skeleton.layers
    )
    end = choose.choice(list(ENDS[skeleton.end].writings))
    return Loss(skeleton, Writing(parts, end, choose.choice(list(PENALTIES[skeleton.penalty].writings))))
