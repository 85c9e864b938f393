"""Learned augmentation at a size of seconds: every row, its files, and going on after an interruption."""

from __future__ import annotations

import pytest
import torch
from test_examples_paper import Interrupted, cifar, finished, quiet, rows  # noqa: F401

import hvp_engine as hvp
from examples import augmented_training
from examples.augmentation import EXPERIMENT, PAPER
from examples.augmentations import OddUNet, Shifts, UNet, moments, with_noise
from examples.augmented_training import PAPER_ROWS, Augmentation, Recipe, Settings
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
    assert set(EXPERIMENT.sizes["paper"].rows) == set(PAPER) == set(PAPER_ROWS)
    batch = (torch.randn(10, 3, 8, 8, generator=torch.Generator().manual_seed(1)), torch.arange(10))
    found = {}
    for row in PAPER_ROWS:
        if row in ("none", "fixed noise"):
            continue
        one = problem(row, step_size=1e-7)  # far below 1 / lambda_max
        estimator = one.tuner().estimator
        if isinstance(estimator, hvp.Hypergradient):
            estimator = hvp.Hypergradient(one.train_loss, one.val_loss, solver=estimator.solver, engine="eager")
        weights, augmentation = dict(one.module.named_parameters()), dict(one.unet.named_parameters())
        estimate = estimator(weights, augmentation, batch, batch)
        norm = float(torch.stack([grad.norm() for grad in estimate.grads.values()]).norm())
        found[row] = float(estimate.train_loss), float(estimate.gradient_norm), norm
    losses, gradients, norms = (dict(zip(found, values, strict=True)) for values in zip(*found.values(), strict=True))
    assert norms["identity"] > 0
    for row in losses:
        assert losses[row] == pytest.approx(losses["identity"], rel=1e-5)
        assert gradients[row] == pytest.approx(gradients["identity"], rel=1e-4)
    terms = {"3 Neumann terms": 3, "3 unrolled": 3, "3 Neumann products": 4}
    ratios = {row: norms[row] / norms["identity"] for row in terms}
    assert ratios == pytest.approx(terms, rel=0.15)


def test_batch_norm_has_the_statistics_of_what_is_scored():
    one = problem("identity")
    torch.nn.init.constant_(one.unet.residual.bias, 1.0)
    before = {name: buffer.clone() for name, buffer in one.module.named_buffers()}
    with torch.no_grad():
        for shift, images in enumerate((one.plain, one.samples(one.plain, 1)[0])):
            torch.testing.assert_close(images - one.plain, torch.full_like(images, shift * torch.tensor(1.0).tanh()))
            mean = one.module[0](images).mean((0, 2, 3))
            torch.testing.assert_close(one.settled(images, 5)[1].running_mean, mean)
    assert all(torch.equal(buffer, before[name]) for name, buffer in one.module.named_buffers())


def test_the_spread_of_augmentations_is_rewarded():
    plain, spread = problem("identity"), problem("identity", spread=0.5)
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

    def failing(self, *parts):
        calls.append(parts)
        if len(calls) == 4:  # within the second row
            raise Interrupted
        return measured(self, *parts)

    monkeypatch.setattr(augmented_training.Augmentation, "progress", failing)
    with pytest.raises(Interrupted):
        finished("augmentation", tmp_path / "parts", options, **settings)
    monkeypatch.undo()
    parts, _ = finished("augmentation", tmp_path / "parts", options | {"resume": True}, **settings)
    assert rows(parts, "scores") == rows(whole, "scores")
    for row in settings["rows"]:
        for mine, other in zip(rows(parts, f"{row}, seed 0"), rows(whole, f"{row}, seed 0"), strict=True):
            assert mine["val_loss"] == other["val_loss"]


def test_the_unet_begins_at_the_identity_and_its_residual_is_bounded():
    unet = UNet()
    assert sum(weight.numel() for weight in unet.parameters()) == 6_659
    assert sum(weight.numel() for weight in UNet(1).parameters()) == 6_497
    x = torch.randn(2, 4, 32, 32)
    assert torch.equal(unet(x), x[:, :3])
    torch.nn.init.constant_(unet.residual.bias, 100.0)
    torch.testing.assert_close(unet(x), x[:, :3] + 1)


def test_the_odd_unet_begins_with_noise_that_is_felt_and_cannot_shift_an_image():
    torch.manual_seed(0)
    x = with_noise(torch.randn(40, 1, 14, 14))
    unet = OddUNet(x, 0.3)
    assert sum(weight.numel() for weight in unet.parameters()) == 6_497
    images, noise = x[:, :1], torch.randn(50, 40, 1, 14, 14)
    with torch.no_grad():
        samples = torch.stack([unet(torch.cat([images, e], 1)) for e in noise])
        assert float(samples.std(0).mean()) == pytest.approx(0.3, abs=0.02)
        for weight in unet.parameters():  # whatever they are
            weight.copy_(torch.randn_like(weight))
        up, down = (unet(torch.cat([images, sign * noise[0]], 1)) for sign in (1, -1))
        torch.testing.assert_close((up + down) / 2, images, rtol=0, atol=1e-5)
        assert 0.1 < float((up - images).abs().max()) < 1 + 1e-5
        assert torch.equal(unet(torch.cat([images, 0 * noise[0]], 1)), images)


def test_the_odd_unet_has_no_gradient_at_zero():
    unet = OddUNet(with_noise(torch.randn(4, 1, 14, 14)), 0.3)
    torch.nn.init.zeros_(unet.residual.weight)
    x = with_noise(torch.randn(4, 1, 14, 14))
    grads = torch.autograd.grad((unet(x) * torch.randn(4, 1, 14, 14)).sum(), list(unet.parameters()))
    reached = {name for (name, _), grad in zip(unet.named_parameters(), grads, strict=True) if grad.any()}
    assert reached == {"residual.weight"}  # and its mean over the noise is zero, as that of the residual


@pytest.mark.parametrize("colours", [1, 3])
def test_images_are_shifted_and_only_colours_mirrored(colours):
    torch.manual_seed(0)
    image = torch.arange(1.0, 26.0).view(1, 1, 5, 5).expand(400, colours, 5, 5)
    moved = Shifts(1)(with_noise(image))
    versions = set()
    for flipped in (False, True):
        padded = torch.nn.functional.pad(image[:1].flip(3) if flipped else image[:1], (1, 1, 1, 1), value=1.0)
        for down in range(3):
            for right in range(3):
                if colours == 3 or not flipped:
                    version = padded[0, :, down : down + 5, right : right + 5]
                    versions.add(tuple(version.flatten().tolist()))
    # mirroring comes after moving, which makes the same set of versions
    assert {tuple(version.flatten().tolist()) for version in moved} == versions
    assert len(versions) == (18 if colours == 3 else 9)


def test_odd_augmentation_runs_on_digits_and_compares_like_with_like(tmp_path):
    chosen = ("none", "fixed noise of 0.3", "fixed noise", "random shifts", "validation labels too", "odd, T1-T2")
    small = {"hyper_steps": 4, "inner_steps": 2, "train": 20, "validation": 30, "held_back": 40, "seeds": 2}
    small |= {"evaluations": 2, "tested": 60, "width": 4, "rows": chosen}
    run, result = finished("odd_augmentation", tmp_path, {"dataset": "mnist"}, **small)
    scores = rows(run, "scores")
    assert [row["row"] for row in scores[::2]] == [*chosen, "odd, T1-T2, re-trained"]
    lines = {line["what"]: line["ours"] for line in result["comparisons"]}
    assert sum("stopped where" in what for what in lines) == len(chosen)
    assert any(note.startswith("Of the amounts of fixed noise, validation chooses: fixed") for note in result["notes"])
    assert any("20 to train, 30 to validate and 40 held back" in note for note in result["notes"])
    for row in chosen:
        for seed in (0, 1):
            records = rows(run, f"{row}, seed {seed}")
            assert (float(records[-1]["hypergradient_norm"]) > 0) == (row == "odd, T1-T2")
            assert 0 <= float(records[-1]["test_accuracy"]) <= 1
    deviations = {row: float(rows(run, f"{row}, seed 0")[-1]["deviation"]) for row in chosen}
    assert deviations["none"] == deviations["validation labels too"] < 1e-5
    assert 0.2 < deviations["fixed noise of 0.3"] < 0.4 < deviations["fixed noise"] < 0.6
    assert 0.15 < deviations["odd, T1-T2"] < 0.5


def test_validation_labels_and_those_held_back_are_kept_apart(tmp_path, monkeypatch):
    trained, judged = {}, {}
    tuner, scores = Augmentation.tuner, Augmentation.scores

    def recorded(self):
        loss, names = self.train_loss, trained.setdefault((self.row.everything, self.row.approximation), set())

        def train_loss(weights, hyper, batch):
            names.update(float(image.sum()) for image in batch[0])
            return loss(weights, hyper, batch)

        self.train_loss = train_loss
        return tuner(self)

    def scored(self, part, *arguments, **options):
        judged.setdefault(len(part[1]), set()).update(float(image.sum()) for image in part[0])
        return scores(self, part, *arguments, **options)

    monkeypatch.setattr(Augmentation, "tuner", recorded)
    monkeypatch.setattr(Augmentation, "scores", scored)
    small = {"hyper_steps": 8, "inner_steps": 2, "train": 20, "validation": 30, "held_back": 40, "seeds": 1}
    small |= {"evaluations": 1, "tested": 60, "width": 4, "rows": ("none", "validation labels too", "odd, T1-T2")}
    finished("odd_augmentation", tmp_path, {"dataset": "mnist"}, **small)
    plain, everything, tuned = trained[False, ""], trained[True, ""], trained[False, "identity"]
    assert len(plain) == 20 and plain == tuned < everything and len(everything) == 50
    assert judged.keys() == {40, 60} and len(judged[40]) == 40
    assert not everything & judged[40] and not everything & judged[60] and not judged[40] & judged[60]
