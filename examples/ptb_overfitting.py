"""Fig. 8: one decay for each weight of a large LSTM is enough to fit ten validation sequences of the Penn Treebank.

    L_T(w, lambda) = cross-entropy on 10 training sequences + 1/2 sum_i exp(lambda_i) w_i^2,
    L_V = cross-entropy on 10 validation sequences.

A sequence is 10 consecutive words from anywhere in the text (it may cross the end of a sentence, the word `<eos>`). The
network starts reading in the zero state and predicts after each word the next one, so there are 100 words to predict in
each set. Algorithm 1 uses the identity for the inverse Hessian (T1-T2) and one training step before each hyper step.
The embedding is tied to the output and initialized uniformly in [-1, 1]: with [-0.1, 0.1] the validation loss stalls.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn import functional as F

import hvp_engine as hvp
from examples import models, text_sets
from examples.decay_per_weight import DecayPerWeight
from examples.experiment import Experiment, Run


@dataclass(frozen=True)
class Settings:
    """At most `hyper_steps`; a run ends earlier if the validation loss falls below `goal`."""

    hyper_steps: int
    goal: float
    words: int = 10_000
    units: int = 650
    layers: int = 2
    embedding_scale: float = 1.0
    sequences: int = 10
    test_sequences: int = 100
    time: int = 10
    inner_steps: int = 1
    weight_learning_rate: float = 1e-3
    hyper_learning_rate: float = 0.1
    log_decay: float = -4.0
    bounds: tuple[float, float] = (-14.0, 2.0)
    evaluate_every: int = 5


class Overfitting(DecayPerWeight):
    """Overfitting of an LSTM; a batch is int64 (sequences, time + 1)."""

    def val_loss(self, weights: dict[str, Tensor], decays: dict[str, Tensor], batch: Tensor) -> Tensor:
        """Cross-entropy of every word but the first, given those before it."""
        logits, _, _, _ = self.network(weights, batch[:, :-1])
        return F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())


def run(run: Run, settings: Settings) -> None:
    options = run.options
    text = text_sets.load(options.data, settings.words)
    generator = torch.Generator().manual_seed(options.seed)
    train, validation, test = (
        text_sets.sequences(part, count, settings.time, generator).to(options.device)
        for part, count in (
            (text.train, settings.sequences),
            (text.validation, settings.sequences),
            (text.test, settings.test_sequences),
        )
    )
    module = models.TiedLSTM(len(text.words), settings.units, settings.layers, settings.embedding_scale)
    problem = Overfitting(module.to(options.device), settings.log_decay)
    run.note(
        f"A sequence is {settings.time} words in a row, read from a state of zero; {settings.sequences} each are "
        f"trained on and validated on, {settings.test_sequences} tested on. The network has {len(text.words):,} words, "
        f"{settings.layers} layers of {settings.units}."
    )

    @torch.no_grad()
    def evaluate(tuner: hvp.Tuner | None = None) -> dict[str, float]:
        weights = dict(module.named_parameters())
        return {
            name: float(problem.val_loss(weights, problem.decays, batch))
            for name, batch in (("train", train), ("validation", validation), ("test", test))
        }

    history = run.tune(
        "overfitting",
        problem.tuner(settings, settings.inner_steps),
        [train],
        [validation],
        settings.hyper_steps,
        evaluate=evaluate,
        evaluate_every=settings.evaluate_every,
        stop=lambda record: record.val_loss < settings.goal,
        checkpoint_every=100,
    )
    final = evaluate()
    count = sum(decay.numel() for decay in problem.decays.values())
    run.compare("hyperparameters, one decay for each weight", f"{count:,}", "13,280,400")
    run.compare(
        f"cross-entropy of train, validation, test sequences after {len(history)} hyper steps",
        ", ".join(f"{final[part]:.3f}" for part in ("train", "validation", "test")),
        "validation near 0",
    )
    run.compare("validation loss before the first hyper step", f"{history[0].val_loss:.3f}")
    run.picture("overfitting", draw(history))


def draw(history: hvp.History) -> Figure:
    """Draw the cross-entropy of the three sets over the hyper steps."""
    records = [record for record in history if record.metrics]
    steps = [record.hyper_step + 1 for record in records]
    figure = Figure(figsize=(6.4, 4.4), layout="constrained")
    axis = figure.subplots()
    axis.plot([record.hyper_step + 1 for record in history], [r.val_loss for r in history], label="validation", lw=1.8)
    for part in ("train", "test"):
        axis.plot(steps, [record.metrics[part] for record in records], label=part, lw=1.8)
    axis.set(xlabel="hyper steps", ylabel="cross-entropy", yscale="log")
    axis.set_title("Ten validation sequences of PTB, one decay for each weight of an LSTM", fontsize=10)
    axis.grid(alpha=0.25)
    axis.legend(frameon=False)
    return figure


EXPERIMENT = Experiment(
    name="ptb_overfitting",
    source="Fig. 8",
    title="fitting ten validation sequences of PTB by one decay per weight of an LSTM",
    run=run,
    sizes={"small": Settings(hyper_steps=400, goal=0.05), "paper": Settings(hyper_steps=5000, goal=0.005)},
)
