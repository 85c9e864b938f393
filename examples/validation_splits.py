"""Fig. 9 and section 5.6: how large a validation split should be, for one decay and for one per weight.

A share of N digits is the validation set. A logistic regression is trained on the rest while its decays are tuned:

    L_T(w, lambda) = cross-entropy on the training part + sum_i exp(lambda_i) w_i^2,   L_V = that on the other part.

Then its test accuracy is measured twice: as tuned, and re-trained on all N digits with the same decays. The paper
observes that with one decay both are best at a small share, and equally good, and that with one decay per weight the
best share is larger and re-training matters.

The settings are those of the public code, not in the paper: full batches, few training steps, far from a minimum, and
a hyper step of T1-T2 after each of them. `--recipe longer` trains and tunes for four times as long, which shows what
becomes of both observations once decays per weight have had the time to fit the validation part.
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
from examples.image_sets import ImageSet
from examples.seeds import difference, spread, standard_error
from hvp_engine.demo.preparation import stratified_split

TUNED, RETRAINED = "as tuned", "re-trained on all data"

Tensors = dict[str, Tensor]
Part = tuple[Tensor, Tensor, Tensor]
"""Images, labels, and how much each counts for each share, (N, S), of which every column adds up to 1."""

UNTUNED = "untuned"
TUNINGS = (UNTUNED, "one decay", "one per weight")
HALVES = slice(0, None, 2), slice(1, None, 2)
"""The seeds in two halves: a share is chosen on one and judged on the other."""


@dataclass(frozen=True)
class Recipe:
    """How much is measured.

    Arguments:
        digits: values of N.
        steps: of training, when tuned and when re-trained.
        seeds: each draws its N digits, its splits and its initial weights.
    """

    digits: tuple[int, ...]
    steps: int
    seeds: int


@dataclass(frozen=True)
class Settings:
    """Rates and bounds.

    Arguments:
        recipes: by the name of `--recipe`.
        shares: of the digits that are the validation set.
        bounds: of the log-decays. Training with these rates is unstable where exp(lambda) > 6.8, log-decay 1.9, even
            without the curvature of the cross-entropy; unbounded, decays get there and weights become infinite.
    """

    recipes: Mapping[str, Recipe]
    shares: tuple[float, ...] = (0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95)
    weight_learning_rate: float = 0.1
    momentum: float = 0.9
    hyper_learning_rate: float = 1e-2
    log_decay: float = -7.0
    bounds: tuple[float, float] = (-14.0, 1.0)


class Regressions:
    """A logistic regression for each share, trained side by side: tensors have a leading dimension for the shares.

    Their losses are added. Since the optimizers and T1-T2 treat every number by itself, each moves as it would alone.

    Attributes:
        weights: "weight" (S, 10, pixels) and "bias" (S, 10, 1), the same for every share.
        decays: the log-decays, "all" (S, 1, 1), or shaped as the weights.
    """

    def __init__(self, pool: ImageSet, shares: int, one_per_weight: bool, log_decay: float):
        weight, bias = (w.detach().to(pool.train[0].device) for w in models.linear(pool.shape).parameters())
        self.weights = {name: w.repeat(shares, 1, 1) for name, w in {"weight": weight, "bias": bias[:, None]}.items()}
        decayed = self.weights if one_per_weight else {"all": self.weights["bias"][:, :1]}
        self.decays = {name: torch.full_like(tensor, log_decay) for name, tensor in decayed.items()}

    @staticmethod
    def logits(weights: Tensors, images: Tensor) -> Tensor:
        """The logits of every share, (N, S, 10)."""
        together = F.linear(images.flatten(1), weights["weight"].flatten(0, 1), weights["bias"].flatten())
        return together.unflatten(1, weights["bias"].shape[:2])

    def val_loss(self, weights: Tensors, decays: Tensors, batch: Part) -> Tensor:
        """The sum over shares of the mean cross-entropy of their digits."""
        images, labels, importance = batch
        labels = labels.repeat_interleave(importance.shape[1])
        entropies = F.cross_entropy(self.logits(weights, images).flatten(0, 1), labels, reduction="none")
        return importance.flatten() @ entropies

    def train_loss(self, weights: Tensors, decays: Tensors, batch: Part) -> Tensor:
        """The same + sum_i exp(decay_i) w_i^2."""
        log_decays = {name: decays[name] if name in decays else decays["all"] for name in weights}
        penalties = [(log_decays[name].exp() * w.square()).sum() for name, w in weights.items()]
        return self.val_loss(weights, decays, batch) + torch.stack(penalties).sum()

    @torch.no_grad()
    def accuracies(self, part: Part) -> list[float]:
        """The accuracy of each share, in percent."""
        images, labels, importance = part
        right = self.logits(self.weights, images).argmax(2).eq(labels.unsqueeze(1))
        return (100 * right * importance).sum(0).tolist()


def measure(settings: Settings, pool: ImageSet, seed: int, name: str, steps: int) -> list[dict[str, float]]:
    """A curve of the figure for one seed: the points of all shares. All of `pool.train` is trained or validated on."""
    images, labels = pool.train
    training, validation = (torch.zeros(len(labels), len(settings.shares)).to(images) for _ in range(2))
    for column, share in enumerate(settings.shares):
        validated = round(share * len(labels))
        parts = stratified_split(labels.cpu(), (len(labels) - validated, validated), seed)
        for importance, part in zip((training, validation), parts, strict=True):
            importance[part, column] = 1 / len(part)
    everything = torch.full_like(training, 1 / len(labels))
    test = torch.full((len(pool.test[1]), len(settings.shares)), 1 / len(pool.test[1])).to(images)
    torch.manual_seed(seed)
    problem = Regressions(pool, len(settings.shares), name == "one per weight", settings.log_decay)
    tuner = hvp.Tuner(
        problem.weights,
        problem.decays,
        problem.train_loss,
        problem.val_loss,
        weight_optimizer=lambda tensors: torch.optim.SGD(
            tensors, lr=settings.weight_learning_rate, momentum=settings.momentum, nesterov=True
        ),
        hyper_optimizer=lambda tensors: torch.optim.RMSprop(tensors, lr=settings.hyper_learning_rate),
        solver=hvp.Identity(),
        inner_steps=1,
        bounds=settings.bounds,
    )
    if name == UNTUNED:
        tuner.train([(images, labels, training)], steps, progress=False)
    else:
        tuner.fit([(images, labels, training)], [(images, labels, validation)], steps, progress=False)
    columns = {
        TUNED: problem.accuracies((*pool.test, test)),
        "validation": problem.accuracies((images, labels, validation)),
        "log_decay": torch.cat([decay.flatten(1) for decay in problem.decays.values()], 1).mean(1).tolist(),
    }
    tuner.retrain([(images, labels, everything)], steps, progress=False)
    columns[RETRAINED] = problem.accuracies((*pool.test, test))
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def run(run: Run, settings: Settings) -> None:
    options, recipe = run.options, settings.recipes[run.options.recipe]

    @lru_cache(maxsize=1)
    def pool_of(digits: int, seed: int) -> ImageSet:
        """An image set whose training part is everything to train or validate on, with the test set."""
        return image_sets.load("mnist", options.data, (digits, 0), seed, options.device)

    def measured(digits: int, seed: int, name: str) -> list[dict[str, float]]:
        return measure(settings, pool_of(digits, seed), seed, name, recipe.steps)

    seeds = range(options.seed, options.seed + recipe.seeds)
    cases = list(itertools.product(recipe.digits, seeds, TUNINGS))
    rows: list[dict[str, Any]] = []
    with run.progress("splits", len(cases), "curve") as bar:
        for case in cases:
            points = run.remember("-".join(map(str, case)), partial(measured, *case))
            known = dict(zip(("digits", "seed", "tuning"), case, strict=True))
            rows += [known | {"share": share} | point for share, point in zip(settings.shares, points, strict=True)]
            bar.update()
    run.table("splits", rows)
    for digits in recipe.digits:
        summarize(run, Accuracies(settings, [row for row in rows if row["digits"] == digits]), f"{digits:,} digits")
    run.note(f"± is the standard error of the mean over {recipe.seeds} seeds; differences are seed by seed.")
    run.picture("validation_splits", draw(settings, recipe, rows))


class Accuracies:
    """Test accuracies in percent by tuning, share, and whether re-trained: one for each seed, in their order."""

    def __init__(self, settings: Settings, rows: Sequence[Mapping[str, Any]]):
        self.settings = settings
        self._found: dict[tuple[str, float, str], list[float]] = {}
        for row in rows:
            for when in (TUNED, RETRAINED):
                self._found.setdefault((row["tuning"], row["share"], when), []).append(row[when])

    def of(self, name: str, share: float, when: str) -> list[float]:
        return self._found[name, share, when]

    def best(self, name: str, when: str, seeds: slice = slice(None)) -> float:
        """The share with the best mean over some of the seeds; the smallest of equals."""
        return max(self.settings.shares, key=lambda share: statistics.fmean(self.of(name, share, when)[seeds]))

    def elsewhere(self, name: str, chosen: str, when: str) -> list[float]:
        """The accuracies at the share that is best by `chosen` on the other half of the seeds."""
        found = list(self.of(name, self.settings.shares[0], when))
        for half, other in (HALVES, HALVES[::-1]):
            found[half] = self.of(name, self.best(name, chosen, other), when)[half]
        return found


def summarize(run: Run, accuracies: Accuracies, digits: str) -> None:
    """The best shares, as read off the figure and as chosen on other seeds; what re-training and the share change."""
    shares = accuracies.settings.shares
    plain = accuracies.of(UNTUNED, shares[0], RETRAINED)
    retrained = {}
    for name in TUNINGS:
        best = {when: accuracies.best(name, when) for when in (TUNED, RETRAINED)}
        here = {when: accuracies.of(name, share, when) for when, share in best.items()}
        retrained[name] = here[RETRAINED]
        for when in (TUNED, RETRAINED):
            ends = ", ".join(spread(accuracies.of(name, share, when)) for share in (shares[0], shares[-1]))
            large = name == "one per weight" and when == RETRAINED
            run.compare(
                f"{digits}, {name}, {when}: best share, test accuracy there in %; at the smallest and largest share",
                f"{best[when]:.0%}, {spread(here[when])}; {ends}",
                "" if name == UNTUNED else "large" if large else "small",
            )
        if name == UNTUNED:
            continue
        against = {
            "the best as tuned": here[TUNED],
            "re-trained at the share that is best as tuned": accuracies.of(name, best[TUNED], RETRAINED),
            "untuned on all data": plain,
        } | ({"one decay, best re-trained": retrained["one decay"]} if name == "one per weight" else {})
        text = "; ".join(f"minus {what} {difference(here[RETRAINED], other)}" for what, other in against.items())
        run.note(f"{digits}, {name}, best re-trained, in points of test accuracy: {text}.")
        if len(plain) > 1:
            chosen = {when: ", ".join(f"{accuracies.best(name, when, half):.0%}" for half in HALVES) for when in best}
            there = {when: accuracies.elsewhere(name, when, RETRAINED) for when in best}
            run.note(
                f"{digits}, {name}, shares chosen on half of the seeds and measured on the other half: {TUNED} "
                f"{chosen[TUNED]}, {spread(accuracies.elsewhere(name, TUNED, TUNED))}; {RETRAINED} "
                f"{chosen[RETRAINED]}, {spread(there[RETRAINED])}; the latter minus the former share, both re-trained: "
                f"{difference(there[RETRAINED], there[TUNED])} points."
            )


def draw(settings: Settings, recipe: Recipe, rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Draw test accuracy by share: a row for each number of digits, as tuned on the left, re-trained on the right."""
    figure = Figure(figsize=(9.6, 3.6 * len(recipe.digits)), layout="constrained")
    grid = figure.subplots(len(recipe.digits), 2, sharex=True, squeeze=False)
    x = [100 * share for share in settings.shares]
    for digits, pair in zip(recipe.digits, grid, strict=True):
        accuracies = Accuracies(settings, [row for row in rows if row["digits"] == digits])
        for axis, when in zip(pair, (TUNED, RETRAINED), strict=True):
            for name, style in zip(TUNINGS, ("k:", "o-", "s-"), strict=True):
                values = [accuracies.of(name, share, when) for share in settings.shares]
                errors = [standard_error(value) for value in values]
                axis.errorbar(x, [statistics.fmean(v) for v in values], errors, fmt=style, capsize=3, label=name)
            axis.set(title=f"{digits:,} digits, {when}", xlabel="share in validation, %", ylabel="test accuracy, %")
            axis.grid(alpha=0.25)
    figure.legend(*axis.get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    figure.suptitle(f"Logistic regression on MNIST, mean and standard error of {recipe.seeds} seeds")
    return figure


EXPERIMENT = Experiment(
    name="validation_splits",
    source="Fig. 9",
    title="how large a validation split, for one decay and for one per weight",
    run=run,
    sizes={
        "small": Settings({"code": Recipe((200, 400), 250, 20), "longer": Recipe((200,), 1000, 6)}),
        "paper": Settings({"code": Recipe((100, 200, 1600), 250, 20), "longer": Recipe((100, 200, 1600), 1000, 20)}),
    },
    recipes=("code", "longer"),
)
