"""Checkpoint files: complete or absent, and errors that name what is wrong."""

from __future__ import annotations

import os
import re
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch

import hvp_engine as hvp
from hvp_engine.errors import CheckpointError
from hvp_engine.tuning import checkpoint

STATE = {"weights": {"w": torch.arange(1000.0)}, "count": 3}
OLD = {"weights": {"w": torch.zeros(1000)}, "count": 2}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A checkpoint and its previous one."""
    path = tmp_path / "run.pt"
    checkpoint.write(path, OLD)
    checkpoint.write(path, STATE)
    return path


def count(path: Path) -> int:
    return checkpoint.read(path)["count"]


def test_what_was_written_is_read(path: Path) -> None:
    state = checkpoint.read(path)
    assert state["count"] == 3 and torch.equal(state["weights"]["w"], STATE["weights"]["w"])
    assert count(checkpoint.previous(path)) == 2
    assert sorted(file.name for file in path.parent.iterdir()) == ["run.pt", "run.pt.previous"]


def test_only_two_are_kept(path: Path) -> None:
    checkpoint.write(path, STATE | {"count": 4})
    assert (count(path), count(checkpoint.previous(path))) == (4, 3)
    assert len(list(path.parent.iterdir())) == 2


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-700])


def bit_flipped(path: Path) -> None:
    """In the middle of the tensor's data, where torch.load alone notices nothing."""
    data = bytearray(path.read_bytes())
    place = data.index(torch.arange(500.0, 510.0).numpy().tobytes())
    data[place] ^= 1
    path.write_bytes(data)
    torch.load(path, weights_only=True)


DAMAGES = {
    "truncated": truncated,
    "bit flipped": bit_flipped,
    "empty": lambda path: path.write_bytes(b""),
    "zeros": lambda path: path.write_bytes(bytes(5000)),
    "text": lambda path: path.write_text("not a checkpoint"),
    "missing": lambda path: path.unlink(),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_newest_falls_back_to_the_one_before(damage: str, path: Path) -> None:
    DAMAGES[damage](path)
    assert checkpoint.exists(path)
    message = rf"{re.escape(str(path))}: expected a whole checkpoint; got .*going on from the checkpoint before it"
    with pytest.warns(UserWarning, match=message):
        assert count(path) == 2


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_and_nothing_before_it(damage: str, path: Path) -> None:
    checkpoint.previous(path).unlink()
    DAMAGES[damage](path)
    with pytest.raises(CheckpointError, match="run.pt: expected a whole .*pass another file, or delete"):
        checkpoint.read(path)


def test_both_damaged(path: Path) -> None:
    truncated(path)
    truncated(checkpoint.previous(path))
    with pytest.raises(CheckpointError, match=r"run.pt: expected .*run.pt.previous: expected .*delete both"):
        checkpoint.read(path)


def test_cut_at_any_length_is_noticed(path: Path) -> None:
    whole = path.read_bytes()
    for length in range(0, len(whole), 97):
        path.write_bytes(whole[:length])
        with pytest.warns(UserWarning, match="expected a whole checkpoint"):
            assert count(path) == 2


FOREIGN = {
    "a state_dict": OrderedDict(weight=torch.zeros(2)),
    "a list": [1, 2],
    "another format": {"format": "something", "version": 1, "state": {}},
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_files_of_something_else(kind: str, path: Path) -> None:
    """Refused even if the previous checkpoint is good: no accident turns a checkpoint into such a file."""
    torch.save(FOREIGN[kind], path)
    with pytest.raises(CheckpointError, match="run.pt: expected a checkpoint of a Tuner; got a file of something else"):
        checkpoint.read(path)


def test_a_newer_version(path: Path) -> None:
    torch.save({"format": checkpoint.FORMAT, "version": checkpoint.VERSION + 1, "state": {}}, path)
    with pytest.raises(CheckpointError, match="run.pt: expected format version 1; got 2.*update hvp_engine"):
        checkpoint.read(path)


def test_older_versions_are_brought_up_to_date(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint.write(path, {"count": 1})
    monkeypatch.setattr(checkpoint, "VERSION", 3)
    renamed = {1: lambda state: {"steps": state["count"]}, 2: lambda state: {**state, "epoch": 0}}
    monkeypatch.setattr(checkpoint, "MIGRATIONS", renamed)
    assert checkpoint.read(path) == {"steps": 1, "epoch": 0}


class Evil:
    def __reduce__(self) -> Any:
        return os.mkdir, ("evil",)


def test_no_code_of_a_file_is_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"format": checkpoint.FORMAT, "version": 1, "state": Evil()}, "run.pt")
    with pytest.raises(CheckpointError, match="expected a whole checkpoint; got UnpicklingError"):
        checkpoint.read(Path("run.pt"))
    assert not Path("evil").exists()


def test_a_state_that_could_not_be_read_again_is_refused_when_written(path: Path) -> None:
    with pytest.raises(CheckpointError, match="run.pt: expected a state of tensors and plain values"):
        checkpoint.write(path, {"scheduler": Evil()})
    assert count(path) == 3 and len(list(path.parent.iterdir())) == 2


class Killed(BaseException):
    pass


@pytest.mark.parametrize("operation", ["save", "fsync", "first rename", "second rename"])
def test_killed_while_writing(operation: str, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At whatever moment, a complete checkpoint is found, and the next write succeeds."""
    calls, replace, save = [], os.replace, torch.save

    def stop(*arguments: Any) -> None:
        raise Killed

    def half(state: Any, file: Any) -> None:
        file.write(b"half of it")
        raise Killed

    def stop_at(source: Path, target: Path) -> None:
        calls.append(target)
        if len(calls) == (1 if operation == "first rename" else 2):
            raise Killed
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", lambda self, missing_ok=False: None)  # a killed process cleans nothing up
        if operation == "save":
            patch.setattr(torch, "save", half)
        elif operation == "fsync":
            patch.setattr(os, "fsync", stop)
        else:
            patch.setattr(os, "replace", stop_at)
        with pytest.raises(Killed):
            checkpoint.write(path, STATE | {"count": 4})
    assert torch.save is save
    if operation == "second rename":
        with pytest.warns(UserWarning, match="going on from the checkpoint before it"):
            assert count(path) == 3
    else:
        assert count(path) == 3
    checkpoint.write(path, STATE | {"count": 5})
    assert count(path) == 5


def test_checksums_are_written_even_where_they_are_turned_off(path: Path) -> None:
    torch.serialization.set_crc32_options(False)
    try:
        checkpoint.write(path, STATE)
        assert not torch.serialization.get_crc32_options()
    finally:
        torch.serialization.set_crc32_options(True)
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None


def test_places_where_nothing_can_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="checkpoint: expected a file that can be written; got .*file/run.pt"):
        checkpoint.check_place(tmp_path / "file" / "run.pt")
    with pytest.raises(CheckpointError, match="checkpoint: expected a file that can be written; .*it is a folder"):
        checkpoint.check_place(tmp_path)
    checkpoint.check_place(tmp_path / "new" / "folder" / "run.pt")
    assert list((tmp_path / "new" / "folder").iterdir()) == []


def test_views_are_saved_without_the_rest_of_their_storage() -> None:
    large = torch.arange(1000.0)
    assert checkpoint.compact(large[3:5]).untyped_storage().nbytes() == 8
    assert torch.equal(checkpoint.compact(large[3:5]), large[3:5])
    assert checkpoint.compact(large).data_ptr() == large.data_ptr()


# Checkpoints of another tuner


def tuner(**options: Any) -> hvp.Tuner:
    settings: dict[str, Any] = {
        "module": torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3)),
        "hyper": {"decay": torch.zeros(3), "scale": torch.ones(())},
        "train_loss": lambda w, h, b: w["0.weight"].square().sum(),
        "val_loss": lambda w, h, b: w["0.weight"].sum(),
        "weight_optimizer": lambda tensors: torch.optim.SGD(tensors, lr=0.1),
        "hyper_optimizer": lambda tensors: torch.optim.Adam(tensors, lr=0.1),
    }
    return hvp.Tuner(**settings | options)


def test_learning_rates_from_an_array_are_saved(tmp_path: Path) -> None:
    rates = numpy.logspace(-2, -1, 3)

    def make() -> hvp.Tuner:
        return tuner(
            weight_optimizer=lambda tensors: torch.optim.SGD(tensors, lr=rates[0]),
            hyper_optimizer=lambda tensors: torch.optim.Adam(tensors, lr=rates[1], betas=(numpy.float64(0.5), 0.9)),
            weight_scheduler=lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 10, gamma=rates[2]),
        )

    saved, loaded = make(), make()
    saved.train_step(None)
    saved.save(tmp_path / "run.pt")
    loaded.load(tmp_path / "run.pt")
    assert loaded.weight_optimizer.param_groups[0]["lr"] == rates[0]
    assert loaded.hyper_optimizer.param_groups[0]["betas"] == (0.5, 0.9)


OTHERS: dict[str, tuple[Any, str]] = {
    "fewer weights": (
        lambda: {"module": torch.nn.Linear(2, 3)},
        r"weights to be this Tuner's; got \"\['.*'\]\", and",
    ),
    "other shape": (
        lambda: {"module": torch.nn.Sequential(torch.nn.Linear(2, 4), torch.nn.BatchNorm1d(4))},
        r"expected shape \(4, 2\) of weights \"\['0.weight'\]\" as in this Tuner; got \(3, 2\)",
    ),
    "other dtype": (
        lambda: {"hyper": {"decay": torch.zeros(3), "scale": torch.ones((), dtype=torch.float64)}},
        r"expected dtype torch.float64 of hyperparameters \"\['scale'\]\" as in this Tuner; got torch.float32",
    ),
    "other hyperparameters": (
        lambda: {"hyper": {"decay": torch.zeros(3)}},
        r"hyperparameters to be this Tuner's; got \"\['scale'\]\", and this Tuner lacks it",
    ),
    "hyper shape": (
        lambda: {"hyper": {"decay": torch.zeros(4), "scale": torch.ones(())}},
        r"expected shape \(4,\) of hyperparameters \"\['decay'\]\" as in this Tuner; got \(3,\)",
    ),
    "no buffers": (
        lambda: {
            "module": torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3, track_running_stats=False))
        },
        r"buffers to be this Tuner's; got 'module.1.\w+', and this Tuner lacks it",
    ),
    "other optimizer": (
        lambda: {"weight_optimizer": lambda tensors: torch.optim.Adam(tensors)},
        r"weight_optimizer: expected Adam as in this Tuner; got SGD in the checkpoint",
    ),
    "other groups": (
        lambda: {"hyper_optimizer": lambda tensors: torch.optim.Adam([{"params": [t]} for t in tensors])},
        r"hyper_optimizer: expected groups of \[1, 1\] tensors as in this Tuner; got groups of \[2\]",
    ),
    "a scheduler": (
        lambda: {"weight_scheduler": lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 3)},
        r"weight_scheduler: expected StepLR as in this Tuner; got NoneType in the checkpoint",
    ),
    "other estimator": (
        lambda: {"estimator": lambda weights, hyper, train_batch, val_batch: None},
        r"estimator: expected function as in this Tuner; got Hypergradient in the checkpoint",
    ),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_checkpoints_of_another_tuner_change_nothing(kind: str, tmp_path: Path) -> None:
    options, message = OTHERS[kind]
    tuner().save(tmp_path / "run.pt")
    other = tuner(**options())
    before = [tensor.clone() for tensor in (*other.weights, *other.hyper)]
    with pytest.raises(CheckpointError, match=rf"^{tmp_path}/run.pt: .*{message}.*build the Tuner as it"):
        other.load(tmp_path / "run.pt")
    assert all(torch.equal(a, b) for a, b in zip(before, (*other.weights, *other.hyper), strict=True))


def test_an_incomplete_state(tmp_path: Path) -> None:
    checkpoint.write(tmp_path / "run.pt", {"weights": {}})
    with pytest.raises(CheckpointError, match="run.pt: expected a complete .*; got one without buffers, counters"):
        tuner().load(tmp_path / "run.pt")


def test_save_and_load_by_hand(tmp_path: Path) -> None:
    one, other = tuner(), tuner()
    one.save(tmp_path / "run.pt")
    other.load(str(tmp_path / "run.pt"))
    assert all(torch.equal(a, b) for a, b in zip(one.weights, other.weights, strict=True))
