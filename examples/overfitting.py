"""Figs. 5 and 10: one decay for each weight is enough to fit 50 validation examples as well as the 50 training ones.

    L_T(w, lambda) = cross-entropy on 50 examples + 1/2 sum_i exp(lambda_i) w_i^2,   L_V = cross-entropy on 50 others.

Algorithm 1 with the identity for the inverse Hessian (T1-T2). A run ends when every training and validation example is
classified correctly; the error on the test set stays far higher. With BatchNorm there are two accuracies: in the
statistics of the batch, which the losses see, and in the running ones. A run ends when everything is right in both.
"""

from __future__ import annotations

import resource
import sys
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn import functional as F

import hvp_engine as hvp
from examples import image_sets, models
from examples.decay_per_weight import DecayPerWeight
from examples.experiment import Experiment, Run
from examples.image_sets import Batch, ImageSet
from hvp_engine.errors import HvpError

NETWORKS = {
    "Linear": models.linear,
    "1-layer": models.one_layer,
    "LeNet-5": models.lenet5,
    "wide LeNet": models.wide_lenet,
    "ResNet-44": models.resnet44,
    "AlexNet": models.alexnet,
}
ONLY_COLOUR = ("ResNet-44", "AlexNet")
ALEXNET = 1000
"""At most as many hyper steps has `--recipe alexnet`, which is AlexNet alone: two hours of one core."""

LARGE = 9_000_000
"""The number of weights from which `large_inner_steps` applies."""


@dataclass(frozen=True)
class Settings:
    """At most `hyper_steps`, for each network."""

    hyper_steps: Mapping[str, int]
    examples: int = 50
    inner_steps: int = 5
    large_inner_steps: int = 2
    weight_learning_rate: float = 1e-4
    hyper_learning_rate: float = 3e-2
    log_decay: float = -4.0
    bounds: tuple[float, float] = (-14.0, 2.0)
    evaluations: int = 20
    test_images: int = 500
    """Test images behind the curves; the summary is about all of them."""


class Overfitting(DecayPerWeight):
    """Overfitting on images; a batch is a pair of images and classes."""

    def val_loss(self, weights: dict[str, Tensor], decays: dict[str, Tensor], batch: Batch) -> Tensor:
        """Cross-entropy."""
        return F.cross_entropy(self.network(weights, batch[0]), batch[1])

    def inner_steps(self, settings: Settings) -> int:
        """Training steps before each hyper step; fewer for a large network."""
        large = sum(weight.numel() for weight in self.module.parameters()) > LARGE
        return settings.large_inner_steps if large else settings.inner_steps


def peak_gigabytes(device: torch.device) -> float:
    """The most memory that the process (on a GPU: its tensors) has taken so far."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def everything_right(record: hvp.Record) -> bool:
    """Whether every training and validation example is classified correctly, by either of the statistics."""
    fitted = [value for name, value in record.metrics.items() if name.startswith(("train", "validation"))]
    return bool(fitted) and min(fitted) == 1.0


def accuracies(module: torch.nn.Module, parts: Mapping[str, Batch], batch: int) -> dict[str, float]:
    """The accuracy on each part; with BatchNorm also in the statistics of batches of `batch`: "PART in batches"."""
    found = {name: image_sets.accuracy(module, part) for name, part in parts.items()}
    if any(True for _ in module.buffers()):
        found |= {
            f"{name} in batches": image_sets.accuracy_of_batches(module, part, batch) for name, part in parts.items()
        }
    return found


def run(run: Run, settings: Settings) -> None:
    options = run.options
    if options.recipe == "alexnet" and options.dataset == "mnist":
        raise HvpError("--recipe: expected none with --dataset mnist, whose images are too small; got 'alexnet'")
    images = image_sets.load(
        options.dataset, options.data, (settings.examples, settings.examples), options.seed, options.device
    )
    run.note(f"{images.source}; the test curves are of {settings.test_images} images, the summary's numbers of all.")
    curves = {}
    alone = options.recipe == "alexnet"
    for name, hyper_steps in ({"AlexNet": ALEXNET} if alone else settings.hyper_steps).items():
        if options.dataset == "mnist" and name in ONLY_COLOUR:
            continue
        torch.manual_seed(options.seed)
        module = NETWORKS[name](images.shape, images.classes).to(options.device)
        curves[name] = _overfit(run, settings, name, module, images, hyper_steps)
    run.picture("overfitting", draw(curves, options.dataset))


def _overfit(
    run: Run, settings: Settings, name: str, module: torch.nn.Module, images: ImageSet, hyper_steps: int
) -> hvp.History:
    problem = Overfitting(module, settings.log_decay)
    parts = {"train": images.train, "validation": images.validation, "test": images.test}
    few = parts | {"test": tuple(tensor[: settings.test_images] for tensor in images.test)}

    def evaluate(tuner: hvp.Tuner) -> dict[str, float]:
        found = accuracies(module, few, settings.examples)
        return found | {"peak_gigabytes": peak_gigabytes(run.options.device)}

    history = run.tune(
        name,
        problem.tuner(settings, problem.inner_steps(settings)),
        [images.train],
        [images.validation],
        hyper_steps,
        evaluate=evaluate,
        evaluate_every=max(1, min(5, hyper_steps // settings.evaluations)),
        stop=everything_right,
        checkpoint_every=500,
    )
    scores = accuracies(module, parts, settings.examples)
    count = sum(decay.numel() for decay in problem.decays.values())
    for ending, means in {"": "", " in batches": ", BatchNorm in the statistics of each batch"}.items():
        if f"test{ending}" in scores:
            run.compare(
                f"{name}, {count:,} decays: train, validation, test accuracy{means}",
                ", ".join(f"{scores[part + ending]:.1%}" for part in parts),
                "100%, 100%, far lower",
            )
    run.compare(f"{name}: hyper steps", f"{len(history)}")
    run.compare(f"{name}: validation loss, first and last", f"{history[0].val_loss:.4f}, {history[-1].val_loss:.4f}")
    measured = [record.metrics["peak_gigabytes"] for record in history if record.metrics]
    run.compare(
        f"{name}: peak memory of the process, first and last", f"{measured[0]:.2f}, {measured[-1]:.2f} GB", "constant"
    )
    return history


def draw(curves: Mapping[str, hvp.History], dataset: str) -> Figure:
    """Draw training, validation and test error over the hyper steps, one panel for each network."""
    columns = min(3 if len(curves) > 4 else 2, len(curves))
    rows = -(-len(curves) // columns)
    figure = Figure(figsize=(max(6.4, 4.6 * columns), 3.6 * rows), layout="constrained")  # wide enough for the title
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for axis in axes[len(curves) :]:
        axis.set_axis_off()
    for axis, (name, history) in zip(axes, curves.items(), strict=False):
        records = [record for record in history if record.metrics]
        steps = [record.hyper_step + 1 for record in records]
        for colour, part in enumerate(("train", "validation", "test")):
            axis.plot(steps, [1 - record.metrics[part] for record in records], f"C{colour}", label=part, lw=1.8)
            batches = f"{part} in batches"
            if batches in records[0].metrics:
                axis.plot(steps, [1 - record.metrics[batches] for record in records], f"C{colour}--", label=batches)
        axis.set(title=name, xlabel="hyper steps", ylabel="error", ylim=(-0.03, 1.0))
        axis.grid(alpha=0.25)
        axis.legend(frameon=False, fontsize=8)
    figure.suptitle(f"Fitting the validation examples of {dataset} by one decay for each weight")
    return figure


_SMALL = {"Linear": 3000, "1-layer": 300, "LeNet-5": 3000, "wide LeNet": 3000, "ResNet-44": 100, "AlexNet": 150}
_PAPER = {
    "Linear": 10_000,
    "1-layer": 10_000,
    "LeNet-5": 10_000,
    "wide LeNet": 10_000,
    "ResNet-44": 10_000,
    "AlexNet": 2000,
}

EXPERIMENT = Experiment(
    name="overfitting",
    source="Fig. 5, 10",
    title="fitting 50 validation examples by one decay per weight",
    run=run,
    sizes={"small": Settings(_SMALL), "paper": Settings(_PAPER, hyper_learning_rate=1e-2)},
    datasets=image_sets.NAMES[:2],
    recipes=("", "alexnet"),
)
