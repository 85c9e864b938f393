"""The paper's experiments at a size of seconds: what must hold already there, the files they write, and resuming."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import hvp_engine as hvp
from examples import distillation, image_sets, models, overfitting
from examples.__main__ import NAMES, find, main
from examples.experiment import Options, Run, execute
from examples.files import write

FOLDER = Path(__file__).resolve().parents[1] / "examples"
PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(autouse=True)
def quiet():
    with warnings.catch_warnings():  # a few steps are far from a minimum
        warnings.filterwarnings("ignore", message="the weights are far from a minimum")
        yield


def finished(name: str, out: Path, options: dict | None = None, **changes) -> tuple[Run, dict]:
    """The run of `name` with other settings, and its results, once the files are what they should be."""
    experiment = find(name)
    chosen = Options(**{"size": "small", "out": out} | (options or {}))
    run = execute(experiment, chosen, replace(experiment.settings(chosen), **changes))
    result = json.loads(run.results.read_text())
    summary = (out / "SUMMARY.md").read_text()
    assert not run.checkpoints.exists()
    assert result["pictures"] and result["comparisons"]
    for picture in result["pictures"]:
        assert (run.folder / picture).read_bytes().startswith(PNG)
        assert f"({run.folder.name}/{picture})" in summary
    assert all(line["what"] in summary and line["ours"] in summary for line in result["comparisons"])
    return run, result


def rows(run: Run, name: str) -> list[dict[str, str]]:
    with (run.folder / f"{name}.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def cifar(folder: Path, name: str, images: int) -> Path:
    """Files in the binary format of CIFAR, of random pixels."""
    inner, train, test, label_bytes, classes = {
        "cifar10": ("cifar-10-batches-bin", "data_batch_1.bin", "test_batch.bin", 1, 10),
        "cifar100": ("cifar-100-binary", "train.bin", "test.bin", 2, 100),
    }[name]
    (folder / inner).mkdir()
    for file, count in ((train, images), (test, classes)):
        records = torch.randint(0, 256, (count, label_bytes + 3072), dtype=torch.uint8)
        records[:, label_bytes - 1] = torch.arange(count) % classes
        (folder / inner / file).write_bytes(records.numpy().tobytes())
    return folder


def test_inversion_error(tmp_path):
    run, _ = finished("inversion_error", tmp_path, products=(0, 5, 20), hyper_steps=3)
    for name, bound in (("standardized", 1e-9), ("raw", 0.5)):
        distance = {(row["solver"], row["products"]): float(row["distance"]) for row in rows(run, name)}
        assert distance["CG", "20"] < bound < distance["Neumann", "20"]
        if name == "standardized":
            assert distance["Neumann", "20"] < distance["Neumann", "5"] < distance["Neumann", "0"] < 1
    by_steps = rows(run, "hyper_steps")
    assert len(by_steps) == 5 * 3
    assert all(float(row["distance"]) < 1e-9 for row in by_steps if row["solver"] == "20 CG")
    losses = [float(row["val_loss"]) for row in by_steps if row["solver"] == "20 CG"]
    assert losses == sorted(losses, reverse=True)


def test_inverse_hessian_pictures(tmp_path):
    run, result = finished(
        "inverse_hessian_pictures", tmp_path, hidden=2, training_steps=500, products=(1, 100, 10_000)
    )
    assert not any(note.startswith("standardized") for note in result["notes"])  # no negative eigenvalue
    errors = [float(row["error"]) for row in rows(run, "standardized")]
    assert 1 > errors[0] > errors[1] > errors[2] > errors[3] == 0
    raw = [float(row["error"]) for row in rows(run, "raw")]
    assert raw[2] > errors[2] and raw[3] == 0


def test_distillation_is_far_better_than_real_images(tmp_path):
    settings = {"hyper_steps": 40, "solvers": ("Neumann",), "real_draws": 2}
    _, result = finished("distillation", tmp_path, {"dataset": "mnist"}, **settings)
    ours = {line["what"].removeprefix("4,000 validation points: "): line["ours"] for line in result["comparisons"]}
    accuracy = {name: float(text.rstrip("%")) for name, text in ours.items() if text.endswith("%")}
    distilled = accuracy["test accuracy of a fresh classifier of the images by Neumann"]
    assert distilled > accuracy["of the class means"] + 2
    assert distilled > accuracy["of one real image per class, mean of 2 draws"] + 20
    assert accuracy["of all of these points"] > accuracy["of the class means"]
    assert ours["images by Neumann most like the mean of their own class"] == "10 of 10"
    assert ours["hyperparameters"] == "7,840"
    assert 0 < result["costs"]["Neumann, 4,000 validation points"]["share_of_hypergradients"] < 1


def test_distillation_reads_cifar100(tmp_path):
    data = cifar(tmp_path, "cifar100", 400)
    settings = {"hyper_steps": 2, "solvers": ("T1-T2",), "real_draws": 1}
    options = {"size": "paper", "dataset": "cifar100", "data": data}
    _, result = finished("distillation", tmp_path / "out", options, **settings)
    ours = {line["what"]: line["ours"] for line in result["comparisons"]}
    assert ours["hyperparameters"] == "307,200"
    points = ("400 validation points", "300 validation points", "300 validation points, moved and mirrored")
    assert {f"{name}: of the class means" for name in points} <= ours.keys()


def test_versions_of_an_image_are_moved_and_mirrored():
    image = torch.arange(49.0).view(1, 1, 7, 7)
    images, labels = distillation.moved_and_mirrored((image, torch.tensor([3])), 2)
    assert len(images) == len(labels) == len({tuple(version.flatten().tolist()) for version in images}) == 18
    assert torch.equal(images[4], image[0]) and torch.equal(images[13], image[0].flip(2))
    down_and_right = images[0, 0]
    assert torch.equal(down_and_right[2:, 2:], image[0, 0, :5, :5]) and down_and_right[0, 0] == image[0, 0, 2, 2]
    assert set(labels.tolist()) == {3}


def test_overfitting_fits_the_validation_set(tmp_path):
    run, result = finished("overfitting", tmp_path, {"dataset": "mnist"}, hyper_steps={"Linear": 400, "AlexNet": 1})
    train, validation, test = result["comparisons"][0]["ours"].split(", ")
    assert train == validation == "100.0%"
    assert float(test.rstrip("%")) < 90
    assert len(rows(run, "Linear")) < 400  # ended at its goal
    assert not (run.folder / "AlexNet.csv").exists()  # has no network for gray images


def test_alexnet_alone(tmp_path, monkeypatch):
    monkeypatch.setitem(overfitting.NETWORKS, "AlexNet", models.lenet5)
    monkeypatch.setattr(overfitting, "ALEXNET", 2)
    options = {"size": "small", "dataset": "cifar10", "data": cifar(tmp_path, "cifar10", 200), "recipe": "alexnet"}
    run, result = finished("overfitting", tmp_path / "out", options, examples=10)
    assert run.folder.name == "overfitting-cifar10-small-alexnet-seed0"
    assert {line["what"].split(":")[0].split(",")[0] for line in result["comparisons"]} == {"AlexNet"}
    with pytest.raises(hvp.HvpError, match="--recipe: expected none with --dataset mnist"):
        finished("overfitting", tmp_path / "gray", {"dataset": "mnist", "recipe": "alexnet"})


def test_overfitting_runs_batch_norm_in_colour_and_ends_once_both_of_its_accuracies_are_right(tmp_path, monkeypatch):
    data = cifar(tmp_path, "cifar10", 200)
    options = {"size": "paper", "dataset": "cifar10", "data": data}
    monkeypatch.setitem(overfitting.NETWORKS, "ResNet-44", lambda *sizes: models.resnet18(*sizes, width=2))
    by_batches = iter(
        [1.0, 0.5, 1.0, 1.0, 0.5, 1.0] + [1.0] * 6
    )  # train, validation and test of two steps, and at the end
    monkeypatch.setattr(image_sets, "accuracy_of_batches", lambda *_: next(by_batches))
    monkeypatch.setattr(image_sets, "accuracy", lambda *_: 1.0)
    settings = {"hyper_steps": {"ResNet-44": 9}, "evaluations": 9, "examples": 10}
    run, result = finished("overfitting", tmp_path / "out", options, **settings)
    assert [line["what"].partition(": ")[2] for line in result["comparisons"][:2]] == [
        "train, validation, test accuracy",
        "train, validation, test accuracy, BatchNorm in the statistics of each batch",
    ]
    assert "11,420 decays" in result["comparisons"][0]["what"]
    assert [row["validation in batches"] for row in rows(run, "ResNet-44")] == ["0.5", "0.5", "1"]


def test_accuracy_of_batches_uses_their_statistics_and_keeps_the_running_ones():
    torch.manual_seed(0)
    network = models.resnet18((3, 8, 8), width=2)
    part = (torch.randn(20, 3, 8, 8) * 5 + 3, torch.randint(10, (20,)))
    before = {name: buffer.clone() for name, buffer in network.named_buffers()}
    found = image_sets.accuracy_of_batches(network, part, 10)
    assert all(torch.equal(buffer, before[name]) for name, buffer in network.named_buffers())
    with torch.no_grad():
        right = [network(x).argmax(1).eq(y) for x, y in zip(part[0].split(10), part[1].split(10), strict=True)]
    assert found == pytest.approx(float(torch.cat(right).float().mean()))


class Interrupted(BaseException):
    pass


def test_an_interrupted_run_goes_on_and_ends_with_the_same_numbers(tmp_path, monkeypatch):
    options = {"dataset": "mnist"}
    settings = {"hyper_steps": {"Linear": 6, "1-layer": 6}, "evaluations": 6, "examples": 20}
    whole, expected = finished("overfitting", tmp_path / "whole", options, **settings)

    accuracy, calls = image_sets.accuracy, []

    def failing(network, part, batch=1000):
        calls.append(network)
        if len(calls) == 3 * 6 + 3 + 3 * 4 + 1:  # the fifth evaluation of the second network
            raise Interrupted
        return accuracy(network, part, batch)

    monkeypatch.setattr(image_sets, "accuracy", failing)
    with pytest.raises(Interrupted):
        finished("overfitting", tmp_path / "parts", options, **settings)
    monkeypatch.undo()
    before = torch.load(tmp_path / "parts" / whole.folder.name / "checkpoints" / "1-layer.pt")["state"]["history"]
    assert len(before) == 5

    parts, result = finished("overfitting", tmp_path / "parts", options | {"resume": True}, **settings)
    for name in ("Linear", "1-layer"):
        for mine, other in zip(rows(parts, name), rows(whole, name), strict=True):
            assert float(mine["val_loss"]) == pytest.approx(float(other["val_loss"]), rel=1e-5)
    repeated = [row["training_seconds"] for row in rows(parts, "1-layer")]
    timed = [record["training_seconds"] for record in before]
    assert [float(seconds) for seconds in repeated[:5]] == pytest.approx(timed, rel=1e-5)
    accuracies = [line for line in result["comparisons"] if "accuracy" in line["what"]]
    assert accuracies == [line for line in expected["comparisons"] if "accuracy" in line["what"]]

    written = parts.results.stat().st_mtime_ns
    finished("overfitting", tmp_path / "parts", options | {"resume": True}, **settings)
    assert parts.results.stat().st_mtime_ns == written  # a finished run is not made again


def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    target = tmp_path / "new" / "table.csv"
    write(target, b"old")

    def full(self, content):
        raise OSError("no space left")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="no space"):
        write(target, b"new")
    assert [file.name for file in target.parent.iterdir()] == ["table.csv"]
    assert target.read_text() == "old"


def test_the_command_line(tmp_path, capsys):
    assert main(["list"]) == 0
    listed = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in listed] == list(NAMES)
    assert all(set(find(name).sizes) == {"small", "paper"} for name in NAMES)

    out = ["--out", str(tmp_path)]
    assert main(["inversion_error", "--dataset", "mnist", *out]) == 1
    assert "expected no --dataset for inversion_error; got 'mnist'" in capsys.readouterr().err
    assert main(["overfitting", "--dataset", "cifar10", *out]) == 1
    assert "--data: expected a folder with cifar10" in capsys.readouterr().err
    assert main(["overfitting", "--dataset", "cifar10", "--data", str(tmp_path), *out]) == 1
    assert "data_batch_1.bin" in capsys.readouterr().err
    (tmp_path / "file").touch()
    assert main(["inversion_error", "--out", str(tmp_path / "file")]) == 1
    assert "--out: expected a folder that can be written" in capsys.readouterr().err


def test_all_runs_every_experiment_in_a_process_of_its_own_and_goes_on_after_a_failure(tmp_path, capsys, monkeypatch):
    commands = []

    def started(command, stdout, stderr, env):
        commands.append(command[3:])
        stdout.write("error: no text\n" if command[3] == "ptb_tuning" else "written\n")
        assert env["OMP_NUM_THREADS"] == os.environ.get("OMP_NUM_THREADS", "1")
        return subprocess.CompletedProcess(command, command[3] == "ptb_tuning")

    monkeypatch.setattr(subprocess, "run", started)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 1}, raising=False)
    options = ["--out", str(tmp_path / "out"), "--recipe", "code", "--data", "folder", "--resume"]
    assert main(["all", *options]) == 1
    assert {command[0] for command in commands} == set(NAMES)
    by_name = {tuple(command[:3]): command for command in commands}
    assert ("overfitting", "--dataset", "cifar10") in by_name and ("distillation", "--dataset", "cifar100") in by_name
    code = next(command for command in commands if command[0] == "augmentation")
    assert code[1:5] == ["--dataset", "cifar10", "--recipe", "code"]
    assert code[-3:] == ["--data", "folder", "--resume"]
    assert main([*code[:-2], str(tmp_path)]) == 1  # is understood; there is no CIFAR-10
    said = capsys.readouterr()
    assert f"{len(commands) - 1} of {len(commands)} runs" in said.out
    assert "not run: ptb_tuning: error: no text" in said.err
    assert (tmp_path / "out" / "SUMMARY.md").exists() and (tmp_path / "out" / "ptb_tuning.log").exists()


def test_every_experiment_is_listed():
    text = (FOLDER / "README.md").read_text()
    assert all(f"]({name}.py)" in text for name in NAMES)
