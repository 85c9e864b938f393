"""The experiments at the paper's size: each starts and finishes on tiny data, and resumes to the same numbers.

Those on CIFAR-10 and on text have files of tests of their own.
"""

from __future__ import annotations

import csv
import json
import re
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from examples import image_sets
from examples.__main__ import find
from examples.experiment import Options, Run, execute
from examples.validation_splits import Recipe

TINY: dict[str, dict[str, Any]] = {
    "inversion_error": {"products": (2,), "hyper_steps": 1},
    "inverse_hessian_pictures": {"hidden": 2, "training_steps": 20, "products": (1, 3)},
    "distillation": {"hyper_steps": 6, "solvers": ("T1-T2",), "real_draws": 1, "batch": 100},
    "overfitting": {"hyper_steps": {"Linear": 6, "LeNet-5": 4}, "evaluations": 3, "examples": 20},
    "validation_splits": {"recipes": {"code": Recipe((60,), 5, 2)}, "shares": (0.2, 0.5)},
    "odd_augmentation": {
        "hyper_steps": 3,
        "train": 20,
        "validation": 20,
        "held_back": 20,
        "seeds": 1,
        "rows": ("none", "odd, T1-T2"),
        "evaluations": 3,
        "checkpoint_every": 1,
    },
    "method_comparison": {"methods": ("exact IFT", "CG", "unrolled"), "lengths": (1, 3), "search_gradients": 0},
    "method_memory": {"methods": ("CG", "unrolled"), "lengths": (1, 3), "hyperparameters": (1, 5), "batch": 10},
}
"""What replaces settings of the paper size; the mathematics stays the same."""

SHORT = ("inversion_error", "inverse_hessian_pictures")
"""Experiments of seconds, which begin anew."""

MEASURED = re.compile("seconds|time|bytes|memory|alpha")
"""Columns, and benchmarks, that no two runs share: times, memory, and the step of an engine chosen by time."""


class Interrupted(BaseException):
    pass


@pytest.fixture(autouse=True)
def few_images(monkeypatch):
    """A test set of 100 images, and nothing said about weights far from a minimum."""
    load = image_sets.load

    def loaded(*arguments):
        images = load(*arguments)
        return replace(images, test=tuple(part[:100] for part in images.test))

    monkeypatch.setattr(image_sets, "load", loaded)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="the weights are far from a minimum")
        yield


def execute_tiny(name: str, out: Path, resume: bool = False) -> Run:
    experiment = find(name)
    dataset, recipe = (names[0] if names else "" for names in (experiment.datasets, experiment.recipes))
    options = Options("paper", out, dataset=dataset, recipe=recipe, resume=resume)
    return execute(experiment, options, replace(experiment.settings(options), **TINY[name]))


def watch(monkeypatch: pytest.MonkeyPatch, stop_at: int | None = None) -> list[int]:
    """What every update of a progress bar adds; after `stop_at` of them the run is interrupted."""
    progress, updates = Run.progress, []

    def watched(*arguments, **options):
        bar = progress(*arguments, **options)
        update = bar.update

        def counted(n=1):
            updates.append(n)
            if len(updates) == stop_at:
                raise Interrupted
            return update(n)

        bar.update = counted
        return bar

    monkeypatch.setattr(Run, "progress", watched)
    return updates


def tables(run: Run) -> dict[str, list[dict[str, str]]]:
    """Every curve, without what is measured."""
    found = {}
    for file in sorted(run.folder.glob("*.csv")):
        with file.open(newline="") as lines:
            rows = [row for row in csv.DictReader(lines) if not MEASURED.search(row.get("benchmark", ""))]
        found[file.stem] = [{k: v for k, v in row.items() if not MEASURED.search(k)} for row in rows]
    return found


def agree(mine: str, other: str) -> bool:
    """Texts, or numbers up to the rounding of engines, which are chosen by time."""
    try:
        return float(mine) == pytest.approx(float(other), rel=1e-4, abs=1e-7, nan_ok=True)
    except ValueError:
        return mine == other


@pytest.mark.parametrize("name", TINY)
def test_the_paper_size_runs_and_goes_on_after_an_interruption(name, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        updates = watch(patch)
        whole = execute_tiny(name, tmp_path / "whole")
    result = json.loads(whole.results.read_text())
    assert result["size"] == "paper" and result["comparisons"] and result["pictures"]

    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        watch(patch, stop_at=len(updates) // 2 + 1)
        execute_tiny(name, tmp_path / "parts")
    interrupted = tmp_path / "parts" / whole.folder.name
    assert name in SHORT or len(list((interrupted / "checkpoints").iterdir())) > 1
    before = json.loads((interrupted / "checkpoints" / "times.json").read_text())

    resumed = execute_tiny(name, tmp_path / "parts", resume=True)
    after = json.loads(resumed.results.read_text())
    assert all(after[clock] > seconds > 0 for clock, seconds in before.items())
    expected = tables(whole)
    assert expected and tables(resumed).keys() == expected.keys()
    for table, rows in tables(resumed).items():
        assert len(rows) == len(expected[table])
        for row, other in zip(rows, expected[table], strict=True):
            assert row.keys() == other.keys() and all(agree(row[key], other[key]) for key in row), (table, row, other)
