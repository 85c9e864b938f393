"""Fig. 7 and Table 3: a network that augments the training images, tuned on the validation images.

The hyperparameters are the 6,659 weights of a U-Net, which starts as the identity; augmented_training.py has the
problem and the rows of the table, augmentations.py the U-Nets. All rows of one seed have the same split and initial
weights. In every row, both the plain prediction and the mean prediction over augmented images are scored; the public
code averages only in tuned rows. odd_augmentation.py is the same table in a setting in which the effect shows.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from statistics import fmean

import torch
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn import functional as F

import hvp_engine as hvp
from examples import image_sets
from examples.augmented_training import PAPER_ROWS, ROWS, Augmentation, Recipe, Settings
from examples.experiment import Experiment, Options, Run
from examples.image_sets import Batch, ImageSet
from examples.seeds import difference, spread, verdict

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

AGAIN = ", re-trained"
PARTS = ("validation", "test")
SHOWN = 6
"""Number of images in the picture."""


def run(run: Run, settings: Settings) -> None:
    options, recipe = run.options, settings.recipes[run.options.recipe]
    scores: dict[str, list[dict[str, float]]] = {}
    histories: dict[str, list[hvp.History]] = {row: [] for row in settings.rows}
    samples: dict[str, Tensor] = {}
    for seed in range(options.seed, options.seed + settings.seeds):
        images, judged = _images(options, settings, seed)
        shown = images.test[0][:SHOWN]
        samples.setdefault("image", shown.cpu())
        for row in settings.rows:
            torch.manual_seed(seed)
            problem = Augmentation(settings, recipe, images, options.device, row)
            if problem.row.augmentation == "U-Net" and not torch.equal(problem.samples(shown, 1)[0], shown):
                raise RuntimeError("the augmentation does not begin as the identity")
            name = f"{row}, seed {seed}"
            used = (images.train, images.validation) if problem.row.everything else (images.train,)
            loader = image_sets.Shuffled(tuple(map(torch.cat, zip(*used, strict=True))), settings.batch)
            tuner = problem.tuner()
            histories[row].append(_train(run, problem, tuner, loader, images, judged, name))
            for when, found in run.remember(name, partial(_scores, problem, tuner, loader, images, judged)).items():
                scores.setdefault(row + when, []).append(found)
            samples.setdefault(row, problem.samples(shown, 32).cpu())
    weights = sum(weight.numel() for weight in problem.module.parameters())
    held_back = f" and {settings.held_back:,} held back, on which validation is scored" if settings.held_back else ""
    run.note(
        f"{images.source}; {len(images.train[1]):,} to train, {len(images.validation[1]):,} to validate{held_back}; "
        f"a {settings.network} of {weights:,} weights; {settings.seeds} seeds, each with its own split; ± is the "
        "standard error of the mean."
    )
    run.table("scores", [{"row": row, "run": k} | score for row in scores for k, score in enumerate(scores[row])])
    _report(run, settings, scores, histories)
    run.picture("samples", draw_samples(samples))
    run.picture("curves", draw_curves(histories))


def _images(options: Options, settings: Settings, seed: int) -> tuple[ImageSet, Batch]:
    """The images, and those to judge by: the validation images, or the ones held back."""
    held_back = settings.held_back
    validated = None if settings.validation is None else settings.validation + held_back
    images = image_sets.load(options.dataset, options.data, (settings.train, validated), seed, options.device)
    parts = (images.train, images.validation, images.test)
    if settings.halved:
        parts = tuple((F.avg_pool2d(x, 2), labels) for x, labels in parts)
    train, (x, labels), test = parts
    judged = x[:held_back], labels[:held_back]
    tuned_on = x[held_back:], labels[held_back:]
    return ImageSet(train, tuned_on, test, images.classes, images.source), judged if held_back else tuned_on


def _train(
    run: Run,
    problem: Augmentation,
    tuner: hvp.Tuner,
    loader: image_sets.Shuffled,
    images: ImageSet,
    judged: Batch,
    name: str,
) -> hvp.History:
    settings = problem.settings
    seen = first(judged, settings.watched), first(images.test, settings.tested if settings.held_back else 0)
    return run.tune(
        name,
        tuner,
        loader,
        image_sets.Shuffled(images.validation, settings.validation_batch),
        settings.hyper_steps,
        evaluate=lambda tuner: problem.progress(*seen),
        evaluate_every=max(1, settings.hyper_steps // settings.evaluations),
        checkpoint_every=settings.checkpoint_every,
    )


def _scores(
    problem: Augmentation, tuner: hvp.Tuner, loader: image_sets.Shuffled, images: ImageSet, judged: Batch
) -> dict[str, dict[str, float]]:
    """As tuned, under the key "", and re-trained from scratch with the final augmentation."""
    settings = problem.settings
    parts = dict(zip(PARTS, (first(judged, settings.scored), first(images.test, settings.tested)), strict=True))

    def scores() -> dict[str, float]:
        return {f"{name}_{key}": x for name, part in parts.items() for key, x in problem.scores(part).items()}

    found = {"": scores()}
    if settings.retrained and problem.row.approximation:
        tuner.retrain(loader, settings.warmup_steps + settings.inner_steps * settings.hyper_steps, progress=False)
        found[AGAIN] = scores()
    return found


def _report(
    run: Run,
    settings: Settings,
    scores: Mapping[str, list[Mapping[str, float]]],
    histories: Mapping[str, list[hvp.History]],
) -> None:
    """The table, what tuning gained in pairs of runs, and how the augmentations ended."""
    names = {"clean": "plain", "averaged": f"mean over {settings.samples} augmented images"}
    paper = PAPER if run.options.dataset == "cifar10" else {}
    for way, name in names.items():
        for row, found in scores.items():
            accuracies = [spread([100 * score[f"{part}_{way}_accuracy"] for score in found], 1) for part in PARTS]
            losses = [spread([score[f"{part}_{way}_loss"] for score in found], 3) for part in PARTS]
            run.compare(
                f"{row}, {name}: validation / test accuracy in %; loss",
                f"{' / '.join(accuracies)}; {' / '.join(losses)}",
                paper.get(row, "") if way == "clean" else "",
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
    noises = [row for row in histories if ROWS[row].amount]
    if len(noises) > 1:
        chosen = max(noises, key=lambda row: fmean(score["validation_clean_accuracy"] for score in scores[row]))
        run.note(f"Of the amounts of fixed noise, validation chooses: {chosen}.")
        beside = (chosen, *(row for row in ("odd, not tuned", "random shifts") if row in scores))
        plain = {row: [100 * score["test_clean_accuracy"] for score in found] for row, found in scores.items()}
        for row in (row for row in scores if ROWS[row.removesuffix(AGAIN)].approximation):
            against = "; ".join(f"{other} {difference(plain[row], plain[other], 1)}" for other in beside)
            run.compare(f"{row}, plain: test accuracy in points above other rows", against)
    for row in (row for row in histories if row != "none"):
        ends = [metered(history)[-1].metrics for history in histories[row]]
        run.compare(
            f"{row}: mean change of an image, standard deviation over the noise",
            ", ".join(f"{fmean([end[name] for end in ends]):.3f}" for name in ("shift", "deviation")),
        )
        failed = sum(record.status in FAILED for history in histories[row] for record in history)
        if failed:
            steps = sum(map(len, histories[row]))
            run.note(f"{row}: {failed} of {steps} solves met negative curvature or diverged.")
    if settings.held_back:
        _report_stopped(run, histories)


def _report_stopped(run: Run, histories: Mapping[str, list[hvp.History]]) -> None:
    """The test accuracies where the accuracy on the images held back is best, and the fixed noise that these choose."""
    best = {
        row: [max(metered(history), key=lambda record: record.metrics["clean_accuracy"]) for history in runs]
        for row, runs in histories.items()
    }
    accuracies = {row: [100 * record.metrics["test_accuracy"] for record in found] for row, found in best.items()}
    for row, found in accuracies.items():
        against = difference(found, accuracies["none"], 1)
        steps = fmean(record.weight_steps for record in best[row])
        run.compare(
            f"{row}, stopped where the images held back are best: test accuracy in %; above none; steps",
            f"{spread(found, 1)}; {against}; {steps:.0f}",
        )


def metered(history: hvp.History) -> list[hvp.Record]:
    """The records that were evaluated."""
    return [record for record in history if record.metrics]


def first(part: Batch, count: int) -> Batch:
    """At most `count` of the part's images, which are in random order."""
    return part[0][:count], part[1][:count]


def draw_samples(samples: Mapping[str, Tensor]) -> Figure:
    """Draw images, and below them, for each tuned row, one augmentation of each and the standard deviation of many."""
    images = samples["image"]
    low, high = images.amin(), images.amax()
    strips = {"image": (images - low) / (high - low)}
    for row, drawn in samples.items():
        if row != "image" and ROWS[row].augmentation != "noise":
            deviation = drawn.std(0)
            strips[f"{row}:\na sample"] = ((drawn[0] - low) / (high - low)).clamp(0, 1)
            white = deviation.amax().clamp(min=1e-12)
            strips[f"{row}:\nstandard deviation,\nwhite = {float(white):.2g}"] = deviation / white
    figure = Figure(figsize=(1.8 + 0.9 * len(images), 0.95 * len(strips)), layout="constrained")
    for axis, (name, strip) in zip(
        figure.subplots(len(strips), 1, squeeze=False).flatten(), strips.items(), strict=True
    ):
        pixels = torch.cat(list(strip), 2).permute(1, 2, 0)
        axis.imshow(pixels.expand(-1, -1, 3).numpy(), interpolation="nearest")
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
    figure.legend(*axis.get_legend_handles_labels(), loc="outside lower center", ncols=5, frameon=False, fontsize=8)
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
            rows=tuple(row for row in PAPER_ROWS if row != "3 Neumann products"),
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
