"""Learned augmentation at a size of seconds: every row, its files, and going on after an interruption."""

from __future__ import annotations

import pytest
import torch
from test_examples_paper import Interrupted, cifar, finished, quiet, rows  # noqa: F401

import hvp_engine as hvp
from examples import augmented_training
from examples.augmentation import EXPERIMENT, PAPER
from examples.augmented_training import ROWS, Augmentation, Recipe, Settings, moments, with_noise
from examples.image_sets import ImageSet

TINY = {
    "hyper_steps": 2,
    "inner_steps": 2,
    "warmup_steps": 0,
    "train": 20,
    "validation": 20,
    "width": 2,
    "stem_stride": 2,
    "batch": 10,
    "validation_batch": 10,
    "seeds": 1,
    "evaluations": 2,
    "checkpoint_every": 1,
}


def problem(row: str = "none", **recipe) -> Augmentation:
    torch.manual_seed(0)
    settings = Settings({}, **TINY)
    part = (torch.randn(10, 3, 8, 8), torch.arange(10))
    chosen = Recipe(**{"weight_optimizer": "SGD", "weight_rate": 0.1, "hyper_rate": 0.01, "step_size": 0.1} | recipe)
    return Augmentation(settings, chosen, ImageSet(part, part, part, 10, "random"), torch.device("cpu"), row)


@pytest.mark.parametrize(
    ("size", "recipe", "chosen"),
    [
        ("small", "paper", ("none", "fixed noise", "identity", "3 unrolled")),
        ("paper", "code", ("none", "3 Neumann products")),  # with a trace, which takes seconds
    ],
)
def test_it_runs_and_writes_its_results(tmp_path, size, recipe, chosen):
    data = cifar(tmp_path, "cifar10", 40)
    options = {"size": size, "dataset": "cifar10", "recipe": recipe, "data": data}
    run, result = finished("augmentation", tmp_path / "out", options, **TINY, rows=chosen)
    assert run.folder.name == f"augmentation-cifar10-{size}-{recipe}-seed0"
    assert result["pictures"] == ["samples.png", "curves.png"]
    scores = {row["row"]: row for row in rows(run, "scores")}
    assert tuple(scores) == chosen
    for part in ("validation", "test"):
        clean, averaged = (float(scores["none"][f"{part}_{way}_loss"]) for way in ("clean", "averaged"))
        assert clean == pytest.approx(averaged, rel=1e-3)
    for row in chosen:
        records = rows(run, f"{row}, seed 0")
        assert [record["weight_steps"] for record in records] == ["2", "4"]
        if row == "fixed noise":
            assert 0.4 < float(records[-1]["deviation"]) < 0.6
            continue
        assert (float(records[-1]["shift"]) > 1e-6) == (row != "none")
        assert (float(records[-1]["hypergradient_norm"]) > 0) == (row != "none")


def test_rows_differ_in_the_hypergradient_alone(monkeypatch):
    # unrolled steps draw new noise each; with the same one they are the Neumann series of as many terms
    monkeypatch.setattr(augmented_training, "with_noise", lambda images: torch.cat([images, images[:, :1]], 1))
    assert set(EXPERIMENT.sizes["paper"].rows) == set(PAPER) == set(ROWS)
    batch = (torch.randn(10, 3, 8, 8, generator=torch.Generator().manual_seed(1)), torch.arange(10))
    found = {}
    for row in ROWS:
        one = problem(row, step_size=1e-7)  # far below 1 / lambda_max
        estimator = one.tuner().estimator
        if isinstance(estimator, hvp.Hypergradient):
            estimator = hvp.Hypergradient(one.train_loss, one.val_loss, solver=estimator.solver, engine="eager")
        weights, augmentation = dict(one.module.named_parameters()), dict(one.unet.named_parameters())
        estimate = estimator(weights, augmentation, batch, batch)
        norm = float(torch.stack([grad.norm() for grad in estimate.grads.values()]).norm())
        found[row] = float(estimate.train_loss), float(estimate.gradient_norm), norm
    losses, gradients, norms = (dict(zip(found, values, strict=True)) for values in zip(*found.values(), strict=True))
    assert norms["none"] == norms["fixed noise"] == 0 < norms["identity"]
    assert losses.pop("fixed noise") != losses["none"]
    gradients.pop("fixed noise")
    for row in losses:
        assert losses[row] == pytest.approx(losses["none"], rel=1e-5)
        assert gradients[row] == pytest.approx(gradients["none"], rel=1e-4)
    terms = {"3 Neumann terms": 3, "3 unrolled": 3, "3 Neumann products": 4}
    ratios = {row: norms[row] / norms["identity"] for row in terms}
    assert ratios == pytest.approx(terms, rel=0.15)


def test_batch_norm_has_the_statistics_of_what_is_scored():
    one = problem()
    torch.nn.init.constant_(one.unet.residual.bias, 1.0)
    before = {name: buffer.clone() for name, buffer in one.module.named_buffers()}
    with torch.no_grad():
        for shift, images in enumerate((one.plain, one.samples(one.plain, 1)[0])):
            torch.testing.assert_close(images - one.plain, torch.full_like(images, shift * torch.tensor(1.0).tanh()))
            mean = one.module[0](images).mean((0, 2, 3))
            torch.testing.assert_close(one.settled(images, 5)[1].running_mean, mean)
    assert all(torch.equal(buffer, before[name]) for name, buffer in one.module.named_buffers())


def test_the_spread_of_augmentations_is_rewarded():
    plain, spread = problem(), problem(spread=0.5)
    for one in (plain, spread):
        torch.nn.init.constant_(one.unet.residual.bias, 0.3)
    batch = (torch.randn(10, 3, 8, 8), torch.arange(10))
    losses = [
        one.val_loss(dict(one.module.named_parameters()), dict(one.unet.named_parameters()), batch)
        for one in (plain, spread)
    ]
    shift = torch.tanh(torch.tensor(0.3))
    torch.testing.assert_close(losses[1] - losses[0], 0.5 * shift, rtol=1e-4, atol=1e-5)

    samples = torch.randn(1000, 2, 3, 4, 4) * 0.7 + 0.2
    shift, deviation = moments(samples, torch.zeros(2, 3, 4, 4))
    assert float(shift) == pytest.approx(0.2, abs=0.01)
    assert float(deviation) == pytest.approx(0.7, abs=0.01)
    assert with_noise(samples[0]).shape == (2, 4, 4, 4)


def test_an_interrupted_run_ends_with_the_same_scores(tmp_path, monkeypatch):
    data = cifar(tmp_path, "cifar10", 40)
    options = {"dataset": "cifar10", "recipe": "code", "data": data}
    settings = TINY | {"rows": ("none", "identity", "3 unrolled")}
    whole, _ = finished("augmentation", tmp_path / "whole", options, **settings)

    calls, measured = [], augmented_training.Augmentation.progress

    def failing(self, part):
        calls.append(part)
        if len(calls) == 4:  # within the second row
            raise Interrupted
        return measured(self, part)

    monkeypatch.setattr(augmented_training.Augmentation, "progress", failing)
    with pytest.raises(Interrupted):
        finished("augmentation", tmp_path / "parts", options, **settings)
    monkeypatch.undo()
    parts, _ = finished("augmentation", tmp_path / "parts", options | {"resume": True}, **settings)
    assert rows(parts, "scores") == rows(whole, "scores")
    for row in settings["rows"]:
        for mine, other in zip(rows(parts, f"{row}, seed 0"), rows(whole, f"{row}, seed 0"), strict=True):
            assert mine["val_loss"] == other["val_loss"]
