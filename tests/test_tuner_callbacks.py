"""Callbacks: when each method is called, what it may return, and what happens if it fails."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor
from tuning_problem_with_known_optimum import DATA, TARGET, distance, tuner_of, zeros

import hvp_engine as hvp
from hvp_engine.tuning import Callback

pytestmark = pytest.mark.filterwarnings("ignore:the weights are far from a minimum")


class Log(Callback):
    """Records every call; the method named `raising` raises."""

    def __init__(self, name: str = "", calls: list[Any] | None = None, raising: str = ""):
        self.name, self.raising = name, raising
        self.calls: list[Any] = [] if calls is None else calls

    def note(self, method: str, *details: Any) -> None:
        self.calls.append((self.name + method, *details))
        if method == self.raising:
            raise ZeroDivisionError(self.name)

    def on_fit_start(self, tuner: hvp.Tuner) -> None:
        self.note("start", tuner.hyper_steps)

    def on_train_step(self, tuner: hvp.Tuner, loss: Tensor) -> None:
        self.note("train", tuner.steps_to_go, float(loss))

    def on_evaluate(self, tuner: hvp.Tuner, record: hvp.Record) -> None:
        self.note("evaluate", tuner.hyper_steps, record)

    def on_hyper_step(self, tuner: hvp.Tuner, record: hvp.Record) -> None:
        self.note("hyper", tuner.hyper_steps, record)

    def on_round_end(self, tuner: hvp.Tuner) -> None:
        self.note("round", tuner.hyper_steps)

    def on_fit_end(self, tuner: hvp.Tuner, error: BaseException | None) -> None:
        self.note("end", type(error).__name__)


class Scores(Callback):
    """An evaluation that returns `metrics`."""

    def __init__(self, **metrics: float):
        self.metrics = metrics

    def on_evaluate(self, tuner: hvp.Tuner, record: hvp.Record) -> Mapping[str, float]:
        return self.metrics


def run(*callbacks: Any, steps: int = 2, **options: Any) -> tuple[hvp.Tuner, hvp.History]:
    tuner = tuner_of(zeros(3), zeros(3), inner_steps=2, **options)
    return tuner, tuner.fit([DATA], [TARGET], steps, progress=False, callbacks=callbacks)


def test_the_moments_of_a_run_in_order() -> None:
    log = Log()
    _, history = run(log)
    twin = tuner_of(zeros(3), zeros(3), inner_steps=2)
    losses = [float(twin.train_step(DATA)) for _ in range(2)]
    assert log.calls[:6] == [
        ("start", 0),
        ("train", 1, losses[0]),
        ("train", 0, losses[1]),
        ("evaluate", 1, history[0]),
        ("hyper", 1, history[0]),
        ("round", 1),
    ]
    assert [call[0] for call in log.calls[6:]] == ["train", "train", "evaluate", "hyper", "round", "end"]
    assert log.calls[-1] == ("end", "NoneType")


def test_a_callback_that_overrides_nothing_changes_nothing() -> None:
    (plain, expected), (watched, found) = run(), run(Callback())
    assert torch.equal(plain.weights[0], watched.weights[0]) and torch.equal(plain.hyper[0], watched.hyper[0])
    assert [record.val_loss for record in found] == [record.val_loss for record in expected]


def test_metrics_of_all_callbacks_are_in_the_record_that_each_of_them_gets() -> None:
    early = Log()
    _, history = run(early, Scores(one=1.0), Scores(two=2.0), steps=1)
    assert history[0].metrics == {"one": 1.0, "two": 2.0}
    assert ("hyper", 1, history[0]) in early.calls


@pytest.mark.parametrize("name", ["one", "val_loss"])
def test_metrics_must_have_names_of_their_own(name: str) -> None:
    message = f"evaluate: expected names that are no fields of the record; got '{name}'"
    with pytest.raises(ValueError, match=message):
        run(Scores(one=1.0), Scores(**{name: 2.0}))


def test_a_callback_can_prevent_the_first_step_and_stop_after_any() -> None:
    class Never(Log):
        def on_fit_start(self, tuner: hvp.Tuner) -> bool:
            return True

    class Second(Log):
        def on_hyper_step(self, tuner: hvp.Tuner, record: hvp.Record) -> bool:
            return record.hyper_step == 1

    never, second = Never(), Second()
    assert len(run(never, steps=5)[1]) == 0 and never.calls == [("end", "NoneType")]
    assert len(run(second, steps=5)[1]) == 2 and [call for call in second.calls if call[0] == "round"][-1][1] == 2


def test_a_hyper_step_that_was_left_out_ends_its_round_only() -> None:
    log = Log()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tuner, history = run(log, val=lambda w, h, b: distance(w, h, b) * math.nan, steps=3)
    assert not history and tuner.failures == 3
    assert [call for call in log.calls if call[0] in ("evaluate", "hyper", "round")] == [
        ("round", k) for k in (1, 2, 3)
    ]


@pytest.mark.parametrize("method", ["train", "evaluate", "hyper", "round"])
def test_an_error_is_told_to_all_callbacks_the_last_one_first(method: str) -> None:
    calls: list[Any] = []
    with pytest.raises(ZeroDivisionError, match="b"):
        run(Log("a", calls), Log("b", calls, method), Log("c", calls))
    assert calls[-4][0] == f"b{method}"
    assert calls[-3:] == [(f"{name}end", "ZeroDivisionError") for name in "cba"]


def test_only_callbacks_that_were_started_are_ended_and_an_error_at_the_end_leaves_out_none() -> None:
    calls: list[Any] = []
    with pytest.raises(ZeroDivisionError):
        run(Log("a", calls), Log("b", calls, "start"), Log("c", calls))
    assert calls == [("astart", 0), ("bstart", 0), ("aend", "ZeroDivisionError")]
    calls.clear()
    with pytest.raises(ZeroDivisionError):
        run(Log("a", calls), Log("b", calls, "end"), steps=0)
    assert calls[-2:] == [("bend", "NoneType"), ("aend", "ZeroDivisionError")]


def test_one_process_sends_no_messages(monkeypatch: pytest.MonkeyPatch) -> None:
    def message(*arguments: Any, **options: Any) -> None:
        raise AssertionError("a distributed call")

    for name in ("all_reduce", "all_gather", "all_gather_object", "get_rank", "get_world_size"):
        monkeypatch.setattr(torch.distributed, name, message)
    assert len(run(Log())[1]) == 2
