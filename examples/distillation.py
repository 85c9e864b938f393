"""Figs. 6 and 11: one synthetic image per class, such that a classifier trained on them alone does well on real ones.

The hyperparameters are the pixels; the weights are those of a logistic regression that sees nothing but them:

    L_T(w, images) = cross-entropy of the images, one per class + exp(LOG_DECAY) / 2 ||w||^2,   L_V = that of real ones.

What counts is a fresh classifier, trained on the images to its minimum under the same decay, on the test set; beside it
one that is trained on a real image of each class, and one on the class means of the same validation points. The paper
has 300 validation points for CIFAR in its appendix and all of them in section 5.3: here are both.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn import functional as F

import hvp_engine as hvp
from examples import image_sets, models
from examples.experiment import Experiment, Run
from examples.image_sets import Batch, ImageSet

LOG_DECAY = -4.0


@dataclass(frozen=True)
class Settings:
    hyper_steps: int
    products: int = 20
    inner_steps: int = 5
    batch: int = 1000
    weight_learning_rate: float = 1e-2
    hyper_learning_rate: dict[str, float] = field(
        default_factory=lambda: {"mnist": 1e-2, "cifar10": 1e-3, "cifar100": 1e-3}
    )
    evaluations: int = 30
    solvers: tuple[str, ...] = ("Neumann", "CG", "T1-T2")
    real_draws: int = 5
    """Sets of one real image per class over which that baseline is averaged."""


SOLVERS = {
    "Neumann": hvp.Neumann,
    "CG": hvp.ConjugateGradient,
    "T1-T2": lambda products: hvp.Identity(),
}


class Distillation:
    """A logistic regression that is trained on images, one per class, which are tuned."""

    def __init__(self, images: ImageSet, device: torch.device):
        self.module = models.linear(images.shape, images.classes).to(device)
        self.network = hvp.functional(self.module)
        self.images = models.images_per_class(images.shape, images.classes).to(device)
        self.labels = torch.arange(images.classes, device=device)

    def val_loss(self, weights: dict[str, Tensor], images: Tensor, batch: Batch) -> Tensor:
        """Cross-entropy of real images."""
        return F.cross_entropy(self.network(weights, batch[0]), batch[1])

    def train_loss(self, weights: dict[str, Tensor], images: Tensor, labels: Tensor) -> Tensor:
        """Cross-entropy of the distilled images, with decay."""
        return F.cross_entropy(self.network(weights, images), labels) + decay(weights)

    def tuner(
        self, settings: Settings, solver: hvp.Neumann | hvp.ConjugateGradient | hvp.Identity, rate: float
    ) -> hvp.Tuner:
        return hvp.Tuner(
            self.module,
            self.images,
            self.train_loss,
            self.val_loss,
            weight_optimizer=lambda tensors: torch.optim.Adam(tensors, lr=settings.weight_learning_rate),
            hyper_optimizer=lambda tensors: torch.optim.RMSprop(tensors, lr=rate),
            hyper_scheduler=lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(
                optimizer, settings.hyper_steps, eta_min=rate / 50
            ),
            solver=solver,
            inner_steps=settings.inner_steps,
        )


def decay(weights: dict[str, Tensor]) -> Tensor:
    """exp(LOG_DECAY) / 2 ||w||^2."""
    squares = torch.stack([weight.square().sum() for weight in weights.values()])
    return math.exp(LOG_DECAY) / 2 * squares.sum()


def fresh_accuracy(images: Tensor, labels: Tensor, test: Batch) -> float:
    """On the test set, of a new logistic regression at the minimum of its loss on `images`, which is unique."""
    module = models.linear(tuple(images.shape[1:]), int(labels.max()) + 1).to(images.device)
    weights = dict(module.named_parameters())
    optimizer = torch.optim.LBFGS(module.parameters(), max_iter=500, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(module(images), labels) + decay(weights)
        loss.backward()
        return loss

    optimizer.step(closure)
    return image_sets.accuracy(module, test)


def class_means(part: Batch, classes: int) -> Tensor:
    images, labels = part
    return torch.stack([images[labels == label].mean(0) for label in range(classes)])


def real_images(part: Batch, classes: int) -> Tensor:
    """One of each class, by chance."""
    images, labels = part
    shuffled = torch.randperm(len(labels), device=labels.device)
    first = torch.stack([shuffled[labels[shuffled] == label][0] for label in range(classes)])
    return images[first]


def run(run: Run, settings: Settings) -> None:
    dataset, options = run.options.dataset, run.options
    pictures = {}
    for validation in (None, 300) if dataset != "mnist" else (None,):
        images = image_sets.load(dataset, options.data, (0, validation), options.seed, options.device)
        if validation is None:
            run.note(f"{images.source}.")
        points = f"{len(images.validation[1]):,} validation points"
        labels = torch.arange(images.classes, device=options.device)
        for name in settings.solvers:
            torch.manual_seed(options.seed)
            distilled = _distill(run, settings, images, f"{name}, {points}", SOLVERS[name](settings.products))
            pictures[f"{name}, {points}"] = distilled
            accuracy = fresh_accuracy(distilled, labels, images.test)
            run.compare(
                f"distilled ({name}, {points}): test accuracy of a fresh classifier", f"{accuracy:.1%}", "not stated"
            )
        means = pictures[f"class means, {points}"] = class_means(images.validation, images.classes)
        run.compare(f"class means ({points})", f"{fresh_accuracy(means, labels, images.test):.1%}")
        real = [real_images(images.validation, images.classes) for _ in range(settings.real_draws)]
        accuracies = [fresh_accuracy(draw, labels, images.test) for draw in real]
        run.compare(f"one real image per class ({points}), mean of {len(real)}", f"{sum(accuracies) / len(real):.1%}")
        pictures[f"real, {points}"] = real[0]
    run.compare(
        "hyperparameters", f"{means.numel():,}", {"mnist": "7,840", "cifar10": "30,720", "cifar100": "300,720"}[dataset]
    )
    run.picture("distilled", draw(pictures))


def _distill(run: Run, settings: Settings, images: ImageSet, name: str, solver) -> Tensor:
    problem = Distillation(images, run.options.device)
    history = run.tune(
        name,
        problem.tuner(settings, solver, settings.hyper_learning_rate[run.options.dataset]),
        [problem.labels],
        image_sets.Shuffled(images.validation, settings.batch),
        settings.hyper_steps,
        evaluate=lambda tuner: {"test_accuracy": image_sets.accuracy(problem.module, images.test)},
        evaluate_every=max(1, settings.hyper_steps // settings.evaluations),
        checkpoint_every=100,
    )
    run.compare(
        f"distilled ({name}): validation loss, first and last", f"{history[0].val_loss:.3f}, {history[-1].val_loss:.3f}"
    )
    return problem.images


def tile(images: Tensor) -> Tensor:
    """(N, C, H, W) in rows of ten, each image stretched to [0, 1]: (rows H, 10 W, C)."""
    low, high = images.amin((1, 2, 3), keepdim=True), images.amax((1, 2, 3), keepdim=True)
    shown = F.pad((images - low) / (high - low).clamp(min=1e-12), (1, 1, 1, 1), value=1.0)
    rows = [torch.cat(list(row), 2) for row in shown.split(10)]
    return torch.cat(rows, 1).permute(1, 2, 0)


def draw(pictures: dict[str, Tensor]) -> Figure:
    """Every set of images, one below the other, or side by side where there are many classes."""
    tiles = {name: tile(images.cpu()) for name, images in pictures.items()}
    height, width, _ = next(iter(tiles.values())).shape
    flat = height < width / 2
    rows, columns = (len(tiles), 1) if flat else ((len(tiles) + 3) // 4, 4)
    figure = Figure(figsize=(10, 1.3 * rows) if flat else (16, 4.3 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for axis in axes:
        axis.set_axis_off()
    for axis, (name, image) in zip(axes, tiles.items(), strict=False):
        axis.imshow(image.squeeze(-1).numpy(), cmap="gray", interpolation="nearest")
        axis.set_title(name, fontsize=9)
    return figure


EXPERIMENT = Experiment(
    name="distillation",
    source="Fig. 6, 11",
    title="one image per class as hyperparameters",
    run=run,
    sizes={"small": Settings(hyper_steps=600), "paper": Settings(hyper_steps=10_000)},
    datasets=image_sets.NAMES,
)
