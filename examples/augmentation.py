"""Fig. 7 and Table 3: a network that augments the training images, tuned on the validation images.

The hyperparameters are the 6,659 weights of a U-Net, which starts as the identity; augmented_training.py has the
problem and the rows of the table. All rows of one seed have the same initial weights, batches and noise. In every row,
both the plain prediction and the mean prediction over augmented images are scored; the public code averages only in
tuned rows.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from statistics import mean, stdev

import torch
from matplotlib.figure import Figure
from torch import Tensor

import hvp_engine as hvp
from examples import image_sets
from examples.augmented_training import ROWS, Augmentation, Recipe, Settings
from examples.experiment import Experiment, Run
from examples.image_sets import Batch, ImageSet

PAPER = {
    "none": "92.5 / 92.6",
    "fixed noise": "",
    "identity": "94.6 / 94.1",
    "3 Neumann terms": "95.1 / 94.6",
    "3 Neumann products": "95.1 / 94.6",
    "3 unrolled": "95.0 / 94.7",
    "3 CG products": "unstable",
}
"""Validation and test accuracy in percent."""

FAILED = (hvp.Status.DIVERGED.name, hvp.Status.NEGATIVE_CURVATURE.name)
STUDENT = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78}
"""Student's t by the number of seeds; for more of them it is 2.6 or less."""

PARTS = ("validation", "test")
SHOWN = 6
"""Number of images in the picture."""


def run(run: Run, settings: Settings) -> None:
    options, recipe = run.options, settings.recipes[run.options.recipe]
    scores: dict[str, list[dict[str, float]]] = {row: [] for row in settings.rows}
    histories: dict[str, list[hvp.History]] = {row: [] for row in settings.rows}
    samples: dict[str, Tensor] = {}
    for seed in range(options.seed, options.seed + settings.seeds):
        sizes = (settings.train, settings.validation)
        images = image_sets.load(options.dataset, options.data, sizes, seed, options.device)
        shown = images.test[0][:SHOWN]
        samples.setdefault("image", shown.cpu())
        for row in settings.rows:
            torch.manual_seed(seed)
            problem = Augmentation(settings, recipe, images, options.device, row)
            if row != "fixed noise" and not torch.equal(problem.samples(shown, 1)[0], shown):
                raise RuntimeError("the augmentation does not begin as the identity")
            name = f"{row}, seed {seed}"
            histories[row].append(_train(run, problem, images, name))
            scores[row].append(run.remember(name, partial(_scores, problem, images)))
            samples.setdefault(row, problem.samples(shown, 32).cpu())
    weights = sum(weight.numel() for weight in problem.module.parameters())
    run.note(
        f"{images.source}; {len(images.train[1]):,} to train and {len(images.validation[1]):,} to validate; a "
        f"ResNet-18 of {weights:,} weights; {settings.seeds} seeds, each with its own split; mean ± standard deviation."
    )
    run.table("scores", [{"row": row, "run": k} | score for row in scores for k, score in enumerate(scores[row])])
    _report(run, settings, scores, histories)
    run.picture("samples", draw_samples(samples))
    run.picture("curves", draw_curves(histories))


def _train(run: Run, problem: Augmentation, images: ImageSet, name: str) -> hvp.History:
    settings = problem.settings
    return run.tune(
        name,
        problem.tuner(),
        image_sets.Shuffled(images.train, settings.batch),
        image_sets.Shuffled(images.validation, settings.validation_batch),
        settings.hyper_steps,
        evaluate=lambda tuner: problem.progress(first(images.validation, settings.watched)),
        evaluate_every=max(1, settings.hyper_steps // settings.evaluations),
        checkpoint_every=settings.checkpoint_every,
    )


def _scores(problem: Augmentation, images: ImageSet) -> dict[str, float]:
    settings = problem.settings
    parts = (first(images.validation, settings.scored), first(images.test, settings.tested))
    return {
        f"{name}_{key}": x for name, part in zip(PARTS, parts, strict=True) for key, x in problem.scores(part).items()
    }


def _report(
    run: Run,
    settings: Settings,
    scores: Mapping[str, list[Mapping[str, float]]],
    histories: Mapping[str, list[hvp.History]],
) -> None:
    """The table, what tuning gained in pairs of runs, and how the augmentations ended."""
    names = {"clean": "plain", "averaged": f"mean over {settings.samples} augmented images"}
    for way, name in names.items():
        for row, found in scores.items():
            accuracies = [spread([100 * score[f"{part}_{way}_accuracy"] for score in found], 1) for part in PARTS]
            losses = [spread([score[f"{part}_{way}_loss"] for score in found], 3) for part in PARTS]
            run.compare(
                f"{row}, {name}: validation / test accuracy in %; loss",
                f"{' / '.join(accuracies)}; {' / '.join(losses)}",
                PAPER[row] if way == "clean" else "",
            )
    for row in (row for row in scores if row != "none"):
        pairs = list(zip(scores[row], scores["none"], strict=True))
        for way, name in names.items():
            accuracy = [100 * (mine[f"test_{way}_accuracy"] - none["test_clean_accuracy"]) for mine, none in pairs]
            loss = [mine[f"test_{way}_loss"] - none["test_clean_loss"] for mine, none in pairs]
            run.compare(
                f"{row}, {name}: test accuracy above none, in points; test loss above none",
                f"{spread(accuracy, 1, '+')} ({verdict(accuracy)}); {spread(loss, 3, '+')} ({verdict(loss)})",
            )
        ends = [metered(history)[-1].metrics for history in histories[row]]
        run.compare(
            f"{row}: mean change of an image, standard deviation over the noise",
            ", ".join(f"{mean(end[name] for end in ends):.3f}" for name in ("shift", "deviation")),
        )
        failed = sum(record.status in FAILED for history in histories[row] for record in history)
        if failed:
            steps = sum(map(len, histories[row]))
            run.note(f"{row}: {failed} of {steps} solves met negative curvature or diverged.")


def metered(history: hvp.History) -> list[hvp.Record]:
    """The records that were evaluated."""
    return [record for record in history if record.metrics]


def first(part: Batch, count: int) -> Batch:
    """At most `count` of the part's images, which are in random order."""
    return part[0][:count], part[1][:count]


def spread(values: list[float], digits: int, sign: str = "") -> str:
    """Mean ± standard deviation over the seeds."""
    deviation = f" ± {stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{mean(values):{sign}.{digits}f}{deviation}"


def verdict(differences: list[float]) -> str:
    """Whether the mean is further from 0 than Student's t allows in 95% of cases for so few seeds."""
    if len(differences) < 2:
        return "one seed"
    error = stdev(differences) / math.sqrt(len(differences))
    return "within noise" if abs(mean(differences)) <= STUDENT.get(len(differences), 2.6) * error else "beyond noise"


def draw_samples(samples: Mapping[str, Tensor]) -> Figure:
    """Draw images, and below them, for each tuned row, one augmentation of each and the standard deviation of many."""
    images = samples["image"]
    low, high = images.amin(), images.amax()
    strips = {"image": (images - low) / (high - low)}
    for row, drawn in samples.items():
        if row not in ("image", "none", "fixed noise"):
            deviation = drawn.std(0)
            strips[f"{row}:\na sample"] = ((drawn[0] - low) / (high - low)).clamp(0, 1)
            white = deviation.amax().clamp(min=1e-12)
            strips[f"{row}:\nstandard deviation,\nwhite = {float(white):.2g}"] = deviation / white
    figure = Figure(figsize=(1.8 + 0.9 * len(images), 0.95 * len(strips)), layout="constrained")
    for axis, (name, strip) in zip(
        figure.subplots(len(strips), 1, squeeze=False).flatten(), strips.items(), strict=True
    ):
        axis.imshow(torch.cat(list(strip), 2).permute(1, 2, 0).numpy(), interpolation="nearest")
        axis.set(xticks=[], yticks=[], anchor="E")  # away from the labels
        axis.set_ylabel(name, rotation=0, ha="right", va="center", fontsize=7)
    return figure


def draw_curves(histories: Mapping[str, list[hvp.History]]) -> Figure:
    """Draw the mean over the seeds, and the range of their values."""
    panels = {
        "clean_loss": "validation loss",
        "clean_accuracy": "validation accuracy",
        "shift": "mean change of the image",
        "deviation": "standard deviation of the augmented image",
    }
    figure = Figure(figsize=(11, 7), layout="constrained")
    for axis, (metric, title) in zip(figure.subplots(2, 2).flatten(), panels.items(), strict=True):
        for row, runs in histories.items():
            measured = [{record.weight_steps: record.metrics[metric] for record in metered(run)} for run in runs]
            steps = sorted(set.intersection(*(set(run) for run in measured)))
            curves = torch.tensor([[run[step] for step in steps] for run in measured])
            (line,) = axis.plot(steps, curves.mean(0), label=row, lw=1.6)
            axis.fill_between(steps, curves.amin(0), curves.amax(0), alpha=0.12, color=line.get_color(), lw=0)
        axis.set(title=title, xlabel="training steps")
        axis.grid(alpha=0.25)
    axis.legend(frameon=False, fontsize=8)
    return figure


_EPOCH = 45_000 // 128

EXPERIMENT = Experiment(
    name="augmentation",
    source="Fig. 7, Tab. 3",
    title="a network that augments the training images",
    run=run,
    sizes={
        "small": Settings(
            recipes={
                "paper": Recipe("Adam", 3e-3, 2e-3, 3e-3),
                "code": Recipe("SGD", 0.1, 2e-3, 2e-2, cuts=(0.3, 0.6, 0.8), spread=0.5),
            },
            hyper_steps=24,
            inner_steps=10,
            rows=tuple(row for row in ROWS if row != "3 Neumann products"),
            train=2000,
            validation=2000,
            width=8,
            stem_stride=2,
            batch=50,
            validation_batch=100,
            samples=3,
            scored=500,
        ),
        "paper": Settings(
            recipes={
                "paper": Recipe("Adam", 1e-4, 1e-2, 1e-3),
                "code": Recipe("SGD", 0.1, 1e-2, 0.1, cuts=(0.3, 0.6, 0.8), spread=0.5),
            },
            hyper_steps=200 * _EPOCH // 9,
            inner_steps=9,
            warmup_steps=_EPOCH,  # where the Hessian's eigenvalues are too large for a step size of 0.1
            train=None,
            validation=5000,
            width=64,
            stem_stride=1,
            batch=128,
            validation_batch=128,
            evaluations=200,
        ),
    },
    datasets=("cifar10",),
    recipes=("paper", "code"),
)
