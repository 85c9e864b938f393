"""Validation splits: the shares that are trained side by side do what each would alone, and what is said of shares."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from test_examples_paper import finished, quiet, rows  # noqa: F401
from torch.nn import functional as F

from examples import models, seeds
from examples.image_sets import ImageSet
from examples.validation_splits import EXPERIMENT, RETRAINED, TUNED, TUNINGS, Accuracies, Recipe, measure
from hvp_engine.demo.preparation import stratified_split

SETTINGS = replace(EXPERIMENT.sizes["small"], shares=(0.2, 0.7), log_decay=-3.0)


def pool(digits: int = 40) -> ImageSet:
    generator = torch.Generator().manual_seed(3)
    parts = [(torch.randn(count, 1, 5, 5, generator=generator), torch.arange(count) % 10) for count in (digits, 0, 200)]
    images = [(x + F.one_hot(labels, 25).view(-1, 1, 5, 5), labels) for x, labels in parts]
    return ImageSet(*images, classes=10, source="random")


def alone(images: ImageSet, name: str, share: float, steps: int) -> dict[str, float]:
    """Training steps with Nesterov's momentum and hyper steps of RMSprop, written out in float64 for one share."""
    inputs, labels = images.train
    inputs = inputs.flatten(1).double()
    validated = round(share * len(labels))
    train, val = stratified_split(labels, (len(labels) - validated, validated), 0)
    torch.manual_seed(0)
    start = [w.detach().double() for w in models.linear(images.shape).parameters()]

    def loss(weights, part, log_decays):
        entropy = F.cross_entropy(F.linear(inputs[part], *weights), labels[part])
        return entropy + sum((h.exp() * w.square()).sum() for w, h in zip(weights, log_decays, strict=True))

    def descend(weights, momenta, part, log_decays):
        leaves = [w.requires_grad_() for w in weights]
        grads = torch.autograd.grad(loss(leaves, part, log_decays), leaves)
        momenta = [0.9 * m + g for m, g in zip(momenta, grads, strict=True)]
        moved = [w.detach() - 0.1 * (g + 0.9 * m) for w, g, m in zip(weights, grads, momenta, strict=True)]  # Nesterov
        return moved, momenta

    one = torch.tensor(-3.0, dtype=torch.float64)
    log_decays = [torch.full_like(w, -3.0) if name == "one per weight" else one for w in start]
    weights, momenta, squares = start, [torch.zeros_like(w) for w in start], [0.0, 0.0]
    for _ in range(steps):
        weights, momenta = descend(weights, momenta, train, log_decays)
        if name == "untuned":
            continue
        leaves = [w.requires_grad_() for w in weights]
        slopes = torch.autograd.grad(loss(leaves, val, [torch.tensor(-torch.inf)] * 2), leaves)
        parts = [-2 * h.exp() * w * v for h, w, v in zip(log_decays, leaves, slopes, strict=True)]
        if name == "one decay":
            parts = [sum(part.sum() for part in parts)] * 2
        squares = [0.99 * s + 0.01 * g * g for s, g in zip(squares, parts, strict=True)]
        log_decays = [
            (h - 0.01 * g / (s.sqrt() + 1e-8)).detach().clamp(-14, 1)
            for h, g, s in zip(log_decays, parts, squares, strict=True)
        ]
        weights = [w.detach() for w in weights]
    tested = images.test[0].flatten(1).double(), images.test[1]

    def accuracy(weights):
        return 100 * float(F.linear(tested[0], *weights).argmax(1).eq(tested[1]).double().mean())

    found = {TUNED: accuracy(weights)}
    weights, momenta = start, [torch.zeros_like(w) for w in start]
    for _ in range(steps):
        weights, momenta = descend(weights, momenta, torch.arange(len(labels)), log_decays)
    mean = log_decays[0] if name != "one per weight" else torch.cat([h.flatten() for h in log_decays]).mean()
    return found | {"log_decay": float(mean), RETRAINED: accuracy(weights)}


@pytest.mark.parametrize("name", TUNINGS)
def test_shares_side_by_side_are_what_each_is_alone(name):
    images = pool()
    together = measure(SETTINGS, images, 0, name, steps=30)
    for share, point in zip(SETTINGS.shares, together, strict=True):
        expected = alone(images, name, share, steps=30)
        assert point["log_decay"] == pytest.approx(expected["log_decay"], abs=1e-3)
        for when in (TUNED, RETRAINED):  # of 200 test images, one may be a tie
            assert point[when] == pytest.approx(expected[when], abs=0.51)
    if name != "untuned":
        assert together[0]["log_decay"] != pytest.approx(-3.0, abs=1e-3)
        assert together[0]["log_decay"] != pytest.approx(together[1]["log_decay"], abs=1e-3)


def test_a_share_is_chosen_on_the_other_half_of_the_seeds():
    # Even seeds have their best accuracy at .2, odd ones at .7, so each half gets what the other chose.
    even, odd = {0.2: 90.0, 0.7: 80.0}, {0.2: 60.0, 0.7: 70.0}
    found = [
        {"tuning": "one decay", "share": share, TUNED: 1.0, RETRAINED: (even, odd)[seed % 2][share]}
        for seed in range(4)
        for share in SETTINGS.shares
    ]
    accuracies = Accuracies(SETTINGS, found)
    assert accuracies.best("one decay", RETRAINED) == 0.2  # 75 and 75: the smallest of equals
    assert accuracies.elsewhere("one decay", RETRAINED, RETRAINED) == [80.0, 60.0, 80.0, 60.0]
    assert accuracies.elsewhere("one decay", TUNED, RETRAINED) == [90.0, 60.0, 90.0, 60.0]


def test_decays_stay_within_their_bounds():
    settings = replace(SETTINGS, hyper_learning_rate=2.0, bounds=(-3.5, -2.5))
    for point in measure(settings, pool(), 0, "one decay", steps=10):
        assert point["log_decay"] in (-3.5, -2.5)


def test_it_runs_and_writes_its_results(tmp_path):
    settings = {"recipes": {"longer": Recipe((60,), 40, 4)}, "shares": (0.2, 0.9)}
    run, result = finished("validation_splits", tmp_path, {"recipe": "longer"}, **settings)
    assert run.folder.name == "validation_splits-small-longer-seed0"
    points = rows(run, "splits")
    assert len(points) == 4 * len(TUNINGS) * 2
    tuned = {
        (name, share): [float(p[TUNED]) for p in points if (p["tuning"], p["share"]) == (name, share)]
        for name in TUNINGS
        for share in ("0.2", "0.9")
    }
    for name in TUNINGS:
        assert sum(tuned[name, "0.2"]) > sum(tuned[name, "0.9"]) + 4 * 10  # six digits to train on teach less
    untuned = [p for p in points if p["tuning"] == "untuned"]
    assert len({(p["seed"], p[RETRAINED]) for p in untuned}) == 4  # the share plays no part
    assert sum("chosen on half of the seeds" in note for note in result["notes"]) == 2


def test_statistics_over_seeds():
    values, other = [1.0, 2.0, 6.0], [1.0, 1.0, 1.0]  # mean 3, standard deviation sqrt(7)
    assert seeds.spread(values) == "3.00 ± 1.53" and seeds.spread([2.5], 1) == "2.5"
    assert seeds.difference(values, other, 1) == "+2.0 ± 1.5"
    assert seeds.verdict(values) == "within noise"  # 3 < 4.30 * 1.53
    assert seeds.verdict([2.9, 3.0, 3.1]) == "beyond noise" and seeds.verdict([3.0]) == "one seed"
