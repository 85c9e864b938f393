"""Watching a run: history, evaluation, callbacks, early stopping, lines, TensorBoard, progress."""

from __future__ import annotations

import csv
import dataclasses
import json
import math
import sys
import types
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from problems_with_known_answers import DTYPE
from tuning_problem_with_known_optimum import DATA, TARGET, distance, tuner_of, zeros

import hvp_engine as hvp
from hvp_engine.hypergradients.estimator import Estimate

pytestmark = pytest.mark.filterwarnings("ignore:the weights are far from a minimum")


def test_history_as_tables(tmp_path: Path) -> None:
    tuner = tuner_of(zeros(3), zeros(3))
    history = tuner.fit(
        [DATA],
        [TARGET],
        4,
        progress=False,
        evaluate=lambda tuner: {"test_loss": torch.tensor(float(tuner.hyper_steps))},
        evaluate_every=2,
    )
    assert [record.metrics for record in history] == [{}, {"test_loss": 2.0}, {}, {"test_loss": 4.0}]
    rows = history.rows()
    assert rows[1]["test_loss"] == 2.0 and "test_loss" not in rows[0] and "metrics" not in rows[1]
    history.write_csv(tmp_path / "run.csv")
    with open(tmp_path / "run.csv") as file:
        read = list(csv.DictReader(file))
    assert [row["test_loss"] for row in read] == ["", "2.0", "", "4.0"]
    assert [float(row["val_loss"]) for row in read] == [record.val_loss for record in history]
    history.append(dataclasses.replace(history[-1], residual_norm=math.nan))
    history.write_json(tmp_path / "run.json")
    read = json.loads((tmp_path / "run.json").read_text())
    assert read[:4] == rows and read[4]["residual_norm"] is None


def test_evaluation_names_must_not_hide_fields() -> None:
    tuner = tuner_of(zeros(3), zeros(3))
    with pytest.raises(ValueError, match="evaluate: expected names that are no fields of the record; got 'val_loss'"):
        tuner.fit([DATA], [TARGET], 1, progress=False, evaluate=lambda tuner: {"val_loss": 1.0})


def test_callbacks_see_every_record_and_can_stop() -> None:
    tuner = tuner_of(zeros(3), zeros(3))
    seen: list[Any] = []
    callbacks = [
        lambda tuner, record: record.hyper_step == 2,
        lambda tuner, record: seen.append((tuner.hyper_steps, record)),
    ]
    history = tuner.fit([DATA], [TARGET], 10, progress=False, callbacks=callbacks)
    assert len(history) == 3 and seen == [(k + 1, history[k]) for k in range(3)]
    assert len(tuner.fit([DATA], [TARGET], 5, progress=False)) == 5


@pytest.mark.parametrize("true", [True, numpy.float64(1.0) > 0, torch.ones(()) > 0, torch.ones(1) > 0], ids=repr)
def test_a_comparison_of_numbers_of_any_kind_stops(true: Any) -> None:
    class Stop(hvp.tuning.Callback):
        def on_fit_start(self, tuner: Any) -> Any:
            return true

    tuner = tuner_of(zeros(3), zeros(3))
    assert len(tuner.fit([DATA], [TARGET], 3, progress=False, callbacks=[lambda tuner, record: true])) == 1
    assert len(tuner.fit([DATA], [TARGET], 3, progress=False, callbacks=[Stop()])) == 1
    assert len(tuner.fit([DATA], [TARGET], 3, progress=False, callbacks=[lambda tuner, record: 1])) == 3


METRICS: dict[str, Any] = {
    "field": "val_loss",
    "evaluation": "score",
    "function": lambda record: -record.metrics["accuracy"],
}


@pytest.mark.parametrize("name", METRICS)
def test_early_stopping(name: str, tmp_path: Path) -> None:
    """The best is at step 3; with a patience of 4 the last step is 7, also if a checkpoint lies between."""
    values = [5.0, 4.0, 3.0, 1.0, 2.0, 1.0, math.nan, 2.0, 0.0]

    def run(steps: int) -> hvp.History:
        tuner = tuner_of(
            torch.zeros(1),
            torch.zeros(1),
            train=lambda w, h, b: (w * h).sum(),
            estimator=lambda w, h, t, v: Estimate(
                torch.ones(1), h.sum(), torch.tensor(values[tuner.hyper_steps]), h.sum()
            ),
        )
        return tuner.fit(
            [None],
            [None],
            steps,
            progress=False,
            metric=METRICS[name],
            patience=4,
            evaluate=lambda tuner: {k: s * values[tuner.hyper_steps - 1] for k, s in (("score", 1), ("accuracy", -1))},
            checkpoint=tmp_path / "run.pt",
        )

    run(5)
    assert len(run(9)) == 8
    assert len(run(9)) == 8, "a run that is over stays over"


def test_a_metric_that_no_record_has_is_named() -> None:
    fit = tuner_of(zeros(3), zeros(3)).fit
    with pytest.raises(
        ValueError, match="^metric: expected a field of the record or .*; got 'loss', which no record has"
    ):
        fit([DATA], [TARGET], 9, progress=False, metric="loss", patience=3)


def test_verbose_prints_a_line_for_each_step(capsys: pytest.CaptureFixture[str]) -> None:
    tuner = tuner_of(zeros(3), zeros(3))
    history = tuner.fit([DATA], [TARGET], 2, progress=False, verbose=True, evaluate=lambda tuner: {"test": 0.25})
    lines = capsys.readouterr().out.strip().splitlines()
    assert len(lines) == 2
    record = history[1]
    for part in (
        "hyper step 1:",
        f"train {record.train_loss:.4g}",
        f"val {record.val_loss:.4g}",
        f"|dL_T/dw| {record.gradient_norm:.2e}",
        f"|hypergradient| {record.hypergradient_norm:.2e}",
        f"residual {record.residual_norm:.1e} ({record.status.lower().replace('_', ' ')})",
        f"alpha {record.alpha:.3g}",
        "test 0.25",
        f"{record.training_seconds:.2f} + {record.hypergradient_seconds:.2f} s",
    ):
        assert part in lines[1]
    assert "->" not in lines[1]


def test_a_line_names_the_remedy_of_a_bad_solve() -> None:
    h = zeros(2)
    w = torch.ones(2, dtype=DTYPE)
    curvature = torch.tensor([1.0, -0.5], dtype=DTYPE)
    tuner = tuner_of(w, h, train=lambda w, h, b: (curvature * w.square()).sum() / 2 + w @ h, val=distance)
    (record,) = tuner.fit([torch.ones(2)], [zeros(2)], 1, progress=False)
    assert record.status == "NEGATIVE_CURVATURE"
    assert record.line().endswith("-> use damping or a Gauss-Newton operator")


class Writer:
    def __init__(self) -> None:
        self.scalars: list[tuple[str, float, int]] = []

    def add_scalar(self, name: str, value: float, step: int) -> None:
        self.scalars.append((name, value, step))


def test_tensorboard_writer_of_ones_own() -> None:
    writer = Writer()
    tuner = tuner_of(zeros(3), zeros(3))
    history = tuner.fit([DATA], [TARGET], 2, progress=False, tensorboard=writer, evaluate=lambda t: {"test": 3.0})
    assert ("hvp_engine/val_loss", history[1].val_loss, 1) in writer.scalars
    assert ("hvp_engine/test", 3.0, 0) in writer.scalars
    assert not [name for name, _, _ in writer.scalars if "status" in name or "hyper_step" in name]


def test_tensorboard_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []

    class Summary(Writer):
        def __init__(self, folder: str):
            super().__init__()
            made.append((folder, self))

        def close(self) -> None:
            self.scalars.append(("closed", 0.0, 0))

    tuner = tuner_of(zeros(3), zeros(3))
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", types.SimpleNamespace(SummaryWriter=Summary))
    tuner.fit([DATA], [TARGET], 1, progress=False, tensorboard=tmp_path)
    ((folder, writer),) = made
    assert folder == str(tmp_path) and len(writer.scalars) > 5 and writer.scalars[-1][0] == "closed"
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(hvp.HvpError, match="tensorboard: expected the package tensorboard.*pip install tensorboard"):
        tuner.fit([DATA], [TARGET], 2, progress=False, tensorboard=tmp_path)


def test_progress_bar(capsys: pytest.CaptureFixture[str]) -> None:
    tuner_of(zeros(3), zeros(3)).fit([DATA], [TARGET], 3)
    assert "hyper steps: 100%" in capsys.readouterr().err
