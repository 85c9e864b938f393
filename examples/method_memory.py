"""Table 2: the peak memory of every method, by the number of products or steps, and by the number of hyperparameters.

LeNet-5 on MNIST. Each weight has one of H decays (weight number n has decay n modulo H):

    L_T(w, lambda) = cross-entropy + 1/2 sum_n exp(lambda_(n mod H)) w_n^2,   L_V = cross-entropy of other images.

With P weights and i products or steps, implicit differentiation takes O(P + H), unrolling O(P i + H), a linear
hypernetwork O(P H), a self-tuning network with K units O((P + H) K). A peak counts all tensors beyond the weights, the
batches and the hyperparameters, so it includes the graph of one gradient, which every method needs.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn import functional as F

import hvp_engine as hvp
from baselines.methods import Setting, find
from examples import image_sets, models
from examples.experiment import Experiment, Run
from examples.image_sets import Batch
from hvp_engine.diagnostics import peak_memory

Tensors = dict[str, Tensor]
Row = dict[str, Any]


@dataclass(frozen=True)
class Settings:
    lengths: tuple[int, ...]
    hyperparameters: tuple[int, ...]
    length: int = 5
    """Products or steps where the hyperparameters vary."""
    few: int = 10
    """Hyperparameters where the length varies."""
    most_slopes: int = 30_000_000
    """Numbers above which no linear hypernetwork is made."""
    batch: int = 50
    rate: float = 0.01
    log_decay: float = -6.0
    methods: tuple[str, ...] = (
        "T1-T2",
        "Neumann",
        "CG",
        "unrolled",
        "unrolled, truncated",
        "unrolled, checkpointing",
        "linear hypernetwork",
        "self-tuning network",
    )


class Grouped:
    """A network whose weights have H decays, assigned in turn."""

    def __init__(self, module: torch.nn.Module, count: int, log_decay: float):
        self.module = module
        self.network = hvp.functional(module)
        weights = dict(module.named_parameters())
        device = next(iter(weights.values())).device
        self.log_decays = torch.full((count,), log_decay, device=device)
        groups = (torch.arange(sum(weight.numel() for weight in weights.values()), device=device) % count).split(
            [weight.numel() for weight in weights.values()]
        )
        self.groups = {name: part.view_as(weight) for (name, weight), part in zip(weights.items(), groups, strict=True)}

    def model(self, weights: Tensors, log_decays: Tensor, batch: Batch) -> Tensor:
        return self.network(weights, batch[0])

    def loss_of_outputs(self, outputs: Tensor, weights: Tensors, log_decays: Tensor, batch: Batch) -> Tensor:
        """Cross-entropy + 1/2 sum_n exp(decay of n) w_n^2."""
        penalties = [(log_decays[self.groups[n]].exp() * weight.square()).sum() for n, weight in weights.items()]
        return F.cross_entropy(outputs, batch[1]) + torch.stack(penalties).sum() / 2

    def train_loss(self, weights: Tensors, log_decays: Tensor, batch: Batch) -> Tensor:
        return self.loss_of_outputs(self.model(weights, log_decays, batch), weights, log_decays, batch)

    def val_loss(self, weights: Tensors, log_decays: Tensor, batch: Batch) -> Tensor:
        """Cross-entropy."""
        return F.cross_entropy(self.network(weights, batch[0]), batch[1])

    def setting(self, rate: float) -> Setting:
        return Setting(self.train_loss, self.val_loss, rate, self.model, self.loss_of_outputs, scale=0.01)


def peak(
    module: torch.nn.Module, train: Batch, val: Batch, settings: Settings, name: str, length: int, count: int
) -> int:
    """Bytes that one hypergradient takes, without what a method prepares once."""
    problem = Grouped(module, count, settings.log_decay)
    make = find(name).make
    assert make is not None
    estimator = make(problem.setting(settings.rate), length)
    arguments = (dict(module.named_parameters()), problem.log_decays, train, val)
    estimator(*arguments)
    with peak_memory(train[0].device) as meter:
        estimator(*arguments)
    return meter.peak_bytes


def run(run: Run, settings: Settings) -> None:
    options = run.options
    images = image_sets.load("mnist", options.data, (settings.batch, settings.batch), options.seed, options.device)
    module = models.lenet5(images.shape, images.classes).to(options.device)
    weights = sum(weight.numel() for weight in module.parameters())
    by_length = list(itertools.product(settings.methods, settings.lengths, [settings.few]))
    by_count = [
        (name, settings.length, count)
        for name, count in itertools.product(settings.methods, settings.hyperparameters)
        if find(name).memory != "O(P H)" or weights * count <= settings.most_slopes
    ]
    peaks: dict[tuple[str, int, int], int] = {}
    with warnings.catch_warnings(), run.progress("peaks", len(by_length) + len(by_count), "peak") as bar:
        warnings.filterwarnings("ignore", message="the weights are far from a minimum")
        for case in (*by_length, *by_count):
            measured = partial(peak, module, images.train, images.validation, settings, *case)
            peaks[case] = run.remember("-".join(map(str, case)), measured)
            bar.update()
            bar.set_postfix(MB=f"{peaks[case] / 1e6:.1f}", refresh=False)
    sweeps = {
        name: [_row(*case, peaks[case]) for case in cases]
        for name, cases in (("by_length", by_length), ("by_hyperparameters", by_count))
    }
    for name, rows in sweeps.items():
        run.table(name, rows)
    for name in settings.methods:
        summarize(run, name, settings, *([row for row in rows if row["method"] == name] for rows in sweeps.values()))
    run.note(
        f"{images.source}; LeNet-5, {weights:,} weights ({4 * weights / 1e6:.2f} MB), batches of {settings.batch}."
    )
    run.picture("memory", draw(sweeps["by_length"], sweeps["by_hyperparameters"]))


def _row(method: str, length: int, hyperparameters: int, peak_bytes: int) -> Row:
    return {"method": method, "length": length, "hyperparameters": hyperparameters, "peak_bytes": peak_bytes}


def summarize(run: Run, name: str, settings: Settings, by_length: Sequence[Row], by_count: Sequence[Row]) -> None:
    """First and last peak of both sweeps, beside the method's formula."""
    texts = []
    for symbol, key, rows in (("i", "length", by_length), ("H", "hyperparameters", by_count)):
        first, last = rows[0], rows[-1]
        texts.append(
            f"{first['peak_bytes'] / 1e6:.2f} MB at {symbol} = {first[key]:,}, {last['peak_bytes'] / 1e6:.2f} at "
            f"{last[key]:,} ({last['peak_bytes'] / first['peak_bytes']:.2f}x)"
        )
    run.compare(
        f"{name}: peak by i (H = {settings.few}); by H (i = {settings.length})", "; ".join(texts), find(name).memory
    )


def draw(by_length: Sequence[Row], by_count: Sequence[Row]) -> Figure:
    """Draw peaks by products or steps, and by hyperparameters."""
    figure = Figure(figsize=(9.6, 5.4), layout="constrained")
    panels = ((by_length, "length", "products or steps, i"), (by_count, "hyperparameters", "hyperparameters, H"))
    for axis, (rows, key, label) in zip(figure.subplots(1, 2, sharey=True), panels, strict=True):
        for place, name in enumerate(dict.fromkeys(row["method"] for row in rows)):
            mine = [row for row in rows if row["method"] == name]
            x, y = [row[key] for row in mine], [row["peak_bytes"] / 1e6 for row in mine]
            style = ("o-", "s--", "^:")[place % 3]
            axis.loglog(x, y, style, ms=4, label=f"{name}: {find(name).memory}")
        axis.set(xlabel=label, ylabel="peak, MB" if key == "length" else None)
        axis.grid(alpha=0.25, which="both")
    figure.legend(*axis.get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=8, frameon=False)
    figure.suptitle("Peak memory of one hypergradient: LeNet-5 on MNIST")
    return figure


EXPERIMENT = Experiment(
    name="method_memory",
    source="Tab. 2",
    title="peak memory of every method, by products or steps and by hyperparameters",
    run=run,
    sizes={
        "small": Settings(lengths=(1, 2, 5, 10, 20, 50, 100), hyperparameters=(1, 10, 100, 400, 4000, 61_706)),
        "paper": Settings(
            lengths=(1, 2, 5, 10, 20, 50, 100, 200, 500, 1000),
            hyperparameters=(1, 10, 100, 400, 4000, 61_706),
            most_slopes=2_000_000_000,
        ),
    },
)
