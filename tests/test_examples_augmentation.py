"""Learned augmentation at a size of seconds: every row, its files, and going on after an interruption."""

from __future__ import annotations

import pytest
import torch
from test_examples_paper import Interrupted, cifar, finished, quiet, rows  # noqa: F401

from examples import augmented_training
from examples.augmentation import EXPERIMENT
from examples.augmented_training import ROWS, Augmentation, Recipe, Settings, moments, with_noise
from examples.image_sets import ImageSet

TINY = {
    "hyper_steps": 2,
    "inner_steps": 2,
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


def problem(**recipe) -> Augmentation:
    torch.manual_seed(0)
    settings = Settings({}, **TINY)
    part = (torch.randn(10, 3, 8, 8), torch.arange(10))
    chosen = Recipe(**{"weight_optimizer": "SGD", "weight_rate": 0.1, "hyper_rate": 0.01, "step_size": 0.1} | recipe)
    return Augmentation(settings, chosen, ImageSet(part, part, part, 10, "random"), torch.device("cpu"))


@pytest.mark.parametrize("size", ["small", "paper"])
@pytest.mark.parametrize("recipe", EXPERIMENT.recipes)
def test_every_row_runs(tmp_path, size, recipe):
    data = cifar(tmp_path, "cifar10", 40)
    options = {"size": size, "dataset": "cifar10", "recipe": recipe, "data": data}
    run, result = finished("augmentation", tmp_path / "out", options, **TINY)
    assert run.folder.name == f"augmentation-cifar10-{size}-{recipe}-seed0"
    assert result["pictures"] == ["samples.png", "curves.png"]
    scores = {row["row"]: row for row in rows(run, "scores")}
    assert tuple(scores) == ROWS == tuple(dict.fromkeys(name.rpartition(", ")[0] for name in result["costs"]))
    for part in ("validation", "test"):
        assert scores["none"][f"{part}_clean_accuracy"] == scores["none"][f"{part}_averaged_accuracy"]
    for row in ROWS:
        records = rows(run, f"{row}, seed 0")
        assert [record["weight_steps"] for record in records] == ["2", "4"]
        assert (float(records[-1]["shift"]) > 0) == (float(records[-1]["hypergradient_norm"]) > 0)
        assert (float(records[-1]["shift"]) > 0) or row in ("none", "3 CG products")


def test_rows_differ_in_the_hypergradient_alone():
    first = {}
    for row in ROWS:
        tuner = problem().tuner(row)
        loader = [(torch.randn(10, 3, 8, 8, generator=torch.Generator().manual_seed(1)), torch.arange(10))]
        first[row] = tuner.fit(loader, loader, 1, progress=False)[0]
    for record in first.values():
        assert record.train_loss == pytest.approx(first["none"].train_loss, rel=1e-5)
        assert record.gradient_norm == pytest.approx(first["none"].gradient_norm, rel=1e-4)
    norms = {row: record.hypergradient_norm for row, record in first.items()}
    assert norms["none"] == 0 < norms["identity"] < norms["3 Neumann products"]
    assert norms["3 Neumann terms"] == pytest.approx(norms["3 unrolled"], rel=0.5)


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
    settings = TINY | {"rows": ("none", "3 Neumann terms", "3 unrolled")}
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
