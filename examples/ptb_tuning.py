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

Hypergradients use the identity for the inverse Hessian (T1-T2). Searches (ptb_searches.py) have the same budget of
gradients as a tuned run, one for a training step and three for a hyper step.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

import hvp_engine as hvp
from examples import ptb_searches, text_sets
from examples.datasets import Text
from examples.experiment import Experiment, Run
from examples.regularized_lstm import RATES, RegularizedLSTM, Settings
from examples.training import NoTuning, last_quarter, nonmonotone

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
HYPER_STEP_COST = 3
"""How many gradients a hyper step counts as: of the validation loss, of the training loss, and the mixed product."""


@dataclass(frozen=True)
class Row:
    """A trained network: `steps` of a single training, `gradients` in total."""

    method: str
    seed: int
    hyperparameters: int
    steps: int
    gradients: int
    seconds: float
    validation: float
    test: float


def run(run: Run, settings: Settings) -> None:
    options = run.options
    text = text_sets.load(options.data, settings.words)
    rows: list[Row] = []
    curves: dict[tuple[str, int], hvp.History] = {}
    budget = settings.steps + settings.steps // settings.inner_steps * HYPER_STEP_COST
    for seed in range(options.seed, options.seed + settings.seeds):
        for method in ("no tuning", "7", "many"):
            torch.manual_seed(seed)
            problem = settings.problem(text, options.device)
            row, curves[method, seed] = _tune(run, settings, problem, method, seed, settings.steps)
            rows.append(row)
    torch.manual_seed(options.seed)
    problem = settings.problem(text, options.device)
    rows.append(_tune(run, settings, problem, "no tuning", options.seed, budget)[0])
    for name in settings.searches:
        rows.append(Row(**run.remember(name, lambda name=name: _search(run, settings, text, name, budget))))
    run.table("table", [vars(row) for row in rows])
    run.note(
        f"PTB with {len(text.words):,} words; {settings.layers} layers of {settings.units}; batches of {settings.rows} "
        f"x {settings.time} words; {settings.steps:,} training steps, a hyper step after each {settings.inner_steps}. "
        "Perplexities are validation / test, of the whole texts; times are without evaluation."
    )
    _compare(run, settings, rows)
    run.picture("tuning", draw(curves, rows))


def _tune(
    run: Run, settings: Settings, problem: RegularizedLSTM, method: str, seed: int, steps: int
) -> tuple[Row, hvp.History]:
    """Algorithm 1, or plain training in one round for each evaluation."""
    tuned = method != "no tuning"
    hyper = problem.many if method == "many" else problem.seven
    evaluate_every = settings.steps // settings.evaluations
    inner_steps = settings.inner_steps if tuned else evaluate_every
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
        return {"validation_perplexity": problem.perplexity(problem.module.state_dict(), part)} | rates | strengths

    history = run.tune(
        _name(method, steps, seed),
        tuner,
        problem.train,
        problem.validation,
        steps // inner_steps,
        evaluate=evaluate,
        evaluate_every=evaluate_every // inner_steps,
        callbacks=[nonmonotone("validation_perplexity", settings.nonmonotone)] if settings.nonmonotone else (),
    )
    weights = problem.module.state_dict()
    row = Row(
        method,
        seed,
        sum(tensor.numel() for tensor in hyper.values()) if tuned else 0,
        steps,
        steps + len(history) * HYPER_STEP_COST if tuned else steps,
        sum(record.training_seconds + (record.hypergradient_seconds if tuned else 0) for record in history),
        problem.perplexity(weights, problem.text.validation),
        problem.perplexity(weights, problem.text.test),
    )
    return row, history


def _search(run: Run, settings: Settings, text: Text, name: str, budget: int) -> dict[str, Any]:
    """The row of one search, from the same weights and with `budget` gradients."""
    seed = run.options.seed
    torch.manual_seed(seed)
    problem = settings.problem(text, run.options.device)
    print(f"{name}: {budget:,} gradients", flush=True)
    start = time.perf_counter()
    hyperparameters, found = ptb_searches.search(problem, settings, name, budget, seed)
    seconds = time.perf_counter() - start
    steps = found.training_gradients if name == "self-tuning network" else budget // settings.trials
    perplexities = (problem.perplexity(found.weights, part) for part in (text.validation, text.test))
    return vars(Row(name, seed, hyperparameters, steps, found.gradients, seconds, *perplexities))


def _compare(run: Run, settings: Settings, rows: list[Row]) -> None:
    """Fill the summary's table: equal steps, over the seeds, then equal budgets."""
    plain = [row for row in rows if row.method == "no tuning" and row.steps == settings.steps]
    for method in ("no tuning", "7", "many"):
        mine = [row for row in rows if row.method == method and row.steps == settings.steps]
        perplexities = "; ".join(f"{row.validation:.1f} / {row.test:.1f}" for row in mine)
        count = f"{mine[0].hyperparameters:,} hyperparameters" if mine[0].hyperparameters else method
        run.compare(f"{count}, seeds {mine[0].seed} to {mine[-1].seed}", perplexities, PAPER[method])
        if method != "no tuning":
            run.compare(f"{count}: time / plain training", f"{_ratio(run, mine):.2f}")
    extra = _ratio(run, [row for row in rows if row.method == "7"]) - 1
    run.note(
        f"A hyper step counts as {HYPER_STEP_COST} gradients; it takes as long as {extra * settings.inner_steps:.1f} "
        "training steps, among which fused kernels serve that have no second derivative. Equal budgets are equal "
        "gradients, not equal times."
    )
    for row in rows:
        if row in plain or row.method in ("7", "many"):
            continue
        what = (
            f"{row.method}, {row.gradients:,} gradients, the best training of {row.steps:,} steps, {row.seconds:.0f} s"
        )
        run.compare(what, f"{row.validation:.1f} / {row.test:.1f}", PAPER[row.method])


def _ratio(run: Run, rows: list[Row]) -> float:
    """Total time by the time of its training steps, which ran while the machine was equally busy."""
    costs = [run.costs[_name(row.method, row.steps, row.seed)] for row in rows]
    training = sum(cost["seconds"] / cost["ratio_to_plain_training"] for cost in costs)
    return sum(cost["seconds"] for cost in costs) / training


def _name(method: str, steps: int, seed: int) -> str:
    """The name of a training."""
    return f"{method}, {steps} steps, seed {seed}"


def draw(curves: Mapping[tuple[str, int], hvp.History], rows: list[Row]) -> Figure:
    """Draw validation perplexity and mean rates over the training steps, and the perplexities of every method."""
    figure = Figure(figsize=(12.5, 4), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    colours = {"no tuning": "C7", "7": "C0", "many": "C1"}
    first = min(seed for _, seed in curves)
    for (method, seed), history in curves.items():
        seen = [record for record in history if record.metrics]
        steps = [record.weight_steps for record in seen]
        label = method if seed == first else None
        perplexity = [record.metrics["validation_perplexity"] for record in seen]
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
    right.set_yticks(range(len(shown)), [f"{row.method}\n{row.gradients:,} gradients" for row in shown], fontsize=7)
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
            words=2000,
            units=128,
            rows=20,
            time=20,
            steps=240,
            inner_steps=2,
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
)
