"""The problems that are measured: a network, its losses, its hyperparameters and seeded synthetic batches."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import hvp_engine as hvp
from bench import networks
from bench.networks import COLOR, DIGIT
from examples import models

Tensors = Mapping[str, Tensor]
Batch = tuple[Tensor, Tensor]
Context = Callable[[], contextlib.AbstractContextManager]

BATCH = 50
LOG_DECAY = -6.0


@dataclass(frozen=True)
class Problem:
    """A bilevel problem at one point: everything that a method needs.

    Attributes:
        name: a key of :data:`PROBLEMS`.
        module: the network; `weights` are its parameters.
        weights, hyper: named leaves that require grad; hyper holds log decays, one for each weight or one for all.
        train, val: batches (inputs, targets).
        loss_of_outputs: the data term; the validation loss is nothing else.
        alpha: a step of the Neumann series; small enough that negative curvature does not blow up 50 terms.
        terms: Hessian-vector products of a solve of the usual length.
        sweep: other lengths that are measured.
        brief: only the list loops and our engines take part, since a case takes a minute on a CPU.
        kernels: a context in which the forward uses kernels that have a second derivative.
    """

    name: str
    module: nn.Module
    weights: Tensors
    hyper: Tensors
    train: Batch
    val: Batch
    loss_of_outputs: Callable[[Tensor, Tensor], Tensor]
    alpha: float
    terms: int
    sweep: tuple[int, ...]
    brief: bool
    kernels: Context

    @property
    def device(self) -> torch.device:
        return self.train[0].device

    @cached_property
    def net(self) -> Callable[..., Tensor]:
        """The network as a function of (weights, inputs)."""
        return hvp.functional(self.module)

    @cached_property
    def vector(self) -> list[Tensor]:
        """dL_V/dw, the right-hand side."""
        value = self.val_loss(self.weights, self.hyper, self.val)
        return list(torch.autograd.grad(value, list(self.weights.values())))

    def penalty(self, weights: Tensors, hyper: Tensors) -> Tensor:
        """sum(e^h w^2) / 2."""
        decays = [hyper["all"]] * len(weights) if "all" in hyper else list(hyper.values())
        terms = [(h.exp() * w.square()).sum() for h, w in zip(decays, weights.values(), strict=True)]
        return torch.stack(terms).sum() / 2

    def train_loss(self, weights: Tensors, hyper: Tensors, batch: Batch) -> Tensor:
        return self.val_loss(weights, hyper, batch) + self.penalty(weights, hyper)

    def val_loss(self, weights: Tensors, hyper: Tensors, batch: Batch) -> Tensor:
        with self.kernels():
            outputs = self.net(weights, batch[0])
        return self.loss_of_outputs(outputs, batch[1])


@dataclass(frozen=True)
class Recipe:
    """How to make a problem, and where it belongs.

    `batch(count)` draws (inputs, targets). Solves are shorter where 20 products would take many seconds on a CPU.
    """

    module: Callable[[], nn.Module]
    batch: Callable[[int], Batch]
    loss: Callable[[Tensor, Tensor], Tensor]
    alpha: float
    size: int = BATCH
    terms: int = 20
    sweep: tuple[int, ...] = (1, 5, 50)
    brief: bool = False
    per_weight: bool = True
    kernels: Context = contextlib.nullcontext
    gpu_only: bool = False


def _images(shape: models.Shape, count: int) -> Batch:
    return torch.randn(count, *shape), torch.randint(10, (count,))


def _noisy_images(count: int) -> Batch:
    clean = torch.rand(count, 3, 32, 32)
    return torch.cat([clean + 0.1 * torch.randn_like(clean), torch.randn(count, 1, 32, 32)], 1), clean


def _text(words: int, length: int, count: int) -> Batch:
    text = torch.randint(words, (count, length + 1))
    return text[:, :-1], text[:, 1:]


def _next_word(scores: Tensor, words: Tensor) -> Tensor:
    return F.cross_entropy(scores.flatten(0, 1), words.flatten())


_digits, _colors = partial(_images, DIGIT), partial(_images, COLOR)
_math_attention = partial(sdpa_kernel, SDPBackend.MATH)


@contextlib.contextmanager
def _plain_rnn() -> Iterator[None]:
    enabled = torch._C._get_mkldnn_enabled()
    torch._C._set_mkldnn_enabled(False)  # `torch.backends.mkldnn.flags` would warn about TF32 at every call
    try:
        with torch.backends.cudnn.flags(enabled=False):
            yield
    finally:
        torch._C._set_mkldnn_enabled(enabled)


PROBLEMS = {
    "logistic": Recipe(partial(models.linear, DIGIT), _digits, F.cross_entropy, alpha=0.1),
    "logistic-one-decay": Recipe(
        partial(models.linear, DIGIT), _digits, F.cross_entropy, alpha=0.1, per_weight=False, sweep=(50,)
    ),
    "mlp": Recipe(partial(models.one_layer, DIGIT), _digits, F.cross_entropy, alpha=0.05),
    "mlp-one-decay": Recipe(
        partial(models.one_layer, DIGIT), _digits, F.cross_entropy, alpha=0.05, per_weight=False, sweep=()
    ),
    "lenet": Recipe(partial(models.lenet5, DIGIT), _digits, F.cross_entropy, alpha=0.03),
    "resnet20": Recipe(
        partial(networks.resnet, 20), _colors, F.cross_entropy, alpha=0.005, terms=5, sweep=(), brief=True
    ),
    "resnet44": Recipe(partial(networks.resnet, 44), _colors, F.cross_entropy, alpha=0.005, gpu_only=True),
    "unet": Recipe(networks.unet, _noisy_images, F.mse_loss, alpha=0.1, terms=5, sweep=(1,)),
    "lstm": Recipe(
        partial(networks.LSTM, 100, 64),
        partial(_text, 100, 20),
        _next_word,
        alpha=1.0,
        size=10,
        sweep=(1, 5),
        kernels=_plain_rnn,
    ),
    "looped-lstm": Recipe(
        partial(networks.LoopedLSTM, 100, 64), partial(_text, 100, 20), _next_word, alpha=1.0, size=10, sweep=()
    ),
    "large-lstm": Recipe(
        partial(networks.LSTM, 10_000, 650),
        partial(_text, 10_000, 70),
        _next_word,
        alpha=1.0,
        kernels=_plain_rnn,
        gpu_only=True,
    ),
    "transformer": Recipe(
        partial(networks.Transformer, 100, 64, 32),
        partial(_text, 100, 32),
        _next_word,
        alpha=0.2,
        sweep=(1, 5),
        kernels=_math_attention,
    ),
}
"""Every problem by name, at batch 50 (the small LSTMs at 10)."""


def names_for(device: torch.device) -> list[str]:
    """The problems that are measured on a device of this type."""
    return [name for name, recipe in PROBLEMS.items() if device.type == "cuda" or not recipe.gpu_only]


def build(name: str, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> Problem:
    """The problem `name`: the same numbers at every call, rounded to `dtype`."""
    return built(name, PROBLEMS[name], device, dtype)


def built(name: str, recipe: Recipe, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> Problem:
    """The problem of a recipe."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        module = recipe.module().to(device, dtype).train()
        batches = [recipe.batch(recipe.size) for _ in range(2)]
    weights: Tensors = dict(module.named_parameters())
    if recipe.per_weight:
        hyper: Tensors = {name: torch.full_like(w, LOG_DECAY).requires_grad_() for name, w in weights.items()}
    else:
        hyper = {"all": torch.tensor(LOG_DECAY, dtype=dtype, device=device, requires_grad=True)}

    def place(t: Tensor) -> Tensor:
        return t.to(device, dtype) if t.is_floating_point() else t.to(device)

    train, val = ((place(x), place(y)) for x, y in batches)
    return Problem(
        name=name,
        module=module,
        weights=weights,
        hyper=hyper,
        train=train,
        val=val,
        loss_of_outputs=recipe.loss,
        alpha=recipe.alpha,
        terms=recipe.terms,
        sweep=recipe.sweep,
        brief=recipe.brief,
        kernels=recipe.kernels,
    )
