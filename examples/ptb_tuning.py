"""Tab. 4: the regularization of an LSTM on the Penn Treebank, by 7 hyperparameters and by one for each unit and weight.

    L_T(w, lambda) = cross-entropy under dropout + a mean(output^2) + b mean((output_t - output_{t-1})^2),
    L_V(w) = cross-entropy without dropout.

There are five dropout rates: for units of the input, between the layers, and of the output (one mask for all time
steps: variational dropout), for words of the embedding, and for recurrent weights (DropConnect). With a and b, the
strengths of activation and temporal activation regularization, they are the 7. The many are one rate for each unit, one
for each recurrent weight, shared by the layers, and one for the embedding; a and b then keep their initial values.
Masks are concrete, so that the training loss is a smooth function of the rates. Everything starts at 0.5; "no tuning"
leaves it there.

Training text is read in order. A batch includes the words before it, which set the network's initial state as a
constant. So a loss is a function of weights, hyperparameters and batch alone, as every search requires.

Hypergradients use the identity for the inverse Hessian (T1-T2). Tuned runs are compared with plain training of as many
steps, and of as much time; searches (ptb_searches.py) have that time too. Time is that of the processor, in which other
work on the machine does not count, without evaluations. `--recipe converged` trains until plain training gains nothing
any more, with one seed and without searches; its numbers are meant for the small size.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

import torch
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

import hvp_engine as hvp
from baselines.search import SearchResult
from examples import ptb_searches, text_sets
from examples.datasets import Text
from examples.experiment import Experiment, Run
from examples.regularized_lstm import RATES, RegularizedLSTM, Settings
from examples.seeds import difference, spread, verdict
from examples.training import NoTuning, ProcessorTime, last_quarter, nonmonotone

PAPER = {
    "no tuning": "75.72 / 71.91",
    "7": "69.22 / 66.40",
    "many": "68.18 / 66.14",
    "self-tuning network": "70.30 / 67.68",
    "Bayesian optimization": "72.13 / 69.29",
    "random search": "84.81 / 81.46",
    "grid search": "97.32 / 94.58",
}
"""Validation and test perplexity."""
PERPLEXITY = "validation_perplexity"
CONVERGED = {"steps": 16_000, "evaluations": 32, "seeds": 1, "searches": ()}
"""What `--recipe converged` changes in the settings of either size."""
CALIBRATION = 150, 450
"""Gradients of two short self-tuning networks that are timed, to know how many fit into a time. Both look at the
validation loss fifty times, as a long one does."""


@dataclass(frozen=True)
class Row:
    """A trained network, after `trainings` of `steps` each, in `seconds` of the processor."""

    method: str
    seed: int
    hyperparameters: int
    trainings: int
    steps: int
    seconds: float
    validation: float
    test: float


def run(run: Run, settings: Settings) -> None:
    options = run.options
    if options.recipe == "converged":
        settings = replace(settings, **CONVERGED)
    text = text_sets.load(options.data, settings.words)
    seeds = range(options.seed, options.seed + settings.seeds)
    rows: list[Row] = []
    curves: dict[tuple[str, int], hvp.History] = {}

    def tune(method: str, seed: int, steps: int) -> hvp.History:
        torch.manual_seed(seed)
        row, history = _tune(run, settings, settings.problem(text, options.device), method, seed, steps)
        rows.append(row)
        return history

    for seed in seeds:
        for method in ("no tuning", "7", "many"):
            curves[method, seed] = tune(method, seed, settings.steps)
    budget = fmean(row.seconds for row in rows if row.method == "7")
    step_seconds = fmean(row.seconds / row.steps for row in rows if row.method == "no tuning")
    every = settings.evaluate_every
    longer = max(settings.steps // every + 1, round(budget / step_seconds / every)) * every
    for seed in seeds:
        tune("no tuning", seed, longer)
    if settings.searches:
        tune("no tuning", options.seed, 2 * longer)
    for name in settings.searches:
        rows.append(Row(**run.remember(name, lambda name=name: _search(run, settings, text, name, longer, budget))))
    run.table("table", [vars(row) for row in rows])
    run.note(
        f"PTB with {len(text.words):,} words; {settings.layers} layers of {settings.units}; batches of {settings.rows} "
        f"x {settings.time} words; {settings.steps:,} training steps, a hyper step after each {settings.inner_steps}. "
        "Perplexities are validation / test, of the whole texts; times are of the processor, without evaluation; ± is "
        "the standard error of the mean."
    )
    _compare(run, settings, rows, longer)
    run.picture("tuning", draw(curves, rows))


def _tune(
    run: Run, settings: Settings, problem: RegularizedLSTM, method: str, seed: int, steps: int
) -> tuple[Row, hvp.History]:
    """Algorithm 1, or plain training in one round for each evaluation."""
    tuned = method != "no tuning"
    hyper = problem.many if method == "many" else problem.seven
    inner_steps = settings.inner_steps if tuned else settings.evaluate_every
    clock = ProcessorTime()
    plan = {} if settings.nonmonotone else {"weight_scheduler": last_quarter(steps)}
    way = {"solver": hvp.Identity()} if tuned else {"estimator": NoTuning(problem.train_loss, problem.val_loss)}
    tuner = hvp.Tuner(
        problem.module,
        hyper,
        problem.train_loss,
        problem.val_loss,
        weight_optimizer=lambda tensors: torch.optim.SGD(tensors, lr=settings.learning_rate),
        hyper_optimizer=lambda tensors: torch.optim.Adam(tensors, lr=settings.hyper_learning_rate),
        inner_steps=inner_steps,
        weight_clip=settings.clip,
        hyper_clip=settings.hyper_clip,
        bounds=problem.bounds(hyper, settings.rate_bounds, settings.strength_bounds),
        **plan,
        **way,
    )
    part = problem.text.validation[: settings.curve_words]

    def evaluate(tuner: hvp.Tuner) -> dict[str, float]:
        rates = {f"rate_{name}": float(hyper[name].sigmoid().mean()) for name in RATES}
        strengths = {name: float(tensor.exp()) for name, tensor in hyper.items() if name not in RATES}
        return {PERPLEXITY: problem.perplexity(problem.module.state_dict(), part)} | rates | strengths

    history = run.tune(
        f"{method}, {steps} steps, seed {seed}",
        tuner,
        problem.train,
        problem.validation,
        steps // inner_steps,
        evaluate=clock.untimed(evaluate),
        evaluate_every=settings.evaluate_every // inner_steps,
        callbacks=[clock, *([nonmonotone(PERPLEXITY, settings.nonmonotone)] if settings.nonmonotone else [])],
    )
    weights = problem.module.state_dict()
    row = Row(
        method,
        seed,
        sum(tensor.numel() for tensor in hyper.values()) if tuned else 0,
        1,
        steps,
        history[-1].metrics["processor_seconds"],
        problem.perplexity(weights, problem.text.validation),
        problem.perplexity(weights, problem.text.test),
    )
    return row, history


def _search(run: Run, settings: Settings, text: Text, name: str, steps: int, budget: float) -> dict[str, Any]:
    """The row of one search from the same weights: `steps` training steps in all, or as many gradients of a self-tuning
    network as take `budget` seconds."""
    seed, gradual = run.options.seed, name == "self-tuning network"

    def search(gradients: int) -> tuple[int, SearchResult, float]:
        torch.manual_seed(seed)
        before = time.process_time()
        hyperparameters, found = ptb_searches.search(problem, settings, name, gradients, seed)
        return hyperparameters, found, time.process_time() - before

    problem = settings.problem(text, run.options.device)
    gradients = steps
    if gradual:
        short, long = (search(count)[2] for count in CALIBRATION)
        each = (long - short) / (CALIBRATION[1] - CALIBRATION[0])
        gradients = max(CALIBRATION[0], CALIBRATION[0] + round((budget - short) / each))
    print(f"{name}: {gradients:,} gradients", flush=True)
    hyperparameters, found, seconds = search(gradients)
    trainings, steps = (1, found.training_gradients) if gradual else (settings.trials, steps // settings.trials)
    perplexities = (problem.perplexity(found.weights, part) for part in (text.validation, text.test))
    return vars(Row(name, seed, hyperparameters, trainings, steps, seconds, *perplexities))


def _compare(run: Run, settings: Settings, rows: list[Row], longer: int) -> None:
    """Fill the summary's table: equal steps and equal time over the seeds, then the searches."""

    def of(method: str, steps: int) -> list[Row]:
        return [row for row in rows if (row.method, row.steps) == (method, steps)][: settings.seeds]

    plain = {"equal steps": of("no tuning", settings.steps), "equal time": of("no tuning", longer)}
    for steps in sorted({row.steps for row in rows if row.method == "no tuning"}):
        _show(run, f"no tuning, {steps:,} steps", of("no tuning", steps), PAPER["no tuning"])
    for method in ("7", "many"):
        mine = of(method, settings.steps)
        name = f"{mine[0].hyperparameters:,} hyperparameters"
        _show(run, f"{name}, {settings.steps:,} steps", mine, PAPER[method])
        for when, others in plain.items():
            for part in ("validation", "test"):
                pair = [[getattr(row, part) for row in some] for some in (mine, others)]
                gains = [a - b for a, b in zip(*pair, strict=True)]
                what = f"{name}: {part} perplexity above no tuning, at {when}"
                run.compare(what, f"{difference(*pair)} ({verdict(gains)})")
        ratio = fmean(row.seconds for row in mine) / fmean(row.seconds for row in plain["equal steps"])
        run.compare(f"{name}: time / plain training of as many steps", f"{ratio:.2f}")
    for row in rows:
        if row.method in settings.searches:
            what = f"{row.method}, the best training of {row.trainings}, {row.steps:,} steps each"
            _show(run, what, [row], PAPER[row.method])


def _show(run: Run, what: str, rows: list[Row], paper: str) -> None:
    seconds = spread([row.seconds for row in rows], 0)
    parts = (spread([getattr(row, part) for row in rows], 1) for part in ("validation", "test"))
    each = "; ".join(f"{row.validation:.1f} / {row.test:.1f}" for row in rows)
    seeds = f" (seeds {rows[0].seed} to {rows[-1].seed}: {each})" if len(rows) > 1 else f" (seed {rows[0].seed})"
    run.compare(f"{what}: perplexity; seconds", f"{' / '.join(parts)}{seeds}; {seconds}", paper)


def draw(curves: Mapping[tuple[str, int], hvp.History], rows: list[Row]) -> Figure:
    """Draw validation perplexity and mean rates over the training steps, and the perplexities of every method."""
    figure = Figure(figsize=(12.5, 4), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    colours = {"no tuning": "C7", "7": "C0", "many": "C1"}
    first = min(seed for _, seed in curves)
    for (method, seed), history in curves.items():
        seen = [record for record in history if PERPLEXITY in record.metrics]
        steps = [record.weight_steps for record in seen]
        label = method if seed == first else None
        perplexity = [record.metrics[PERPLEXITY] for record in seen]
        left.plot(steps, perplexity, color=colours[method], label=label, lw=1.6)
        if seed == first and method != "no tuning":
            for number, name in enumerate(RATES):
                style = {"ls": "-", "label": name} if method == "7" else {"ls": "--"}
                rates = [record.metrics[f"rate_{name}"] for record in seen]
                middle.plot(steps, rates, color=f"C{number}", lw=1.5, **style)
    left.set(xlabel="training steps", ylabel="validation perplexity", yscale="log", title="equal steps, every seed")
    left.yaxis.set_major_locator(LogLocator(subs=(1, 1.2, 1.5, 2, 3, 5, 7)))
    left.yaxis.set_major_formatter(ScalarFormatter())
    left.yaxis.set_minor_formatter(NullFormatter())
    middle.set(xlabel="training steps", ylabel="rate", ylim=(0, 1), title="7 (solid), means of many (dashed)")
    shown = [row for row in rows if row.seed == first]
    for part, (offset, height) in {"validation": (-0.2, 0.4), "test": (0.2, 0.4)}.items():
        values = [getattr(row, part) for row in shown]
        right.barh([place + offset for place in range(len(shown))], values, height, label=part)
    right.set_yticks(
        range(len(shown)), [f"{row.method}, {row.steps:,} steps\n{row.seconds:.0f} s" for row in shown], fontsize=7
    )
    right.invert_yaxis()
    right.set(xlabel="perplexity", title=f"every method, seed {first}")
    right.set_xlim(right=1.4 * max(max(row.validation, row.test) for row in shown))
    for axis in (left, middle, right):
        axis.grid(alpha=0.25)
        axis.legend(frameon=False, fontsize=7)
    return figure


_PAPER_EPOCH = 331
"""Number of batches of 40 x 70 words in the training text."""

EXPERIMENT = Experiment(
    name="ptb_tuning",
    source="Tab. 4",
    title="regularization of an LSTM on PTB, by 7 hyperparameters and by one for each unit and weight",
    run=run,
    sizes={
        "small": Settings(
            words=1000,
            units=64,
            rows=20,
            time=20,
            steps=2400,
            inner_steps=4,
            evaluations=8,
            curve_words=10_000,
            seeds=3,
            learning_rate=20.0,
            hyper_learning_rate=4e-2,
            hyper_clip=2e-3,
            nonmonotone=None,
        ),
        "paper": Settings(
            words=10_000,
            units=650,
            rows=40,
            time=70,
            steps=100 * _PAPER_EPOCH,
            inner_steps=1,
            evaluations=100,
            curve_words=1_000_000,
            seeds=1,
            learning_rate=30.0,
            hyper_learning_rate=1e-3,
            hyper_clip=None,
            nonmonotone=5,
            stn_learning_rate=1e-3,
        ),
    },
    recipes=("short", "converged"),
)
