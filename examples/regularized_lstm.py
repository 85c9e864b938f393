"""An LSTM on a text with every regularization of Tab. 4: five dropout rates and two strengths."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import hvp_engine as hvp
from examples import models, text_sets
from examples.datasets import Text

RATES = ("drop_connect", "input", "hidden", "output", "embedding")

Weights = dict[str, Tensor]
Hyper = Mapping[str, Tensor]


class RegularizedLSTM:
    """The losses of a :class:`models.TiedLSTM` on batches of words, int64 (rows, time + time + 1).

    The first half of a batch only sets the state, as a constant; the network is trained on the rest.

    Arguments:
        text: to make the batches `train` and `validation` of.
        units, layers: the size of the network.
        batch: rows and time.
        start: the initial value of every rate and strength.
        temperature: that of the concrete masks.
        device: where everything is.

    Attributes:
        seven, many: hyperparameters, as :func:`models.shared_rates` and :func:`models.dropout_rates`.
    """

    def __init__(
        self,
        text: Text,
        units: int,
        layers: int,
        batch: tuple[int, int],
        start: float,
        temperature: float,
        device: torch.device,
    ):
        self.text, self.units, self.temperature, (rows, self.time) = text, units, temperature, batch
        self.module = models.TiedLSTM(len(text.words), units, layers).to(device)
        self.network = hvp.functional(self.module)
        self.train, self.validation = (
            [words.to(device) for words in text_sets.batches(part, rows, self.time, context=self.time)]
            for part in (text.train, text.validation)
        )
        self.seven = models.shared_rates(start, device)
        self.many = models.dropout_rates(units, start, device)
        self.start = start

    def train_loss(self, weights: Weights, hyper: Hyper, batch: Tensor) -> Tensor:
        """Cross-entropy and activation regularization, with dropout; strengths not in `hyper` keep their start."""
        masks, dropped_weights = self._drop(weights, hyper, len(batch))
        logits, _, raw, dropped = self.network(dropped_weights, batch[:, :-1], context=self.time, masks=masks)
        activation, temporal = (
            hyper[name].exp() if name in hyper else self.start for name in ("activation", "temporal")
        )
        penalty = activation * dropped.square().mean() + temporal * raw.diff(dim=1).square().mean()
        return self._cross_entropy(logits, batch) + penalty

    def val_loss(self, weights: Weights, hyper: Any, batch: Tensor) -> Tensor:
        """Cross-entropy."""
        return self._cross_entropy(self.network(weights, batch[:, :-1], context=self.time)[0], batch)

    def perplexity(self, weights: Mapping[str, Tensor], part: Tensor) -> float:
        """Perplexity of a part of the text, without dropout."""
        return text_sets.perplexity(self.network, weights, part)

    def _cross_entropy(self, logits: Tensor, batch: Tensor) -> Tensor:
        return F.cross_entropy(logits.flatten(0, 1), batch[:, -self.time :].flatten())

    def _drop(self, weights: Weights, rates: Hyper, rows: int) -> tuple[dict[str, Tensor], Weights]:
        """The factors of units and words, and the weights after DropConnect."""

        def mask(name: str, *shape: int) -> Tensor:
            return models.concrete_mask(rates[name], shape, self.temperature)

        masks = {name: mask(name, rows, 1, self.units) for name in ("input", "hidden", "output")}
        masks["embedding"] = mask("embedding", len(self.text.words))
        recurrent = {
            name: weight * mask("drop_connect", *weight.shape)
            for name, weight in weights.items()
            if "weight_hh" in name
        }
        return masks, weights | recurrent

    @staticmethod
    def bounds(
        hyper: Mapping[str, Any], rates: tuple[float, float], strengths: tuple[float, float]
    ) -> tuple[dict[str, float], dict[str, float]]:
        """Bounds of logits and logarithms, from those of rates and strengths."""
        low, high = (
            {
                name: math.log(strength) if name in ("activation", "temporal") else math.log(rate / (1 - rate))
                for name in hyper
            }
            for rate, strength in zip(rates, strengths, strict=True)
        )
        return low, high


@dataclass(frozen=True)
class Settings:
    """`steps` are training steps; after every `inner_steps` of them there is a hyper step."""

    words: int
    units: int
    rows: int
    time: int
    steps: int
    inner_steps: int
    evaluations: int
    curve_words: int
    """Words of the validation text behind the curves; the table is about all of it."""
    seeds: int
    learning_rate: float
    hyper_learning_rate: float
    hyper_clip: float | None
    """Largest norm of a hypergradient: the first ones are a thousand times longer than the rest, and would long be all
    that Adam scales its steps by."""
    nonmonotone: int | None
    """Evaluations without a new minimum after which the learning rate is divided by 4; None: it falls linearly in the
    last quarter, as it does in the trials of every search."""
    layers: int = 2
    clip: float = 0.25
    start: float = 0.5
    temperature: float = 0.1
    rate_bounds: tuple[float, float] = (0.02, 0.9)
    strength_bounds: tuple[float, float] = (0.01, 5.0)
    trials: int = 4
    search_batches: int = 20
    """Batches of the validation text by which searches compare their trials."""
    stn_learning_rate: float = 5e-2
    searches: tuple[str, ...] = ("self-tuning network", "random search", "grid search", "Bayesian optimization")

    @property
    def evaluate_every(self) -> int:
        """Training steps between evaluations."""
        return self.steps // self.evaluations

    def problem(self, text: Text, device: torch.device) -> RegularizedLSTM:
        """A new network, with random weights."""
        batch = self.rows, self.time
        return RegularizedLSTM(text, self.units, self.layers, batch, self.start, self.temperature, device)
