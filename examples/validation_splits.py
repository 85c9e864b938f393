"""Fig. 9 and section 5.6: how large a validation split should be, for one decay and for one per weight.

A share of N digits is the validation set. A logistic regression is trained on the rest while its decays are tuned:

    L_T(w, lambda) = cross-entropy on the training part + 1/2 sum_i exp(lambda_i) w_i^2,   L_V = that on the other part.

Then its test accuracy is measured twice: as tuned, and retrained on all N digits with the same decays. The paper
observes that with one decay both are best at a small share, and equally good, and that with one decay per weight the
best share is larger and retraining matters.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn import functional as F

import hvp_engine as hvp
from examples import image_sets, models
from examples.experiment import Experiment, Run
from examples.image_sets import Batch, ImageSet
from hvp_engine.demo.preparation import stratified_split

TUNED, RETRAINED = "as tuned", "re-trained on all data"
UNTUNED = "untuned"


@dataclass(frozen=True)
class Tuning:
    """One decay or one for each weight, and how long it is tuned by gradient descent.

    RMSprop would move every decay equally far, even those that the validation set says little about.
    """

    one_per_weight: bool
    hyper_steps: int
    learning_rate: float


@dataclass(frozen=True)
class Settings:
    digits: tuple[int, ...]
    tunings: Mapping[str, Tuning]
    seeds: int = 3
    shares: tuple[float, ...] = (0.05, 0.1, 0.25, 0.5, 0.75, 0.9)
    inner_steps: int = 5
    warmup_steps: int = 200
    retraining_steps: int = 400
    products: int = 50
    weight_learning_rate: float = 1e-2
    log_decay: float = -4.0
    bounds: tuple[float, float] = (-14.0, 2.0)


class Regression:
    """A logistic regression and its log-decays: `hyper[name]` for each weight, or `hyper["all"]`."""

    def __init__(self, shape: Sequence[int], one_per_weight: bool, log_decay: float, device: torch.device):
        self.module = models.linear(tuple(shape)).to(device)
        self.network = hvp.functional(self.module)
        one = {"all": torch.tensor(log_decay, device=device)}
        self.decays = models.weight_decays(self.module, log_decay) if one_per_weight else one

    def val_loss(self, weights: dict[str, Tensor], decays: dict[str, Tensor], batch: Batch) -> Tensor:
        """Cross-entropy."""
        return F.cross_entropy(self.network(weights, batch[0]), batch[1])

    def train_loss(self, weights: dict[str, Tensor], decays: dict[str, Tensor], batch: Batch) -> Tensor:
        """Cross-entropy + 1/2 sum_i exp(decay_i) w_i^2."""
        penalties = [(decay_of(decays, name).exp() * weight.square()).sum() for name, weight in weights.items()]
        return self.val_loss(weights, decays, batch) + torch.stack(penalties).sum() / 2


def decay_of(decays: dict[str, Tensor], name: str) -> Tensor:
    """The log-decays of one of the weights."""
    return decays["all"] if "all" in decays else decays[name]


def tuner_of(problem: Regression, settings: Settings, hyper_learning_rate: float) -> hvp.Tuner:
    return hvp.Tuner(
        problem.module,
        problem.decays,
        problem.train_loss,
        problem.val_loss,
        weight_optimizer=lambda tensors: torch.optim.Adam(tensors, lr=settings.weight_learning_rate),
        hyper_optimizer=lambda tensors: torch.optim.SGD(tensors, lr=hyper_learning_rate),
        solver=hvp.Neumann(settings.products),
        inner_steps=settings.inner_steps,
        warmup_steps=settings.warmup_steps,
        bounds=settings.bounds,
    )


def untuned(settings: Settings, pool: ImageSet, seed: int) -> dict[str, Any]:
    """Trained on everything with the initial decay."""
    torch.manual_seed(seed)
    problem = Regression(pool.shape, False, settings.log_decay, pool.train[0].device)
    tuner_of(problem, settings, 1.0).train([pool.train], settings.retraining_steps, progress=False)
    return {RETRAINED: image_sets.accuracy(problem.module, pool.test)}


def tuned(settings: Settings, pool: ImageSet, seed: int, tuning: Tuning, share: float) -> dict[str, Any]:
    """One point of the figure."""
    images, labels = pool.train
    validated = round(share * len(labels))
    parts = stratified_split(labels.cpu(), (len(labels) - validated, validated), seed)
    train, validation = ((images[part], labels[part]) for part in parts)
    torch.manual_seed(seed)
    problem = Regression(pool.shape, tuning.one_per_weight, settings.log_decay, images.device)
    tuner = tuner_of(problem, settings, tuning.learning_rate)
    history = tuner.fit([train], [validation], tuning.hyper_steps, progress=False)
    row = {
        "validation_loss": history[-1].val_loss,
        "validation_accuracy": image_sets.accuracy(problem.module, validation),
        "training_seconds": sum(record.training_seconds for record in history),
        "hypergradient_seconds": sum(record.hypergradient_seconds for record in history),
        TUNED: image_sets.accuracy(problem.module, pool.test),
    }
    tuner.retrain([pool.train], settings.retraining_steps, progress=False)
    return row | {RETRAINED: image_sets.accuracy(problem.module, pool.test)}


def run(run: Run, settings: Settings) -> None:
    options = run.options

    @lru_cache(maxsize=1)
    def pool_of(digits: int, seed: int) -> ImageSet:
        """An image set whose training part is everything to train or validate on, with the test set."""
        return image_sets.load("mnist", options.data, (digits, 0), seed, options.device)

    def measure(digits: int, seed: int, name: str, share: float) -> dict[str, Any]:
        pool = pool_of(digits, seed)
        if name == UNTUNED:
            return untuned(settings, pool, seed)
        return tuned(settings, pool, seed, settings.tunings[name], share)

    seeds = range(options.seed, options.seed + settings.seeds)
    kinds = [(UNTUNED, 0.0), *itertools.product(settings.tunings, settings.shares)]
    cases = [(digits, seed, *kind) for digits in settings.digits for seed in seeds for kind in kinds]
    rows = []
    with run.progress("splits", len(cases), "training") as bar:
        for case in cases:
            found = run.remember("-".join(map(str, case)), partial(measure, *case))
            rows.append(dict(zip(("digits", "seed", "tuning", "share"), case, strict=True)) | found)
            bar.update()
            bar.set_postfix({when: f"{found[when]:.3f}" for when in (TUNED, RETRAINED) if when in found}, refresh=False)
    run.table("splits", rows)
    for name, tuning in settings.tunings.items():
        mine = [row for row in rows if row["tuning"] == name]
        seconds = [sum(row[key] for row in mine) for key in ("training_seconds", "hypergradient_seconds")]
        run.cost(name, tuning.hyper_steps * len(mine), *seconds)
    for digits in settings.digits:
        summarize(run, settings, digits, [row for row in rows if row["digits"] == digits])
    run.note(
        "± is the standard error of the mean over seeds. Best shares are by test accuracy, as read off the figure."
    )
    run.picture("validation_splits", draw(settings, rows))


def accuracies(rows: Sequence[Mapping[str, Any]], name: str, share: float, when: str) -> list[float]:
    """The accuracies of all seeds, in their order."""
    return [row[when] for row in rows if row["tuning"] == name and row["share"] == share]


def summarize(run: Run, settings: Settings, digits: int, rows: Sequence[Mapping[str, Any]]) -> None:
    """The best shares, and what retraining and another share change, seed by seed."""
    baseline = accuracies(rows, UNTUNED, 0.0, RETRAINED)
    run.compare(f"{digits:,} digits, untuned, trained on all: test accuracy", spread(baseline))
    for name, tuning in settings.tunings.items():
        best = {
            when: max(settings.shares, key=lambda share: statistics.fmean(accuracies(rows, name, share, when)))
            for when in (TUNED, RETRAINED)
        }
        at_best = {when: accuracies(rows, name, share, when) for when, share in best.items()}
        for when, share in best.items():
            large = tuning.one_per_weight and when == RETRAINED
            run.compare(
                f"{digits:,} digits, {name}, {when}: best share, test accuracy",
                f"{share:.0%}, {spread(at_best[when])}",
                "large" if large else "small",
            )
        against = {
            "the best as tuned": at_best[TUNED],
            "re-trained at the share that is best as tuned": accuracies(rows, name, best[TUNED], RETRAINED),
            "untuned": baseline,
        }
        text = "; ".join(f"minus {what}: {difference(at_best[RETRAINED], other)}" for what, other in against.items())
        run.note(f"{digits:,} digits, {name}, best re-trained, in points of test accuracy, seed by seed: {text}.")


def standard_error(values: Sequence[float]) -> float:
    return statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0


def spread(values: Sequence[float]) -> str:
    return f"{statistics.fmean(values):.2%} ± {standard_error(values):.2%}"


def difference(mine: Sequence[float], other: Sequence[float]) -> str:
    """The difference in percentage points, seed by seed."""
    points = [100 * (a - b) for a, b in zip(mine, other, strict=True)]
    return f"{statistics.fmean(points):.2f} ± {standard_error(points):.2f}"


def draw(settings: Settings, rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Draw test accuracy by share: a row for each number of digits, as tuned on the left and retrained on the right."""
    figure = Figure(figsize=(9.6, 3.6 * len(settings.digits)), layout="constrained")
    grid = figure.subplots(len(settings.digits), 2, sharex=True, squeeze=False)
    x = [100 * share for share in settings.shares]
    for digits, pair in zip(settings.digits, grid, strict=True):
        here = [row for row in rows if row["digits"] == digits]
        baseline = statistics.fmean(accuracies(here, UNTUNED, 0.0, RETRAINED))
        for axis, when in zip(pair, (TUNED, RETRAINED), strict=True):
            for name, tuning in settings.tunings.items():
                values = [accuracies(here, name, share, when) for share in settings.shares]
                means = [100 * statistics.fmean(value) for value in values]
                errors = [100 * standard_error(value) for value in values]
                style = "s:" if tuning.one_per_weight else "o-"
                axis.errorbar(x, means, errors, fmt=style, capsize=3, label=name)
            axis.axhline(100 * baseline, color="gray", lw=1, label="untuned, trained on all")
            axis.set(title=f"{digits:,} digits, {when}", xlabel="share in validation, %", ylabel="test accuracy, %")
            axis.grid(alpha=0.25)
    figure.legend(*axis.get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    figure.suptitle(f"Logistic regression on MNIST, mean and standard error of {settings.seeds} seeds")
    return figure


_TUNINGS = {
    "one decay": Tuning(False, 20, 10.0),
    "one per weight": Tuning(True, 20, 300.0),
    "one per weight, longer": Tuning(True, 100, 300.0),
}

EXPERIMENT = Experiment(
    name="validation_splits",
    source="Fig. 9",
    title="how large a validation split, for one decay and for one per weight",
    run=run,
    sizes={
        "small": Settings(digits=(200, 1000), tunings=_TUNINGS),
        "paper": Settings(digits=(1000, 10_000, 60_000), tunings=_TUNINGS, seeds=5),
    },
)
